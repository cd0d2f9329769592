"""What the CPU under the tests can do. Claims that need more are skipped there; all else of a test still holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_trt.engines.base import BACKENDS
from dit_trt.engines.cpu import CPUINFO, lacks_vnni
from dit_trt.tooling.simulate import SimulatedLinear

CPU_BACKENDS = tuple(name for name, kind in BACKENDS.items() if kind.proof is None)  # they run here


def saturates(backend: str) -> bool:
    """Whether `backend` adds int8 products in 16 bits here."""
    return backend == "openvino" and lacks_vnni()


def has_amx_bf16() -> bool:
    """Whether the CPU multiplies tiles of BF16."""
    return CPUINFO.is_file() and "amx_bf16" in CPUINFO.read_text("utf-8").split()


def exact_int8(backend: str) -> None:
    """Skip what follows in a test, and needs the numbers of `backend`'s int8 products to be those of integers."""
    if saturates(backend):
        pytest.skip("this CPU has no VNNI: OpenVINO adds its int8 products in 16 bits")


def dynamic_int4(backend: str) -> None:
    """Skip what follows in a test, and needs `backend` to quantize the activations of 4-bit weights by itself."""
    if saturates(backend):
        pytest.skip("this CPU has no VNNI: OpenVINO multiplies 4-bit weights in float")


class SaturatingLinear(SimulatedLinear):
    """As SimulatedLinear, its integers added as a kernel without VNNI adds them: see `saturating`."""

    def _multiply(self, x: Tensor, x_step: Tensor | float, weight: Tensor, weight_step: Tensor) -> Tensor:
        w = (weight / weight_step).round()
        rows = ((x / x_step).round() + 128).flatten(0, -2)
        total = torch.zeros(len(rows), len(w))
        for first in range(0, len(rows), 16):  # float32 holds these sums exactly
            pairs = rows[first : first + 16, None].unflatten(-1, (-1, 2)) * w.unflatten(-1, (-1, 2))
            total[first : first + 16] = pairs.sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1)
        return (total - 128 * w.sum(1)).reshape(*x.shape[:-1], -1) * x_step * weight_step.T


def simulated_linear(backend: str) -> type[SimulatedLinear]:
    """How a Linear that `backend` runs in int8 computes here."""
    return SaturatingLinear if saturates(backend) else SimulatedLinear


def product(backend: str, x: NDArray, w: NDArray) -> NDArray[np.float64]:
    """x [rows, in] times w^T [in, out], both of int8 values, as a kernel of `backend` adds it here."""
    return saturating(x, w) if saturates(backend) else x.astype(np.float64) @ w.T.astype(np.float64)


def saturating(x: NDArray, w: NDArray) -> NDArray[np.float64]:
    """x w^T by x86's instructions without VNNI: uint8 (x + 128) times int8, neighbours added in saturating 16 bits.

    What 128 added is subtracted again, in 32 bits. `in` is even.
    """
    products = (x.astype(np.int64) + 128)[:, None, :] * w.astype(np.int64)[None]
    pairs = products.reshape(*products.shape[:2], -1, 2).sum(axis=-1)
    limits = np.iinfo(np.int16)
    total = np.clip(pairs, limits.min, limits.max).sum(axis=-1) - 128 * w.astype(np.int64).sum(axis=1)
    return total.astype(np.float64)
