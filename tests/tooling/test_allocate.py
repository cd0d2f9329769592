"""Bits under a budget: kept, never worse for more, the best on the hull, and the recipe says the same."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.allocate import (
    Choice,
    Mix,
    Simulated,
    at_bits,
    bits_to_try,
    cheapest,
    dit_bytes,
    frontier,
    mixed_recipe,
    options,
    part_bytes,
    reach,
    rest_bytes,
    within,
)
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.recipe_file import read_recipe, recipe_toml
from dit_trt.tooling.sensitivity import Error, parts_of

Choices = dict[str, tuple[Choice, ...]]


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    found = {}
    for number in range(draw(st.integers(1, 5))):
        small, more, most = (draw(st.integers(1, 30)) for _ in range(3))
        w8, w4 = (draw(st.integers(0, 1000)) / 16 for _ in range(2))  # exact in binary; four bits may even be better
        found[f"part{number}"] = (
            Choice("w4a8", small, w4),
            Choice("w8a8", small + more, w8),
            Choice("float", small + more + most, 0.0),
        )
    return found


def every_mix(choices: Choices) -> list[Mix]:
    return [Mix(dict(zip(choices, picked))) for picked in product(*choices.values())]


@given(choices())
def test_the_budget_is_kept_and_more_is_never_worse(choices: Choices) -> None:
    least = cheapest(choices).bytes
    most = sum(of_part[-1].bytes for of_part in choices.values())
    errors = []
    for budget in range(least, most + 1):
        mix = within(choices, budget)
        assert mix.bytes <= budget
        assert mix.choices.keys() == choices.keys()
        errors.append(mix.squared)
    assert all(more <= less for less, more in pairwise(errors))
    assert errors[-1] == 0
    with pytest.raises(ValueError, match=f"{least} bytes"):
        within(choices, least - 1)


@given(choices())
def test_every_mix_of_the_frontier_is_the_best_of_its_size(choices: Choices) -> None:
    mixes, all_mixes = frontier(choices), every_mix(choices)
    assert mixes[0] == cheapest(choices)
    assert mixes[-1].squared == 0
    for mix in mixes:
        assert mix.squared == min(other.squared for other in all_mixes if other.bytes <= mix.bytes)
        assert within(choices, mix.bytes).squared == mix.squared
    assert all(a.bytes < b.bytes and a.squared > b.squared for a, b in pairwise(mixes))


def _error(cosine: float) -> Error:
    return Error((0,), np.array([[cosine]]), np.array([[0.0]]))


@given(st.integers(1, 40), st.data())
def test_the_smallest_mix_that_reaches_the_cosine_is_found(count: int, data: st.DataObject) -> None:
    mixes = [Mix({"a": Choice("w8a8", size, 0.0)}) for size in range(count)]
    first = data.draw(st.integers(0, count))  # from here on the cosine is reached; `count`: nowhere
    simulated: list[int] = []

    def simulate(mix: Mix) -> Error:
        simulated.append(mix.bytes)
        return _error(0.99 if mix.bytes >= first else 0.5)

    trials: list[int] = []
    found = reach(mixes, 0.9, simulate, trials.append)
    assert found == (Simulated(mixes[first], found.error) if first < count and found else None)
    assert (found is None) == (first == count)
    assert trials == list(range(1, len(simulated) + 1))
    assert len(simulated) <= count.bit_length() + 1


# -------------------- recipes


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return Checkpoint.open(str(tiny))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe("sqt", bits="w4a8", w4="memory", clip=True, group_size=32, cfg_pair="difference"),
        Recipe(exclude=("cross_attn.*",), bits_for=(("*.1.self_attn.to_out", "float"), ("ff.ff.2", "w4a8"))),
    ],
    ids=["default", "options of four bits", "patterns of its own"],
)
@pytest.mark.parametrize("by", ["layer", "kind", "block"])
def test_the_recipe_of_a_mix_says_just_that(checkpoint: Checkpoint, recipe: Recipe, by: str, tmp_path: Path) -> None:
    parts = parts_of(recipe.chosen(checkpoint.linears), by)
    names = {linear.name for part in parts for linear in part.linears}
    rng = np.random.default_rng(0)
    for bits in (*rng.choice(["w4a8", "w8a8", "float"], (20, len(parts))), ["w8a8"] * len(parts)):
        if all(one == "float" for one in bits):
            continue
        mix = Mix({p.name: Choice(str(b), part_bytes(recipe, p, str(b)), 0.0) for p, b in zip(parts, bits)})
        mixed = mixed_recipe(recipe, checkpoint.linears, parts, mix)
        expected = {linear.name: mix.choices[part.name].bits for part in parts for linear in part.linears}
        found = {linear.name: mixed.bits_of(linear) for linear in checkpoint.linears}
        assert found == {name: _fp32(expected.get(name, "float")) for name in found}
        alone = [part for part in parts_of(checkpoint.linears, "layer") if part.name not in names]
        in_float = sum(part_bytes(recipe, part, "float") for part in alone)
        assert dit_bytes(checkpoint, mixed) == rest_bytes(checkpoint, recipe) + in_float + mix.bytes
        file = tmp_path / "recipe.toml"
        file.write_text(recipe_toml(mixed), "utf-8")
        assert Recipe(**read_recipe(file)) == mixed


def _fp32(bits: str) -> str:
    return "fp32" if bits == "float" else bits


def test_a_mix_of_kinds_is_written_by_kinds(checkpoint: Checkpoint) -> None:
    parts = parts_of(checkpoint.linears, "layer")
    bits = {"ff.ff.2": "float", "ff.ff.0.proj": "w8a8"}
    mix = Mix({part.name: Choice(bits.get(part.linears[0].kind, "w4a8"), 0, 0.0) for part in parts})
    mixed = mixed_recipe(Recipe(), checkpoint.linears, parts, mix)
    assert mixed == Recipe(bits="w4a8", bits_for=(("ff.ff.0.proj", "w8a8"), ("ff.ff.2", "float")))


def test_all_float_is_no_recipe(checkpoint: Checkpoint) -> None:
    parts = parts_of(checkpoint.linears, "kind")
    with pytest.raises(UserError, match="--method none"):
        mixed_recipe(Recipe(), checkpoint.linears, parts, Mix({p.name: Choice("float", 0, 0.0) for p in parts}))


def test_each_bits_is_tried_with_the_recipes_own_options(checkpoint: Checkpoint) -> None:
    recipe = Recipe("sqt", bits="w4a8", group_size=32, bits_for=(("ff.ff.2", "float"), ("*.to_out", "w8a8")))
    assert bits_to_try(recipe) == ("w4a8", "w8a8")
    for bits in bits_to_try(recipe):
        tried = at_bits(recipe, bits)
        found = {linear.kind: tried.bits_of(linear) for linear in checkpoint.linears}
        assert found.pop("ff.ff.2") == "fp32"
        assert set(found.values()) == {bits}
        assert tried.group_size == 32
    requantized = Recipe("sqd", sqd_weights="requantize")
    assert bits_to_try(requantized) == ("w8a8",)
    assert at_bits(requantized, "w8a8") == requantized


def test_options_are_of_each_part(checkpoint: Checkpoint) -> None:
    parts = parts_of(checkpoint.linears, "kind")[:2]
    nan = Error((0,), np.array([[np.nan]]), np.array([[np.nan]]))
    ok = Error((0,), np.array([[1.0]]), np.array([[0.25]]))
    found = options(Recipe(), parts, {"w4a8": [nan, ok], "w8a8": [ok, ok]})
    assert list(found) == [part.name for part in parts]
    assert [(c.bits, c.squared) for c in found[parts[1].name]] == [("w4a8", 0.25), ("w8a8", 0.25), ("float", 0.0)]
    assert frontier(found)[1].choices[parts[0].name].bits == "w8a8"  # what gives no number is mended first
