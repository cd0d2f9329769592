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
