"""Bits for every Linear, kind or block under a budget of bytes: W4A8, W8A8 or float, by the error each causes.

The errors of parts are taken to be independent, so that their squares add. Then the least error for a size is a
knapsack, which is solved greedily along the lower convex hull of each part's (bytes, error): the step that saves most
squared error per byte comes first (Lagrange's solution, at every size where it has one). What is chosen is simulated
as a whole; it is the simulation's number that counts, not the sum's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, prod

from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.graph_weights import graph_weights
from ..exporters.linears import DIT_PREFIX, Linear
from .recipe import Recipe
from .sensitivity import Error, Part, weight_bytes

_UNUSABLE = 1e12  # the squared error of a velocity that is no number: slopes stay finite


@dataclass(frozen=True)
class Choice:
    """One part at some bits: its bytes, and the mean squared error when all others are FP32."""

    bits: str
    bytes: int
    squared: float


@dataclass(frozen=True)
class Mix:
    """A choice for every part, by its name."""

    choices: Mapping[str, Choice]

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def squared(self) -> float:
        """The predicted mean squared error: independent errors add in squares."""
        return sum(choice.squared for choice in self.choices.values())

    @property
    def is_float(self) -> bool:
        return all(choice.bits == "float" for choice in self.choices.values())


@dataclass(frozen=True)
class _Upgrade:
    part: str
    choice: Choice
    more: int
    saved_per_byte: float


def bits_to_try(recipe: Recipe) -> tuple[str, ...]:
    """SQD `requantize` has no four bits."""
    return ("w8a8",) if recipe.requantizes else ("w4a8", "w8a8")


def at_bits(recipe: Recipe, bits: str) -> Recipe:
    """The recipe with these bits for all it quantizes; its options of 4-bit weights stay good beside 8-bit ones."""
    kept_float = tuple(pair for pair in recipe.bits_for if pair[1] == "float")
    base = "w8a8" if recipe.requantizes else "w4a8"
    return replace(recipe, bits=base, bits_for=(*((("*", bits),) if bits != base else ()), *kept_float))


def without_bits_for(recipe: Recipe, linears: Sequence[Linear]) -> Recipe:
    """The recipe with its `bits_for` as excludes: the bits are chosen anew, what was in float stays there."""
    if not recipe.bits_for:
        return recipe
    left_float = tuple(linear.name for linear in linears if recipe.bits_of(linear) == "fp32")
    base = "w8a8" if recipe.requantizes else "w4a8"
    return replace(recipe, bits=base, bits_for=(), exclude=(*recipe.exclude, *left_float))


def options(
    recipe: Recipe, parts: Sequence[Part], errors: Mapping[str, Sequence[Error]]
) -> dict[str, tuple[Choice, ...]]:
    """What each part may be. errors: by bits, those of every part alone; float, which has none, is added."""
    found = {}
    for number, part in enumerate(parts):
        choices = [
            Choice(bits, part_bytes(recipe, part, bits), min(of_parts[number].mean_squared, _UNUSABLE))
            for bits, of_parts in errors.items()
        ]
        found[part.name] = (*choices, Choice("float", part_bytes(recipe, part, "float"), 0.0))
    return found


def part_bytes(recipe: Recipe, part: Part, bits: str) -> int:
    tried = at_bits(recipe, bits)
    return sum(weight_bytes(tried, linear) for linear in part.linears)


# -------------------- the choice


def cheapest(choices: Mapping[str, Sequence[Choice]]) -> Mix:
    return Mix({part: min(of_part, key=lambda c: (c.bytes, c.squared)) for part, of_part in choices.items()})


def frontier(choices: Mapping[str, Sequence[Choice]]) -> list[Mix]:
    """From the cheapest mix to the one with the least error, an upgrade at a time: each the best of its size."""
    mixes = [cheapest(choices)]
    for upgrade in _upgrades(choices):
        mixes.append(Mix({**mixes[-1].choices, upgrade.part: upgrade.choice}))
    return mixes


def within(choices: Mapping[str, Sequence[Choice]], budget: int) -> Mix:
    """The mix for at most `budget` bytes: an upgrade that does not fit is passed over, with those that build on it.

    A larger budget never predicts a larger error: where it first takes an upgrade that a smaller one could not, that
    saves more than the smaller one can do with what it has left. Raises ValueError when not even the cheapest fits.
    """
    mix = cheapest(choices)
    size, taken, blocked = mix.bytes, dict(mix.choices), set()
    if size > budget:
        raise ValueError(f"the cheapest mix has {size} bytes")
    for upgrade in _upgrades(choices):
        if upgrade.part in blocked or size + upgrade.more > budget:
            blocked.add(upgrade.part)
            continue
        taken[upgrade.part] = upgrade.choice
        size += upgrade.more
    return Mix(taken)


def _upgrades(choices: Mapping[str, Sequence[Choice]]) -> list[_Upgrade]:
    """The steps along every part's hull, those that save most per byte first; a part's own stay in order."""
    found: list[_Upgrade] = []
    for part, start in cheapest(choices).choices.items():
        here = start
        while better := [_upgrade(part, here, choice) for choice in choices[part] if choice.squared < here.squared]:
            found.append(max(better, key=lambda u: (u.saved_per_byte, u.more)))
            here = found[-1].choice
    return sorted(found, key=lambda upgrade: -upgrade.saved_per_byte)


def _upgrade(part: str, here: Choice, choice: Choice) -> _Upgrade:
    more = choice.bytes - here.bytes
    return _Upgrade(part, choice, more, (here.squared - choice.squared) / more if more else inf)


@dataclass(frozen=True)
class Simulated:
    """A mix and the error of the whole model under it, as simulated."""

    mix: Mix
    error: Error


def reach(
    mixes: Sequence[Mix], cosine: float, simulate: Callable[[Mix], Error], done: Callable[[int], object]
) -> Simulated | None:
    """The smallest mix of a frontier whose simulated worst-step cosine is `cosine` or more; None: there is none.

    Found by bisection, which takes the cosine to grow along the frontier; that of the result is always simulated.
    done(trials) counts the simulations.
    """
    trials, found = 0, None
    low, high = 0, len(mixes) - 1
    here = high
    while low <= high:
        error = simulate(mixes[here])
        trials += 1
        done(trials)
        if error.worst_step_cosine >= cosine:
            found, high = Simulated(mixes[here], error), here - 1
        elif here == len(mixes) - 1:
            return None
        else:
            low = here + 1
        here = (low + high) // 2
    return found


# -------------------- what it comes to


def rest_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes in fp32 of all of the DiT that no recipe quantizes: everything under `model.model.` but its Linears.

    What belongs to the step graph counts once for each of them (SQD `grouped`), as the Linears do.
    """
    linears = {linear.graph_name(part) for linear in checkpoint.linears for part in linear.parts}
    graphs = graph_weights(checkpoint.config)
    copies = {"conditioning": 1, "step": recipe.groups or 1}
    return sum(
        copies[graph] * 4 * prod(shape)
        for graph in copies
        for name, shape in graphs[graph].items()
        if name.startswith(DIT_PREFIX) and name not in linears
    )


def dit_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Bytes of the DiT's weights under a recipe: what `--budget-mb` is about.

    Not in it: text and other conditioners, decoder, tokenizer, scales of activations and of steps, the graphs' own.
    """
    return rest_bytes(checkpoint, recipe) + sum(weight_bytes(recipe, linear) for linear in checkpoint.linears)


def mixed_recipe(recipe: Recipe, linears: Sequence[Linear], parts: Sequence[Part], mix: Mix) -> Recipe:
    """The recipe of a mix, in as few `bits_for` pairs as kinds and names allow; includes and excludes stay.

    Options of 4-bit weights go when there are none. Raises UserError when all is float.
    """
    bits = {linear.name: mix.choices[part.name].bits for part in parts for linear in part.linears}
    # What the recipe's own bits_for leaves in float stays there.
    touched = [linear for linear in linears if at_bits(replace(recipe, bits_for=()), "w8a8").bits_of(linear) != "fp32"]
    bits = {linear.name: bits.get(linear.name, "float") for linear in touched}
    counts = Counter(value for value in bits.values() if value != "float")
    if not counts:
        raise UserError("nothing is left to quantize; for FP32 use --method none")
    base = counts.most_common(1)[0][0]
    pairs: list[tuple[str, str]] = []
    for kind in dict.fromkeys(linear.kind for linear in touched):
        of_kind = {linear.name: bits[linear.name] for linear in touched if linear.kind == kind}
        usual = Counter(of_kind.values()).most_common(1)[0][0]
        pairs += [(kind, usual)] if usual != base else []
        pairs += [(name, value) for name, value in of_kind.items() if value != usual]
    idle = [] if "w4a8" in counts else ["w4", "group_size", "rounding"]
    if "w4a8" not in counts and recipe.method == "sqt":
        idle.append("clip")
    defaults = {field.name: field.default for field in fields(Recipe) if field.name in idle}
    return replace(recipe, bits=base, bits_for=tuple(pairs), **defaults)  # type: ignore[arg-type]
