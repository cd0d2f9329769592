"""What a bundle's manifest says of how it is sampled; neither its backend nor its graphs are needed."""

from __future__ import annotations

from ..engines.bundle import Bundle
from ..engines.errors import UserError
from .samplers import OBJECTIVE_OF, SAMPLERS_OF
from .settings import Settings


class BundleFacts:
    """Lengths, defaults and what is refused of one model."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self.sizes: dict[str, int] = bundle.manifest["sizes"]

    @property
    def sample_rate(self) -> int:
        return self.sizes["sample_rate"]

    @property
    def max_seconds(self) -> float:
        return self.sizes["max_latents"] * self.sizes["downsampling_ratio"] / self.sample_rate

    @property
    def objective(self) -> str:
        """What the model was trained to predict: `v` or `rf_denoiser`."""
        sampler = self.bundle.manifest["schedule"]["sampler"]
        if sampler not in OBJECTIVE_OF:
            raise UserError(f"the bundle {self.bundle.folder.name} is for a sampler {sampler!r} of another version")
        return OBJECTIVE_OF[sampler]

    def settings(self, **chosen: object) -> Settings:
        """The model's own defaults, with those of `Settings` that are chosen in their place."""
        return Settings.of_schedule(self.bundle.manifest["schedule"], **chosen)

    @property
    def longest_seconds(self) -> float:
        """max_seconds in hundredths, as a user says it."""
        return round(self.max_seconds, 2)

    def check_seconds(self, seconds: float | None) -> float:
        """The length to make: by default 10 s or the model's longest."""
        if seconds is None:
            return min(10.0, self.max_seconds)
        if not 0.1 <= seconds <= max(self.longest_seconds, self.max_seconds):
            raise UserError(f"seconds {seconds:g} is outside 0.1..{self.longest_seconds:.2f}, this model's longest")
        return min(seconds, self.max_seconds)

    def check_sampler(self, settings: Settings) -> None:
        """Raises UserError for a sampler of models of another objective."""
        if OBJECTIVE_OF[settings.sampler] != self.objective:
            own = ", ".join(SAMPLERS_OF[self.objective])
            raise UserError(f"the sampler {settings.sampler} is not for this model ({self.objective}); it has: {own}")

    def window(self, seconds: float) -> int:
        """The fewest latents that hold so many seconds."""
        samples = round(seconds * self.sample_rate)
        return min(-(-samples // self.sizes["downsampling_ratio"]), self.sizes["max_latents"])
