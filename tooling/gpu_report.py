"""What TensorRT does on the NVIDIA GPU that is here: every method built, run, timed and compared, by one command.

    python -m dit_trt.tooling.gpu_report --output docs/gpu-results.md                       # the demo
    python -m dit_trt.tooling.gpu_report --model demo --model sao --output docs/gpu-results.md

where `python -m dit_trt.tooling.synthetic_checkpoint sao sao` wrote `sao`. What a row found is kept in the home folder:
an interrupted report goes on where it stopped, and a row that fails has its reason in the table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import load_external_data_for_tensor

from ..engines import cuda, tensorrt_api
from ..engines.bundle import Bundle
from ..engines.errors import UserError, last_line
from ..engines.home import home, read_json, write_whole
from ..engines.onnxruntime import ONNXRuntimeEngine
from ..engines.tensorrt import TensorRTEngine, unusable
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline
from .cli.common import dit_command, path_option, say, show
from .gpu_table import markdown
from .process_memory import memory_of
from .recipe import Recipe
from .timed_steps import turns
from .workflow import CalibrationOptions, build

if TYPE_CHECKING:
    from ..runtime.step_engine import StepEngine

PROMPT = "dog barking"
COMPARED = (0.0, 0.5, 0.99)  # of the schedule: the steps that ONNX Runtime computes too
ROWS: dict[str, Recipe] = {
    "FP32": Recipe("none", trunk="fp32"),
    "FP16": Recipe("none", trunk="fp16"),
    "SQS W8A8": Recipe("sqs"),
    "SQD W8A8": Recipe("sqd"),
    "sqt W8A8": Recipe("sqt"),
    "sqt W4A8": Recipe("sqt", "w4a8"),
    "sqt W8A8 + rank 32": Recipe("sqt", lora_rank=32),
}


@dataclass(frozen=True)
class Found:
    """One row. Seconds and bytes; step_ms by round, as the sampling loop calls it, launch_ms with nothing copied.

    cosine, largest_error: of the velocity against ONNX Runtime on the CPU, the same graph and inputs; the worst of the
    compared steps, and the largest deviation in units of the velocity's root mean square.
    """

    linears: int
    int8_linears: int
    attentions: int
    fused_attentions: int
    plan_bytes: int
    build_seconds: float
    open_seconds: float
    device_bytes: int
    host_peak_bytes: int
    cosine: float
    largest_error: float
    sampling_seconds: float
    step_ms: tuple[float, ...]
    launch_ms: tuple[float, ...]


class Report:
    """The rows of one model on one GPU. kept: results by row name, dicts of Found's fields, or {"error": line}."""

    def __init__(self, model: str, steps: int, calibration: CalibrationOptions, device: int = 0):
        self._model, self._steps, self._calibration, self._device = model, steps, calibration, device
        self.gpu = {
            "gpu": cuda.device_name(device),
            "compute_capability": cuda.compute_capability(device),
            "driver_cuda": cuda.driver_version(),
            "memory_bytes": cuda.memory()[1],
            "tensorrt": tensorrt_api.version(),
        }
        key = json.dumps([self.gpu, model, steps, repr(calibration)])
        self.folder = home() / "gpu" / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._file = self.folder / "results.json"
        self.kept: dict[str, dict] = read_json(self._file) if self._file.is_file() else {}

    def run(self, names: Sequence[str], rounds: int, watch: Callable[[str], object]) -> None:
        """Measure the rows that were not yet, or failed; then time all of them in turn, when one was not timed."""
        opened: dict[str, _Opened] = {}
        if all("step_ms" in self.kept.get(name, {}) for name in names):
            return
        for name in names:
            watch(name)
            try:
                opened[name] = _Opened(self._bundle(name), self._steps)
                if "cosine" not in self.kept.get(name, {}):
                    self._keep(name, self._measure(name, opened[name]))
            except (UserError, RuntimeError, ValueError, MemoryError) as error:
                opened.pop(name, None)
                self._keep(name, {"error": last_line(error)})
        watch("timing")
        times: dict[str, dict[str, list[float]]] = {name: {"step_ms": [], "launch_ms": []} for name in opened}
        for order in turns([*opened], rounds if opened else 0):
            for name in order:
                for kind, seconds in opened[name].timed().items():
                    times[name][kind].append(1000 * seconds)
        for name in opened:
            self._keep(name, {**self.kept[name], **times[name]})

    def _bundle(self, name: str) -> tuple[Bundle, float]:
        """The row's bundle, and the seconds its build took; that of an earlier run where it is whole."""
        folder = self.folder / name.lower().replace(" ", "-")
        note = self.folder / f"{folder.name}.seconds"
        with contextlib.suppress(UserError, OSError, ValueError):
            return Bundle(folder).verify(), float(note.read_text("utf-8"))
        start = time.perf_counter()
        bundle = build(ROWS[name], self._model, "tensorrt", folder, self._calibration, say=say).bundle
        seconds = time.perf_counter() - start
        note.write_text(str(seconds), "utf-8")
        return bundle, seconds

    def _measure(self, name: str, row: _Opened) -> dict:
        manifest = row.bundle.manifest
        cosine, largest = row.against_onnx_runtime()
        sampling = row.sampled()
        memory = memory_of()
        return {
            "linears": manifest["linears"],
            "int8_linears": manifest["int8_linears"],
            "attentions": manifest.get("attentions", 0),
            "fused_attentions": manifest.get("fused_attentions", 0),
            "plan_bytes": row.plan_bytes,
            "build_seconds": row.build_seconds,
            "open_seconds": row.open_seconds,
            "device_bytes": row.device_bytes,
            "host_peak_bytes": memory.peak_rss if memory is not None else 0,
            "cosine": cosine,
            "largest_error": largest,
            "sampling_seconds": sampling,
        }

    def _keep(self, name: str, result: dict) -> None:
        self.kept[name] = result
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps(self.kept, indent=1))


class _Opened:
    """A bundle on the GPU, its prompt's conditioning, and inputs from its own sampling."""

    def __init__(self, built: tuple[Bundle, float], steps: int):
        self.bundle, self.build_seconds = built
        free, _ = cuda.memory()
        start = time.perf_counter()
        self._pipeline = Pipeline(self.bundle)
        self._settings = self._pipeline.settings(steps=steps)
        self._seconds = self._pipeline.check_seconds(None)
        self._conditioning = self._pipeline.condition(PROMPT, self._settings, self._seconds)
        self._engine: StepEngine = self._pipeline.step_engine_for(self._conditioning)
        self._xs: list[NDArray[np.float32]] = []
        self.open_seconds = time.perf_counter() - start
        self.sampled()
        self.device_bytes = free - cuda.memory()[0]
        self._step = steps // 2
        self.plan_bytes = sum(len(engine.plan) for engine in self._plans())

    def _plans(self) -> list[TensorRTEngine]:
        return list(self._engine.engines)  # type: ignore[arg-type]

    def sampled(self) -> float:
        """Seconds of one whole sampling, whose inputs are kept."""
        xs: list[NDArray[np.float32]] = []
        start = time.perf_counter()
        self._pipeline.sample(
            self._conditioning, self._settings, observe=lambda step, inputs, outputs: xs.append(inputs["x"].copy())
        )
        seconds = time.perf_counter() - start
        self._xs = xs
        return seconds

    def against_onnx_runtime(self) -> tuple[float, float]:
        """-> the lowest cosine and the largest deviation of the velocity over the compared steps."""
        pipeline, cosines, largest = self._pipeline, [], []
        shapes = graph_shapes(pipeline.sizes, 0, pipeline.step_sigmas, None, self._conditioning.batch)
        by_graph: dict[str, ONNXRuntimeEngine] = {}
        for share in COMPARED:
            step = round(share * (self._settings.steps - 1))
            graph = self._engine.graph(self._conditioning, step)
            if graph not in by_graph:
                by_graph.clear()  # one at a time: gigabytes at full size
                by_graph[graph] = reference_engine(self.bundle.path(f"{graph}.onnx"), shapes[graph])
            x = self._xs[step]
            inputs = {"x": x, **self._conditioning.at(step), **self._conditioning.constants}
            expected = by_graph[graph].run(inputs)["velocity"].astype(np.float64)
            found = self._engine.run(self._conditioning, step, x)["velocity"].astype(np.float64)
            cosines.append((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))
            largest.append(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))
        return float(min(cosines)), float(max(largest))

    def timed(self) -> dict[str, float]:
        """Seconds of one step with its copies, and of the launch alone."""
        x = self._xs[self._step]
        start = time.perf_counter()
        self._engine.run(self._conditioning, self._step, x)
        copied = time.perf_counter()
        self._plans()[-1].launch()
        return {"step_ms": copied - start, "launch_ms": time.perf_counter() - copied}


def reference_engine(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ONNXRuntimeEngine:
    """The graph in ONNX Runtime on the CPU. It multiplies no bfloat16: what is that in the graph is float32 there."""
    model = onnx.load(path, load_external_data=False)
    brain, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    casts = [attribute for node in model.graph.node for attribute in node.attribute if attribute.i == brain]
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == brain]
    if not casts and not weights:
        return ONNXRuntimeEngine(path, shapes)
    for attribute in casts:
        attribute.i = wide
    for tensor in weights:
        load_external_data_for_tensor(tensor, str(path.parent))
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    del model.graph.value_info[:]
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
        data = Path(folder) / f"{path.name}.data"
        data.hardlink_to(path.with_name(data.name))
        onnx.save_model(model, Path(folder) / path.name)
        return ONNXRuntimeEngine(Path(folder) / path.name, shapes)


def measured(model: str, names: Sequence[str], steps: int, rounds: int, calibration: CalibrationOptions) -> dict:
    """One model's rows: the GPU's facts, `model`, and `rows`, a Found or an error each."""
    report = Report(model, steps, calibration)

    def watch(what: str) -> None:
        say(f"{model}: {what}")

    report.run(names, rounds, watch)
    rows: dict[str, Any] = {}
    for name in names:
        kept = report.kept[name]
        rows[name] = kept if "error" in kept else asdict(Found(**kept))
    return {**report.gpu, "model": model, "steps": steps, "rounds": rounds, "rows": rows}


EPILOG = """\b
Examples:
  python -m dit_trt.tooling.gpu_report --output docs/gpu-results.md
  python -m dit_trt.tooling.gpu_report --model demo --model sao --output docs/gpu-results.md
"""


@click.command(epilog=EPILOG)
@click.option("--model", "models", multiple=True, default=("demo",), show_default=True, help="demo, or a checkpoint.")
@click.option("--row", "names", multiple=True, type=click.Choice(list(ROWS)), help="These rows alone.")
@click.option("--rounds", type=click.IntRange(1, 9999), default=30, show_default=True, help="All take turns so often.")
@click.option("--steps", type=click.IntRange(2, 1000), default=100, show_default=True, help="Of the sampling.")
@click.option("--num-prompts", type=click.IntRange(1), help="Calibrate on so many (random weights need 1).")
@click.option("--calib-steps", type=click.IntRange(1), help="Calibrate with so many steps.")
@click.option("--output", required=True, metavar="FILE.md", help="Write the tables here.")
@dit_command
def command(
    models: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    steps: int,
    num_prompts: int | None,
    calib_steps: int | None,
    output: str,
) -> dict:
    """Build, run, time and compare every method on the NVIDIA GPU that is here; see the module's docstring."""
    path = path_option(output)
    assert path is not None
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --output a file in a folder that exists")
    if (why := unusable()) is not None:
        raise UserError(f"TensorRT does not run here: {why}")
    calibration = CalibrationOptions(num_prompts=num_prompts, steps=calib_steps)
    reports = [measured(model, names or tuple(ROWS), steps, rounds, calibration) for model in models]
    line = "python -m dit_trt.tooling.gpu_report " + shlex.join(sys.argv[1:])
    text = markdown(reports, line)
    path.write_text(text, "utf-8")
    show(text)
    say(f"written to {path}")
    return {"reports": reports}


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.gpu_report")
