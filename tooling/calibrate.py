"""Calibration: a float model and prompts become a table of what its Linears' inputs look like, step by step.

The production sampler runs on the float graphs, whose taps hand out, for every Linear, the range of each input channel
over both CFG halves, and a seeded, stratified sample of tokens. The table is cached by content. Every step is written
to disk before the next begins, so an interrupted calibration goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, open_engine
from ..engines.bundle import Bundle
from ..engines.home import flush, home, locked, save_tensors
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import GRAPH_FORMAT, export_topologies
from ..exporters.qdq import write_graph
from ..exporters.taps import ROWS, add_taps
from ..runtime.graph_shapes import graph_shapes
from ..runtime.pipeline import Pipeline, Settings
from .journal import Journal

Float = NDArray[np.float32]
RESERVOIR = 512
_FORMAT = 2


@dataclass(frozen=True)
class Plan:
    """What a calibration runs: prompts under the production settings; its digest keys the cache."""

    checkpoint: str
    prompts: tuple[str, ...]
    settings: Settings
    reservoir: int = RESERVOIR

    @property
    def digest(self) -> str:
        text = json.dumps([_FORMAT, GRAPH_FORMAT, asdict(self)], sort_keys=True)
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


def calibrate(
    checkpoint: Checkpoint,
    reference: Bundle,
    plan: Plan,
    on_step: Callable[[int], object] = lambda done: None,
    fresh: bool = False,
) -> Path:
    """Run `plan` on the float model and return its table, from the cache when it is there (unless `fresh`).

    reference: the float bundle of the same checkpoint; its text graph, sizes and backend are used.
    on_step(done) is called with the number of finished calls of the DiT, first with those of an interrupted run.
    """
    with locked(plan.folder):
        if not plan.table.is_file() or fresh:
            plan.folder.mkdir(parents=True, exist_ok=True)
            _run(checkpoint, reference, plan, on_step)
    return plan.table


def _run(checkpoint: Checkpoint, reference: Bundle, plan: Plan, on_step: Callable[[int], object]) -> None:
    journal = Journal(
        plan.folder / "journal",
        len(plan.prompts),
        plan.settings.steps,
        plan.reservoir,
        checkpoint.linears,
        reference.manifest["sizes"],
    )
    graphs = _tapped_graphs(checkpoint, plan.folder / "graphs")
    on_step(journal.finished_calls)
    pipeline = TappedPipeline(reference, graphs, journal)
    seconds = pipeline.check_seconds(None)
    for index in range(journal.finished_prompts, len(plan.prompts)):
        journal.begin(index)
        settings = replace(plan.settings, seed=plan.settings.seed + index)
        # Without guidance no unconditional half is ever computed: both are then the prompt's.
        other = plan.prompts[index] if settings.cfg_scale == 1 else None
        conditioning = pipeline.condition(plan.prompts[index], settings, seconds, other)

        def stepped(step: int, index: int = index) -> None:
            on_step(index * plan.settings.steps + step + 1)

        pipeline.sample(conditioning, settings, stepped)
        journal.finish(index)
    _save_table(plan, journal, checkpoint)
    shutil.rmtree(plan.folder / "graphs")
    journal.discard()


def _tapped_graphs(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the float conditioning and step graphs with taps, whole or not at all."""
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    topologies = export_topologies(checkpoint.config, home() / "graphs")
    part.mkdir()
    try:
        for name in ("conditioning", "step"):
            write_graph(add_taps(topologies[name], checkpoint.linears), part / f"{name}.onnx", checkpoint.tensor)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


class Recorder(Protocol):
    """What the taps of graphs speak to."""

    def rows_per_call(self, graph: str) -> int:
        """How many tokens of each Linear's input are handed out in a call."""

    def rows(self, graph: str) -> NDArray[np.int64]:
        """Which, in the next call: their places among those of both CFG halves."""

    def replay(self) -> Float | None:
        """The next step's velocity, where it is known from an earlier run."""

    def record(self, graph: str, taps: dict[str, NDArray], outputs: dict[str, NDArray]) -> None:
        """What they said in a call, beside its outputs."""


class TappedPipeline(Pipeline):
    """The production pipeline on float graphs, with taps where `graphs` has a file of their name."""

    def __init__(self, reference: Bundle, graphs: Path, recorder: Recorder):
        super().__init__(reference)
        self._graphs, self._recorder = graphs, recorder

    always_pairs = True  # the taps compare the halves

    def _open(self, graph: str, steps: int, latents: int, batch: int, context: int) -> Engine:
        path = self._graphs / f"{graph}.onnx"
        if not path.is_file():
            return super()._open(graph, steps, latents, batch, context)
        shapes = {**graph_shapes(self.sizes, steps)[graph], ROWS: (self._recorder.rows_per_call(graph),)}
        return TappedEngine(open_engine(self._backend, path, shapes, self._device), graph, self._recorder)


class TappedEngine:
    """An engine that records its taps, and answers for the steps that the recorder knows from an earlier run."""

    def __init__(self, engine: Engine, graph: str, recorder: Recorder):
        self._engine, self._graph, self._recorder = engine, graph, recorder
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._held: dict[str, NDArray] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        self._held.update(inputs)
        if self._graph == "step" and (known := self._recorder.replay()) is not None:
            return {"velocity": known}
        outputs = self._engine.run({**self._held, ROWS: self._recorder.rows(self._graph)})
        taps = {name: outputs.pop(name) for name in list(outputs) if "/" in name}
        self._recorder.record(self._graph, taps, outputs)
        return outputs

    def int8_matmuls(self) -> set[str]:
        return self._engine.int8_matmuls()


def _save_table(plan: Plan, journal: Journal, checkpoint: Checkpoint) -> None:
    tensors = {
        name: np.clip(table, -65504, 65504).astype(np.float16) if name.startswith("rows/") else table
        for name, table in journal.tables.items()
    }
    metadata = {
        "checkpoint": checkpoint.digest,
        "prompts": json.dumps(plan.prompts),
        "settings": json.dumps(asdict(plan.settings)),
    }
    part = plan.table.with_suffix(".part")
    try:
        save_tensors(tensors, part, metadata)
        flush(part)
        part.replace(plan.table)
    finally:
        part.unlink(missing_ok=True)
