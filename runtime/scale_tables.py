"""SQD's scales at any noise level: tables at a few knots become the `step_scales` input of every step of a run.

A table is positive and [width] at each noise level. It is kept as its logarithm at the knots, which are logarithms of
noise levels; between two knots log(table) is linear in log(sigma), outside of them the end value holds. So one bundle
serves every number of steps and every schedule. numpy and safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open

from ..engines.errors import UserError

Float = NDArray[np.float32]
BLOCK = 2**22  # floats that are computed at once: all steps where they are few, step by step where they are many
MAX_LOG = 80.0  # no scale comes near it, and e^80 is not yet float32's end


class Piece(NamedTuple):
    """constant * product over tables of table^exponent, `width` floats of the input; see exporters' `Slot`."""

    width: int
    powers: Mapping[str, int]
    constant: Float


def interpolate(knots: NDArray[np.floating], log_table: NDArray[np.floating], sigmas: ArrayLike) -> Float:
    """knots [k], log_table [k, width], noise levels `sigmas` [n] -> the logarithm at each, float32 [n, width]."""
    places = np.log(np.asarray(sigmas, np.float64))
    knots = knots.astype(np.float64)
    places = np.clip(places, knots[0], knots[-1])
    low = np.searchsorted(knots, places, side="right") - 1
    high = np.minimum(low + 1, len(knots) - 1)
    gap = np.where(high > low, knots[high] - knots[low], 1.0)
    share = ((places - knots[low]) / gap).astype(np.float32)[:, None]
    start = log_table[low].astype(np.float32)
    return start + (log_table[high].astype(np.float32) - start) * share


@dataclass(frozen=True)
class ScaleTables:
    """A graph's `<graph>.scales.safetensors`.

    knots: float32 [k], log sigma, ascending; logs: by table name, [k, width], natural logarithms; pieces: of the input
    `step_scales`, in order.
    """

    knots: Float
    logs: Mapping[str, NDArray[np.floating]]
    pieces: tuple[Piece, ...]

    @property
    def width(self) -> int:
        """How many floats the input `step_scales` has."""
        return sum(piece.width for piece in self.pieces)

    def at(self, sigmas: ArrayLike) -> StepScales:
        """The input at every noise level of `sigmas` [steps]."""
        return StepScales(self, np.asarray(sigmas, np.float64))

    def rows(self, sigmas: ArrayLike) -> Float:
        """The same, all at once: float32 [steps, width]."""
        used = {name for piece in self.pieces for name in piece.powers}
        log_table = {name: interpolate(self.knots, self.logs[name], sigmas) for name in used}
        rows = np.empty((np.size(sigmas), self.width), np.float32)
        end = 0
        for width, powers, constant in self.pieces:
            start, end = end, end + width
            logs = [exponent * log_table[name] for name, exponent in powers.items()]
            rows[:, start:end] = constant * np.exp(sum(logs)) if logs else constant
        return rows


class StepScales:
    """`scales[step]` -> float32 [width]. Computed when asked for, in blocks: at full size all steps are 500 MB."""

    def __init__(self, tables: ScaleTables, sigmas: NDArray[np.float64]):
        self._tables, self._sigmas = tables, sigmas
        self._start = 0
        self._rows = np.empty((0, tables.width), np.float32)

    def __len__(self) -> int:
        return len(self._sigmas)

    def __getitem__(self, step: int) -> Float:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        if not self._start <= step < self._start + len(self._rows):
            count = max(1, BLOCK // self._tables.width)
            self._start, self._rows = step, self._tables.rows(self._sigmas[step : step + count])
        return self._rows[step - self._start]


def load_scales(path: Path, width: int) -> ScaleTables:
    """The tables at `path`, whose pieces make `width` floats.

    Raises UserError when the file is missing, damaged or does not hold what it should.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        tables = _parsed(metadata, tensors)
        if tables.width != width:
            raise ValueError(f"its pieces are {tables.width} floats, the step graph takes {width}")
    except Exception as error:  # what safetensors raises for a damaged file is its own, numpy's or the system's
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} does not hold the scales of every step ({what}); build the bundle again") from None
    return tables


def _parsed(metadata: Mapping[str, str], tensors: Mapping[str, NDArray]) -> ScaleTables:
    """Raises KeyError or ValueError for what is missing or cannot be; RecursionError for bottomless JSON."""
    knots = _finite(tensors["knots"])
    if knots.ndim != 1 or not len(knots) or (np.diff(knots) <= 0).any():
        raise ValueError("the knots are not ascending")
    logs = {name.removeprefix("log/"): _finite(t) for name, t in tensors.items() if name.startswith("log/")}
    for name, table in logs.items():
        if table.ndim != 2 or len(table) != len(knots) or not table.shape[1]:
            raise ValueError(f"the table {name} has shape {list(table.shape)}, there are {len(knots)} knots")
    slots = json.loads(metadata["slots"])
    if not isinstance(slots, list):
        raise ValueError("slots is no list")
    pieces = []
    for index, slot in enumerate(slots):
        if not (isinstance(slot, dict) and _is_count(slot.get("width")) and isinstance(slot.get("powers"), dict)):
            raise ValueError(f"slot {index} is malformed")
        width, powers = slot["width"], slot["powers"]
        constant = _finite(tensors[f"constant/{index}"])
        shapes = [constant.shape, *(logs[name].shape[1:] for name in powers)]
        if any(shape not in ((1,), (width,)) for shape in shapes):
            raise ValueError(f"slot {index} has {width} floats, what it is made of has not")
        if any(type(power) is not int for power in powers.values()):
            raise ValueError(f"slot {index} has an exponent that is no integer")
        largest = sum(abs(power) * float(np.abs(logs[name]).max()) for name, power in powers.items())
        if largest + np.log(max(1.0, np.abs(constant).max())) > MAX_LOG:
            raise ValueError(f"slot {index} is too large for float32")
        pieces.append(Piece(width, powers, constant))
    return ScaleTables(knots, logs, tuple(pieces))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _finite(value: NDArray) -> NDArray[np.floating]:
    """Raises ValueError when `value` is neither float16 nor float32, or not finite."""
    if value.dtype not in (np.float16, np.float32) or not np.isfinite(value).all():
        raise ValueError("a tensor has NaN, infinity or another type than float")
    return value
