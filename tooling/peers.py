"""Other people's quantizers on our float step graph, given our calibration's inputs: NNCF's and ONNX Runtime's.

Each writes a step graph of its own, which then stands in the place of the float bundle's in an ordinary pipeline: the
same conditioning, the same sampler, the same engine options, the same account of its int8 kernels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from ..engines.base import Engine, open_engine
from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..exporters.linears import Linear
from ..exporters.qdq import is_weight
from ..exporters.rewriting import matmuls_by_weight
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline, Settings

Float = NDArray[np.float32]
Call = Mapping[str, Float]  # every input of the step graph, both guidance halves
CALLS = 300  # NNCF's own default


@dataclass(frozen=True)
class Peer:
    """A quantizer of a step graph. smoothing and range: what it does, in the table's words.

    write(float graph, calls, Linears' node names, folder) -> the step graph's file in `folder`.
    dynamic: int8 arises inside the kernel of an int4 weight, which the runtime's account calls float.
    """

    backend: str
    packages: tuple[str, ...]
    smoothing: str
    range: str
    write: Callable[[Path, Sequence[Call], Sequence[str], Path], Path]
    dynamic: bool = False

    def versions(self) -> dict[str, str]:
        """Of its packages. Raises UserError with the fix when one is not installed."""
        found = {}
        for name in self.packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                raise UserError(f'the peer {name} is not installed: pip install -e ".[peers]"') from None
        return found


class PeerPipeline(Pipeline):
    """The float bundle's pipeline with a peer's step engine in it."""

    def __init__(self, reference: Bundle, step: Engine):
        super().__init__(reference)
        self._step = step

    always_pairs = True  # its engine has one shape

    def engine(
        self, graph: str, steps: int = 0, latents: int | None = None, batch: int = 2, context: int | None = None
    ) -> Engine:
        return self._step if graph == "step" else super().engine(graph, steps, latents, batch, context)


# -------------------- what they calibrate on


def calibration_calls(
    reference: Pipeline,
    prompts: Sequence[str],
    settings: Settings,
    count: int = CALLS,
    done: Callable[[int], object] = lambda prompts: None,
) -> list[Call]:
    """`count` calls of the step graph, drawn over all prompts and the whole schedule, from `settings.seed` on.

    As our own calibration samples them: prompt i with seed + i. Each prompt gives as many, one from every stretch of
    the schedule, at a seeded place in it. done(prompts) is called after each prompt.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    calls: list[Call] = []
    seconds = reference.check_seconds(None)
    for index, prompt in enumerate(prompts):
        share = (count * (index + 1)) // len(prompts) - (count * index) // len(prompts)
        chosen = set(((np.arange(share) + rng.random(share)) * settings.steps / max(share, 1)).astype(int).tolist())
        conditioning = reference.condition(prompt, settings, seconds)

        def observe(
            step: int, inputs: Call, outputs: Call, chosen: set = chosen, fixed: Call = conditioning.constants
        ) -> None:
            if step in chosen:
                calls.append({**fixed, **{name: value.copy() for name, value in inputs.items()}})

        reference.sample(conditioning, replace(settings, seed=settings.seed + index), observe=observe)
        done(index + 1)
    return calls


def plain_graph(source: Path, target: Path) -> Path:
    """A float step graph as the quantizers expect it: weights [in, out] without Transpose, MatMuls named by weight."""
    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if is_weight(tensor)}
    dropped = set()
    for name, (transpose, matmul) in matmuls_by_weight(graph).items():
        if name in weights:
            array = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
            weights[name].CopyFrom(numpy_helper.from_array(array, name))
            matmul.input[1], matmul.name = name, name.removesuffix(".weight")
            dropped.add(transpose.output[0])
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node if n.output[0] not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save_model(model, target, save_as_external_data=True, location=f"{target.name}.data")
    return target


# -------------------- the quantizers


def _nncf(graph: Path, calls: Sequence[Call], names: Sequence[str], folder: Path, same: bool = False) -> Path:
    """OpenVINO's post-training quantization for transformers: SmoothQuant, bias correction, all else by default.

    By default it quantizes every product, also the latents' own projections and convolutions; `same`: only the Linears
    that we do, which is more exact.
    """
    import nncf

    float_model = _openvino_model(graph, calls[0])
    with _on_stderr():
        nncf.set_log_level(logging.ERROR)
        model = nncf.quantize(
            float_model,
            nncf.Dataset(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calls),
            ignored_scope=nncf.IgnoredScope(names=_other_products(float_model, names)) if same else None,
        )
    return _save(model, folder)


def _other_products(model: object, names: Sequence[str]) -> list[str]:
    """The model's products that are not those `names`."""
    found = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}  # type: ignore[attr-defined]
    return [name for name, kind in found.items() if kind in ("MatMul", "Convolution") and name not in names]


def _nncf_int4(graph: Path, calls: Sequence[Call], names: Sequence[str], folder: Path) -> Path:
    """OpenVINO's int4 weights, symmetric, groups of 64; the plugin quantizes activations by token and 32 channels."""
    import nncf

    with _on_stderr():
        nncf.set_log_level(logging.ERROR)
        model = nncf.compress_weights(
            _openvino_model(graph, calls[0]),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            ratio=1.0,
            group_size=64,
            # narrower layers, none of them a block's, take smaller groups
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )
    return _save(model, folder)


def _openvino_model(graph: Path, call: Call) -> object:
    import openvino as ov

    model = ov.Core().read_model(graph)
    model.reshape({name: list(value.shape) for name, value in call.items()})
    return model


def _save(model: object, folder: Path) -> Path:
    import openvino as ov

    ov.save_model(model, folder / "step.xml", compress_to_fp16=False)
    return folder / "step.xml"


def _ort_static(graph: Path, calls: Sequence[Call], names: Sequence[str], folder: Path) -> Path:
    """ONNX Runtime's QDQ quantization of the Linears: weights int8 per channel, activations uint8 with a zero point.

    The fastest and the most exact of its settings on this CPU: int8 activations lose their kernels, symmetric uint8 was
    less exact; its SmoothQuant needs neural-compressor, which it no longer works with.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._calls = iter(calls)

        def get_next(self) -> dict | None:
            call = next(self._calls, None)
            return None if call is None else dict(call)

    with _quiet():
        quantize_static(
            graph,
            folder / "step.onnx",
            Reader(),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return folder / "step.onnx"


def _ort_dynamic(graph: Path, calls: Sequence[Call], names: Sequence[str], folder: Path) -> Path:
    """ONNX Runtime's dynamic quantization of the Linears: weights int8 per channel, each tensor's range as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            graph,
            folder / "step.onnx",
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    return folder / "step.onnx"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizers advise, at every call, to pre-process what needs no pre-processing."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """NNCF draws its bars on stdout, which belongs to results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


PEERS = {
    "nncf-int8": Peer("openvino", ("nncf", "openvino"), "static", "static", _nncf),
    "nncf-int8-same": Peer("openvino", ("nncf", "openvino"), "static", "static", partial(_nncf, same=True)),
    "nncf-int4": Peer("openvino", ("nncf", "openvino"), "none", "token, groups of 32", _nncf_int4, dynamic=True),
    "ort-static": Peer("onnxruntime", ("onnxruntime",), "none", "static", _ort_static),
    "ort-dynamic": Peer("onnxruntime", ("onnxruntime",), "none", "dynamic, per tensor", _ort_dynamic),
}


# -------------------- made once, kept


def step_linears(linears: Sequence[Linear]) -> dict[str, list[str]]:
    """Linears of the step graph -> the MatMul nodes of its parts, as `plain_graph` names them."""
    return {
        linear.name: [linear.graph_name(part).removesuffix(".weight") for part in linear.parts]
        for linear in linears
        if linear.graph == "step"
    }


def make(
    peer: Peer, reference: Bundle, calls: Callable[[], Sequence[Call]], linears: Sequence[Linear], folder: Path
) -> Path:
    """The peer's step graph in `folder`: what is there of the same versions and FP32 bundle, else made now."""
    note = folder / "made.json"
    files = reference.manifest["files"]
    facts = {"versions": peer.versions(), "reference": [files[f]["sha256"] for f in ("step.onnx", "step.onnx.data")]}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(note.read_text("utf-8"))
        if {name: kept.get(name) for name in facts} == facts:
            return folder / kept["file"]
    folder.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    names = [name for parts in step_linears(linears).values() for name in parts]
    graph = plain_graph(reference.path("step.onnx"), folder / "float.onnx")
    shapes = step_shapes(reference)
    step = peer.write(graph, [fitted(call, shapes) for call in calls()], names, folder)
    for file in folder.glob("float.onnx*"):
        file.unlink()
    note.write_text(json.dumps({**facts, "file": step.name}), "utf-8")
    return step


def step_shapes(reference: Bundle) -> dict[str, tuple[int, ...]]:
    """Of a peer's step graph: both CFG halves, and no more context than ours has without a negative prompt."""
    context = 1 if reference.manifest.get("short_context") else 2
    return graph_shapes(reference.manifest["sizes"], context=context)["step"]


def fitted(call: Call, shapes: Mapping[str, tuple[int, ...]]) -> Call:
    """A recorded call, of one clip, with so much of its context."""
    return {n: value[: shapes[n][0]] if n.startswith("context_") else value for n, value in call.items()}


def open_step(peer: Peer, step: Path, reference: Bundle, threads: int | None = None) -> Engine:
    return open_engine(peer.backend, step, step_shapes(reference), threads=threads)


def int8_linears(peer: Peer, step: Path, engine: Engine, asked: Mapping[str, Sequence[str]], call: Call) -> int:
    """How many of the step graph's Linears (`step_linears`) run as int8 x int8, by the runtime's own account.

    Of a dynamic peer all or none: they do when switching the activations' quantization off changes what `call` gives.
    """
    if peer.dynamic:
        call = fitted(call, engine.inputs)
        return len(asked) if not np.array_equal(engine.run(call)["velocity"], _undynamic(step, call)) else 0
    found = {name.removesuffix("_quant") for name in engine.int8_matmuls()}
    return sum(found.issuperset(parts) for parts in asked.values())


def _undynamic(step: Path, call: Call) -> Float:
    """The velocity with float activations."""
    import openvino as ov

    options = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(_openvino_model(step, call), "CPU", options)
    return compiled(dict(call))["velocity"]
