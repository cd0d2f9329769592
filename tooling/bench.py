"""The same step by different means, in turn: how long each takes, as ratios within one run, and how far it strays.

Every contender is a process of its own (`step_contest`), gets the same input, recorded from a run of the FP32 model,
and computes one step of the DiT with both CFG halves. They take turns in rounds, in an order that changes, because a
busy machine slows down whoever runs just then; a ratio is taken within each round. All have the same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..engines.base import BACKENDS
from ..engines.bundle import Bundle
from ..engines.errors import UserError, last_line
from ..engines.home import expanded, home, locked
from ..engines.manifest import step_graphs
from ..exporters.checkpoint import Checkpoint
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.samplers import DETERMINISTIC
from . import step_contest
from .contents import bundle_parts
from .intervals import median_interval
from .peers import PEERS, calibration_calls, make, step_linears
from .process_memory import PROGRAM, Memory
from .recipe import Recipe
from .step_contest import BASELINE, Contender, Rival, Task, run_contest
from .synthetic_checkpoint import SHAPES, write_checkpoint
from .timed_steps import cores, turn, turns
from .torch_steps import DIFFUSERS, VARIANTS
from .workflow import CalibrationOptions, Say, Watch, build, silent, unwatched

Float = NDArray[np.float32]
Step = Callable[[], Float]
SQS = "int8 (SQS)"
_ALWAYS = {"fp32": Recipe("none"), SQS: Recipe("sqs")}
PROMPT = "dog barking"


@dataclass(frozen=True)
class Row:
    """One contender. step_ms: median, p10, p90 over rounds; speedup: the median of the rounds' ratios to the baseline,
    and its 95 % bootstrap interval.

    over_sqs: its time over that of SQS on the same backend, likewise. relative_error: of the velocity, ||v - v_fp32|| /
    ||v_fp32|| over both halves; linears: int8 of those asked for. first_seconds: its first step, with what it compiles.
    memory: of its process, after that: allocated, and the most of it and of mapped files together so far.
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
    first_seconds: float
    memory: Memory


@dataclass(frozen=True)
class ColdStart:
    """Seconds from process start to the WAV, 100 steps: the first run (compiles) and the median of later ones; and the
    median of later processes that end after their first step.
    """

    backend: str
    first: float
    later: float
    first_step: float


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
    peers: bool = False,
) -> Report:
    """Time one step of `shape` (`demo` or a synthetic one) by every means there is on this machine.

    more: backend, label and recipe of further contenders. peers: PyTorch's other ways, torchao, diffusers, NNCF and
    ONNX Runtime's quantizers too; those that are not installed, or cannot, are left out with the reason.
    """
    model = _checkpoint_folder(shape)
    checkpoint = Checkpoint.open(model)
    bundles = _bundles(shape, model, say, more)
    reference = next(bundle for bundle in bundles.values() if bundle.manifest["recipe"]["bits"] == "fp32")
    contenders = [Contender(name, bundle.folder) for name, bundle in bundles.items()]
    if _has_bf16() and f"openvino {SQS}" in bundles:
        for label in ("fp32", SQS):
            name = f"openvino {label}"
            contenders.append(Contender(f"{name}, rest in bf16", bundles[name].folder, "bf16"))
    floats = {bundle.backend: bundle for bundle in bundles.values() if bundle.manifest["recipe"]["bits"] == "fp32"}
    rivals = _rivals(shape, checkpoint, reference, floats, say) if peers else []
    quantizers = {rival.name for rival in rivals if rival.kind == "peer"} | {
        name for name in VARIANTS if VARIANTS[name].torchao
    }
    x = _recorded_input(reference)
    pipeline = Pipeline(reference)
    task = Task(PROMPT, x.shape[2], pipeline.check_seconds(None), RECORDED_STEPS, RECORDED, 0, threads)
    contest = run_contest(model, contenders, task, rounds, watch, say, rivals, x)
    places = {contender.name: Bundle(contender.folder) for contender in contenders}
    backends = {rival.name: PEERS[rival.more["peer"]].backend for rival in rivals if rival.kind == "peer"}
    seconds = {row.name: row.step_seconds for row in contest.rows}
    steps = sum(linear.graph == "step" for linear in checkpoint.linears)
    rows = [
        _row(row, seconds, places.get(row.name), backends.get(row.name), steps * (row.name in quantizers))
        for row in contest.rows
    ]
    named = [f"{backend} {SQS}" for backend in BACKENDS]
    starts = [cold_start(bundles[name]) for name in named if shape not in SHAPES and name in bundles]
    batch, _, latents = x.shape
    described = f"{batch} x {latents + 1} tokens, D {checkpoint.sizes.dit.embed_dim}"
    return Report(shape, described, threads, rounds, tuple(rows), tuple(starts))


def check_shape(shape: str) -> None:
    """Raises UserError for what is neither a known shape nor a folder."""
    if shape not in ("demo", *SHAPES) and not expanded(shape).is_dir():
        raise UserError(f"unknown --shape {shape}: give demo, {', '.join(SHAPES)} or a checkpoint folder")


def interleaved(
    contenders: Mapping[str, Step], rounds: int, done: Callable[[int], object] = lambda n: None
) -> dict[str, list[float]]:
    """Seconds a step of every contender in every round; each comes first in turn."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index, order in enumerate(turns(names, rounds)):
        for name in order:
            seconds[name].append(turn(contenders[name]))
        done(index + 1)
    return seconds


def _row(
    row: step_contest.Row,
    seconds: Mapping[str, Sequence[float]],
    bundle: Bundle | None,
    peer_backend: str | None,
    asked: int,
) -> Row:
    """seconds: of every contender, by round; asked: Linears that a rival was to quantize."""
    parts = {} if bundle is None else bundle_parts(bundle)
    graphs = () if bundle is None else step_graphs(bundle.manifest.get("step_sigmas", ()))
    backend = peer_backend if bundle is None else bundle.backend
    sqs = seconds.get(f"{backend} {SQS}")
    return Row(
        row.name,
        _spread([1000 * s for s in row.step_seconds]),
        median_interval(row.ratios),
        None if sqs is None else median_interval([own / base for own, base in zip(row.step_seconds, sqs)]),
        row.relative_error,
        asked if bundle is None else bundle.manifest["linears"],
        row.int8_linears or 0 if bundle is None else bundle.manifest["int8_linears"],
        None if bundle is None else bundle.size_bytes,
        None if bundle is None else sum(parts[graph] for graph in graphs),
        row.first_seconds,
        row.after_step,
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, p10, p90."""
    return tuple(float(v) for v in np.percentile(values, (50, 10, 90)))  # type: ignore[return-value]


# -------------------- contenders


def _has_bf16() -> bool:
    return BACKENDS["openvino"].load().has_bf16()


def _rivals(
    shape: str, checkpoint: Checkpoint, reference: Bundle, floats: Mapping[str, Bundle], say: Say
) -> list[Rival]:
    """PyTorch's and diffusers' ways, and the step graphs that other quantizers write of `reference`, made where they
    are not yet. floats: FP32 bundles by backend.
    """
    rivals = [Rival(name, "torch", {"variant": name}) for name in (*VARIANTS, DIFFUSERS) if name != BASELINE]
    options = _calibration(shape)
    settings = options.settings(checkpoint)

    asked = step_linears(checkpoint.linears)

    @cache
    def calls() -> list:
        say("calibrating the peers")
        count = 300 if shape == "demo" else settings.steps
        return calibration_calls(Pipeline(reference), options.chosen(), settings, count)

    for name, peer in PEERS.items():
        if BACKENDS[peer.backend].unusable() is not None:
            continue
        try:
            say(f"{name}: its step graph")
            graph = make(peer, reference, calls, checkpoint.linears, _folder(shape, checkpoint) / name)
        except Exception as error:  # theirs have no common base
            say(f"{name} is left out: {last_line(error)}")
            continue
        own = floats[peer.backend].folder  # whose conditioning it takes: that of its own backend
        more = {"peer": name, "graph": str(graph), "reference": str(own), "linears": asked}
        rivals.append(Rival(LABELS[name], "peer", more))
    return rivals


LABELS = {
    "nncf-int8": "NNCF int8 (TRANSFORMER)",
    "nncf-int8-same": "NNCF int8, our Linears",
    "nncf-int4": "NNCF int4 weights",
    "ort-static": "ONNX Runtime quantize_static",
    "ort-dynamic": "ONNX Runtime quantize_dynamic",
}


# -------------------- what they run on

RECORDED, RECORDED_STEPS = 4, 8  # the step whose input is used, and of how many


def _recorded_input(bundle: Bundle) -> Float:
    """x [2, channels, latents] of a step in the middle of an FP32 run, eight deterministic steps with guidance."""
    pipeline = Pipeline(bundle)
    sampler = DETERMINISTIC[pipeline.objective]
    settings: Settings = pipeline.settings(steps=RECORDED_STEPS, sampler=sampler, cfg_scale=7.0)
    conditioning = pipeline.condition(PROMPT, settings, pipeline.check_seconds(None))
    seen: dict[int, Float] = {}
    pipeline.sample(conditioning, settings, observe=lambda step, inputs, _: seen.update({step: inputs["x"].copy()}))
    return seen[RECORDED]


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
    calibration, folder = _calibration(shape), _folder(shape, Checkpoint.open(model))
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


def _calibration(shape: str) -> CalibrationOptions:
    return CalibrationOptions() if shape == "demo" else CalibrationOptions(num_prompts=1, steps=8)


def _folder(shape: str, checkpoint: Checkpoint) -> Path:
    return home() / "bench" / (shape if shape in ("demo", *SHAPES) else checkpoint.digest[:16])


def cold_start(bundle: Bundle, runs: int = 3) -> ColdStart:
    """Whole processes of `dit-trt run`, the first with no compiled blobs in its home."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["run", PROMPT, "--bundle", str(bundle.folder), "--output", str(Path(folder) / "clip.wav")]

        def seconds(*more: str) -> float:
            start = time.perf_counter()
            subprocess.run(
                [*PROGRAM, *arguments, *more],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "DIT_TRT_HOME": folder},
            )
            return time.perf_counter() - start

        first = seconds()
        later = [(seconds(), seconds("--stop-after", "1")) for _ in range(runs)]
    return ColdStart(bundle.backend, first, *(statistics.median(times) for times in zip(*later)))


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
        f"| | step, ms (p10-p90) | times {BASELINE}'s speed (95 %) | time over SQS (95 %) | relative error "
        "| Linears in int8 | bundle | step graph | first step, s | memory, MB (peak) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        lines.append(
            f"| {row.name} | {_range(row.step_ms, '{:.1f}')} | {_range(row.speedup, '{:.2f}')} "
            f"| {'' if row.over_sqs is None else _range(row.over_sqs, '{:.3f}')} "
            f"| {row.relative_error:.2g} | {row.int8_linears} of {row.linears} "
            f"| {_megabytes(row.bundle_bytes)} | {_megabytes(row.step_graph_bytes)} "
            f"| {row.first_seconds:.2g} | {row.memory.rss_anon / 1e6:,.0f} ({row.memory.peak_rss / 1e6:,.0f}) |"
        )
    _, low, high = report.rows[0].step_ms
    if report.rounds < 5 or high > 1.5 * low:
        why = f"{report.rounds} rounds" if report.rounds < 5 else f"{BASELINE} took {low:.0f} to {high:.0f} ms"
        lines += ["", f"Read with care: {why}; run it again on an idle machine, with more rounds."]
    for start in report.cold_starts:
        wav = f"to WAV {start.later:.1f} s ({start.first:.1f} s the first time)"
        lines += ["", f"{start.backend}: process start {wav}, to its end after the first step {start.first_step:.2f} s"]
    return "\n".join(lines)


def _range(values: tuple[float, float, float], form: str) -> str:
    middle, low, high = (form.format(value) for value in values)
    return f"**{middle}** ({low}-{high})"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f} MB"
