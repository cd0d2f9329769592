"""The memory of a running calibration: taps of every call in, merged tables out, all of it on disk step by step."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engines.home import flush
from ..exporters.linears import Linear

Float = NDArray[np.float32]


class Journal:
    """What a calibration has learned so far, on disk after every step.

    `merged.npz` holds all finished prompts, `prompt-<p>-step-<i>.npz` the steps of the one that runs. Files appear
    whole: each is written under another name and renamed.
    """

    def __init__(
        self,
        folder: Path,
        prompts: int,
        steps: int,
        reservoir: int,
        linears: Sequence[Linear],
        sizes: Mapping[str, int],
    ):
        self._steps = steps
        self._linears = linears
        self._folder = folder
        self._folder.mkdir(exist_ok=True)
        self._slots = _slots(prompts, steps, reservoir, sizes)
        self._prompt, self._step = 0, 0
        self.finished_prompts = 0
        self.tables: dict[str, Float] = {}
        self._load()

    def _load(self) -> None:
        merged = self._folder / "merged.npz"
        if (known := _load_npz(merged)) is not None:
            self.finished_prompts = int(known.pop("prompts"))
            self.tables = known
            return
        for linear in self._linears:
            steps, k = (1 if linear.graph == "conditioning" else self._steps), linear.in_features
            self.tables[f"max/{linear.name}"] = np.full((steps, k), -np.inf, np.float32)
            self.tables[f"min/{linear.name}"] = np.full((steps, k), np.inf, np.float32)
            if linear.graph == "step":
                self.tables[f"difference/{linear.name}"] = np.zeros((steps, k), np.float32)
            self.tables[f"rows/{linear.name}"] = np.zeros((len(self._slots.prompt), k), np.float32)

    @property
    def finished_calls(self) -> int:
        """Calls of the DiT that need not be made again."""
        steps = sum(self._file(step).is_file() for step in range(self._steps))
        return self.finished_prompts * self._steps + steps

    def rows_per_call(self, graph: str) -> int:
        return self._slots.width(graph)

    def begin(self, prompt: int) -> None:
        self._prompt, self._step = prompt, 0

    def rows(self, graph: str) -> NDArray[np.int64]:
        """Which tokens the next call hands out, padded with the first."""
        wanted = self._slots.tokens(graph, self._prompt, self._step)[1]
        rows = np.zeros(self._slots.width(graph), np.int64)
        rows[: len(wanted)] = wanted
        return rows

    def replay(self) -> Float | None:
        """The velocity of the current step if it is known; its taps are merged and the step is done."""
        known = _load_npz(self._file(self._step))
        if known is None:
            return None
        velocity = known.pop("velocity")
        self._merge("step", known)
        self._step += 1
        return velocity

    def record(self, graph: str, taps: Mapping[str, Float], outputs: Mapping[str, Float]) -> None:
        if graph == "step":
            _savez(self._file(self._step), False, velocity=outputs["velocity"], **taps)
        self._merge(graph, taps)
        self._step += graph == "step"

    def _merge(self, graph: str, taps: Mapping[str, Float]) -> None:
        row = self._step if graph == "step" else 0
        slots = self._slots.tokens(graph, self._prompt, self._step)[0]
        for name, value in taps.items():
            table = self.tables[name]
            match name.partition("/")[0]:
                case "max" | "difference":
                    np.maximum(table[row], value, out=table[row])
                case "min":
                    np.minimum(table[row], value, out=table[row])
                case _:
                    table[slots] = value[: len(slots)]

    def finish(self, prompt: int) -> None:
        """All steps of a prompt are in: keep the merged tables, forget the steps."""
        _savez(self._folder / "merged.npz", True, prompts=np.array(prompt + 1), **self.tables)
        for step in range(self._steps):
            self._file(step).unlink(missing_ok=True)

    def discard(self) -> None:
        shutil.rmtree(self._folder)

    def _file(self, step: int) -> Path:
        # Named by prompt, so that steps left over from a finished prompt are never taken for the next one's.
        prompt = max(self._prompt, self.finished_prompts)
        return self._folder / f"prompt-{prompt:04d}-step-{step:04d}.npz"


@dataclass(frozen=True)
class _Slots:
    """Where each row of the reservoir comes from; arrays [reservoir]."""

    prompt: NDArray[np.int64]
    step: NDArray[np.int64]
    step_token: NDArray[np.int64]  # into the flattened [2 * tokens] of the step graph
    context_token: NDArray[np.int64]  # into the flattened [2 * context tokens] of the conditioning graph

    def tokens(self, graph: str, prompt: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The slots that one call fills, and their tokens."""
        if graph == "conditioning":
            slots = np.flatnonzero(self.prompt == prompt)
            return slots, self.context_token[slots]
        slots = np.flatnonzero((self.prompt == prompt) & (self.step == step))
        return slots, self.step_token[slots]

    def width(self, graph: str) -> int:
        """The most rows any call of a graph hands out."""
        cells = self.prompt if graph == "conditioning" else self.prompt * (self.step.max() + 1) + self.step
        return int(np.bincount(cells).max())


def _slots(prompts: int, steps: int, n: int, sizes: Mapping[str, int]) -> _Slots:
    """Stratified over steps and CFG halves, drawn over prompts and tokens, the same for the same plan."""
    rng = np.random.default_rng(0)
    order = np.arange(n)
    half = order % 2
    tokens, context = sizes["max_latents"] + 1, sizes["context_tokens"]
    return _Slots(
        prompt=rng.integers(0, prompts, n),
        step=slot_steps(steps, n),
        step_token=half * tokens + rng.integers(0, tokens, n),
        context_token=half * context + rng.integers(0, context, n),
    )


def slot_steps(steps: int, n: int) -> NDArray[np.int64]:
    """The step that each of a reservoir's n rows is taken from."""
    return np.arange(n) * steps // n


def _savez(path: Path, flushed: bool, **arrays: NDArray) -> None:
    """Written whole; `flushed` also for a power cut, where what it replaces is the only other copy."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        if flushed:
            flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _load_npz(path: Path) -> dict[str, NDArray] | None:
    """The arrays of a journal file; None when it is not there, or damaged (a power cut) and then removed."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        path.unlink()
        return None
