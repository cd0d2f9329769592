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

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, open_engine
from ..engines.bundle import Bundle
from ..engines.home import flush, home, locked, save_tensors
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import GRAPH_FORMAT, export_topologies
from ..exporters.qdq import write_graph
from ..exporters.taps import ROWS, add_taps
from ..runtime.pipeline import Pipeline, Settings, graph_shapes
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


class TappedPipeline(Pipeline):
    """The production pipeline on float graphs with taps; everything the taps say goes to the journal."""

    def __init__(self, reference: Bundle, graphs: Path, journal: Journal):
        super().__init__(reference)
        self._graphs, self._journal = graphs, journal

    always_pairs = True  # the taps compare the halves

    def _open(self, graph: str, steps: int, latents: int, batch: int) -> Engine:
        if graph not in ("conditioning", "step"):
            return super()._open(graph, steps, latents, batch)
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
