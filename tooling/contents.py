"""What is in a bundle, read from its files: bytes by part, and every Linear with its shape, scales and bytes."""

from __future__ import annotations

from types import SimpleNamespace

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..engines.initializers import Initializer, initializers
from ..exporters.linears import Linear, block_linears

_WEIGHT = ("weight", "int8", "scale", "zero_point")  # the initializers that together are one weight (exporters/qdq)


def bundle_parts(bundle: Bundle) -> dict[str, int]:
    """Bytes by part, a graph's two files in one; their sum is the bundle's size."""
    parts: dict[str, int] = {}
    for name, entry in bundle.manifest["files"].items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + entry["bytes"]
    return parts


def bundle_layers(bundle: Bundle) -> list[dict]:
    """Every block Linear in order: name, kind, graph, in_features, out_features, bits, bytes, scales.

    activation_scale, smoothing_min and smoothing_max are None where a Linear has none. Raises UserError when a file
    cannot be read or lacks a Linear.
    """
    sizes = bundle.manifest["sizes"]
    config = SimpleNamespace(
        embed_dim=sizes["embed_dim"], cond_token_dim=sizes["cond_dim"], ff_inner=0, depth=sizes["depth"]
    )
    linears = block_linears(config)  # type: ignore[arg-type]  # names and parts; widths are read from the graphs
    graphs = {
        graph: {tensor.name: tensor for tensor in initializers(bundle.path(f"{graph}.onnx"))}
        for graph in dict.fromkeys(linear.graph for linear in linears)
    }
    try:
        scales = load_file(bundle.path("scales.safetensors"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"the bundle {bundle.folder.name}: scales.safetensors cannot be read ({error})") from None
    found = []
    for linear in linears:
        row = _layer(linear, graphs[linear.graph], bundle)
        scale, smoothing = scales.get(f"activation_scale/{linear.name}"), scales.get(f"smoothing/{linear.name}")
        row["activation_scale"] = None if scale is None else float(scale[0])
        row["smoothing_min"] = None if smoothing is None else float(smoothing.min())
        row["smoothing_max"] = None if smoothing is None else float(smoothing.max())
        found.append(row)
    return found


def _layer(linear: Linear, tensors: dict[str, Initializer], bundle: Bundle) -> dict:
    width = height = size = 0
    integer = False
    for part in linear.parts:
        base = linear.graph_name(part).removesuffix(".weight")
        own = {suffix: tensors[f"{base}.{suffix}"] for suffix in _WEIGHT if f"{base}.{suffix}" in tensors}
        integer = "int8" in own
        weight = own.get("int8") or own.get("weight")
        if weight is None:
            raise UserError(f"the bundle {bundle.folder.name}: {linear.graph}.onnx lacks the weight of {base}")
        width, rows = weight.shape if integer else weight.shape[::-1]
        height += rows
        size += sum(tensor.bytes for tensor in own.values())
    return {
        "name": linear.name,
        "kind": linear.kind,
        "graph": linear.graph,
        "in_features": width,
        "out_features": height,
        "bits": bundle.manifest["recipe"]["bits"] if integer else "fp32",
        "bytes": size,
    }
