"""Calibration: a float model and prompts become a table of what its Linears' inputs look like, step by step.

The production sampler runs on the float graphs, whose taps hand out, for every Linear, the range of each input channel
over both CFG halves, and a seeded, stratified sample of tokens. The table is cached by content. Every step is written
to disk before the next begins, so an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ..engines.base import Engine, open_engine
from ..engines.bundle import Bundle, home
from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import export_topologies
from ..exporters.linears import Linear
from ..exporters.qdq import write_graph
from ..exporters.taps import ROWS, add_taps
from ..runtime.pipeline import Pipeline, Settings, graph_shapes

Float = NDArray[np.float32]
RESERVOIR = 512
SHIPPED = "calibration.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What a calibration runs: prompts under the production settings; its digest keys the cache."""

    checkpoint: str
    prompts: tuple[str, ...]
    settings: Settings
    reservoir: int = RESERVOIR

    @property
    def digest(self) -> str:
        text = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> Path:
        return home() / "calibration" / self.digest[:16]

    @property
    def table(self) -> Path:
        return self.folder / "table.safetensors"

    @property
    def calls(self) -> int:
        return len(self.prompts) * self.settings.steps


def load_absmax(path: Path, checkpoint: Checkpoint) -> dict[str, Float]:
    """The table at `path` as absmax of every Linear's input channels, [steps, in] (one row where it never changes).

    Raises UserError when it is unreadable or belongs to another checkpoint.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, ValueError, Exception) as error:
        raise UserError(f"the calibration table {path} cannot be read ({error}); use --recalibrate") from None
    if metadata.get("checkpoint") != checkpoint.digest:
        raise UserError(f"the calibration table {path} belongs to another checkpoint; use --recalibrate")
    absmax = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "absmax":
            absmax[name] = value.astype(np.float32)
        elif kind == "max":
            absmax[name] = np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"]))
    return absmax


def shipped_table(checkpoint: Checkpoint) -> Path | None:
    """The table that came with a checkpoint, if it belongs to these very weights."""
    path = checkpoint.folder / SHIPPED
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return path if (file.metadata() or {}).get("checkpoint") == checkpoint.digest else None
    except Exception:  # a damaged shipped table is the same as none: calibration makes a new one
        return None


def slim_table(table: Path, target: Path) -> None:
    """A table small enough to ship: absmax only, in fp16 rounded up."""
    with safe_open(table, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(table)
    slim = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "max":
            absmax = np.maximum(np.abs(value), np.abs(tensors[f"min/{name}"]))
            half = absmax.astype(np.float16)
            slim[f"absmax/{name}"] = np.where(half < absmax, np.nextafter(half, np.float16(np.inf)), half)
    save_file(slim, target, metadata)


def calibrate(
    checkpoint: Checkpoint,
    reference: Bundle,
    plan: Plan,
    on_step: Callable[[int], object] = lambda done: None,
) -> Path:
    """Run `plan` on the float model and return its table, from the cache when it is there.

    reference: the float bundle of the same checkpoint; its text graph, sizes and backend are used.
    on_step(done) is called with the number of finished calls of the DiT, first with those of an earlier run.
    """
    if plan.table.is_file():
        return plan.table
    plan.folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(plan, checkpoint.linears, reference.manifest["sizes"])
    graphs = _tapped_graphs(checkpoint, plan.folder / "graphs")
    on_step(journal.finished_calls)
    pipeline = TappedPipeline(reference, graphs, journal)
    seconds = pipeline.check_seconds(None)
    for index in range(journal.finished_prompts, len(plan.prompts)):
        journal.begin(index)
        settings = Settings(**{**asdict(plan.settings), "seed": plan.settings.seed + index})
        conditioning = pipeline.condition(plan.prompts[index], settings, seconds)

        def stepped(step: int, index: int = index) -> None:
            on_step(index * plan.settings.steps + step + 1)

        pipeline.sample(conditioning, settings, stepped)
        journal.finish(index)
    _save_table(plan, journal, checkpoint)
    shutil.rmtree(plan.folder / "graphs")
    journal.discard()
    return plan.table


def _tapped_graphs(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the float conditioning and step graphs with taps, whole or not at all."""
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    topologies = export_topologies(checkpoint.config, home() / "graphs")
    for name in ("conditioning", "step"):
        write_graph(add_taps(topologies[name], checkpoint.linears), part / f"{name}.onnx", checkpoint.tensor)
    part.rename(folder)
    return folder


class TappedPipeline(Pipeline):
    """The production pipeline on float graphs with taps; everything the taps say goes to the journal."""

    def __init__(self, reference: Bundle, graphs: Path, journal: Journal):
        super().__init__(reference)
        self._graphs, self._journal = graphs, journal

    def _open(self, graph: str, steps: int) -> Engine:
        if graph not in ("conditioning", "step"):
            return super()._open(graph, steps)
        shapes = {**graph_shapes(self.sizes, steps)[graph], ROWS: (self._journal.rows_per_call(graph),)}
        engine = open_engine(self._backend, self._graphs / f"{graph}.onnx", shapes, self._device)
        return TappedEngine(engine, graph, self._journal)


class TappedEngine:
    """An engine that records its taps, and answers from the journal for the steps an earlier run finished."""

    def __init__(self, engine: Engine, graph: str, journal: Journal):
        self._engine, self._graph, self._journal = engine, graph, journal
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._held: dict[str, NDArray] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        self._held.update(inputs)
        if self._graph == "step" and (known := self._journal.replay()) is not None:
            return {"velocity": known}
        outputs = self._engine.run({**self._held, ROWS: self._journal.rows(self._graph)})
        taps = {name: outputs.pop(name) for name in list(outputs) if "/" in name}
        self._journal.record(self._graph, taps, outputs)
        return outputs

    def int8_matmuls(self) -> set[str]:
        return self._engine.int8_matmuls()


class Journal:
    """What a calibration has learned so far, on disk after every step.

    `merged.npz` holds all finished prompts, `step-<i>.npz` the steps of the one that runs. Files appear whole: each is
    written under another name and renamed.
    """

    def __init__(self, plan: Plan, linears: Sequence[Linear], sizes: Mapping[str, int]):
        self._steps = plan.settings.steps
        self._linears = linears
        self._folder = plan.folder / "journal"
        self._folder.mkdir(exist_ok=True)
        self._slots = _slots(plan, sizes)
        self._prompt, self._step = 0, 0
        self.finished_prompts = 0
        self.tables: dict[str, Float] = {}
        self._load()

    def _load(self) -> None:
        merged = self._folder / "merged.npz"
        if merged.is_file():
            with np.load(merged) as file:
                self.tables = {name: file[name] for name in file.files if name != "prompts"}
                self.finished_prompts = int(file["prompts"])
            return
        for linear in self._linears:
            steps, k = (1 if linear.graph == "conditioning" else self._steps), linear.in_features
            self.tables[f"max/{linear.name}"] = np.full((steps, k), -np.inf, np.float32)
            self.tables[f"min/{linear.name}"] = np.full((steps, k), np.inf, np.float32)
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
        file = self._file(self._step)
        if not file.is_file():
            return None
        with np.load(file) as known:
            self._merge("step", {name: known[name] for name in known.files if name != "velocity"})
            self._step += 1
            return known["velocity"]

    def record(self, graph: str, taps: Mapping[str, Float], outputs: Mapping[str, Float]) -> None:
        if graph == "step":
            _savez(self._file(self._step), velocity=outputs["velocity"], **taps)
        self._merge(graph, taps)
        self._step += graph == "step"

    def _merge(self, graph: str, taps: Mapping[str, Float]) -> None:
        row = self._step if graph == "step" else 0
        slots = self._slots.tokens(graph, self._prompt, self._step)[0]
        for name, value in taps.items():
            table = self.tables[name]
            match name.partition("/")[0]:
                case "max":
                    np.maximum(table[row], value, out=table[row])
                case "min":
                    np.minimum(table[row], value, out=table[row])
                case _:
                    table[slots] = value[: len(slots)]

    def finish(self, prompt: int) -> None:
        """All steps of a prompt are in: keep the merged tables, forget the steps."""
        _savez(self._folder / "merged.npz", prompts=np.array(prompt + 1), **self.tables)
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


def _slots(plan: Plan, sizes: Mapping[str, int]) -> _Slots:
    """Stratified over steps and CFG halves, drawn over prompts and tokens, the same for the same plan."""
    n, steps = plan.reservoir, plan.settings.steps
    rng = np.random.default_rng(0)
    order = np.arange(n)
    half = order % 2
    tokens, context = sizes["max_latents"] + 1, sizes["context_tokens"]
    return _Slots(
        prompt=rng.integers(0, len(plan.prompts), n),
        step=order * steps // n,
        step_token=half * tokens + rng.integers(0, tokens, n),
        context_token=half * context + rng.integers(0, context, n),
    )


def _savez(path: Path, **arrays: NDArray) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.rename(path)


def _save_table(plan: Plan, journal: Journal, checkpoint: Checkpoint) -> None:
    tensors = {
        name: table.astype(np.float16) if name.startswith("rows/") else table for name, table in journal.tables.items()
    }
    metadata = {
        "checkpoint": checkpoint.digest,
        "prompts": json.dumps(plan.prompts),
        "settings": json.dumps(asdict(plan.settings)),
    }
    part = plan.table.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.rename(plan.table)
