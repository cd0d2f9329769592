"""What a TensorRT plan really multiplies: its matrix products, their operands' types, the ONNX nodes they came from.

TensorRT never says that a quantized product fell to float. Two accounts tell: the engine inspector's JSON, where the
plan can be loaded, and the text inside a TensorRT-RTX plan, which needs no GPU. Neither format is documented.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

INT8, LOW = "int8", ("half", "bf16", "float16", "bfloat16")


@dataclass(frozen=True)
class Product:
    """One kernel. kind: `gemm` or `attention`; operands: types of what it reads first; nodes: ONNX nodes in it."""

    kind: str
    operands: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_int8(self) -> bool:
        return self.kind == "gemm" and self.operands[:2] == (INT8, INT8)


def int8_nodes(products: list[Product]) -> set[str]:
    """Names of the ONNX nodes whose product is int8 x int8."""
    return {node for product in products if product.is_int8 for node in product.nodes}


def attention_nodes(products: list[Product]) -> set[str]:
    """Names of the ONNX nodes that became part of a fused attention."""
    return {node for product in products if product.kind == "attention" for node in product.nodes}


_TENSOR = re.compile(r'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)')
# Fused attention is a generated function, `_gemm_mha_v2` among others.
_KERNEL = re.compile(r'^\s*(fully_connected|function)=\{ ?name="?(\S+?)"? ([^\n]*)', re.MULTILINE)
_INPUTS = re.compile(r"\binput(?:_args)?=\{([^}]*)\}")
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def products_of_plan(plan: bytes) -> list[Product]:
    """From the text of a TensorRT-RTX plan. An empty list says that the format is another."""
    text = plan.decode("latin1")
    types = dict(_TENSOR.findall(text))

    def kernels() -> Iterator[Product]:
        for kind, name, rest in _KERNEL.findall(text):
            if kind == "function" and "mha" not in name:
                continue
            inputs = _INPUTS.search(rest)
            read = re.findall(r'"([^"]+)"', inputs[1]) if inputs else []
            operands = tuple(types.get(tensor, "?").lower() for tensor in read)
            nodes = tuple(dict.fromkeys(_NODES.findall(rest)))
            yield Product("attention" if kind == "function" else "gemm", operands, nodes)

    return list(kernels())


def products_of_inspector(text: str) -> list[Product]:
    """From the JSON of an engine inspector whose engine was built with detailed profiling verbosity."""
    found = []
    for layer in json.loads(text)["Layers"]:
        if not isinstance(layer, dict):  # names alone: the engine was built without details
            return []
        name = f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
        operands = tuple(_type_of(tensor) for tensor in layer.get("Inputs", []))
        nodes = tuple(_NODES.findall(layer.get("Metadata", "")))
        if "mha" in name or "attention" in name:
            found.append(Product("attention", operands, nodes))
        elif re.search("gemm|matrixmultiply|fully_connected|matmul", name):
            found.append(Product("gemm", operands, nodes))
    return found


def _type_of(tensor: dict) -> str:
    """`Int8`, `Row major INT8 format`, ... -> `int8`"""
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "?").lower()
    return next((name for name in (INT8, *LOW, "float", "fp8", "int4") if name in text), text)
