"""What a runtime counts of one layer of a compiled graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """nodes: its own name, and those of the ONNX nodes and weights in it; kind, kernel: in the runtime's words.

    has_weight: of a matrix product, whether one side is constant. seconds: of a run, the mean.
    """

    nodes: tuple[str, ...]
    kind: str
    kernel: str
    is_int8: bool
    has_weight: bool
    seconds: float
