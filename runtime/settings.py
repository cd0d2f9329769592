"""How to sample: steps, sampler, guidance, seed, noise levels, each within its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.errors import UserError
from .samplers import OBJECTIVE_OF, SAMPLERS
from .schedule import OBJECTIVES, Objective

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
_DEFAULTS: dict[str, dict[str, Any]] = {  # by objective, what differs from Stable Audio Open's
    "v": {},
    "rf_denoiser": {"steps": 8, "sampler": "pingpong", "cfg_scale": 1.0, "sigma_max": 1.0},
}


@dataclass(frozen=True)
class Settings:
    """How to sample. Defaults are Stable Audio Open's model card and the paper's: 100 steps, cfg 7, seed 1000.

    The sampler says of which objective the model must be. A flow's noise levels (`pingpong`, `euler`) begin at
    sigma_max, at most 1, and sigma_min does not count.

    >>> import dit_trt
    >>> dit_trt.Settings(steps=4).sigmas.round(2).tolist()
    [500.0, 42.17, 3.56, 0.3, 0.0]
    >>> dit_trt.Settings(steps=0)
    Traceback (most recent call last):
    dit_trt.engines.errors.UserError: steps 0 is outside 1..1000

    Raises UserError naming every setting that is out of range.
    """

    steps: int = 100
    sampler: str = "dpmpp-3m-sde"
    cfg_scale: float = 7.0
    seed: int = 1000
    sigma_min: float = 0.3
    sigma_max: float = 500.0

    @classmethod
    def of_objective(cls, name: str) -> Settings:
        """What a model of that objective is sampled with by default: `v` or `rf_denoiser` (8 steps, no guidance)."""
        return cls(**_DEFAULTS[name])

    @classmethod
    def of_schedule(cls, schedule: Mapping[str, Any], **chosen: object) -> Settings:
        """What a manifest's `schedule` says, with those of our fields that are chosen in its place.

        Raises UserError as Settings does, and for a sigma_min that would not count.
        """
        own = {"cfg_scale" if name == "cfg" else name: value for name, value in schedule.items()}
        found = cls(**(own | chosen))
        if "sigma_min" in chosen and found.objective.interpolates:
            raise UserError(f"the sampler {found.sampler} takes no sigma_min: its noise falls to 0; leave it out")
        return found

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.steps <= MAX_STEPS:
            faults.append(f"steps {self.steps} is outside 1..{MAX_STEPS}")
        if self.sampler not in SAMPLERS:
            faults.append(f"unknown sampler {self.sampler!r} (one of: {', '.join(SAMPLERS)})")
        if not 0 <= self.cfg_scale <= 100:
            faults.append(f"cfg {self.cfg_scale} is outside 0..100")
        if not 0 <= self.seed <= MAX_SEED:
            faults.append(f"seed {self.seed} is outside 0..{MAX_SEED}")
        if (fault := self.objective.fault(self.sigma_min, self.sigma_max)) is not None:
            faults.append(fault)
        if faults:
            raise UserError("; ".join(faults))

    @property
    def objective(self) -> Objective:
        """Of the models that the sampler is for; an unknown sampler, which is refused, has Stable Audio Open's."""
        return OBJECTIVES[OBJECTIVE_OF.get(self.sampler, "v")]

    @property
    def sigmas(self) -> NDArray[np.float64]:
        """[steps + 1], falling to 0."""
        return self.objective.sigmas(self.steps, self.sigma_min, self.sigma_max)


def check_clips(
    prompts: Sequence[str], settings: Settings, num_variations: int = 1, negative_prompt: str | None = None
) -> None:
    """Raises UserError for what no model could make clips of."""
    if num_variations < 1:
        raise UserError(f"num_variations {num_variations} must be 1 or more")
    if settings.seed + len(prompts) * num_variations - 1 > MAX_SEED:
        raise UserError(f"seed {settings.seed} leaves no seeds for all clips; give a smaller one")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError('the prompt is empty; say what to hear, for example "dog barking"')
    for text in (*prompts, negative_prompt or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of argv that are not UTF-8 become these
            raise UserError(f"the prompt {text[:40]!r} is not UTF-8 text; set your terminal to UTF-8")
