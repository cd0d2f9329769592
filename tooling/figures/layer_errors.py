"""The error of every quantized Linear by itself: FP32's own inputs in, how far its output strays, step by step.

The float DiT runs in torch on a trajectory of FP32. Each Linear of the recipe is computed twice from the same input,
exactly and as simulate.py has it; what goes on to the next layer is the exact one, so no error meets another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...engines.bundle import Bundle
from ...exporters.checkpoint import Checkpoint
from ...runtime.pipeline import Settings
from ..fidelity import Forced
from ..quantize import Quantized, QuantizedRange
from ..simulate import SimulatedLinear, SimulatedModel, SimulatedPipeline

Float = NDArray[np.float32]
Table = NDArray[np.float64]


def layer_errors(
    checkpoint: Checkpoint,
    ranges: Sequence[QuantizedRange],
    reference: Bundle,
    prompt: str,
    settings: Settings,
    x: Float,
    steps: Sequence[int],
    done: Callable[[int], object] = lambda steps: None,
) -> dict[str, Table]:
    """||y' - y|| / ||y|| [len(steps)] by Linear name, y its output with bias over both CFG halves and all tokens.

    x [steps, channels, latents]: FP32's trajectory as the model sees it. A Linear that runs once a prompt has the same
    error at every step. done(n) counts up to len(steps).
    """
    found: dict[str, list[float]] = {name: [] for name in ranges[0].linears}

    def measured(item: Quantized, bias: Tensor | None, tables: Mapping[str, Tensor]) -> _Measured:
        weight = torch.from_numpy(checkpoint.tensor(item.linear.key()))
        return _Measured(SimulatedLinear(item, bias, tables), weight, bias, found[item.linear.name])

    pipeline = SimulatedPipeline(reference, SimulatedModel(checkpoint, ranges, measured))
    conditioning = pipeline.condition(prompt, settings, pipeline.check_seconds(None))
    velocity = Forced(pipeline, conditioning, settings.cfg_scale)
    for number, step in enumerate(steps):
        velocity(x[step], step)
        done(number + 1)
    return {name: np.resize(np.array(values), len(steps)) for name, values in found.items()}


class _Measured(nn.Module):
    """A Linear that is exact, and writes down how far its simulation is from it."""

    def __init__(self, simulated: nn.Module, weight: Tensor, bias: Tensor | None, errors: list[float]):
        super().__init__()
        self._simulated, self._weight, self._bias, self._errors = simulated, weight, bias, errors

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = nn.functional.linear(x, self._weight, self._bias)
        found = self._simulated(x)
        whole = found if isinstance(found, Tensor) else torch.cat(found, dim=-1)
        error, size = float((whole - y).double().norm()), float(y.double().norm())
        self._errors.append(error / size if size else float(np.inf if error else 0))
        return y if isinstance(found, Tensor) else y.split([part.shape[-1] for part in found], dim=-1)
