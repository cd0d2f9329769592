"""Where the time of a step goes: by the runtime's own counters within the step graph, and by ours outside it.

A bundle samples some steps as `run` does, and again on engines that count what each of their layers takes. Counting
costs a little, most of all where layers are many and small: shares are to be trusted more than sums.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import BACKENDS, Engine
from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..engines.layers import Layer
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.step_engine import graph_index
from .plots import new_figure
from .timed_steps import cores, open_step_engine
from .vnni_peak import vnni_peak

Float = NDArray[np.float32]
PROMPT = "dog barking"
_LINEAR = re.compile(r"layers\.\d+\.(self_attn\.to_(?:qkv|out)|cross_attn\.to_(?:q|kv|out)|ff\.ff\.(?:0\.proj|2))\b")
OUTSIDE, BETWEEN = "outside the engine", "between its layers"
_GROUPS = {  # by a layer's own kind, of either runtime
    "norms": ("MVN", "LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "ReduceMean"),
    "attention": ("ScaledDotProductAttention", "Softmax", "MultiHeadAttention", "Attention", "MHA"),
    "quantizing": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Convert", "Cast"),
    "layout": (
        *("Reorder", "Transpose", "Concat", "Split", "VariadicSplit"),
        *("Slice", "StridedSlice", "Reshape", "Gather"),
    ),
}
_PRODUCTS = (
    *("FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul", "FusedMatMul", "Gemm"),
    *(
        "Convolution",
        "Conv",
        "FusedConv",
        "GatherMatmul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "QLinearMatMul",
        "DynamicQuantizeMatMul",
    ),
)


@dataclass(frozen=True)
class Group:
    """Layers of one kind in a step: how many, their milliseconds, their share of the step as `run` sees it."""

    name: str
    layers: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Roof:
    """The int8 Linears of a step against what the CPU can: multiply-adds, milliseconds (scaled as the groups'), and the
    multiply-adds a second of a loop on registers alone, as many threads; None where that cannot be measured.
    """

    macs: int
    milliseconds: float
    peak: float | None

    @property
    def share(self) -> float | None:
        """Of the peak."""
        return None if self.peak is None else self.macs / (self.milliseconds / 1000) / self.peak

    def __str__(self) -> str:
        rate = self.macs / self.milliseconds / 1e9
        told = f"{self.macs / 1e9:.2f} G multiply-adds in {self.milliseconds:.2f} ms, {rate:.2f} T a second"
        if self.peak is None or self.share is None:
            return told
        return f"{told}: {self.share:.0%} of the {self.peak / 1e12:.2f} T that a loop on registers alone gets"


@dataclass(frozen=True)
class Profile:
    """step_ms: of a whole step, sampler and guidance included, median; engine_ms: within `Engine.run`."""

    bundle: str
    backend: str
    steps: int
    threads: int | None
    step_ms: float
    engine_ms: float
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    int8_products: Roof | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "backend": self.backend,
            "steps": self.steps,
            "threads": self.threads,
            "step_ms": self.step_ms,
            "engine_ms": self.engine_ms,
            "int8_products": None if self.int8_products is None else vars(self.int8_products),
            "groups": [vars(group) for group in self.groups],
            "layers": [vars(layer) | {"group": group_of(layer)} for layer in self.layers],
        }


class _Timed:
    """An engine that notes how long each of its calls took."""

    def __init__(self, engine: Engine, seconds: list[float]):
        self._engine, self._seconds = engine, seconds
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        start = time.perf_counter()
        found = self._engine.run(inputs)
        self._seconds.append(time.perf_counter() - start)
        return found

    def int8_matmuls(self) -> set[str]:
        return self._engine.int8_matmuls()


def profile(
    bundle: Bundle, steps: int, threads: int | None = None, done: Callable[[int], object] = lambda steps: None
) -> Profile:
    """Sample `steps` steps, the first of which is not counted. Raises UserError for a backend that does not count."""
    if BACKENDS[bundle.backend].proof is not None:
        raise UserError(f"{bundle.backend} is not profiled here: NVIDIA's trtexec --dumpProfile reads its plans")
    pipeline = Pipeline(bundle)
    settings: Settings = pipeline.settings(steps=steps + 1)
    conditioning = pipeline.condition(PROMPT, settings, pipeline.check_seconds(None))
    plain = open_step_engine(pipeline, conditioning, threads)
    counting = open_step_engine(pipeline, conditioning, threads, profile=True)
    calls: list[float] = []
    context = pipeline.context_rows(conditioning)
    key = conditioning.batch, pipeline.sizes["max_latents"], context
    times: list[float] = []

    def on_step(step: int) -> None:
        times.append(time.perf_counter())
        done(step + 1)

    pipeline._step_engines[key] = plain.through(lambda engine: _Timed(engine, calls))
    pipeline.sample(conditioning, settings, on_step)
    pipeline._step_engines[key] = counting
    pipeline.sample(conditioning, settings)
    step_ms = 1000 * statistics.median(np.diff(times)[1:])
    engine_ms = 1000 * statistics.median(calls[1:])
    peak = vnni_peak(threads or cores())
    runs = Counter(graph_index(sigma, pipeline.step_sigmas) for sigma in conditioning.sigmas.tolist())
    weighted: list[tuple[Layer, float]] = []
    for index, engine in enumerate(counting.engines):  # of several step graphs each runs some of the steps
        share = runs[index] / len(conditioning.sigmas)
        weighted += [(layer, share) for layer in engine.layers()] if share else []  # type: ignore[attr-defined]
    layers = tuple(layer for layer, _ in weighted)
    groups = _groups(weighted, step_ms, engine_ms)
    roof = _roof(bundle, conditioning.batch, context, groups, peak)
    return Profile(str(bundle.folder), bundle.backend, steps, threads, step_ms, engine_ms, groups, layers, roof)


def _roof(bundle: Bundle, halves: int, context: int, groups: Sequence[Group], peak: float | None) -> Roof | None:
    """None for a step without int8 Linears. context: of how many halves cross attention is computed."""
    tokens = bundle.manifest["sizes"]["max_latents"] + 1
    of_step = [layer for layer in bundle.manifest["layers"] if layer["graph"] == "step" and layer["int8"]]
    ms = sum(group.milliseconds for group in groups if group.name.endswith(", int8"))
    if not of_step or not ms:
        return None
    macs = sum(
        (context if layer["kind"].startswith("cross_attn.") else halves) * layer["in_features"] * layer["out_features"]
        for layer in of_step
    )
    return Roof(tokens * macs, ms, peak)


def _groups(layers: Sequence[tuple[Layer, float]], step_ms: float, engine_ms: float) -> tuple[Group, ...]:
    """By time. What counters miss of the engine's time is between its layers; what they count too much goes."""
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for layer, share in layers:
        times[group_of(layer)] += 1000 * layer.seconds * share
        counts[group_of(layer)] += share
    total = sum(times.values())
    scale = min(1.0, engine_ms / total) if total else 1.0
    groups = [Group(name, round(counts[name]), scale * ms, scale * ms / step_ms) for name, ms in times.items()]
    groups.sort(key=lambda group: -group.milliseconds)
    between = max(0.0, engine_ms - total)
    rest = ((BETWEEN, between), (OUTSIDE, step_ms - engine_ms))
    return (*groups, *(Group(name, 0, ms, ms / step_ms) for name, ms in rest))


def group_of(layer: Layer) -> str:
    """`ff.ff.2, int8`; `attention`; ..."""
    if layer.kind in _PRODUCTS:
        for name in layer.nodes:
            if (match := _LINEAR.search(name)) is not None:
                return f"{match[1]}, {'int8' if layer.is_int8 else 'float'}"
        return "attention" if not layer.has_weight else "other products"
    if any(".x_q" in name for name in layer.nodes):
        return "quantizing"
    for group, kinds in _GROUPS.items():
        if layer.kind in kinds:
            return group
    if any("softmax" in name for name in layer.nodes):
        return "attention"
    return "element-wise"


def plot(path: Path, found: Profile) -> None:
    """The groups as bars, the longest first."""
    groups = sorted((group for group in found.groups if group.milliseconds > 0), key=lambda group: -group.milliseconds)
    figure = new_figure(1.2 + 0.3 * len(groups))
    axes = figure.subplots()
    places = range(len(groups))
    axes.barh(places, [group.milliseconds for group in groups])
    axes.set_yticks(places, [group.name for group in groups], fontsize=8)
    for place, group in zip(places, groups):
        axes.annotate(f" {group.share:.0%}", (group.milliseconds, place), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(f"{Path(found.bundle).name}, {found.backend}: {found.step_ms:.2f} ms a step", fontsize=9)
    axes.set_xlim(right=1.08 * groups[0].milliseconds)
    figure.savefig(path, dpi=144)
