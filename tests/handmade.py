"""Quantized Linears by plain formulas, of every realization there is, and the model that rounds as they say.

Nothing of the product's quantizers is used. `Handmade.simulation` is torch's float model with every Linear replaced by
its formula on inputs that were never folded into anything: an oracle for whole graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_trt.engines.base import INT8, Dialect
from dit_trt.engines.home import home
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.conditioners import MultiConditioner
from dit_trt.exporters.dit import DiffusionTransformer
from dit_trt.exporters.float_graphs import ConditioningGraph, export_topologies
from dit_trt.exporters.linears import DIT_PREFIX, Linear
from dit_trt.exporters.qdq import Written, write_graph
from dit_trt.exporters.quantized import Activation, LowRank, QuantizedLinear, Slot, Weight
from dit_trt.runtime.graph_shapes import graph_shapes
from dit_trt.tooling.build import bundle_sizes
from dit_trt.tooling.smoothing import Smoothing, fold, smoothing_factor, smoothing_factors
from dit_trt.tooling.write_graphs import folded_weights

Float = NDArray[np.float32]
PROMPT_INPUTS = ("prompt_embeds", "seconds_start", "seconds_total", "keep", "t")
KINDS = ("static", "step", "token", "requantize")


def random_prompt(checkpoint: Checkpoint, random: np.random.Generator) -> dict[str, NDArray]:
    """What the conditioning graph reads, for one step: its PROMPT_INPUTS."""
    shape = graph_shapes(bundle_sizes(checkpoint), 1)["conditioning"]["prompt_embeds"]
    values = (
        random.standard_normal(shape).astype(np.float32),
        *(np.zeros(2, np.float32), np.float32([0.7, 0.7]), np.float32([1, 0]), np.float32([0.6])),
    )
    return dict(zip(PROMPT_INPUTS, values))


@dataclass
class Row:
    """One Linear. s [in]; integers [out, in], scale [out]: of W * s; a, b: its branch in the domain of x / s.

    requantize: s is the stored smoothing, the branch's domain that of x; tables has what changes with the step.
    """

    linear: Linear
    kind: str
    s: Float
    delta: float
    integers: NDArray[np.int8]
    scale: Float
    low_rank: LowRank | None

    def weight(self) -> Float:
        return self.integers * self.scale[:, None]


@dataclass
class Handmade:
    checkpoint: Checkpoint
    smoothing: Smoothing
    rows: dict[str, Row]
    tables: dict[str, Float] = field(default_factory=dict)  # [steps, width], see SPEC of Slot

    def quantized(self) -> dict[str, QuantizedLinear]:
        return {name: self._quantized(row) for name, row in self.rows.items()}

    def folded_rows(self, linear: Linear) -> Float:
        """[out]: what readers of this Linear folded into its rows."""
        return self.smoothing.rows.get(linear.name, np.ones(linear.out_features, np.float32))

    def _quantized(self, row: Row) -> QuantizedLinear:
        factor = self.folded_rows(row.linear)

        def weight(part: str) -> Weight:
            rows = row.linear.rows(part)
            return Weight(row.integers[rows], row.scale[rows] * factor[rows])

        def low_rank() -> LowRank:
            assert row.low_rank is not None
            return LowRank(row.low_rank.a, (row.low_rank.b * factor).astype(np.float16))

        requantize = row.kind == "requantize"
        activation = Activation("step" if requantize else row.kind, 1.0 if requantize else row.delta)  # type: ignore[arg-type]
        return QuantizedLinear(
            row.linear,
            activation,
            weight,
            None if row.low_rank is None else low_rank,
            row.s if requantize else None,
        )

    def write(
        self, folder: Path, dialect: Dialect = INT8, graphs: tuple[str, ...] = ("step", "conditioning")
    ) -> dict[str, Written]:
        """The graphs in a backend's dialect; what `write_graph` says of each."""
        topologies = export_topologies(self.checkpoint.config, home() / "graphs")
        weights = folded_weights(self.checkpoint, self.smoothing)
        folder.mkdir(parents=True, exist_ok=True)
        return {
            name: write_graph(
                topologies[name], folder / f"{name}.onnx", weights, self.quantized(), dialect, narrow=name == "step"
            )
            for name in graphs
        }

    def step_scales(self, slots: tuple[Slot, ...], step: int) -> Float:
        """The graph's input at a calibrated step."""
        pieces = []
        for slot in slots:
            value = slot.constant.astype(np.float64)
            for name, exponent in slot.powers.items():
                value = value * self.tables[name][step].astype(np.float64) ** exponent
            pieces.append(np.broadcast_to(value, slot.width))
        return np.concatenate([np.zeros(0), *pieces]).astype(np.float32)

    def simulation(self, step: int) -> DiffusionTransformer:
        """The DiT in float64, its quantized Linears computed as their formulas say for `step`."""
        dit = DiffusionTransformer(self.checkpoint.sizes.dit)
        state = {name: torch.from_numpy(self.checkpoint.tensor(DIT_PREFIX + name)) for name in dit.state_dict()}
        dit.load_state_dict(state)
        dit.eval().requires_grad_(False).double()
        for name, row in self.rows.items():
            module = dit.get_submodule(name)
            parts = None if list(row.linear.parts) == [""] else list(row.linear.parts.values())
            module.forward = _forward(self, row, module.bias, parts, step)  # type: ignore[method-assign]
        return dit

    def velocity(self, prompt: Mapping[str, NDArray], x: NDArray, step: int) -> NDArray:
        """What the conditioning and the step graph make together, without either; the time is prompt["t"][0]."""
        conditioner = MultiConditioner(self.checkpoint.config)
        state = {
            name: torch.from_numpy(self.checkpoint.tensor(f"conditioner.{name}")) for name in conditioner.state_dict()
        }
        conditioner.load_state_dict(state)
        dit = self.simulation(step)
        given = [torch.from_numpy(prompt[name]).double() for name in PROMPT_INPUTS]
        with torch.inference_mode():
            glob, times, *keys = ConditioningGraph(dit, conditioner).double()(*given)
            keys = keys[0] if isinstance(keys[0], list | tuple) else keys
            pairs = list(zip(keys[0::2], keys[1::2]))
            cos, sin = (table.double() for table in dit.transformer.rotary_pos_emb.tables(x.shape[-1] + 1))
            prepend = (glob + times[0])[:, None]
            return dit.step(torch.from_numpy(x).double(), prepend, pairs, cos, sin).numpy()

    def formula(self, row: Row, x: NDArray, step: int) -> tuple[NDArray, NDArray]:
        """x [..., in] that nothing was folded into -> its integers, and x W^T as the realization has it, in float64."""
        name, x = row.linear.name, x.astype(np.float64)
        weight = row.integers.astype(np.float64)
        match row.kind:
            case "static":
                f, g = 1 / (row.s * row.delta), row.delta * row.scale
            case "step":
                delta = row.delta / self.tables[f"range/{name}"][step]
                f, g = 1 / (row.s * delta), delta * row.scale
            case "token":
                amax = np.maximum(np.abs(x / row.s).max(axis=-1, keepdims=True), 127 * row.delta)
                f, g = 127 / (amax * row.s), amax / 127 * row.scale
            case "requantize":
                s, sigma, delta = (self.tables[f"{t}/{name}"][step] for t in ("smoothing", "weight_scale", "delta"))
                sigma = sigma / self.folded_rows(row.linear)
                weight = np.rint(row.weight().astype(np.float64) / row.s * s / sigma[:, None])
                f, g = 1 / (s * delta), sigma * delta
            case _:
                raise ValueError(row.kind)
        integers = np.clip(np.rint(x * f), -128, 127)
        y = integers @ weight.T * g
        if row.low_rank is not None:
            x = x if row.kind == "requantize" else x / row.s
            y += x @ row.low_rank.a.astype(np.float64) @ row.low_rank.b.astype(np.float64)
        return integers, y


def _forward(model: Handmade, row: Row, bias: torch.Tensor | None, parts: list[int] | None, step: int) -> Callable:
    def forward(x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        _, y = model.formula(row, x.numpy(), step)
        found = torch.from_numpy(y) if bias is None else torch.from_numpy(y) + bias
        return found if parts is None else found.split(parts, dim=-1)

    return forward


def handmade(
    checkpoint: Checkpoint,
    absmax: Mapping[str, Float],
    kinds: str | Callable[[Linear], str | None],
    rank: int = 0,
    levels: int = 127,
) -> Handmade:
    """kinds: of all Linears, or of each (None: float). `to_kv` is static wherever the others depend on the step.

    absmax: [steps, in] of every Linear. levels: the largest integer of a weight.
    """
    kind_of = kinds if callable(kinds) else lambda linear: str(kinds)
    chosen = {linear.name: kind_of(linear) for linear in checkpoint.linears}
    for linear in checkpoint.linears:
        if linear.graph == "conditioning" and chosen[linear.name] in ("step", "requantize"):
            chosen[linear.name] = "static"
    steps = max(len(table) for table in absmax.values())
    table = {name: np.broadcast_to(value, (steps, value.shape[1])) for name, value in absmax.items()}

    def absmax_w(linear: Linear) -> Float:
        return np.abs(checkpoint.tensor(linear.key())).max(axis=0)

    folded = [linear for linear in checkpoint.linears if chosen[linear.name] in ("static", "step", "token")]
    alphas = dict.fromkeys((linear.name for linear in folded), 0.5)
    factors = smoothing_factors(folded, checkpoint.sizes.dit, absmax, absmax_w, alphas)
    smoothing = fold(factors, checkpoint.linears, checkpoint.sizes.dit)
    model = Handmade(checkpoint, smoothing, {})
    for linear in checkpoint.linears:
        kind = chosen[linear.name]
        if kind is not None:
            model.rows[linear.name] = _row(model, linear, kind, table[linear.name], absmax_w(linear), rank, levels)
    return model


def _row(model: Handmade, linear: Linear, kind: str, table: Float, absmax_w: Float, rank: int, levels: int) -> Row:
    name, original = linear.name, model.checkpoint.tensor(linear.key())
    s = smoothing_factor(table.max(axis=0), absmax_w, 0.5) if kind == "requantize" else model.smoothing.factor[name]
    smoothed = original * s
    scale = np.maximum(np.abs(smoothed).max(axis=1), 1e-9) / np.float32(levels)
    integers = np.rint(smoothed / scale[:, None]).astype(np.int8)
    delta = (table / s).max(axis=1, keepdims=True) / 127  # [steps, 1]
    largest = float(delta.max())
    error = smoothed - integers * scale[:, None]
    if kind == "step":
        model.tables[f"range/{name}"] = np.float32(largest) / delta
    if kind == "requantize":
        steps = [smoothing_factor(row, absmax_w, 0.5) for row in table]
        stored = integers * scale[:, None] / s
        model.tables[f"smoothing/{name}"] = np.stack(steps)
        model.tables[f"delta/{name}"] = np.stack([(x / t).max(keepdims=True) / 127 for x, t in zip(table, steps)])
        sigma = [np.maximum(np.abs(stored * t).max(axis=1), 1e-9) / 127 for t in steps]
        model.tables[f"weight_scale/{name}"] = np.stack(sigma).astype(np.float32) * model.folded_rows(linear)
        error = original - stored
    low_rank = None
    if rank:
        u, values, v = np.linalg.svd(error.T.astype(np.float64), full_matrices=False)  # [in, out]
        root = np.sqrt(values[:rank])
        low_rank = LowRank((u[:, :rank] * root).astype(np.float16), (root[:, None] * v[:rank]).astype(np.float16))
    floor = 1e-8 * largest if kind == "token" else largest
    return Row(linear, kind, s, floor, integers, scale.astype(np.float32), low_rank)
