"""Seeded tensors by name, written one at a time: a safetensors file of any size in the memory of its largest tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..engines.home import flush

OUTLIER_GAIN = 12.0  # how much louder a loud channel is
OUTLIERS = 0.01  # of the channels


@dataclass(frozen=True)
class TensorSpec:
    """One fp32 tensor: normal with this mean and standard deviation.

    loud: among these rows about one in a hundred is `OUTLIER_GAIN` times louder. A name that ends in `inv_freq` is
    RoPE's frequencies, whatever the rest says.
    """

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0
    loud: slice | None = None

    def under(self, prefix: str) -> TensorSpec:
        return replace(self, name=prefix + self.name)

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)


def draw(spec: TensorSpec, seed: int) -> Tensor:
    """The tensor of `spec`, fp32: a function of seed and name alone, so any can be made again without the others."""
    if spec.name.endswith("inv_freq"):
        dim = 2 * spec.shape[0]
        return 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    value = torch.randn(spec.shape, generator=generator).mul_(spec.std).add_(spec.mean)
    if spec.loud is not None:
        rows = value[spec.loud]
        rows[torch.rand(len(rows), generator=generator) < OUTLIERS] *= OUTLIER_GAIN
    return value


def write_tensors(path: Path, specs: Sequence[TensorSpec], seed: int) -> None:
    """Write a safetensors file of drawn tensors, in this order; it is whole or absent."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": "F32", "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                file.write(draw(spec, seed).numpy().astype("<f4", copy=False).data)
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
