"""Bundles whose steps differ by more than their time, made by hand: inputs scaled by `step_scales`, two step graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.manifest import SCALES, write_manifest
from dit_trt.exporters.quantized import Slot
from dit_trt.tooling.scale_tables import save_scales

LAYERS = "model.model.transformer.layers."
FIRST, LAST = f"{LAYERS}0.pre_norm.gamma", f"{LAYERS}1.ff_norm.gamma"
LOUDER = f"{LAYERS}1.ff.ff.2.bias"
KNOTS = np.log(np.float32([0.5, 3.0, 40.0, 300.0]))
LOGS = {
    "range/first": np.float32([[0.7], [-0.2], [0.1], [0.4]]),
    "wide": np.linspace(-0.5, 0.5, 4 * 128, dtype=np.float16).reshape(4, 128),
}


def manifest_of(bundle: Bundle, **changes: object) -> dict:
    return {**{k: v for k, v in bundle.manifest.items() if k not in ("files", "format")}, **changes}


def edited(folder: Path, graph: str, change: Callable[[onnx.GraphProto], None], source: str = "step") -> None:
    """`<source>.onnx` of a bundle's folder after `change`, written as `<graph>.onnx`."""
    model = onnx.load(folder / f"{source}.onnx")
    change(model.graph)
    (folder / f"{graph}.onnx.data").unlink(missing_ok=True)
    onnx.save_model(model, folder / f"{graph}.onnx", save_as_external_data=True, location=f"{graph}.onnx.data")


def set_tensor(graph: onnx.GraphProto, name: str, change: Callable[[NDArray], NDArray]) -> None:
    [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), name))


def tensor_of(bundle: Bundle, name: str) -> NDArray:
    [tensor] = [tensor for tensor in onnx.load(bundle.path("step.onnx")).graph.initializer if tensor.name == name]
    return numpy_helper.to_array(tensor)


def take_scales(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    """The graph takes `step_scales`, whose pieces stand in for the weights `names`."""
    widths = {}
    for name in names:
        [tensor] = [tensor for tensor in graph.initializer if tensor.name == name]
        widths[name] = tensor.dims[0]
        graph.initializer.remove(tensor)
    split = numpy_helper.from_array(np.array(list(widths.values())), "step_scales.widths")
    graph.initializer.append(split)
    graph.node.insert(0, helper.make_node("Split", ["step_scales", split.name], list(names), name="Split", axis=0))
    graph.input.append(helper.make_tensor_value_info("step_scales", TensorProto.FLOAT, [sum(widths.values())]))


def slots_of(bundle: Bundle) -> list[Slot]:
    """Of the two gains: the first as it was, times r; the last times wide^2 / r."""
    gains = tensor_of(bundle, FIRST), tensor_of(bundle, LAST)
    return [Slot(128, {"range/first": 1}, gains[0]), Slot(128, {"range/first": -1, "wide": 2}, gains[1])]


def scaled_bundle(bundle: Bundle, folder: Path, logs: Mapping[str, NDArray] = LOGS) -> Bundle:
    """A copy whose first and last norm gains are pieces of `step_scales`."""
    shutil.copytree(bundle.folder, folder)
    edited(folder, "step", lambda graph: take_scales(graph, (FIRST, LAST)))
    n = save_scales(folder / SCALES.format("step"), KNOTS, logs, slots_of(bundle))
    write_manifest(folder, manifest_of(bundle, sizes={**bundle.manifest["sizes"], "step_scales": n}))
    return Bundle(folder)


def grouped_bundle(bundle: Bundle, folder: Path, step_sigmas: list[float], slots: Sequence[Slot] = ()) -> Bundle:
    """A copy with further step graphs: in `step-<i>` a bias is 20 i larger and, with slots, logarithms i / 10."""
    shutil.copytree(bundle.folder, folder)
    for index in range(1, len(step_sigmas) + 1):
        edited(folder, f"step-{index}", lambda g, i=index: set_tensor(g, LOUDER, lambda bias: bias + 20 * i))  # type: ignore[misc]
        if slots:
            logs = {name: table + np.float32(0.1 * index) for name, table in LOGS.items()}
            save_scales(folder / SCALES.format(f"step-{index}"), KNOTS, logs, slots)
    write_manifest(folder, manifest_of(bundle, step_sigmas=step_sigmas))
    return Bundle(folder)
