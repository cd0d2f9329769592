"""nvidia-modelopt's INT8 of our step graph, or a step that its user quantized, becomes a bundle like any other.

Its fake-quantized ONNX goes through `exporters.fake_quant` and stands in the place of the step graph; text,
conditioning and decoder are the float ones, stored as `build` stores them. What is compared is the quantizer alone: the
same Linears of the step, calibrated on calls of the same prompts, run by the same engines.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from numpy.typing import NDArray

from ..engines.base import BACKENDS, choose_backend, open_engine
from ..engines.bundle import Bundle, bundles_folder, check_target, new_bundle
from ..engines.errors import UserError
from ..engines.home import home, save_tensors, sha256
from ..engines.manifest import write_manifest
from ..exporters.checkpoint import Checkpoint
from ..exporters.fake_quant import Imported, import_step
from ..exporters.float_graphs import export_topologies
from ..exporters.half import GRAPHS as half_graphs
from ..exporters.linears import Linear
from ..exporters.qdq import write_graph
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline
from .build import Built, prove
from .cli.common import UsageError, dit_command, megabytes, path_option, progress, say, tell
from .layers import layers
from .modelopt_step import ALGORITHMS, export_step, input_names, quantize_step, step_linears
from .peers import CALLS, Call, calibration_calls
from .recipe import Recipe
from .workflow import CalibrationOptions, Say, Watch, reference_backend, reference_bundle, silent, unwatched

LEAST_COSINE = 0.5  # of the velocity to FP32's: less is no quantization of this model


@dataclass(frozen=True)
class Source:
    """A fake-quantized step as ONNX, and what the manifest says of it. calls: of the float step graph, one or more."""

    onnx: Path
    method: str
    options: dict
    calibration: dict | None
    calls: Sequence[Call]


def build_modelopt(
    checkpoint: Checkpoint,
    source: Source,
    backend: str,
    target: Path | None = None,
    say: Say = silent,
) -> Built:
    """Write the bundle of `source` and prove it, as `build_bundle` does: all its quantized Linears run in int8.

    Raises UserError for an ONNX file that is not this model's quantized step, and when a Linear lost its int8 kernel.
    Nothing is left behind then.
    """
    reference = reference_bundle(checkpoint, reference_backend(backend), say)
    target = target or bundles_folder() / _name(checkpoint, source, backend)
    linears = step_linears(checkpoint)
    with new_bundle(target) as folder:
        say(f"importing {source.onnx.name}")
        dialect = BACKENDS[backend].dialects["fp32"]
        found = import_step(source.onnx, folder / "step.onnx", linears, input_names(source.calls[0]), dialect)
        for name, topology in export_topologies(checkpoint.config, home() / "graphs").items():
            if name != "step":
                path = folder / f"{name}.onnx"
                write_graph(topology, path, checkpoint.tensor, half=name in half_graphs)
        save_tensors(_scales(found), folder / "scales.safetensors")
        shutil.copyfile(checkpoint.tokenizer_file, folder / "tokenizer.json")
        say(f"compiling with {backend}, reading back its kernels")
        chosen = [linear for linear in linears if linear.name in found]
        sizes = reference.manifest["sizes"]
        if lost := prove(folder, backend, graph_shapes(sizes), chosen, say=say).lost:
            names = ", ".join(lost[:6])
            raise UserError(f"{len(lost)} of {len(chosen)} Linears do not run in int8 with {backend}: {names}")
        _check_velocity(reference, folder / "step.onnx", source)
        write_manifest(folder, _manifest(checkpoint, reference, source, backend, found))
    return Built(Bundle(target), len(chosen), len(chosen))


def _check_velocity(reference: Bundle, step: Path, source: Source) -> None:
    engine = open_engine(reference.backend, step, graph_shapes(reference.manifest["sizes"])["step"])
    call = source.calls[len(source.calls) // 2]
    expected, found = (e.run(call)["velocity"].ravel() for e in (Pipeline(reference).engine("step"), engine))
    cosine = float(expected @ found / max(np.linalg.norm(expected) * np.linalg.norm(found), 1e-30))
    if not cosine >= LEAST_COSINE:
        name = reference.manifest["model"]["name"]
        raise UserError(f"{source.onnx} is not a step of {name}: its velocity has a cosine of {cosine:.2f} to FP32's")


def _name(checkpoint: Checkpoint, source: Source, backend: str) -> str:
    facts = [checkpoint.digest, source.method, source.options, source.calibration, sha256(source.onnx)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{checkpoint.name}-{source.method}-w8a8-{backend}-{digest}"


def _scales(found: dict[str, Imported]) -> dict[str, NDArray]:
    """As `build` keeps them, but by part: modelopt calibrates q, k and v apart. `inspect` tells the first's."""
    tensors: dict[str, NDArray] = {}
    for name, item in found.items():
        tensors[f"activation_scale/{name}"] = np.array(list(item.scale.values()), np.float32)
        if item.smoothing:
            tensors[f"smoothing/{name}"] = np.stack(list(item.smoothing.values()))
    return tensors


def _manifest(
    checkpoint: Checkpoint, reference: Bundle, source: Source, backend: str, found: dict[str, Imported]
) -> dict:
    """What the reference's says of the model, with the quantizer's own in the place of a recipe."""
    smoothed = any(item.smoothing for item in found.values())
    recipe = {
        "method": source.method,
        "bits": "w8a8",
        "smoothing": "static" if smoothed else "none",
        "activation_range": "static",
        "include": ["*"],
        "exclude": _excluded(checkpoint.linears, found),
        **source.options,
    }
    of_bits = {layer.name: layer for layer in layers(checkpoint.linears, Recipe("sqs", include=tuple(found)))}
    rows = []
    for name, layer in of_bits.items():
        whole = replace(layer, branch_bytes=found[name].branch_bytes) if name in found else layer
        rows.append({**asdict(whole), "int8": name in found})
    packages = ("dit-trt", "onnx", "torch", *(["nvidia-modelopt"] if source.calibration is not None else []))
    versions = {name: version(name) for name in packages}
    return {
        **reference.manifest,
        "created": datetime.datetime.now(datetime.UTC).isoformat(),
        "backend": backend,
        "recipe": recipe,
        "calibration": source.calibration,
        "linears": len(found),
        "int8_linears": len(found),
        "layers": rows,
        "short_context": False,  # its graph has one batch for x and the context
        "versions": {**versions, backend: BACKENDS[backend].load().runtime_version()},
    }


def _excluded(linears: Sequence[Linear], found: dict[str, Imported]) -> list[str]:
    """The float Linears: by kind where all of a kind are."""
    kinds = {linear.kind for linear in linears} - {linear.kind for linear in linears if linear.name in found}
    return [*sorted(kinds), *(x.name for x in linears if x.name not in found and x.kind not in kinds)]


# -------------------- the two ways to a source


def quantized_source(
    checkpoint: Checkpoint,
    algorithm: str,
    backend: str,
    folder: Path,
    calibration: CalibrationOptions,
    count: int = CALLS,
    watch: Watch = unwatched,
    say: Say = silent,
) -> Source:
    """Quantize the step with modelopt, on `count` recorded calls of the float pipeline, and export it into `folder`."""
    plan = calibration.plan(checkpoint)
    reference = reference_bundle(checkpoint, reference_backend(backend), say)
    say(f"sampling {len(plan.prompts)} prompts x {plan.settings.steps} steps for {count} calls of the step graph")
    with watch("prompts", len(plan.prompts)) as done:
        calls = calibration_calls(Pipeline(reference), plan.prompts, plan.settings, count, done)
    say(f"quantizing with nvidia-modelopt: {algorithm}")
    module = quantize_step(checkpoint, algorithm, calls)
    path = folder / f"modelopt-{algorithm}.onnx"
    export_step(module, calls[0], path)
    options = {"algorithm": ALGORITHMS[algorithm], "lora_rank": ALGORITHMS[algorithm].get("lowrank", 0)}
    facts = {"prompts": list(plan.prompts), "settings": asdict(plan.settings), "calls": len(calls)}
    return Source(path, f"modelopt-{algorithm}", options, facts, calls)


def given_source(checkpoint: Checkpoint, onnx: Path, backend: str, say: Say = silent) -> Source:
    """A step that somebody else quantized: see exporters.fake_quant for what it has to be."""
    if not onnx.is_file():
        raise UserError(f"--onnx {onnx} is not a file")
    plan = CalibrationOptions(num_prompts=1, steps=2).plan(checkpoint)
    reference = Pipeline(reference_bundle(checkpoint, reference_backend(backend), say))
    return Source(onnx, "modelopt-onnx", {}, None, calibration_calls(reference, plan.prompts, plan.settings, 2))


EPILOG = """\b
Examples:
  python -m dit_trt.tooling.modelopt --algorithm smoothquant
  python -m dit_trt.tooling.modelopt --algorithm svdquant --backend onnxruntime --output svdquant
  python -m dit_trt.tooling.modelopt --onnx my-step.onnx --output mine
"""


@click.command(epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help="As for dit-trt build.")
@click.option("--algorithm", type=click.Choice(list(ALGORITHMS)), help="modelopt's calibration (default: smoothquant).")
@click.option("--onnx", metavar="FILE", help="Take this step, quantized with modelopt, instead of quantizing one.")
@click.option("--backend", default="auto", show_default=True, help="auto, openvino, onnxruntime or tensorrt.")
@click.option("--output", metavar="DIR", help="The bundle's folder (default: in the home folder, by a name).")
@click.option("--num-prompts", type=click.IntRange(1), help="Prompts to sample for calibration (default: 50).")
@click.option("--calib-steps", type=click.IntRange(1), help="Steps of each (default: the model's own).")
@click.option("--calls", type=click.IntRange(1), help=f"Calls of the step graph to calibrate on (default: {CALLS}).")
@dit_command
def command(
    model: str,
    algorithm: str | None,
    onnx: str | None,
    backend: str,
    output: str | None,
    num_prompts: int | None,
    calib_steps: int | None,
    calls: int | None,
) -> dict:
    """Quantize a model's step with nvidia-modelopt and build a bundle of it; dit-trt run, diff, inspect take it."""
    idle = {"--algorithm": algorithm, "--num-prompts": num_prompts, "--calib-steps": calib_steps, "--calls": calls}
    if onnx is not None and (given := [name for name, value in idle.items() if value is not None]):
        raise UsageError(f"{', '.join(given)}: --onnx names a step that is quantized already; leave one of them out")
    backend, target = choose_backend(backend, to_build=True), path_option(output)
    if target is not None:
        check_target(target)
    checkpoint = Checkpoint.open(model)
    with TemporaryDirectory() as folder:
        if onnx is not None:
            path = path_option(onnx)
            assert path is not None
            source = given_source(checkpoint, path, backend, say)
        else:
            calibration = CalibrationOptions(num_prompts=num_prompts, steps=calib_steps)
            found = (checkpoint, algorithm or "smoothquant", backend, Path(folder), calibration, calls or CALLS)
            source = quantized_source(*found, progress, say)
        built = build_modelopt(checkpoint, source, backend, target, say)
    files = built.bundle.manifest["files"]
    step = sum(files[name]["bytes"] for name in ("step.onnx", "step.onnx.data"))
    tell(f"{built.int8_linears} of {built.linears} Linears in int8, {megabytes(built.bundle.size_bytes)}: {built}")
    return {
        "bundle": str(built),
        "backend": backend,
        "linears": built.linears,
        "int8_linears": built.int8_linears,
        "size_bytes": built.bundle.size_bytes,
        "step_bytes": step,
    }


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.modelopt")
