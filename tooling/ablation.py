"""The ablation table: every method, and the peers, on prompts that no calibration saw, by one command.

    python -m dit_trt.tooling.ablation --output table.md
    python -m dit_trt.tooling.ablation --rows "openvino/w8a8-*,*/ort-static" --prompts 4 --seeds 1 --output table.md

FP32's trajectories are recorded once. Every finished row is kept in the home folder under the digest of its bundle and
of the trial, so an interrupted run goes on where it stopped and --rows adds rows to the table of the same trial. Rows
are built anew when their recipe or a version changes; after a change of the code itself, give --fresh.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import click

from ..calib_data.reader import ablation_prompts
from ..engines.base import BACKENDS
from ..engines.bundle import Bundle
from ..engines.errors import UserError
from ..engines.home import home, sha256, write_whole
from ..exporters.checkpoint import Checkpoint
from ..runtime.pipeline import Pipeline, Settings
from .ablation_report import markdown
from .ablation_rows import BASELINE, ROWS, Row, chosen_rows
from .bench import Step, interleaved, machine
from .cli.common import dit_command, path_option, progress, say, show
from .fidelity import Forced, Trial, measure, record
from .peers import PEERS, Call, PeerPipeline, calibration_calls, int8_linears, make, open_step, step_linears
from .recipe import Recipe
from .simulate import SimulatedPipeline, step_channel_model
from .tables import load_calibration
from .workflow import (
    CalibrationOptions,
    Say,
    Watch,
    build,
    calibration_table,
    reference_bundle,
    silent,
    unwatched,
)

FIRST_SEED = 5000  # calibration's begin at 1000
REFERENCE_BACKEND = "openvino"
_TIMED_STEP = 0.5  # of the schedule


@dataclass(frozen=True)
class Contender:
    """A row's pipeline. digest: of all that decides what it computes; facts: what the table says of it."""

    pipeline: Pipeline
    digest: str
    facts: dict


class Ablation:
    """All rows of one checkpoint and trial: builds, measures and times them, and keeps what is done in `results`.

    results: by row name, what the table needs (see `measured`, `timed`). folder: theirs, in the home folder.
    """

    def __init__(
        self,
        model: str,
        trial: Trial,
        calibration: CalibrationOptions | None = None,
        watch: Watch = unwatched,
        say: Say = silent,
        fresh: bool = False,
    ):
        self.trial, self._model = trial, model
        self._calibration = calibration or CalibrationOptions()
        self._watch, self._say, self._fresh = watch, say, fresh
        self._checkpoint = Checkpoint.open(model)
        self._models = home() / "ablation" / self._checkpoint.digest[:16]
        self.folder = self._models / trial.digest(self._checkpoint.digest)
        self._kept = self.folder / "results.json"
        self._made: set[str] = set()
        self.results: dict[str, dict] = {}
        with contextlib.suppress(FileNotFoundError):
            self.results = json.loads(self._kept.read_text("utf-8"))

    # -------------------- what they are measured against

    def _reference(self, backend: str) -> Bundle:
        return reference_bundle(self._checkpoint, backend, self._say)

    @cached_property
    def clips(self) -> Path:
        """The folder of FP32's trajectories, recorded now where any is missing."""
        folder = self.folder / "fp32"
        with self._watch("FP32", self.trial.calls) as done:
            return record(Pipeline(self._reference(REFERENCE_BACKEND)), self.trial, folder, done)

    @cached_property
    def _calls(self) -> list[Call]:
        """What the peers calibrate on: calls from the prompts and settings of our own calibration."""
        plan = self._calibration.plan(self._checkpoint)
        with self._watch("inputs for the peers, prompts", len(plan.prompts)) as done:
            reference = Pipeline(self._reference(REFERENCE_BACKEND))
            return calibration_calls(reference, plan.prompts, plan.settings, done=done)

    # -------------------- rows

    def open(self, row: Row) -> Contender:
        """Build the row's bundle, or take the one that is there. Raises UserError when it cannot be."""
        if row.step_channel is not None:
            return self._open_simulation(row.step_channel)
        return self._open_peer(row, row.peer) if row.peer else self._open_bundle(row)

    def _open_simulation(self, bits: Literal[8, 4]) -> Contender:
        reference = self._reference(REFERENCE_BACKEND)
        table = calibration_table(self._checkpoint, REFERENCE_BACKEND, self._calibration, self._watch, self._say)
        model = step_channel_model(self._checkpoint, load_calibration(table, self._checkpoint), 0.5, bits)
        facts = {
            "smoothing": "step",
            "range": "step and channel",
            "bundle_bytes": reference.size_bytes,
            "step_bytes": _step_bytes(reference),
            "linears": 0,
            "int8_linears": 0,
        }
        digest = _digest({"table": sha256(table), "bits": str(bits)}, REFERENCE_BACKEND)
        return Contender(SimulatedPipeline(reference, model), digest, facts)

    def _open_bundle(self, row: Row) -> Contender:
        recipe = row.to_recipe()
        options = hashlib.sha256(repr(self._calibration).encode()).hexdigest()[:8]
        folder = self._models / f"{row.backend}-{row.slug}-{options}"
        bundle = self._standing(row, folder, recipe)
        if bundle is None:
            self._say(f"building {row.name}")
            bundle = build(recipe, self._model, row.backend, folder, self._calibration, self._watch, self._say).bundle
        self._made.add(row.name)
        manifest = bundle.manifest
        files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        facts = {
            "smoothing": manifest["recipe"]["smoothing"],
            "range": manifest["recipe"]["activation_range"],
            "bundle_bytes": bundle.size_bytes,
            "step_bytes": _step_bytes(bundle),
            "linears": manifest["linears"],
            "int8_linears": manifest["int8_linears"],
        }
        return Contender(Pipeline(bundle), _digest(files, row.backend), facts)

    def _standing(self, row: Row, folder: Path, recipe: Recipe) -> Bundle | None:
        if self._fresh and row.name not in self._made:
            return None
        try:
            bundle = Bundle(folder)
        except UserError:
            return None
        backend = BACKENDS[row.backend].load().runtime_version()
        same = json.loads(json.dumps(recipe.to_dict())) == bundle.manifest["recipe"]
        return bundle if same and bundle.manifest["versions"][row.backend] == backend else None

    def _open_peer(self, row: Row, name: str) -> Contender:
        peer, reference = PEERS[name], self._reference(row.backend)
        folder = self._models / f"peer-{name}"
        if self._fresh and row.name not in self._made:
            (folder / "made.json").unlink(missing_ok=True)
        step = make(peer, reference, lambda: self._calls, self._checkpoint.linears, folder)
        self._made.add(row.name)
        engine = open_step(peer, step, reference)
        pipeline = PeerPipeline(reference, engine)
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        own = sum(size for file, size in files.items() if file.startswith("step"))
        linears = self._checkpoint.linears
        call = _one_call(pipeline, self.trial)
        facts = {
            "smoothing": peer.smoothing,
            "range": peer.range,
            "bundle_bytes": reference.size_bytes - _step_bytes(reference) + own,
            "step_bytes": own,
            "linears": sum(linear.graph == "step" for linear in linears),
            "int8_linears": int8_linears(peer, step, engine, step_linears(linears), call),
            "versions": peer.versions(),
        }
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("step*"))}
        return Contender(pipeline, _digest(hashes, row.backend), facts)

    def run(self, rows: Sequence[Row], rounds: int) -> dict[str, str]:
        """Measure and time `rows`; what is kept of the same bundles is not done again. -> why rows are left out."""
        left_out: dict[str, str] = {}
        clips, started, spent = self.clips, time.monotonic(), 0
        for number, row in enumerate(rows):
            ahead = sum(other.name not in self.results for other in rows[number:])
            rest = (time.monotonic() - started) / spent * ahead if spent else None
            self._say(f"{number + 1}/{len(rows)} {row.name}" + (f", about {rest / 60:.0f} min left" if rest else ""))
            try:
                contender = self.open(row)
            except UserError as error:
                left_out[row.name] = str(error)
                self._say(f"{row.name} is left out: {error}")
                continue
            spent += self._measure(row, contender, clips)
        for backend in dict.fromkeys(row.backend for row in rows):
            here = [row for row in rows if row.backend == backend and row.name not in left_out]
            self._time(backend, [row for row in here if row.step_channel is None], rounds)
        return left_out

    def _measure(self, row: Row, contender: Contender, clips: Path) -> bool:
        kept = self.results.get(row.name, {})
        if kept.get("digest") == contender.digest:
            self.results[row.name] = {**kept, **contender.facts}
            return False
        with self._watch(row.name, self.trial.calls) as done:
            fidelity = measure(contender.pipeline, self.trial, clips, done)
        steps = fidelity.cosine.mean(axis=0).tolist()
        numbers = {**fidelity.summary(), "cosine_by_step": steps}
        self._keep(row, {"digest": contender.digest, **contender.facts, **numbers})
        return True

    def _time(self, backend: str, rows: Sequence[Row], rounds: int) -> None:
        """Ratios of a step's time to the baseline's of the same backend, within each of `rounds` rounds."""
        base = next(row for row in ROWS if row.name == f"{backend}/{BASELINE}")
        baseline = self.open(base)
        timed = {row.name: [self.results[row.name]["digest"], baseline.digest, rounds] for row in rows}
        due = [row for row in rows if self.results[row.name].get("timed") != timed[row.name]]
        if not due:
            return
        contenders = {base.name: baseline, **{row.name: self.open(row) for row in due if row != base}}
        steps = {name: _step(contender.pipeline, self.trial) for name, contender in contenders.items()}
        with self._watch(f"timing {backend}, rounds", rounds) as done:
            seconds = interleaved(steps, rounds, done)
        for row in due:
            ratios = [own / sqs for own, sqs in zip(seconds[row.name], seconds[base.name])]
            self._keep(row, {**self.results[row.name], "timed": timed[row.name], "ratios": ratios})

    def _keep(self, row: Row, result: dict) -> None:
        self.results[row.name] = result
        write_whole(self._kept, json.dumps(self.results, indent=1))


def _digest(files: dict[str, str], backend: str) -> str:
    facts = [files, backend, BACKENDS[backend].load().runtime_version()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _step_bytes(bundle: Bundle) -> int:
    """Of all that the sampling loop reads: the step graphs, and their tables where there are any."""
    return sum(entry["bytes"] for name, entry in bundle.manifest["files"].items() if name.startswith("step"))


def _one_call(pipeline: Pipeline, trial: Trial) -> Call:
    """All inputs of the step graph at the first step of the first prompt."""
    seen: list[Call] = []
    settings = Settings(steps=1, cfg_scale=trial.settings.cfg_scale)
    conditioning = pipeline.condition(trial.prompts[0], settings, pipeline.check_seconds(None))
    pipeline.sample(conditioning, settings, observe=lambda step, inputs, outputs: seen.append(inputs))
    return {**conditioning.constants, **seen[0]}


def _step(pipeline: Pipeline, trial: Trial) -> Step:
    """One velocity in the middle of the schedule, on the first prompt: what `interleaved` times."""
    conditioning = pipeline.condition(trial.prompts[0], trial.settings, pipeline.check_seconds(None))
    velocity = Forced(pipeline, conditioning, trial.settings.cfg_scale)
    step = int(_TIMED_STEP * trial.settings.steps)
    x = _one_call(pipeline, trial)["x"][0]
    velocity(x, step)
    return lambda: velocity(x, step)


EPILOG = """\b
Examples:
  python -m dit_trt.tooling.ablation --output table.md
  python -m dit_trt.tooling.ablation --rows "*/w8a8-sqs,*/nncf*" --prompts 4 --seeds 1 --output table.md
"""


@click.command(epilog=EPILOG)
@click.option("--model", default="demo", show_default=True, help="demo, or a checkpoint folder.")
@click.option("--rows", default="*", show_default=True, help="Wildcards over <backend>/<row>, commas between them.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="How many wordings.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Clips of each.")
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="All take turns so often.")
@click.option("--fresh", is_flag=True, help="Build the rows anew, as after a change of the code.")
@click.option("--output", required=True, metavar="FILE", help="Write the table as Markdown here.")
@dit_command
def command(model: str, rows: str, prompts: int, seeds: int, rounds: int, fresh: bool, output: str) -> dict:
    """Measure every method and peer against FP32; see the module's docstring."""
    path = path_option(output)
    assert path is not None
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"cannot write {path}; give --output a file in a folder that exists")
    texts = ablation_prompts()
    if prompts > len(texts):
        raise UserError(f"--prompts {prompts} is more than the {len(texts)} there are")
    chosen = chosen_rows(rows)
    for row in chosen:
        row.to_recipe()  # what cannot be constructed is known before any work
    trial = Trial(tuple(texts[:prompts]), tuple(range(FIRST_SEED, FIRST_SEED + seeds)))
    ablation = Ablation(model, trial, None, progress, say, fresh)
    left_out = ablation.run(chosen, rounds)
    text = markdown(
        ROWS, ablation.results, trial, _command_line(model, rows, prompts, seeds, rounds), machine(), left_out
    )
    path.write_text(text, "utf-8")
    show(text)
    say(f"written to {path}")
    return {"trial": asdict(trial), "rows": ablation.results, "left_out": left_out}


def _command_line(model: str, rows: str, prompts: int, seeds: int, rounds: int) -> str:
    given = {"model": model, "rows": rows, "prompts": prompts, "seeds": seeds, "rounds": rounds}
    defaults = {option.name: option.default for option in command.params}
    named = [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value != defaults[name]]
    return " ".join(["python -m dit_trt.tooling.ablation", *named, "--output table.md"])


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.ablation")
