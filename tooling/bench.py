"""The same step by different means, in turn: how long each takes, as ratios within one run, and how far it strays.

Every contender gets the same inputs, recorded from a run of the FP32 model, and computes one step of the DiT with both
CFG halves. They take turns in rounds, in an order that changes, because a busy machine slows down whoever runs just
then; a ratio is taken within each round and the median over rounds reported. All have the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.base import BACKENDS
from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..engines.home import expanded, home, locked
from ..engines.manifest import step_graphs
from ..exporters.checkpoint import Checkpoint
from ..exporters.dit import DiffusionTransformer
from ..exporters.linears import DIT_PREFIX
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.samplers import DETERMINISTIC
from .contents import bundle_parts
from .intervals import median_interval
from .recipe import Recipe
from .synthetic_checkpoint import SHAPES, write_checkpoint
from .timed_steps import cores, open_step_engine, turns
from .workflow import CalibrationOptions, Say, Watch, build, silent, unwatched

Float = NDArray[np.float32]
Step = Callable[[], Float]
BASELINE = "torch fp32"
SQS = "int8 (SQS)"
_ALWAYS = {"fp32": Recipe("none"), SQS: Recipe("sqs")}
PROMPT = "dog barking"


@dataclass(frozen=True)
class Row:
    """One contender. step_ms: median, p10, p90 over rounds; speedup: the same of the rounds' ratios to the baseline.

    over_sqs: its time over that of SQS on the same backend, median of the rounds and its 95 % bootstrap interval.
    relative_error: of the velocity, ||v - v_fp32|| / ||v_fp32|| over both halves; linears: int8 of those asked for.
    """

    name: str
    step_ms: tuple[float, float, float]
    speedup: tuple[float, float, float]
    over_sqs: tuple[float, float, float] | None
    relative_error: float
    linears: int
    int8_linears: int
    bundle_bytes: int | None
    step_graph_bytes: int | None


@dataclass(frozen=True)
class ColdStart:
    """Seconds from process start to the WAV, 100 steps: the first run (compiles) and the median of later ones."""

    backend: str
    first: float
    later: float


@dataclass(frozen=True)
class Report:
    """One shape's rows; the baseline is the first."""

    shape: str
    inputs: str
    threads: int
    rounds: int
    rows: tuple[Row, ...]
    cold_starts: tuple[ColdStart, ...] = ()


def bench(
    shape: str,
    rounds: int,
    threads: int,
    watch: Watch = unwatched,
    say: Say = silent,
    more: Sequence[tuple[str, str, Recipe]] = (),
) -> Report:
    """Time one step of `shape` (`demo` or a synthetic one) by every means there is on this machine.

    more: backend, label and recipe of further contenders.
    """
    model = _checkpoint_folder(shape)
    checkpoint = Checkpoint.open(model)
    bundles = _bundles(shape, model, say, more)
    inputs = _recorded_inputs(
        next(bundle for bundle in bundles.values() if bundle.manifest["recipe"]["bits"] == "fp32")
    )
    bundles_of = dict(bundles)
    contenders: dict[str, Step] = {BASELINE: torch_step(checkpoint, inputs, threads)}
    for name, bundle in bundles.items():
        contenders[name] = engine_step(bundle, inputs, threads)
        if name == "openvino int8 (SQS)" and _has_bf16():
            bf16 = f"{name}, rest in bf16"
            contenders[bf16], bundles_of[bf16] = engine_step(bundle, inputs, threads, "bf16"), bundle
    velocities = {name: step() for name, step in contenders.items()}
    with watch(f"timing {shape}", rounds) as done:
        seconds = interleaved(contenders, rounds, done)
    rows = [_row(name, seconds, velocities, bundles_of.get(name)) for name in contenders]
    named = [f"{backend} {SQS}" for backend in BACKENDS]
    starts = [cold_start(bundles[name]) for name in named if shape not in SHAPES and name in bundles]
    batch, _, latents = inputs["x"].shape
    described = f"{batch} x {latents + 1} tokens, D {checkpoint.sizes.dit.embed_dim}"
    return Report(shape, described, threads, rounds, tuple(rows), tuple(starts))


def check_shape(shape: str) -> None:
    """Raises UserError for what is neither a known shape nor a folder."""
    if shape not in ("demo", *SHAPES) and not expanded(shape).is_dir():
        raise UserError(f"unknown --shape {shape}: give demo, {', '.join(SHAPES)} or a checkpoint folder")


def interleaved(
    contenders: Mapping[str, Step], rounds: int, done: Callable[[int], object] = lambda n: None
) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round; each comes first once, and runs a step untimed before."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index, order in enumerate(turns(names, rounds)):
        for name in order:
            step = contenders[name]
            step()
            start = time.perf_counter()
            calls = 0
            while calls < 1 or (time.perf_counter() - start < 0.05 and calls < 20):
                step()
                calls += 1
            seconds[name].append((time.perf_counter() - start) / calls)
        done(index + 1)
    return seconds


def _row(
    name: str, seconds: Mapping[str, Sequence[float]], velocities: Mapping[str, Float], bundle: Bundle | None
) -> Row:
    exact = velocities[BASELINE].astype(np.float64)
    error = float(np.linalg.norm(velocities[name] - exact) / np.linalg.norm(exact))
    ratios = [base / own for base, own in zip(seconds[BASELINE], seconds[name])]
    parts = {} if bundle is None else bundle_parts(bundle)
    graphs = () if bundle is None else step_graphs(bundle.manifest.get("step_sigmas", ()))
    sqs = None if bundle is None else seconds.get(f"{bundle.backend} {SQS}")
    return Row(
        name,
        _spread([1000 * s for s in seconds[name]]),
        _spread(ratios),
        None if sqs is None else median_interval([own / base for own, base in zip(seconds[name], sqs)]),
        error,
        0 if bundle is None else bundle.manifest["linears"],
        0 if bundle is None else bundle.manifest["int8_linears"],
        None if bundle is None else bundle.size_bytes,
        None if bundle is None else sum(parts[graph] for graph in graphs),
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, p10, p90."""
    return tuple(float(v) for v in np.percentile(values, (50, 10, 90)))  # type: ignore[return-value]


# -------------------- contenders


def torch_step(checkpoint: Checkpoint, inputs: Mapping[str, Float], threads: int) -> Step:
    """The DiT in PyTorch, eager, fp32: what a user of stable-audio-tools has on a CPU."""
    return dit_step(torch_dit(checkpoint, threads), inputs)


def torch_dit(checkpoint: Checkpoint, threads: int) -> DiffusionTransformer:
    """The DiT with the checkpoint's weights, each in memory once; PyTorch gets so many threads."""
    torch.set_num_threads(threads)
    with torch.device("meta"):
        dit = DiffusionTransformer(checkpoint.sizes.dit)
    weights = {name: torch.from_numpy(checkpoint.tensor(DIT_PREFIX + name)) for name in dit.state_dict()}
    dit.load_state_dict(weights, assign=True)
    return dit.eval().requires_grad_(False)


def dit_step(dit: DiffusionTransformer, inputs: Mapping[str, Float]) -> Step:
    """One step; `inputs` are those of the step graph."""
    t = {name: torch.from_numpy(value) for name, value in inputs.items()}
    pairs = [(t[f"context_k.{i}"], t[f"context_v.{i}"]) for i in range(dit.config.depth)]
    prepend = (t["global_embed"] + t["time_embed"])[:, None]
    cos, sin = dit.transformer.rotary_pos_emb.tables(t["x"].shape[-1] + 1)

    def step() -> Float:
        with torch.inference_mode():
            return dit.step(t["x"], prepend, pairs, cos, sin).numpy()

    return step


def _has_bf16() -> bool:
    return BACKENDS["openvino"].load().has_bf16()


def engine_step(bundle: Bundle, inputs: Mapping[str, Float], threads: int, precision: str | None = None) -> Step:
    """A bundle's step engine as the sampling loop drives it: conditioning bound once, what changes every step.

    `inputs` are the unquantized model's; a quantized bundle's context has its own scale, so its is made by itself.
    precision: of what is not quantized, where the backend has a choice.
    """
    pipeline = Pipeline(bundle)
    settings = _settings(pipeline)
    conditioning = pipeline.condition(PROMPT, settings, pipeline.check_seconds(None))
    engine = open_step_engine(pipeline, threads, precision)
    return lambda: engine.run(conditioning, _RECORDED, inputs["x"])["velocity"]


# -------------------- what they run on

_RECORDED = 4  # the step whose inputs are used, of 8


def _settings(pipeline: Pipeline) -> Settings:
    """Eight deterministic steps with guidance, whatever the model's own are."""
    return pipeline.settings(steps=8, sampler=DETERMINISTIC[pipeline.objective], cfg_scale=7.0)


def _recorded_inputs(bundle: Bundle) -> dict[str, Float]:
    """All inputs of one step in the middle of an FP32 run."""
    pipeline = Pipeline(bundle)
    settings = _settings(pipeline)
    conditioning = pipeline.condition(PROMPT, settings, pipeline.check_seconds(None))
    seen: dict[int, Mapping[str, Float]] = {}
    pipeline.sample(conditioning, settings, observe=lambda step, inputs, _: seen.update({step: inputs}))
    return {**conditioning.constants, **seen[_RECORDED]}


def _checkpoint_folder(shape: str) -> str:
    if shape not in SHAPES:
        return shape
    folder = home() / "synthetic" / shape
    with locked(folder):
        if not (folder / "model_config.json").is_file():  # written last
            write_checkpoint(shape, folder)
    return str(folder)


def _bundles(shape: str, model: str, say: Say, more: Sequence[tuple[str, str, Recipe]] = ()) -> dict[str, Bundle]:
    """FP32 and SQS W8A8 of every backend that can run here, and `more`, by the name they have in the table."""
    calibration = CalibrationOptions() if shape == "demo" else CalibrationOptions(num_prompts=1, steps=8)
    folder = home() / "bench" / (shape if shape in ("demo", *SHAPES) else Checkpoint.open(model).digest[:16])
    found = {}
    always = [(backend, label, recipe) for label, recipe in _ALWAYS.items() for backend in BACKENDS]
    for backend, label, recipe in (*always, *more):
        if (why := BACKENDS[backend].unusable()) is not None:
            say(f"{backend} is left out: {why}")
            continue
        say(f"building {shape} for {backend}, {label}")
        own = hashlib.sha256(json.dumps(recipe.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        output = folder / f"{backend}-{recipe.method}-{own}"  # its own: `run` takes the newest of the home folder
        found[f"{backend} {label}"] = build(recipe, model, backend, output, calibration).bundle
    return found


def cold_start(bundle: Bundle, runs: int = 3) -> ColdStart:
    """Whole processes of `dit-trt run`, the first with no compiled blobs in its home."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from dit_trt.tooling.cli import main; main(prog_name='dit-trt')"]
        arguments = ["run", PROMPT, "--bundle", str(bundle.folder), "--output", str(Path(folder) / "clip.wav")]
        for _ in range(1 + runs):
            start = time.perf_counter()
            subprocess.run(
                command + arguments,
                check=True,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "DIT_TRT_HOME": folder},
            )
            seconds.append(time.perf_counter() - start)
    return ColdStart(bundle.backend, seconds[0], statistics.median(seconds[1:]))


def machine() -> str:
    """The processor, its int8 instructions and the versions that were measured."""
    versions = {name: kind.load().runtime_version() for name, kind in BACKENDS.items() if kind.unusable() is None}
    versions = {"torch": torch.__version__, **versions}
    told = ", ".join(f"{name} {number.partition('-')[0]}" for name, number in versions.items())
    return f"{_processor()}; Python {platform.python_version()}, {told}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8") if info.is_file() else ""
    fields = dict(line.partition(":")[::2] for line in text.splitlines())
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8") if name in facts.get("flags", "").split()]
    return f"{facts.get('model name') or platform.machine()}, {cores()} cores, {' '.join(flags) or 'no VNNI'}"


# -------------------- the report


def markdown(report: Report) -> str:
    """A report as the table that docs/results.md shows."""
    lines = [
        f"**{report.shape}**: {report.inputs}, {report.threads} threads, {report.rounds} interleaved rounds",
        "",
        f"| | step, ms (p10-p90) | speed-up over {BASELINE} | time over SQS (95 %) | relative error | Linears in int8 "
        "| bundle | step graph |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        lines.append(
            f"| {row.name} | {_range(row.step_ms, '{:.1f}')} | {_range(row.speedup, '{:.2f}')} "
            f"| {'' if row.over_sqs is None else _range(row.over_sqs, '{:.3f}')} "
            f"| {row.relative_error:.2g} | {row.int8_linears} of {row.linears} "
            f"| {_megabytes(row.bundle_bytes)} | {_megabytes(row.step_graph_bytes)} |"
        )
    _, low, high = report.rows[0].step_ms
    if report.rounds < 5 or high > 1.5 * low:
        why = f"{report.rounds} rounds" if report.rounds < 5 else f"{BASELINE} took {low:.0f} to {high:.0f} ms"
        lines += ["", f"Read with care: {why}; run it again on an idle machine, with more rounds."]
    for start in report.cold_starts:
        lines += ["", f"{start.backend}: process start to WAV {start.later:.1f} s ({start.first:.1f} s the first time)"]
    return "\n".join(lines)


def _range(values: tuple[float, float, float], form: str) -> str:
    middle, low, high = (form.format(value) for value in values)
    return f"**{middle}** ({low}-{high})"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"
