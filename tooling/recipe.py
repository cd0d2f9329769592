"""A recipe: what to do to a model, as a small frozen value that can be printed, hashed and stored in a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from math import gcd

from ..engines.base import TRUNKS
from ..engines.errors import UserError
from ..exporters.linears import Linear
from ..exporters.quantized import WeightBits

# method -> (smoothing, activation range): the two independent axes behind the methods' names. SQD's smoothing is by
# step, too, where its weights are (`sqd_weights`).
METHODS = {"none": ("none", "none"), "sqs": ("static", "static"), "sqd": ("static", "step"), "sqt": ("static", "token")}
WEIGHT_BITS: dict[str, WeightBits] = {"w8a8": 8, "w7a8": 7, "w4a8": 4}
BITS = tuple(WEIGHT_BITS)
LAYER_BITS = (*BITS, "float")
FLOAT = {"bits": "fp32", "decoder_bits": 32}  # of method none
SQD_WEIGHTS = ("shared", "requantize", "grouped:2..16")
W4 = ("expanded", "memory")
ROUNDINGS = ("nearest", "gptq")
CFG_PAIRS = ("halves", "difference")
LORA_FORMS = ("svdquant", "residual")
MAX_GROUPS = 16
MIN_GROUP = 16
MAX_RANK = 1024


@dataclass(frozen=True)
class Recipe:
    """What is done to which Linears. Fields are the options of `dit-trt build` and the keys of a recipe file.

    method: `none` (FP32), or the paper's `sqs` (static) and `sqd` (by step), or our `sqt` (by token); bits of weights
    and activations, of which w7a8 is w8a8 with weights of up to 63, whose products a CPU without VNNI adds without loss
    (ONNX Runtime's `reduce_range`). alpha: smoothing strength (eq. 3), or `auto`: searched for every Linear; smooth:
    False leaves smoothing out. include, exclude: a Linear is quantized when an include pattern matches it and no
    exclude pattern does; bits_for: pairs (pattern, bits or `float`) for some of those, of which the last that matches
    counts. Patterns are wildcards over the full name (`transformer.layers.3.ff.ff.2`) or the kind within a block
    (`ff.ff.2`). sqd_weights: what SQD does with the weights: `shared` by all steps, `requantize`d at each, `grouped:G`,
    a set for each of G ranges of steps. lora_rank, lora_form: the FP16 low-rank branch; 0: none. clip: static and step
    ranges and the scales of 4-bit weights by least output error. cfg_pair: both halves of the guidance pair are
    quantized as they are, or one of them as its `difference` from the other, whose error guidance does not multiply.
    For 4-bit weights, w4: `expanded` to int8 in the engine or kept in `memory`; group_size: input channels that share a
    scale, 0 for all of an output channel; rounding: `nearest` or `gptq`, which makes up for errors, those of a branch,
    too. decoder_bits: 16 stores the matrices of what runs once a clip in FP16: text encoder, embedders, decoder,
    encoder. trunk: what the step computes in where it is not quantized, `fp32`, `bf16` or `fp16`, as far as the backend
    has it; `auto`: as the backend does by default, and fp32 where nothing is quantized.
    """

    method: str = "sqs"
    bits: str = "w8a8"
    alpha: float | str = 0.95
    smooth: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, str], ...] = ()
    sqd_weights: str = "shared"
    lora_rank: int = 0
    lora_form: str = "svdquant"
    clip: bool = False
    cfg_pair: str = "halves"
    w4: str = "expanded"
    group_size: int = 64
    rounding: str = "nearest"
    decoder_bits: int = 16
    trunk: str = "auto"

    def __post_init__(self) -> None:
        self._accept()
        faults = [*self._unknown(), *self._idle()] if self.method in METHODS else list(self._unknown())
        if faults:
            raise UserError("; ".join(faults))
        if self.method == "none":
            for name, value in FLOAT.items():
                object.__setattr__(self, name, value)
        if self.alpha != "auto":
            object.__setattr__(self, "alpha", float(self.alpha))  # 1 and 1.0 are one recipe, with one hash

    def _accept(self) -> None:
        """What may be said in other ways: bits_for as a dict, group_size as `channel`."""
        if isinstance(self.bits_for, dict):
            object.__setattr__(self, "bits_for", tuple(self.bits_for.items()))
        if self.group_size == "channel":
            object.__setattr__(self, "group_size", 0)
        for name in ("lora_rank", "group_size", "decoder_bits"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name} takes a whole number, not {getattr(self, name)!r}")

    def _unknown(self) -> Iterator[str]:
        """Values that no field may have."""
        for name, value, known in (
            ("method", self.method, METHODS),
            ("w4", self.w4, W4),
            ("rounding", self.rounding, ROUNDINGS),
            ("lora_form", self.lora_form, LORA_FORMS),
            ("cfg_pair", self.cfg_pair, CFG_PAIRS),
            ("trunk", self.trunk, TRUNKS),
        ):
            if value not in known:
                yield f"unknown {name} {value!r} (one of: {', '.join(known)})"
        if self.bits not in BITS and (self.method, self.bits) != ("none", "fp32"):
            yield f"unknown bits {self.bits!r} (one of: {', '.join(BITS)})"
        if self.alpha != "auto" and (isinstance(self.alpha, str) or not 0 <= self.alpha <= 1):
            yield f"alpha {self.alpha} is outside 0..1" + (" and not auto" if isinstance(self.alpha, str) else "")
        if self.sqd_weights not in SQD_WEIGHTS and self.groups is None:
            yield f"unknown sqd_weights {self.sqd_weights!r} (one of: {', '.join(SQD_WEIGHTS)})"
        if not 0 <= self.lora_rank <= MAX_RANK:
            yield f"lora_rank {self.lora_rank} is outside 0..{MAX_RANK}"
        if self.group_size != 0 and not 16 <= self.group_size <= 1024:
            yield f"group_size {self.group_size} is neither 0 (per output channel) nor in 16..1024"
        if self.decoder_bits not in (16, 32):
            yield f"decoder_bits {self.decoder_bits} is neither 16 nor 32"
        patterns = [pattern for pattern, _ in self.bits_for]
        if twice := sorted({pattern for pattern in patterns if patterns.count(pattern) > 1}):
            yield f"bits_for names {', '.join(map(repr, twice))} more than once"
        for pattern, bits in self.bits_for:
            if bits not in LAYER_BITS:
                yield f"unknown bits {bits!r} for {pattern!r} (one of: {', '.join(LAYER_BITS)})"

    def _idle(self) -> Iterator[str]:
        """Options that would do nothing, or that no engine can do together."""
        changed = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        if self.method == "none":
            own = {name for name, value in FLOAT.items() if getattr(self, name) == value}
            if idle := changed - {"method", "trunk"} - own:
                yield f"method none quantizes nothing: {', '.join(sorted(idle))} do not apply"
            return
        four = "w4a8" in (self.bits, *(bits for _, bits in self.bits_for))
        if "sqd_weights" in changed and self.method != "sqd":
            yield f"sqd_weights belongs to method sqd, not to {self.method}; give --method sqd"
        if "lora_form" in changed and not self.lora_rank:
            yield "lora_form needs a branch; give --lora-rank, 32 for example"
        if "alpha" in changed and not self.smooth:
            yield "without smoothing there is no alpha; leave one of the two out"
        if not four and (idle := changed & {"w4", "group_size", "rounding"}):
            yield f"{', '.join(sorted(idle))} belong to 4-bit weights (bits w4a8)"
        if self.requantizes and not {self.bits, *(bits for _, bits in self.bits_for)} <= {"w8a8", "float"}:
            yield "sqd_weights requantize needs w8a8: fewer bits have lost what a step would restore"
        if self.w4 == "memory" and four and self.method != "sqt":
            yield "w4 memory lets the engine quantize every token by itself: that is method sqt"
        if self.clip and self.method == "sqt" and not four:
            yield "clip has nothing to do: sqt takes every token's own range, and weights of 8 or 7 bits gain nothing"
        if self.requantizes and self.clip:
            yield "clip is not for sqd_weights requantize, whose ranges follow its own smoothing"
        if self.requantizes and not self.smooth:
            yield "sqd_weights requantize is a smoothing for every step: it cannot be without"

    @property
    def smoothing(self) -> str:
        """The first axis: none, static or step."""
        if not self.smooth:
            return "none"
        return "step" if self.requantizes else METHODS[self.method][0]

    @property
    def activation_range(self) -> str:
        """The second axis: none, static, step or token."""
        return METHODS[self.method][1]

    @property
    def requantizes(self) -> bool:
        return self.method == "sqd" and self.sqd_weights == "requantize"

    @property
    def halves(self) -> bool:
        """Whether float matrices outside the step are stored in 16 bits."""
        return self.decoder_bits == 16

    @property
    def groups(self) -> int | None:
        """G of `grouped:G`; None for other weights."""
        kind, _, number = self.sqd_weights.partition(":")
        good = kind == "grouped" and number.isdecimal() and 2 <= int(number) <= MAX_GROUPS
        return int(number) if good else None

    @property
    def needs_rows(self) -> bool:
        """Whether calibration must keep sample activations, not only their ranges."""
        return self.alpha == "auto" or self.clip or self.rounding == "gptq"

    def bits_of(self, linear: Linear) -> str:
        """w8a8, w7a8, w4a8, or fp32 for a Linear that is left alone."""
        included = any(_matches(linear, pattern) for pattern in self.include)
        if self.method == "none" or not included or any(_matches(linear, pattern) for pattern in self.exclude):
            return "fp32"
        wanted = [bits for pattern, bits in self.bits_for if _matches(linear, pattern)]
        bits = wanted[-1] if wanted else self.bits
        return "fp32" if bits == "float" else bits

    def int16_sums(self, chosen: Iterable[Linear]) -> bool:
        """Whether there are any, and the sum of two products of each fits 16 bits."""
        chosen = list(chosen)
        return bool(chosen) and all(self.fits_int16(linear) for linear in chosen)

    def fits_int16(self, linear: Linear) -> bool:
        """Whether no integer of its weight is beyond 64: 2 x 255 x 64 < 2^15.

        Those of 4 bits are as small where one scale an output channel leaves them as they are.
        """
        bits, one_scale = self.bits_of(linear), gcd(linear.in_features, self.group_size) == linear.in_features
        return bits == "w7a8" or (bits == "w4a8" and self.w4 == "expanded" and one_scale)

    def chosen(self, linears: Iterable[Linear]) -> list[Linear]:
        """The Linears to quantize. Raises UserError when a pattern matches nothing (likely a typo) or none is left."""
        linears = list(linears)
        if self.method == "none":
            return []
        for pattern in (*self.include, *self.exclude, *(pattern for pattern, _ in self.bits_for)):
            if not any(_matches(linear, pattern) for linear in linears):
                kinds = ", ".join(dict.fromkeys(linear.kind for linear in linears))
                raise UserError(f"the pattern {pattern!r} matches no Linear; kinds: {kinds}")
        chosen = [linear for linear in linears if self.bits_of(linear) != "fp32"]
        self._check_groups(chosen)
        if not chosen:
            raise UserError("include, exclude and bits_for leave nothing to quantize; for FP32 use --method none")
        return chosen

    def _check_groups(self, chosen: Iterable[Linear]) -> None:
        """A group that shares few divisors with a width would become tiny, and its scales larger than the weight."""
        for linear in chosen:
            group = gcd(linear.in_features, self.group_size)
            if self.bits_of(linear) == "w4a8" and group < MIN_GROUP:
                raise UserError(
                    f"group_size {self.group_size} leaves groups of {group} in {linear.name}, whose width is "
                    f"{linear.in_features}; give a divisor of it, 64 for most models, or channel"
                )

    def to_dict(self) -> dict:
        return {**asdict(self), "smoothing": self.smoothing, "activation_range": self.activation_range}

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        for key in ("include", "exclude"):
            if key in known:
                known[key] = tuple(known[key])
        if "bits_for" in known:
            known["bits_for"] = tuple((pattern, bits) for pattern, bits in known["bits_for"])
        return cls(**known)


def _matches(linear: Linear, pattern: str) -> bool:
    return fnmatchcase(linear.name, pattern) or fnmatchcase(linear.kind, pattern)
