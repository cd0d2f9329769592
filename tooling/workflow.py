"""From a recipe to a bundle, whatever that takes: the float reference, the calibration table, the build."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..calib_data.reader import choose_prompts, default_prompts, read_prompts
from ..engines.base import BACKENDS, choose_backend
from ..engines.bundle import Bundle, check_target
from ..engines.errors import UserError
from ..engines.home import expanded, home, locked
from ..engines.tensorrt_build import PlanOptions
from ..exporters.checkpoint import Checkpoint
from ..exporters.float_graphs import GRAPH_FORMAT
from ..runtime.pipeline import Settings
from .build import Built, build_bundle, trunk_of
from .calibrate import Plan, calibrate
from .quantize import check_groups
from .recipe import Recipe
from .tables import shipped_table, tensor_kinds
from .watching import Say, Watch, silent, unwatched

NUM_PROMPTS = 50  # the paper's


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user may choose about calibration. The defaults are the paper's: 50 prompts, 100 steps.

    prompts: a file with one prompt a line, or an AudioCaps CSV; None for our own fifty. num_prompts of them are drawn;
    None: fifty, or all of a shorter file. steps: of every run; None: what the model is sampled with by default.
    """

    prompts: str | Path | None = None
    num_prompts: int | None = None
    prompt_seed: int = 0
    steps: int | None = None
    recalibrate: bool = False

    def chosen(self) -> list[str]:
        if self.num_prompts is not None and self.num_prompts < 1:
            raise UserError(f"--num-prompts {self.num_prompts} must be 1 or more")
        prompts = default_prompts() if self.prompts is None else read_prompts(expanded(str(self.prompts)))
        return choose_prompts(prompts, self.num_prompts or min(NUM_PROMPTS, len(prompts)), self.prompt_seed)

    def is_default(self) -> bool:
        """Whether these are the paper's, however they were said: what a shipped table was made with."""
        own = replace(self, num_prompts=self.num_prompts or NUM_PROMPTS, steps=self.steps or Settings().steps)
        return own == CalibrationOptions(num_prompts=NUM_PROMPTS, steps=Settings().steps)

    def settings(self, checkpoint: Checkpoint) -> Settings:
        """How the runs are sampled: as the model is by default, but for the steps."""
        own = Settings.of_objective(checkpoint.sizes.objective)
        return own if self.steps is None else replace(own, steps=self.steps)

    def plan(self, checkpoint: Checkpoint) -> Plan:
        return Plan(checkpoint.digest, tuple(self.chosen()), self.settings(checkpoint))


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
    text_encoder: str | None = None,
    plan: PlanOptions | None = None,
) -> Built:
    """A recipe becomes a bundle; the model is calibrated first when the recipe needs it and no table is at hand.

    >>> import dit_trt
    >>> built = dit_trt.build(dit_trt.Recipe("sqs", exclude=("ff.ff.2",)), output="without-ff2")
    >>> built.linears, built.int8_linears
    (48, 48)
    >>> print(built)
    without-ff2

    model: `demo`, a folder in stable-audio-tools' or diffusers' layout, a file of weights or a hub id; text_encoder: a
    folder or hub id, for models that are without theirs. output: the bundle's folder (default: in the home folder).
    device, allow_float, plan: see `build_bundle`.
    Raises UserError for whatever the user can mend; a bundle is whole or absent.
    """
    recipe = recipe or Recipe()
    backend = choose_backend(backend, device, to_build=True)
    trunk_of(recipe, backend)  # refused before anything is done
    checkpoint = Checkpoint.open(model, text_encoder)
    output = None if output is None else Path(output)
    if output is not None:
        check_target(output)
    table = None
    if recipe.chosen(checkpoint.linears):
        table = calibration_table(checkpoint, backend, calibration or CalibrationOptions(), watch, say, recipe)
    return build_bundle(checkpoint, recipe, backend, output, table, say, device, allow_float, plan)


def checkpoint_of(bundle: Bundle, instead: str = "build it again") -> Checkpoint:
    """The checkpoint that a bundle was built from. Raises UserError when it is gone, or (instead: the fix) another."""
    model = bundle.manifest["model"]
    checkpoint = Checkpoint.of_bundle(model)
    if checkpoint.digest != model["digest"]:
        raise UserError(f"the model at {model['source']} has changed since {bundle.folder.name} was built; {instead}")
    return checkpoint


def reference_backend(backend: str) -> str:
    """Whose FP32 a backend's bundles are calibrated on and compared with: its own, or that of one that runs here."""
    return backend if BACKENDS[backend].proof is None else choose_backend("auto")


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


@dataclass(frozen=True)
class TableAtHand:
    """The table a build would use: its path, None when a calibration has to run, and where it comes from.

    origin: `shipped`, `cache` or `to run`. lacks: what kept the one there is from being used, in words.
    """

    path: Path | None
    origin: str
    lacks: str | None = None


def table_at_hand(checkpoint: Checkpoint, options: CalibrationOptions, recipe: Recipe) -> TableAtHand:
    """Look for a table that holds all that `recipe` needs: what ships with the checkpoint, then the cache.

    Raises UserError when no table of so many steps could, or none of a guidance pair that there is not.
    """
    plan = options.plan(checkpoint)
    check_groups(recipe, plan.settings.steps)
    if recipe.cfg_pair == "difference" and plan.settings.cfg_scale == 1:
        raise UserError(
            f"cfg_pair difference: {checkpoint.name} is sampled without guidance, there is no pair; use halves"
        )
    found: list[tuple[Path, str]] = []
    if options.is_default() and (shipped := shipped_table(checkpoint)) is not None:
        found.append((shipped, "shipped"))
    if plan.table.is_file() and not options.recalibrate:
        found.append((plan.table, "cache"))
    needs, lacks = _needs(recipe), None
    for path, origin in found:
        missing = needs.keys() - tensor_kinds(path) if needs else set()
        if not missing:
            return TableAtHand(path, origin)
        lacks = " and ".join(words for kind, words in needs.items() if kind in missing)
    return TableAtHand(None, "to run", lacks)


def _needs(recipe: Recipe) -> dict[str, str]:
    """Kinds of tensors that not every table has -> what they are."""
    needs = {"rows": "sample tokens"} if recipe.needs_rows else {}
    if recipe.cfg_pair == "difference" and recipe.activation_range != "token":
        needs["difference"] = "ranges of the guidance pair's difference"
    return needs


def calibration_table(
    checkpoint: Checkpoint,
    backend: str,
    options: CalibrationOptions,
    watch: Watch = unwatched,
    say: Say = silent,
    recipe: Recipe | None = None,
) -> Path:
    """The table of every Linear's input: the checkpoint's own, from the cache, or from a calibration run now.

    recipe: what the table is for (default: one that needs ranges alone); one that lacks what it needs is not used.
    """
    found = table_at_hand(checkpoint, options, recipe or Recipe())
    if found.path is not None:
        shipped = "the one shipped with the checkpoint (--recalibrate makes it afresh)"
        say(f"calibration table: {shipped if found.origin == 'shipped' else 'from the cache'}")
        return found.path
    if found.lacks is not None:
        say(f"the calibration table at hand lacks {found.lacks}, which this recipe needs: it is made afresh and kept")
    plan = options.plan(checkpoint)
    fresh = options.recalibrate or (found.lacks is not None and plan.table.is_file())
    reference = reference_bundle(checkpoint, reference_backend(backend), say)
    say(f"calibrating with {len(plan.prompts)} prompts x {plan.settings.steps} steps; Ctrl-C keeps what is done")
    with watch("calibrating", plan.calls) as done:
        return calibrate(checkpoint, reference, plan, foretelling(done, plan.calls, say), fresh)


def foretelling(
    done: Callable[[int], object], calls: int, say: Say, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], object]:
    """`done`, and once, after the first call that was not known from an earlier run: how long all of them will take.

    Nothing is said of what takes less than a minute.
    """
    known, last, told = -1, 0.0, False

    def counted(n: int) -> None:
        nonlocal known, last, told
        now, known = clock(), n if known < 0 else known
        if n > known and not told:
            told, seconds = True, now - last
            if (left := seconds * (calls - n)) > 60:
                say(
                    f"one call of the model took {seconds:.1f} s: the {calls - n} to come take about "
                    f"{_duration(left)}; "
                    "Ctrl-C and --num-prompts or --calib-steps make it shorter"
                )
        last = now
        done(n)

    return counted


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
