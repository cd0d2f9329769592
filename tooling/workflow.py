"""The steps around a build that need a bundle already: the float reference, and the calibration table made with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..calib_data.reader import choose_prompts, default_prompts, read_prompts
from ..engines.bundle import Bundle, home
from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..runtime.pipeline import Settings
from .build import build
from .calibrate import Plan, calibrate, load_absmax, shipped_table
from .recipe import Recipe

Say = Callable[[str], object]


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user may choose about calibration. The defaults are the paper's: 50 prompts, 100 steps."""

    prompts: str | None = None
    num_prompts: int = 50
    prompt_seed: int = 0
    steps: int = 100
    recalibrate: bool = False

    @property
    def calls(self) -> int:
        return max(self.num_prompts, 1) * max(self.steps, 1)

    def chosen(self) -> list[str]:
        if self.num_prompts < 1:
            raise UserError(f"--num-prompts {self.num_prompts} must be 1 or more")
        prompts = default_prompts() if self.prompts is None else read_prompts(Path(self.prompts).expanduser())
        return choose_prompts(prompts, self.num_prompts, self.prompt_seed)


def reference_bundle(checkpoint: Checkpoint, model: str, backend: str, say: Say) -> Bundle:
    """The float bundle of a checkpoint, built when it is missing (and said) and kept by the checkpoint's hash."""
    folder = home() / "reference" / f"{checkpoint.digest[:16]}-{backend}"
    try:
        return Bundle(folder).verify()
    except UserError:
        say("building the FP32 reference of this checkpoint (kept for later)")
        return build(Recipe("none"), model, backend, folder).bundle


def calibration_table(
    model: str, backend: str, options: CalibrationOptions, on_step: Callable[[int], object], say: Say
) -> dict[str, NDArray[np.float32]]:
    """absmax of every Linear's inputs: from the checkpoint's own table, the cache, or a calibration run now."""
    checkpoint = Checkpoint.open(model)
    prompts = options.chosen()
    if options == CalibrationOptions() and (shipped := shipped_table(checkpoint)) is not None:
        say("calibration table shipped with the checkpoint (--recalibrate makes it afresh)")
        return load_absmax(shipped, checkpoint)
    plan = Plan(checkpoint.digest, tuple(prompts), Settings(steps=options.steps))
    if options.recalibrate:
        plan.table.unlink(missing_ok=True)
    if plan.table.is_file():
        say("calibration table from the cache")
    else:
        say(f"calibrating: {len(prompts)} prompts x {options.steps} steps; Ctrl-C keeps what is done")
    reference = reference_bundle(checkpoint, model, backend, say)
    return load_absmax(calibrate(checkpoint, reference, plan, on_step), checkpoint)
