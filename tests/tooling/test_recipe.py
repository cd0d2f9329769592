"""Recipes: which Linears they choose, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.workflow import build


def test_patterns_match_names_and_kinds_in_order(tiny: Path) -> None:
    linears = Checkpoint.open(str(tiny)).linears
    assert len(Recipe().chosen(linears)) == 14
    assert {x.kind for x in Recipe(include=("ff.*",)).chosen(linears)} == {"ff.ff.0.proj", "ff.ff.2"}
    one = Recipe(include=("transformer.layers.1.*",), exclude=("*to_out",)).chosen(linears)
    assert {x.block for x in one} == {1} and len(one) == 5


def test_nothing_left_to_quantize_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method none"):
        build(Recipe(exclude=("*",)), str(tiny), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"exclude": ("ff.ff.2",)}, {"include": ("ff.*",)}])
def test_method_none_takes_no_options(options: dict) -> None:
    with pytest.raises(UserError, match="quantizes nothing"):
        Recipe("none", **options)


def test_round_trip_and_axes() -> None:
    recipe = Recipe("sqs", alpha=0.7, exclude=("ff.ff.2",))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.smoothing, recipe.activation_range) == ("static", "static")
    assert Recipe("none").bits == "fp32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sqd_weights": "requantize"}, "belongs to method sqd, not to sqs"),
        ({"method": "sqd", "sqd_weights": "grouped:1"}, "unknown sqd_weights 'grouped:1'"),
        ({"method": "sqd", "sqd_weights": "grouped:x"}, "unknown sqd_weights"),
        ({"method": "sqd", "bits": "w4a8", "sqd_weights": "requantize"}, "requantize needs w8a8"),
        ({"method": "sqd", "bits_for": (("ff.*", "w4a8"),), "sqd_weights": "requantize"}, "requantize needs w8a8"),
        ({"method": "sqd", "bits": "w7a8", "sqd_weights": "requantize"}, "requantize needs w8a8"),
        ({"lora_form": "residual"}, "give --lora-rank"),
        ({"lora_rank": -1}, "lora_rank -1 is outside 0..1024"),
        ({"smooth": False, "alpha": 0.5}, "there is no alpha"),
        ({"group_size": 128}, "belong to 4-bit weights"),
        ({"bits": "w4a8", "group_size": 7}, "group_size 7 is neither"),
        ({"bits": "w4a8", "w4": "memory"}, "that is method sqt"),
        ({"method": "sqt", "clip": True}, "sqt takes every token's own"),
        ({"method": "sqd", "smooth": False, "sqd_weights": "requantize"}, "cannot be without"),
        ({"method": "sqd", "clip": True, "sqd_weights": "requantize"}, "clip is not for"),
        ({"bits_for": (("ff.*", "int2"),)}, "unknown bits 'int2' for 'ff.*'"),
        ({"bits_for": (("ff.*", "w4a8"), ("ff.*", "w8a8"))}, "names 'ff.*' more than once"),
        ({"alpha": "best"}, "alpha best is outside 0..1 and not auto"),
    ],
)
def test_options_that_cannot_go_together(options: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "fits"),
    [
        (Recipe(), False),
        (Recipe(bits="w7a8"), True),
        (Recipe("sqt", "w7a8", lora_rank=8, cfg_pair="difference"), True),
        (Recipe(bits_for=(("*", "w7a8"),)), True),
        (Recipe(bits_for=(("ff.*", "w7a8"),)), False),
        (Recipe(bits="w7a8", exclude=("ff.*",)), True),
        (Recipe(bits="w4a8"), False),  # groups are rounded to int8 once more
        (Recipe(bits="w4a8", group_size=0), True),
        (Recipe("sqt", bits="w4a8", w4="memory", group_size=0), False),  # the engine has its own kernel
        (Recipe("sqd", sqd_weights="requantize"), False),
    ],
)
def test_whose_sums_fit_16_bits(tiny: Path, recipe: Recipe, fits: bool) -> None:
    assert recipe.int16_sums(recipe.chosen(Checkpoint.open(str(tiny)).linears)) is fits


def test_axes_of_every_method() -> None:
    def axes(*args: str, **options: object) -> tuple[str, str]:
        recipe = Recipe(*args, **options)  # type: ignore[arg-type]
        return recipe.smoothing, recipe.activation_range

    assert axes("sqd") == ("static", "step")
    assert axes("sqd", sqd_weights="grouped:4") == ("static", "step")
    assert axes("sqd", sqd_weights="requantize") == ("step", "step")
    assert axes("sqt") == ("static", "token")
    assert axes("sqs", smooth=False) == ("none", "static")
    assert Recipe("sqd", sqd_weights="grouped:16").groups == 16


def test_bits_by_layer_the_last_match_counts(tiny: Path) -> None:
    linears = Checkpoint.open(str(tiny)).linears
    recipe = Recipe(
        bits_for=(("ff.*", "w4a8"), ("transformer.layers.1.*", "float"), ("*.1.ff.ff.2", "w8a8")), exclude=("*to_q",)
    )
    bits = {linear.name.removeprefix("transformer.layers."): recipe.bits_of(linear) for linear in linears}
    assert bits["0.ff.ff.0.proj"] == bits["0.ff.ff.2"] == "w4a8"
    assert bits["0.self_attn.to_qkv"] == bits["1.ff.ff.2"] == "w8a8"
    assert bits["1.ff.ff.0.proj"] == bits["0.cross_attn.to_q"] == "fp32"
    assert len(recipe.chosen(linears)) == 7
    with pytest.raises(UserError, match="matches no Linear"):
        Recipe(bits_for=(("fff", "w4a8"),)).chosen(linears)


def test_other_ways_to_say_it() -> None:
    assert Recipe("sqt", "w4a8", group_size="channel") == Recipe("sqt", "w4a8", group_size=0)  # type: ignore[arg-type]
    assert Recipe(bits_for={"ff.*": "float"}) == Recipe(bits_for=(("ff.*", "float"),))  # type: ignore[arg-type]
    for wrong in ({"lora_rank": "32"}, {"lora_rank": 1.5}, {"group_size": "row"}):
        with pytest.raises(UserError, match="takes a whole number"):
            Recipe(bits="w4a8", **wrong)  # type: ignore[arg-type]
