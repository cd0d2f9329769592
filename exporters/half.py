"""Weights stored in FP16 and computed with in FP32: the matrices of what runs once a clip, a Cast each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from .rewriting import Rewriting

GRAPHS = ("text", "conditioning", "decoder", "encoder")
SMALLEST = 1024  # elements: below, the Cast costs what the halves save
WORST_ROW = 2e-3  # relative error of a row, four times that of FP16 itself: more means that it left FP16's range


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is stored in FP16: a matrix or kernel. Vectors (norms, biases, frequencies) stay as they are."""
    return len(shape) > 1 and min(shape[:2]) > 1 and prod(shape) >= SMALLEST and not name.startswith("rope.")


def fits(weight: NDArray[np.float32]) -> bool:
    """Whether every row [out, ...] survives FP16, which holds 6e-8 to 65504."""
    rows = weight.reshape(len(weight), -1)
    with np.errstate(over="ignore"):
        lost = np.linalg.norm(rows - rows.astype(np.float16).astype(np.float32), axis=1)
    return bool((lost <= WORST_ROW * np.linalg.norm(rows, axis=1)).all())  # NaN, where infinity was lost, is not


def cast_node(name: str) -> NodeProto:
    """What gives the weight `name` back in FP32."""
    return helper.make_node("Cast", [f"{name}.half"], [name], name, to=TensorProto.FLOAT)


def add_half(rewriting: Rewriting, name: str, weight: NDArray[np.float32]) -> None:
    rewriting.constant(f"{name}.half", weight.astype(np.float16))
    rewriting.add_node(cast_node(name))
