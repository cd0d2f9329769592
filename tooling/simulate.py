"""Every method as a plain simulation: the DiT in torch whose Linears compute with fake-quantized numbers.

No folds, no graphs, no engines: X / s and s W are taken as the formulas have them (DESIGN section 4; paper eq. 1-9).
What an engine loses against this is the engine's; what this loses against FP32 is the method's. `step-channel`, the
paper's own simulation of SQD, exists only here: no integer product has a range for every channel and step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..exporters.checkpoint import Checkpoint
from ..exporters.conditioners import MultiConditioner
from ..exporters.dit import DiffusionTransformer
from ..exporters.float_graphs import ConditioningGraph, StepGraph, context_names
from ..exporters.linears import DIT_PREFIX
from .quantize import Quantized, QuantizedRange
from .weights import dequantize_weight

Float = NDArray[np.float32]


def fake_quantize(x: Tensor, scale: Tensor | float) -> Tensor:
    """round(x / scale) to even, clipped to int8, times scale."""
    return (x / scale).round().clamp(-128, 127) * scale


class SimulatedLinear(nn.Module):
    """One Linear by its method's formula. `tables` holds the current step's (see SimulatedModel)."""

    def __init__(self, item: Quantized, bias: Tensor | None, tables: dict[str, Tensor]):
        super().__init__()
        self._item, self._tables, self._bias = item, tables, bias
        weight, branch = item.whole()
        self._weight = torch.from_numpy(dequantize_weight(weight))
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
            y = fake_quantize(x / s, self._tables[f"delta/{name}"]) @ fake_quantize(self._weight / self._s * s, sigma).T
        else:
            y = self._rounded(x / self._s) @ self._weight.T
        if self._branch is not None:
            a, b = self._branch
            y = y + (x / self._s) @ a @ b
        return y

    def _rounded(self, smoothed: Tensor) -> Tensor:
        activation = self._item.activation
        match activation.range:
            case "static":
                return fake_quantize(smoothed, activation.scale)
            case "step":
                return fake_quantize(smoothed, activation.scale / self._tables[f"range/{self._item.linear.name}"])
            case _:
                absmax = smoothed.abs().amax(-1, keepdim=True)
                return fake_quantize(smoothed, (absmax / 127).clamp_min(activation.scale))


class SimulatedModel:
    """The conditioning and step graphs of a checkpoint with simulated Linears, each with the interface of an `Engine`.

    The step's inputs are those of the graph and `sigma` [], of which the step's tables and range are found.
    """

    def __init__(self, checkpoint: Checkpoint, ranges: Sequence[QuantizedRange]):
        self._checkpoint = checkpoint
        conditioner = MultiConditioner(checkpoint.config)
        _load(conditioner, "conditioner.", checkpoint)
        self.conditioning = ConditioningGraph(_simulated(checkpoint, ranges[0], "conditioning", {}), conditioner)
        self._ranges = list(ranges)
        self._tables: list[dict[str, Tensor]] = [{} for _ in ranges]
        self._steps = [
            StepGraph(_simulated(checkpoint, one, "step", tables), checkpoint.sizes.max_latents)
            for one, tables in zip(ranges, self._tables)
        ]
        for step in self._steps:
            for name in ("cos", "sin"):
                step.rope.register_buffer(name, torch.from_numpy(checkpoint.tensor(f"rope.{name}")))

    @torch.inference_mode()
    def step(self, inputs: Mapping[str, NDArray]) -> Float:
        """The velocity [2, channels, latents]."""
        sigma = float(inputs["sigma"])
        lowest = [one.sigmas[-1] for one in self._ranges[:-1]]
        index = sum(sigma < bound * (1 - 1e-6) for bound in lowest)
        one = self._ranges[index]
        self._tables[index] |= {name: _at(sigma, one.sigmas, table) for name, table in one.tables.items()}
        t = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items() if name != "sigma"}
        context = [t[name] for name in context_names(self._checkpoint.sizes.dit.depth)]
        return self._steps[index](t["x"], t["global_embed"], t["time_embed"], context).numpy()


def _at(sigma: float, sigmas: NDArray[np.float64], table: Float) -> Tensor:
    """table[t] between the calibrated steps: log over log sigma, linearly."""
    x, logs = np.log(sigmas[::-1]), np.log(table[::-1].astype(np.float64))
    upper = int(np.clip(np.searchsorted(x, np.log(sigma)), 1, len(x) - 1)) if len(x) > 1 else 0
    if len(x) == 1:
        return torch.from_numpy(table[0].astype(np.float32))
    weight = float(np.clip((np.log(sigma) - x[upper - 1]) / (x[upper] - x[upper - 1]), 0, 1))
    return torch.from_numpy(np.exp(logs[upper - 1] * (1 - weight) + logs[upper] * weight).astype(np.float32))


def _simulated(
    checkpoint: Checkpoint, quantized: QuantizedRange, graph: str, tables: dict[str, Tensor]
) -> DiffusionTransformer:
    dit = DiffusionTransformer(checkpoint.sizes.dit)
    _load(dit, DIT_PREFIX, checkpoint)
    for item in quantized.linears.values():
        if item.linear.graph == graph:
            parent, _, name = item.linear.name.rpartition(".")
            bias = getattr(dit.get_submodule(item.linear.name), "bias", None)
            setattr(dit.get_submodule(parent), name, SimulatedLinear(item, bias, tables))
    return dit.eval().requires_grad_(False)


def _load(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    module.load_state_dict({name: torch.from_numpy(checkpoint.tensor(prefix + name)) for name in module.state_dict()})
    module.eval().requires_grad_(False)
