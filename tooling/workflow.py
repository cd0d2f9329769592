"""From a recipe to a bundle, whatever that takes: the float reference, the calibration table, the build."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..calib_data.reader import choose_prompts, default_prompts, read_prompts
from ..engines.base import choose_backend
from ..engines.bundle import Bundle, check_target
from ..engines.errors import UserError
from ..engines.home import expanded, home, locked
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import GRAPH_FORMAT
from ..runtime.pipeline import Settings
from .build import Built, build_bundle
from .calibrate import Plan, calibrate
from .recipe import Recipe
from .tables import shipped_table

Say = Callable[[str], object]
# Given what runs and how many calls it takes, a context that yields `done(calls)`: a progress bar, most likely.
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def silent(message: str) -> None:
    """Says nothing."""


@contextlib.contextmanager
def unwatched(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda done: None


NUM_PROMPTS = 50  # the paper's


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user may choose about calibration. The defaults are the paper's: 50 prompts, 100 steps.

    prompts: a file with one prompt a line, or an AudioCaps CSV; None for our own fifty. num_prompts of them are drawn;
    None: fifty, or all of a shorter file.
    """

    prompts: str | Path | None = None
    num_prompts: int | None = None
    prompt_seed: int = 0
    steps: int = 100
    recalibrate: bool = False

    def chosen(self) -> list[str]:
        if self.num_prompts is not None and self.num_prompts < 1:
            raise UserError(f"--num-prompts {self.num_prompts} must be 1 or more")
        prompts = default_prompts() if self.prompts is None else read_prompts(expanded(str(self.prompts)))
        return choose_prompts(prompts, self.num_prompts or min(NUM_PROMPTS, len(prompts)), self.prompt_seed)

    def is_default(self) -> bool:
        """Whether these are the paper's, however they were said: what a shipped table was made with."""
        return self in (CalibrationOptions(), CalibrationOptions(num_prompts=NUM_PROMPTS))

    def plan(self, checkpoint: Checkpoint) -> Plan:
        return Plan(checkpoint.digest, tuple(self.chosen()), Settings(steps=self.steps))


def build(
    recipe: Recipe | None = None,
    model: str = "demo",
    backend: str = "auto",
    output: str | Path | None = None,
    calibration: CalibrationOptions | None = None,
    watch: Watch = unwatched,
    say: Say = silent,
    device: str | None = None,
    allow_float: bool = False,
) -> Built:
    """A recipe becomes a bundle; the model is calibrated first when the recipe needs it and no table is at hand.

    >>> import dit_trt
    >>> built = dit_trt.build(dit_trt.Recipe("sqs", exclude=("ff.ff.2",)), output="without-ff2")
    >>> built.linears, built.int8_linears
    (48, 48)
    >>> print(built)
    without-ff2

    model: `demo` or a folder in stable-audio-tools' layout. output: the bundle's folder (default: in the home folder).
    device, allow_float: see `build_bundle`.
    Raises UserError for whatever the user can mend; a bundle is whole or absent.
    """
    recipe = recipe or Recipe()
    backend = choose_backend(backend, device)
    checkpoint = Checkpoint.open(model)
    output = None if output is None else Path(output)
    if output is not None:
        check_target(output)
    table = None
    if recipe.chosen(checkpoint.linears):
        table = calibration_table(checkpoint, backend, calibration or CalibrationOptions(), watch, say)
    return build_bundle(checkpoint, recipe, backend, output, table, say, device, allow_float)


def reference_bundle(checkpoint: Checkpoint, backend: str, say: Say = silent) -> Bundle:
    """The float bundle of a checkpoint, built when it is missing (and said) and kept by the checkpoint's hash."""
    folder = home() / "reference" / f"{checkpoint.digest[:16]}-{GRAPH_FORMAT}-{backend}"
    with locked(folder.with_name(f"{folder.name}.build")):
        try:
            return Bundle(folder).verify()
        except UserError:
            say("building the FP32 reference of this checkpoint (kept for later)")
            shutil.rmtree(folder, ignore_errors=True)  # ours, and damaged if it is there at all
            return build_bundle(checkpoint, Recipe("none"), backend, folder).bundle


def table_at_hand(checkpoint: Checkpoint, options: CalibrationOptions) -> tuple[Path, str] | None:
    """The table a build would use without calibrating, and where it comes from: `shipped` or `cache`."""
    if options.is_default() and (shipped := shipped_table(checkpoint)) is not None:
        return shipped, "shipped"
    plan = options.plan(checkpoint)
    return (plan.table, "cache") if plan.table.is_file() and not options.recalibrate else None


def calibration_table(
    checkpoint: Checkpoint, backend: str, options: CalibrationOptions, watch: Watch = unwatched, say: Say = silent
) -> Path:
    """The table of every Linear's input ranges: the checkpoint's own, from the cache, or from a calibration run now."""
    if (found := table_at_hand(checkpoint, options)) is not None:
        table, origin = found
        shipped = "the one shipped with the checkpoint (--recalibrate makes it afresh)"
        say(f"calibration table: {shipped if origin == 'shipped' else 'from the cache'}")
        return table
    plan = options.plan(checkpoint)
    reference = reference_bundle(checkpoint, backend, say)
    say(f"calibrating with {len(plan.prompts)} prompts x {options.steps} steps; Ctrl-C keeps what is done")
    with watch("calibrating", plan.calls) as done:
        return calibrate(checkpoint, reference, plan, done, options.recalibrate)
