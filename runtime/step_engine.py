"""The step graphs of a bundle as one engine: the noise level chooses the graph, conditioning is handed over once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine

Float = NDArray[np.float32]


def cfg_halves(cfg_scale: float, always_pairs: bool) -> int:
    """How many halves a step computes: a guidance scale of 1 takes nothing of the unconditional one.

    always_pairs: the step graph takes both or none.
    """
    return 1 if cfg_scale == 1 and not always_pairs else 2


class ByStep(Protocol):
    """An array, or what else gives a step's input by its index."""

    def __getitem__(self, step: int, /) -> Float: ...


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What one prompt and one schedule make of the step engine's inputs, both CFG halves (row 0 is the prompt's).

    Of several clips (`together`) the prompts' halves come first, then the unconditional ones. contexts: how many halves
    have a context at all; without a negative prompt that of the unconditional one is zeros.
    constants: `global_embed` [2, embed_dim] and `context_k.i`, `context_v.i` [2, heads, tokens, dim_heads];
    steps: by input and then by step, `time_embed` [embed_dim] and, where the graph takes them, `step_scales` [n];
    sigmas: the noise levels of the steps, float64 [steps].
    """

    constants: Mapping[str, Float]
    steps: Mapping[str, ByStep]
    sigmas: NDArray[np.float64]
    clips: int = 1
    contexts: int = 2

    @property
    def context_rows(self) -> int:
        """The first rows of the batch, whose context is not zeros."""
        return min(self.contexts * self.clips, self.batch)

    @property
    def batch(self) -> int:
        """Rows that the step graphs see. Of one clip 2: both CFG halves; 1: the prompt's alone."""
        return len(self.constants["global_embed"])

    def prompt_half(self) -> Conditioning:
        """The same without the unconditional half, which a guidance scale of 1 takes nothing of."""
        return replace(self, constants={name: value[:1] for name, value in self.constants.items()})

    @classmethod
    def together(cls, clips: Sequence[Conditioning]) -> Conditioning:
        """Those of several clips of one schedule as one batch."""
        first = clips[0]
        if len(clips) == 1:
            return first
        halves = [
            [clip.constants[name][half] for half in range(first.batch) for clip in clips] for name in first.constants
        ]
        constants = dict(zip(first.constants, map(np.stack, halves)))
        return replace(first, constants=constants, clips=len(clips), contexts=max(clip.contexts for clip in clips))

    def constants_of(self, engine: Engine) -> dict[str, Float]:
        """What an engine is given once: of the context no more rows than it takes, where the others are zeros."""
        found = dict(self.constants)
        for name, value in self.constants.items():
            rows = engine.inputs[name][0] if name.startswith("context_") else 0
            if self.context_rows <= rows:
                found[name] = value[:rows]
        return found

    def at(self, step: int) -> dict[str, Float]:
        """The inputs of one step that change from step to step, but for x."""
        return {name: table[step] for name, table in self.steps.items()}


def graph_index(sigma: float, step_sigmas: Sequence[float]) -> int:
    """Which of the step graphs runs at `sigma`: the first whose lower bound it reaches."""
    return sum(sigma < bound for bound in step_sigmas)


class ByGraph:
    """An input that every step graph has a table of its own for: `[step]` is from that of the graph which runs it."""

    def __init__(self, tables: Sequence[ByStep], sigmas: NDArray[np.float64], step_sigmas: Sequence[float]):
        self._of_step = [tables[graph_index(sigma, step_sigmas)] for sigma in sigmas.tolist()]

    def __getitem__(self, step: int) -> Float:
        return self._of_step[step][step]


class StepEngine:
    """One compiled engine for each step graph, highest noise first; `step_sigmas` are the bounds between them.

    It remembers what each was given, so nobody else may feed them.
    """

    def __init__(self, engines: Mapping[str, Engine], step_sigmas: Sequence[float] = ()):
        self._names, self._engines = tuple(engines), tuple(engines.values())
        self._step_sigmas = step_sigmas
        self._bound: list[Conditioning | None] = [None] * len(engines)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, latents) of one clip"""
        return self._engines[0].inputs["x"][1:]

    def through(self, wrap: Callable[[Engine], Engine]) -> StepEngine:
        """The same graphs, each engine as `wrap` runs it."""
        return StepEngine(dict(zip(self._names, map(wrap, self._engines))), self._step_sigmas)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Highest noise first."""
        return self._engines

    def graph(self, conditioning: Conditioning, step: int) -> str:
        """The name of the graph that runs a step."""
        return self._names[graph_index(conditioning.sigmas[step], self._step_sigmas)]

    def run(self, conditioning: Conditioning, step: int, x: Float) -> dict[str, Float]:
        """x [batch, channels, latents] as the model sees it -> the graph's outputs, `velocity` among them."""
        index = graph_index(conditioning.sigmas[step], self._step_sigmas)
        inputs = {"x": x, **conditioning.at(step)}
        if self._bound[index] is not conditioning:
            inputs |= conditioning.constants_of(self._engines[index])  # an engine keeps what it was given
            self._bound[index] = None  # should it refuse them
        outputs = self._engines[index].run(inputs)
        self._bound[index] = conditioning
        return outputs
