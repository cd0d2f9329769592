"""Every method as a plain simulation: the DiT in torch whose Linears compute with fake-quantized numbers.

No folds, no graphs, no engines: X / s and s W are taken as the formulas have them (paper eq. 1-9). What an engine loses
against this is the engine's; what this loses against FP32 is the method's. `step_channel`, the paper's own simulation
of SQD, exists only here: no integer product has a range for every channel and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engines.base import Engine
from ..engines.bundle import Bundle
from ..exporters.checkpoint import Checkpoint
from ..exporters.conditioners import MultiConditioner
from ..exporters.dit import DiffusionTransformer
from ..exporters.float_graphs import ConditioningGraph, StepGraph, context_names
from ..exporters.int4 import expand
from ..exporters.linears import DIT_PREFIX
from ..exporters.quantized import LARGEST, Weight
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline, Settings
from ..runtime.step_engine import Conditioning, graph_index
from .quantize import Quantized, QuantizedRange, quantize_model, range_bounds
from .recipe import Recipe
from .tables import Calibration
from .weights import dequantize_weight

Float = NDArray[np.float32]
Function = Callable[[Mapping[str, NDArray]], dict[str, Float]]
# (a Linear's numbers, its bias, the current step's tables) -> what computes in its place
Simulated = Callable[[Quantized, Tensor | None, Mapping[str, Tensor]], nn.Module]


def fake_quantize(x: Tensor, scale: Tensor | float, levels: int = 127) -> Tensor:
    """round(x / scale) to even, clipped to int8 (or to +-7), times scale."""
    return (x / scale).round().clamp(-128 if levels == 127 else -levels, levels) * scale


def _engine_group(weight: Weight) -> int:
    """About OpenVINO's choice of channels that share a range, which is one for a whole graph: see openvino_int4."""
    width = weight.integers.shape[1]
    if weight.scale.ndim == 1:
        return min(128, width)
    return next((group for group in (128, 64, 32, 16) if width // weight.scale.shape[1] % group == 0), width)


class SimulatedLinear(nn.Module):
    """One Linear by its method's formula. `tables` holds the current step's (see SimulatedModel)."""

    def __init__(self, item: Quantized, bias: Tensor | None, tables: Mapping[str, Tensor]):
        super().__init__()
        self._item, self._tables, self._bias = item, tables, bias
        weight, branch = item.whole()
        self._group = _engine_group(weight)
        if item.activation.range != "engine" and weight.bits == 4:
            weight = Weight(*expand(weight))  # groups of 4 bits are rounded once more, to int8
        self._weight = torch.from_numpy(dequantize_weight(weight))
        self._weight_step = torch.from_numpy(weight.scale.astype(np.float32))[:, None]
        self._s = torch.from_numpy(item.s)
        self._branch = None
        if branch is not None:
            self._branch = torch.from_numpy(branch.a.astype(np.float32)), torch.from_numpy(branch.b.astype(np.float32))
        self._parts = list(item.linear.parts.values())

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        ratio = self._item.activation.difference
        if ratio is None:
            y = self._product(x)
        else:
            ratio = float(self._tables.get(f"difference/{self._item.linear.name}", torch.tensor(ratio)))
            d, u = self._product(torch.stack(((x[0] - x[1]) * ratio, x[1])))
            y = torch.stack((u + d / ratio, u))
        if self._bias is not None:
            y = y + self._bias
        return y if len(self._parts) == 1 else y.split(self._parts, dim=-1)

    def _product(self, x: Tensor) -> Tensor:
        """x [batch, tokens, in] -> [batch, tokens, out], without the bias."""
        item, name = self._item, self._item.linear.name
        if item.by_step:
            s, sigma = self._tables[f"smoothing/{name}"], self._tables[f"weight_scale/{name}"][:, None]
            delta, weight = self._tables[f"delta/{name}"], fake_quantize(self._weight / self._s * s, sigma)
            y = self._multiply(fake_quantize(x / s, delta), delta, weight, sigma)
        elif item.activation.range == "engine":
            y = self._rounded_in_groups(x / self._s) @ self._weight.T
        else:
            smoothed = x / self._s
            step = self._step(smoothed)
            y = self._multiply(fake_quantize(smoothed, step), step, self._weight, self._weight_step)
        if self._branch is not None:
            a, b = self._branch
            y = y + (x / self._s) @ a @ b
        return y

    def _multiply(self, x: Tensor, x_step: Tensor | float, weight: Tensor, weight_step: Tensor) -> Tensor:
        """x [..., in] weight^T, as integers are multiplied: both are whole multiples of their steps.

        x_step: a number, or one a token [..., 1]; weight_step [out, 1].
        """
        return x @ weight.T

    def _step(self, smoothed: Tensor) -> Tensor | float:
        """What the input is rounded to multiples of: a number, or one a token [..., 1]."""
        activation = self._item.activation
        match activation.range:
            case "step":
                return activation.scale / self._tables[f"range/{self._item.linear.name}"]
            case "token":
                absmax = smoothed.abs().amax(-1, keepdim=True)
                return (absmax / 127).clamp_min(activation.scale)
        return activation.scale

    def _rounded_in_groups(self, smoothed: Tensor) -> Tensor:
        """Every token and group of channels by itself."""
        width = smoothed.shape[-1]
        padded = nn.functional.pad(smoothed, (0, -width % self._group))
        groups = padded.unflatten(-1, (-1, self._group))
        absmax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        return fake_quantize(groups, absmax / 127).flatten(-2)[..., :width]


class StepChannelLinear(SimulatedLinear):
    """The paper's own SQD: X / s[t] by a range for every channel and step, s[t] W rounded from the original W.

    weight [out, in]; levels: 127, or 7 for 4 bits. The table `channel/<name>` has absmax_x / s[t] / 127 [in].
    """

    def __init__(self, item: Quantized, bias: Tensor | None, tables: Mapping[str, Tensor], weight: Float, levels: int):
        super().__init__(item, bias, tables)
        self._weight, self._levels = torch.from_numpy(weight), levels

    def _product(self, x: Tensor) -> Tensor:
        name = self._item.linear.name
        s, sigma = self._tables[f"smoothing/{name}"], self._tables[f"weight_scale/{name}"][:, None]
        weight = fake_quantize(self._weight * s, sigma * (127 / self._levels), self._levels)
        return fake_quantize(x / s, self._tables[f"channel/{name}"]) @ weight.T


def step_channel_model(
    checkpoint: Checkpoint, calibration: Calibration, alpha: float = 0.5, bits: Literal[8, 4] = 8
) -> SimulatedModel:
    """The simulation that the paper evaluates as SQD. `to_kv`, which runs once a prompt, is SQS in it."""
    [one] = quantize_model(checkpoint, Recipe("sqd", alpha=alpha, sqd_weights="requantize"), calibration)
    for name, item in one.linears.items():
        if item.by_step:
            channels = calibration.absmax[name] / one.tables[f"smoothing/{name}"] / np.float32(127)
            one.tables[f"channel/{name}"] = np.maximum(channels, np.float32(1e-12))

    def simulated(item: Quantized, bias: Tensor | None, tables: Mapping[str, Tensor]) -> SimulatedLinear:
        if not item.by_step:
            return SimulatedLinear(item, bias, tables)
        return StepChannelLinear(item, bias, tables, checkpoint.tensor(item.linear.key()), LARGEST[bits])

    return SimulatedModel(checkpoint, [one], simulated)


def conditioning_module(checkpoint: Checkpoint, dit: DiffusionTransformer) -> ConditioningGraph:
    """The conditioning graph in torch, of a checkpoint and its DiT, without the text encoder that ran before it."""
    with torch.device("meta"):
        conditioner = MultiConditioner(checkpoint.config)
    del conditioner.conditioners["prompt"]  # it may be larger than the DiT
    _load(conditioner, "conditioner.", checkpoint)
    return ConditioningGraph(dit, conditioner)


def step_module(checkpoint: Checkpoint, dit: DiffusionTransformer) -> StepGraph:
    """The step graph in torch, of a checkpoint and its DiT."""
    step = StepGraph(dit, checkpoint.sizes.max_latents)
    for name in ("cos", "sin"):
        step.rope.register_buffer(name, torch.from_numpy(checkpoint.tensor(f"rope.{name}")))
    return step.eval()


def float_dit(checkpoint: Checkpoint) -> DiffusionTransformer:
    dit = DiffusionTransformer(checkpoint.sizes.dit)
    _load(dit, DIT_PREFIX, checkpoint)
    return dit


class SimulatedModel:
    """The conditioning and step graphs of a checkpoint, in torch, with simulated Linears."""

    def __init__(
        self, checkpoint: Checkpoint, ranges: Sequence[QuantizedRange], simulated: Simulated = SimulatedLinear
    ):
        self._names = context_names(checkpoint.sizes.dit.depth)
        self._numbers = checkpoint.sizes.conditioning.numbers
        dit = _simulated(checkpoint, ranges[0], "conditioning", {}, simulated)
        self._conditioning = conditioning_module(checkpoint, dit)
        self._ranges, self._bounds = list(ranges), range_bounds(ranges)
        self._tables: list[dict[str, Tensor]] = [{} for _ in ranges]
        self._steps = [
            step_module(checkpoint, _simulated(checkpoint, one, "step", tables, simulated))
            for one, tables in zip(ranges, self._tables)
        ]

    @torch.inference_mode()
    def conditioning(self, inputs: Mapping[str, NDArray]) -> dict[str, Float]:
        """As the conditioning graph: see float_graphs.ConditioningGraph."""
        t = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        found = self._conditioning(*(t[name] for name in ("prompt_embeds", *self._numbers, "keep", "t")))
        return {name: tensor.numpy() for name, tensor in zip(("global_embed", "time_embed", *self._names), found)}

    @torch.inference_mode()
    def step(self, inputs: Mapping[str, NDArray]) -> dict[str, Float]:
        """velocity [2, channels, latents] of the step graph's inputs and `sigma` [], which says what step it is."""
        sigma = float(inputs["sigma"])
        index = graph_index(sigma, self._bounds)
        one = self._ranges[index]
        self._tables[index] |= {name: _at(sigma, one.sigmas, table) for name, table in one.tables.items()}
        t = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items() if name != "sigma"}
        context = [t[name] for name in self._names]
        return {"velocity": self._steps[index](t["x"], t["global_embed"], t["time_embed"], context).numpy()}


def _at(sigma: float, sigmas: NDArray[np.float64], table: Float) -> Tensor:
    """table[t] between the calibrated steps: log over log sigma, linearly."""
    x, logs = np.log(sigmas[::-1]), np.log(table[::-1].astype(np.float64))
    upper = int(np.clip(np.searchsorted(x, np.log(sigma)), 1, len(x) - 1)) if len(x) > 1 else 0
    if len(x) == 1:
        return torch.from_numpy(table[0].astype(np.float32))
    weight = float(np.clip((np.log(sigma) - x[upper - 1]) / (x[upper] - x[upper - 1]), 0, 1))
    return torch.from_numpy(np.exp(logs[upper - 1] * (1 - weight) + logs[upper] * weight).astype(np.float32))


def _simulated(
    checkpoint: Checkpoint, one: QuantizedRange, graph: str, tables: Mapping[str, Tensor], simulated: Simulated
) -> DiffusionTransformer:
    dit = float_dit(checkpoint)
    for item in one.linears.values():
        if item.linear.graph == graph:
            parent, _, name = item.linear.name.rpartition(".")
            bias = getattr(dit.get_submodule(item.linear.name), "bias", None)
            setattr(dit.get_submodule(parent), name, simulated(item, bias, tables))
    return dit.eval().requires_grad_(False)


def _load(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    state = {name: torch.from_numpy(checkpoint.tensor(prefix + name)) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


class SimulatedPipeline(Pipeline):
    """A float bundle's pipeline in which a simulated model takes the place of the conditioning and step engines."""

    def __init__(self, reference: Bundle, model: SimulatedModel):
        super().__init__(reference)
        shapes = graph_shapes(self.sizes)
        self._simulated = {
            "conditioning": _TorchEngine(model.conditioning, shapes["conditioning"]),
            "step": _TorchEngine(model.step, shapes["step"]),
        }

    always_pairs = True

    def engine(
        self, graph: str, steps: int = 0, latents: int | None = None, batch: int = 2, context: int | None = None
    ) -> Engine:
        return self._simulated.get(graph) or super().engine(graph, steps, latents, batch, context)

    def condition(self, prompt: str, settings: Settings, *args: Any, **options: Any) -> Conditioning:
        found = super().condition(prompt, settings, *args, **options)
        return replace(found, steps={**found.steps, "sigma": found.sigmas})


class _TorchEngine:
    """An engine by a plain function of its inputs, which stay bound between runs."""

    def __init__(self, function: Function, shapes: dict[str, tuple[int, ...]]):
        self.inputs = shapes
        self.outputs: list[str] = []
        self._function = function
        self._bound: dict[str, NDArray] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        self._bound |= inputs
        return dict(self._function(self._bound))

    def int8_matmuls(self) -> set[str]:
        """None: its numbers are floats that integers could be."""
        return set()
