"""The Linears of the DiT's blocks: their names, shapes, parts and places, and how graph weights map to checkpoint keys.

Seven a block, 99 % of the parameters: these are what gets quantized. A fused Linear (`to_qkv`, `to_kv`, `ff.0.proj`)
is one Linear with several parts; the graphs hold one MatMul a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dit import DiTConfig

DIT_PREFIX = "model.model."
# What makes a Linear's input, by its kind: a norm; or a part of another Linear of the block, with nothing but what is
# linear in that part in between (attention in its values, SwiGLU in its value half). A factor can go there.
NORMS = {"self_attn.to_qkv": "pre_norm", "cross_attn.to_q": "cross_attend_norm", "ff.ff.0.proj": "ff_norm"}
SOURCES = {"self_attn.to_out": ("self_attn.to_qkv", "v"), "ff.ff.2": ("ff.ff.0.proj", "value")}


@dataclass(frozen=True)
class Linear:
    """One Linear of a block. `parts` maps part names to output rows, in order; unfused Linears have the part ''."""

    name: str
    graph: str
    in_features: int
    parts: Mapping[str, int]
    bias: bool = False

    @property
    def out_features(self) -> int:
        return sum(self.parts.values())

    @property
    def kind(self) -> str:
        """The name within its block: `self_attn.to_qkv`, `ff.ff.2`, ..."""
        return self.name.split(".", 3)[3]

    @property
    def block(self) -> int:
        return int(self.name.split(".")[2])

    def graph_name(self, part: str, parameter: str = "weight") -> str:
        """The initializer's name: `model.model.<name>[.<part>].weight`."""
        return ".".join(filter(None, (DIT_PREFIX + self.name, part, parameter)))

    def key(self, parameter: str = "weight") -> str:
        return f"{DIT_PREFIX}{self.name}.{parameter}"

    def rows(self, part: str) -> slice:
        start = 0
        for name, size in self.parts.items():
            if name == part:
                return slice(start, start + size)
            start += size
        raise KeyError(part)


def block_linears(config: DiTConfig) -> list[Linear]:
    """The 7 x depth Linears in order. `to_kv` runs in the conditioning graph, the others in the step graph."""
    d, c, inner = config.embed_dim, config.context_dim, config.ff_inner
    linears = []
    for i in range(config.depth):
        layer = f"transformer.layers.{i}"
        linears += [
            Linear(f"{layer}.self_attn.to_qkv", "step", d, {"q": d, "k": d, "v": d}),
            Linear(f"{layer}.self_attn.to_out", "step", d, {"": d}),
            Linear(f"{layer}.cross_attn.to_q", "step", d, {"": d}),
            Linear(f"{layer}.cross_attn.to_kv", "conditioning", c, {"k": c, "v": c}),
            Linear(f"{layer}.cross_attn.to_out", "step", d, {"": d}),
            Linear(f"{layer}.ff.ff.0.proj", "step", d, {"value": inner, "gate": inner}, bias=True),
            Linear(f"{layer}.ff.ff.2", "step", inner, {"": d}, bias=True),
        ]
    return linears


def split_keys(linears: list[Linear]) -> dict[str, tuple[str, slice]]:
    """Graph name of every part of a fused Linear -> (checkpoint key, rows of it)."""
    found = {}
    for linear in linears:
        for part in filter(None, linear.parts):
            for parameter in ("weight", "bias") if linear.bias else ("weight",):
                found[linear.graph_name(part, parameter)] = (linear.key(parameter), linear.rows(part))
    return found
