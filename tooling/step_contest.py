"""One step by bundles and by PyTorch, each in a process of its own that stays alive: time, memory, error, as a table.

All get the same input and the same prompt. They take turns in rounds, in an order that changes, one computing at a
time; a ratio is taken within a round. The error is that of the velocity against PyTorch fp32's, both guidance halves.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.bundle import Bundle
from ..engines.errors import UserError, last_line
from .process_memory import Memory
from .timed_steps import turns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .workflow import Watch

BASELINE = "torch fp32"  # of `torch_steps.VARIANTS`, which takes PyTorch to import
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class Contender:
    """A bundle under a name; precision of what is not quantized, None: the backend's own."""

    name: str
    folder: Path
    precision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """`[NAME=]FOLDER[:f32|:bf16]`; the name is the folder's, and the precision, where none is given.

        Raises UserError when there is no such folder.
        """
        name, _, folder = text.rpartition("=")
        head, _, tail = folder.rpartition(":")
        precision = tail if head and tail in PRECISIONS else None
        path = Path(head if precision else folder).expanduser()
        if not path.is_dir():
            raise UserError(f"--bundle {text}: there is no folder {path}; give one that dit-trt build wrote")
        return cls(name or path.resolve().name + (f", {precision}" if precision else ""), path, precision)


@dataclass(frozen=True)
class Rival:
    """A contender that is no bundle: what `step_child` is told to open it by. One that cannot is left out."""

    name: str
    kind: str
    more: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """The step that all compute: the `step`-th of `steps`, of so many latents, on a prompt, from seeded noise."""

    prompt: str
    latents: int
    seconds: float
    steps: int
    step: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Row:
    """One contender. Seconds, bytes; step_seconds and ratios (to PyTorch's time in the same round) by round.

    first_seconds: its first step, which no round counts. relative_error: ||v - v_torch|| / ||v_torch||. int8_linears:
    of a rival.
    """

    name: str
    open_seconds: float
    first_seconds: float
    after_open: Memory
    after_step: Memory
    relative_error: float
    int8_linears: int | None
    step_seconds: tuple[float, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Contest:
    """The baseline's row is the first."""

    model: str
    task: Task
    rounds: int
    rows: tuple[Row, ...]


class Child:
    """A contender's process; `with` ends it, whatever happened."""

    def __init__(self, name: str):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dit_trt.tooling.step_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **more: object) -> dict:
        """Raises UserError when the contender cannot, or has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **more}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise UserError(f"{self.name} died at {do} ({code}; -9: out of memory, most likely); leave it out")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.name}: {answer['error']}")
        return answer

    def memory(self) -> Memory:
        return Memory(**self.ask("memory"))


def run_contest(
    model: str,
    contenders: Sequence[Contender],
    task: Task,
    rounds: int,
    watch: Watch,
    say: Callable[[str], object] = lambda message: None,
    rivals: Sequence[Rival] = (),
    given_x: NDArray[np.float32] | None = None,
) -> Contest:
    """Open all contenders one after the other, then time them in `rounds` rounds. `model`: the checkpoint of all.

    given_x [2, channels, latents]: what the model sees (default: seeded noise). Raises UserError for two of one name,
    and for what a bundle refuses.
    """
    import numpy as np

    every: list[Contender | Rival] = [*contenders, Rival(BASELINE, "torch", {"variant": BASELINE}), *rivals]
    names = [entry.name for entry in every]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two contenders are called {', '.join(sorted(twice))}; name them with --bundle NAME=FOLDER")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        x, embeds = str(folder / "x.npy"), str(folder / "embeds.npy")
        channels = Bundle(contenders[0].folder).manifest["sizes"]["io_channels"]
        if given_x is None:
            rng = np.random.Generator(np.random.PCG64(task.seed))
            noise = rng.standard_normal((1, channels, task.latents), np.float32)
            given_x = noise.repeat(2, axis=0)  # what the model sees has unit variance at any noise level
        np.save(x, given_x)
        children = {name: stack.enter_context(Child(name)) for name in names}
        opened: dict[str, dict] = {}
        after_open: dict[str, Memory] = {}
        after_step: dict[str, Memory] = {}
        first: dict[str, float] = {}
        velocities: dict[str, np.ndarray] = {}
        common = {"model": model, "x": x, "seconds": task.seconds, "threads": task.threads, "prompt": task.prompt}
        common |= {"latents": task.latents, "steps": task.steps, "step": task.step}
        for entry in every:
            say(f"opening {entry.name}")
            child = children[entry.name]
            try:
                if isinstance(entry, Contender):
                    more = {"bundle": str(entry.folder), "precision": entry.precision}
                    answer = child.ask("open", kind="bundle", embeds=None if opened else embeds, **common, **more)
                else:
                    sigma = opened[names[0]]["sigma"]
                    answer = child.ask("open", kind=entry.kind, embeds=embeds, sigma=sigma, **common, **entry.more)
                after_open[entry.name] = child.memory()
                first[entry.name] = child.ask("step", velocity=str(folder / "velocity.npy"))["seconds"]
            except UserError as error:
                if isinstance(entry, Contender) or entry.name == BASELINE:
                    raise
                say(f"left out: {last_line(error)}")
                children.pop(entry.name).__exit__()  # with all that it holds
                continue
            opened[entry.name] = answer
            velocities[entry.name] = np.load(folder / "velocity.npy").astype(np.float64)
            after_step[entry.name] = child.memory()
        with watch("timing, rounds", rounds) as done:
            seconds = _rounds(children, rounds, done)
        for name, child in children.items():
            opened[name] |= child.ask("account")
            child.ask("quit")
    exact = velocities[BASELINE]
    rows = [
        Row(
            name,
            opened[name]["seconds"],
            first[name],
            after_open[name],
            after_step[name],
            float(np.linalg.norm(velocities[name] - exact) / np.linalg.norm(exact)),
            opened[name].get("int8_linears"),
            tuple(seconds[name]),
            tuple(base / own for base, own in zip(seconds[BASELINE], seconds[name])),
        )
        for name in (BASELINE, *(name for name in opened if name != BASELINE))
    ]
    return Contest(model, task, rounds, tuple(rows))


def _rounds(children: Mapping[str, Child], rounds: int, done: Callable[[int], object]) -> dict[str, list[float]]:
    """Seconds of a step of every child in every round; each comes first in turn."""
    names = list(children)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index, order in enumerate(turns(names, rounds)):
        for name in order:
            seconds[name].append(children[name].ask("turn")["seconds"])
        done(index + 1)
    return seconds


def contest_table(contest: Contest) -> str:
    """A contest as Markdown. Memory: allocated + mapped files, and the process's peak so far, in MB."""
    task = contest.task
    lines = [
        f"**{Path(contest.model).name}**: one step of 2 x {task.latents + 1} tokens ({task.seconds:.2f} s of sound), "
        f"step {task.step} of {task.steps}, {task.threads} threads, {contest.rounds} interleaved rounds",
        "",
        f"| | step, s (min-max) | speed-up over {BASELINE} (min-max) | relative error | open, s | first step, s "
        "| MB after open: RssAnon + RssFile (peak) | MB after a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in contest.rows:
        lines.append(
            f"| {row.name} | {_spread(row.step_seconds, '.3g')} | {_spread(row.ratios, '.2f')} "
            f"| {row.relative_error:.2g} | {row.open_seconds:.1f} | {row.first_seconds:.3g} "
            f"| {_memory(row.after_open)} | {_memory(row.after_step)} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    return f"**{statistics.median(values):{form}}** ({min(values):{form}}-{max(values):{form}})"


def _memory(memory: Memory) -> str:
    anon, file, peak = (round(size / 1e6) for size in (memory.rss_anon, memory.rss_file, memory.peak_rss))
    return f"{anon:,} + {file:,} ({peak:,})"
