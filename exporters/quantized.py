"""What the exporter is told of a quantized Linear: ready arrays, in the domain of the folded graph, and no recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .linears import Linear

Float = NDArray[np.float32]
WeightBits = Literal[8, 7, 4]
LARGEST: dict[WeightBits, int] = {8: 127, 7: 63, 4: 7}  # |integer|, by bits: symmetric


@dataclass(frozen=True)
class Weight:
    """One MatMul's weight: integers int8 [out, in], within +-`LARGEST`: -127..127, with 7 bits -63..63, with 4 -7..7.

    W = integers * scale. scale: float32, [out] or [out, in // group], a scale for every group of consecutive input
    channels. 7 bits are stored in 8: two products by uint8 fit 16 bits (2 x 255 x 63 < 2^15).
    """

    integers: NDArray[np.int8]
    scale: Float
    bits: WeightBits = 8


@dataclass(frozen=True)
class Activation:
    """How a Linear's input is quantized to int8; scale is a positive float.

    static: by `scale`. step: x * r[t] by `scale`, the largest delta of any step; the table `range/<name>` has
    r[t] = scale / delta[t]. token: every token by its own absmax / 127, found inside the graph and never less than
    `scale`. engine: left in float; the engine quantizes it by itself (4-bit weights that stay 4-bit).

    difference: given, the two halves of the guidance pair (the batch), c and u, are coded as d = (c - u) * difference
    and u before all this, and the products of both put together again as u + d / difference. With the range step it
    is the table `difference/<name>`, and this is 1.
    """

    range: Literal["static", "step", "token", "engine"]
    scale: float
    difference: float | None = None


@dataclass(frozen=True)
class LowRank:
    """The FP16 branch of a whole Linear: x a b is added to x W^T. a float16 [in, rank], b float16 [rank, out].

    A Linear of several parts has one `a`; the columns of `b` are in the order of its parts.
    """

    a: NDArray[np.float16]
    b: NDArray[np.float16]


@dataclass(frozen=True)
class QuantizedLinear:
    """One Linear in integers. `weight(part)` and `low_rank()` are called when their bytes are written.

    stored_smoothing [in]: given, the weight is rescaled and rounded again at every step (SQD `requantize`). W is then
    integers * scale / stored_smoothing, the input range is `step` with scale 1, and the tables of the Linear are
    `smoothing/<name>` s[t] [in], `weight_scale/<name>` sigma[t] [out] and `delta/<name>`; its low-rank branch adds
    x a b for the x that is not smoothed.
    """

    linear: Linear
    activation: Activation
    weight: Callable[[str], Weight]
    low_rank: Callable[[], LowRank] | None = None
    stored_smoothing: Float | None = None


@dataclass(frozen=True)
class Slot:
    """A stretch of the step graph's input `step_scales`: constant * product over tables of table[t]^exponent.

    width: how many floats; tables and constant have that many or one. powers: table name -> exponent.
    """

    width: int
    powers: Mapping[str, int]
    constant: Float = field(default_factory=lambda: np.ones(1, np.float32))
