"""A recipe: what to do to a model, as a small frozen value that can be printed, hashed and stored in a manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase

from ..engines.errors import UserError
from ..exporters.linears import Linear

# method -> (smoothing, activation range): the two independent axes behind the paper's names.
METHODS = {"none": ("none", "none"), "sqs": ("static", "static")}
BITS = ("w8a8",)


@dataclass(frozen=True)
class Recipe:
    """method `none` (FP32) or `sqs` (static SmoothQuant); include/exclude: wildcards over Linear names, in order.

    A Linear is quantized when an include pattern matches it and no exclude pattern does. Patterns match the full name
    (`transformer.layers.3.ff.ff.2`) or its kind within a block (`ff.ff.2`).
    """

    method: str = "sqs"
    bits: str = "w8a8"
    alpha: float = 0.95
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if self.method not in METHODS:
            faults.append(f"unknown method {self.method!r} (one of: {', '.join(METHODS)})")
        if self.bits not in BITS and (self.method, self.bits) != ("none", "fp32"):
            faults.append(f"unknown bits {self.bits!r} (one of: {', '.join(BITS)})")
        if not 0 <= self.alpha <= 1:
            faults.append(f"alpha {self.alpha} is outside 0..1")
        if self.method == "none" and (self.alpha, self.include, self.exclude) != (Recipe.alpha, ("*",), ()):
            faults.append("method none quantizes nothing: alpha, include and exclude do not apply")
        if faults:
            raise UserError("; ".join(faults))
        if self.method == "none":
            object.__setattr__(self, "bits", "fp32")
        object.__setattr__(self, "alpha", float(self.alpha))  # 1 and 1.0 are one recipe, with one hash

    @property
    def smoothing(self) -> str:
        return METHODS[self.method][0]

    @property
    def activation_range(self) -> str:
        return METHODS[self.method][1]

    def chosen(self, linears: Iterable[Linear]) -> list[Linear]:
        """The Linears to quantize. Raises UserError when a pattern matches nothing (likely a typo) or none is left."""
        linears = list(linears)
        if self.method == "none":
            return []
        for pattern in (*self.include, *self.exclude):
            if not any(_matches(linear, pattern) for linear in linears):
                kinds = ", ".join(dict.fromkeys(linear.kind for linear in linears))
                raise UserError(f"the pattern {pattern!r} matches no Linear; kinds: {kinds}")
        included = [x for x in linears if any(_matches(x, pattern) for pattern in self.include)]
        chosen = [x for x in included if not any(_matches(x, pattern) for pattern in self.exclude)]
        if not chosen:
            raise UserError("--include and --exclude leave nothing to quantize; for FP32 use --method none")
        return chosen

    def to_dict(self) -> dict:
        return {**asdict(self), "smoothing": self.smoothing, "activation_range": self.activation_range}

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        for key in ("include", "exclude"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)


def _matches(linear: Linear, pattern: str) -> bool:
    return fnmatchcase(linear.name, pattern) or fnmatchcase(linear.kind, pattern)
