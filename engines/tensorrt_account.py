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
    """One kernel. kind: `gemm` or `attention`; operands: types of what it reads first; nodes: ONNX nodes in it.

    result: the type of what it writes; of an int8 product these are its sums, which `half` cannot hold.
    """

    kind: str
    operands: tuple[str, ...]
    nodes: tuple[str, ...]
    result: str = "?"

    @property
    def is_int8(self) -> bool:
        return self.kind == "gemm" and self.operands[:2] == (INT8, INT8)


def int8_nodes(products: list[Product]) -> set[str]:
    """Names of the ONNX nodes whose product is int8 x int8."""
    return {node for product in products if product.is_int8 for node in product.nodes}


def attention_nodes(products: list[Product]) -> set[str]:
    """Names of the ONNX nodes that became part of a fused attention."""
    return {node for product in products if product.kind == "attention" for node in product.nodes}


# Of bytes, each with a word in front that is found fast: most of a plan is weights.
_TENSOR = re.compile(rb'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+)')
_GEMM = re.compile(rb'fully_connected=\{ ?name="?(\S+?)"? ([^\n]*)')
_FUNCTION = re.compile(rb'function=\{ ?name="?(\S+?)"? ([^\n]*)')  # generated; `_gemm_mha_v2` is a fused attention
_INPUTS = re.compile(rb"\binput(?:_args)?=\{([^}]*)\}")
_OUTPUTS = re.compile(rb"\boutput(?:_args)?=\{([^}]*)\}")
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def products_of_plan(plan: bytes) -> list[Product]:
    """From the text of a TensorRT-RTX plan. An empty list says that the format is another.

    As it does when there are kernels, but not the types of what they read or the names of their nodes.
    """
    types = {name: kind.decode().lower() for name, kind in _TENSOR.findall(plan)}

    def of_tensors(found: re.Match[bytes] | None) -> tuple[str, ...]:
        return () if found is None else tuple(types.get(name, "?") for name in re.findall(rb'"([^"]+)"', found[1]))

    def kernels(kind: str, pattern: re.Pattern[bytes], named: bytes = b"") -> Iterator[tuple[int, Product]]:
        for found in pattern.finditer(plan):
            begins = plan[found.start() - 1 : found.start()].isspace()  # not the end of a longer word
            if begins and named in found[1]:
                operands, results = of_tensors(_INPUTS.search(found[2])), of_tensors(_OUTPUTS.search(found[2]))
                nodes = tuple(dict.fromkeys(_NODES.findall(found[2].decode("latin1"))))
                yield found.start(), Product(kind, operands, nodes, results[0] if results else "?")

    found = [*kernels("gemm", _GEMM), *kernels("attention", _FUNCTION, b"mha")]
    products = [product for _, product in sorted(found, key=lambda item: item[0])]
    typed = all(len(product.operands) > 1 and "?" not in product.operands[:2] for product in products)
    return products if typed and any(product.nodes for product in products) else []


def products_of_inspector(text: str) -> list[Product]:
    """From the JSON of an engine inspector whose engine was built with detailed profiling verbosity.

    An empty list says that there are no details, or that the format is another.
    """
    found = []
    for layer in json.loads(text)["Layers"]:
        if not isinstance(layer, dict):  # names alone: the engine was built without details
            return []
        name = f"{layer.get('LayerType', '')} {layer.get('Name', '')}".lower()
        operands = tuple(_type_of(tensor) for tensor in layer.get("Inputs", []))
        results = [_type_of(tensor) for tensor in layer.get("Outputs", [])]
        nodes = tuple(dict.fromkeys(_NODES.findall(layer.get("Metadata", ""))))
        is_attention = "mha" in name or "attention" in name
        if is_attention or re.search("gemm|matrixmultiply|fully_connected|matmul", name):
            kind = "attention" if is_attention else "gemm"
            found.append(Product(kind, operands, nodes, results[0] if results else "?"))
    return found if any(product.nodes for product in found) else []


def _type_of(tensor: dict) -> str:
    """`Int8`, `Row major INT8 format`, ... -> `int8`"""
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "?").lower()
    return next((name for name in (INT8, *LOW, "float", "fp8", "int4") if name in text), text)
