"""`dit-trt sensitivity` as a person and a script meet it: the table, JSON, the recipes it writes, mistakes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import error_of, files_in, invoke, one_object

from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.recipe_file import read_recipe
from dit_trt.tooling.tables import SHIPPED, slim_table

QUICK = ("--by", "kind", "--prompts", "1", "--steps-sampled", "2")
KINDS = 7


@pytest.fixture(scope="module")
def model(tiny: Path, tiny_table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a calibration table that came with it."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("shipped") / "tiny"))
    slim_table(tiny_table_file, folder / SHIPPED)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_ranking_and_the_recipe_without_the_worst(model: Path, here: Path) -> None:
    arguments = ("sensitivity", "--model", model, *QUICK, "--top", 2, "--output", "r.toml", "--plot", "p.svg")
    result = invoke(*arguments, "--json")
    value = one_object(result.stdout)
    rows = value["ranking"]
    assert len(rows) == KINDS
    assert [row["relative_error"] for row in rows] == sorted((row["relative_error"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert all(0 < row["bytes"] < row["float_bytes"] for row in rows)
    worst = [row["name"] for row in rows[:2]]
    assert value["left_out"] == worst
    assert value["without"]["relative_error"] < value["whole"]["relative_error"]
    recipe = Recipe(**read_recipe(Path("r.toml")))
    assert recipe == Recipe(exclude=tuple(worst))
    assert len(recipe.chosen(Checkpoint.open(str(model)).linears)) == 2 * (KINDS - 2)
    picture = Path("p.svg").read_text()
    assert picture.lstrip().startswith("<?xml")
    assert "quantizing 7 parts alone, calls 14/14" in result.stderr
    assert files_in(here) == ["p.svg", "r.toml"]


def test_the_table_is_on_stdout_its_progress_is_not(model: Path) -> None:
    result = invoke("sensitivity", "--model", model, *QUICK, "--exclude-above", "1e-9", code=1)
    assert "all there is to quantize" in result.stderr
    result = invoke("sensitivity", "--model", model, *QUICK, "--exclude-above", "9")
    *lines, last = result.stdout.splitlines()
    assert last == "no relative error is above 9: the recipe stays as it is"
    assert lines[0].split() == [
        *("quantized", "alone", "rel.", "error", "worst", "cosine", "step", "share", "float", "bytes", "bytes")
    ]
    assert len(lines) == 1 + KINDS + 2
    assert lines[-2].startswith("all together: relative error ")
    assert "calls" not in result.stdout


def test_a_budget_is_kept_and_the_recipe_says_what_was_chosen(model: Path) -> None:
    command = ("sensitivity", "--model", model, *QUICK, "--method", "sqt", "--output", "r.toml", "--json")
    value = one_object(invoke(*command, "--budget-mb", "0.8").stdout)
    assert value["size_bytes"] <= 800_000
    assert {row["bits"] for row in value["choices"]} > {"w4a8"}
    assert 0 < value["worst_step_cosine"] < 1
    linears = sum(row["bytes"] for row in value["choices"])
    assert value["size_bytes"] == value["rest_bytes"] + linears < value["float_size_bytes"]
    recipe = Recipe(**read_recipe(Path("r.toml")))
    chosen = {row["name"]: {"float": "fp32"}.get(row["bits"], row["bits"]) for row in value["choices"]}
    found = {linear.kind: recipe.bits_of(linear) for linear in Checkpoint.open(str(model)).linears}
    assert (found, recipe.method) == (chosen, "sqt")


def test_a_target_is_reached_or_refused(model: Path) -> None:
    command = ("sensitivity", "--model", model, *QUICK, "--method", "sqt")
    reached = one_object(invoke(*command, "--target-cosine", "0.9999", "--json").stdout)
    assert 0.9999 <= reached["worst_step_cosine"] < 1
    assert reached["size_bytes"] < reached["float_size_bytes"]
    assert "the best that quantizes anything reaches 0.9" in error_of(*command, "--target-cosine", "1")


def test_a_budget_out_of_reach_is_told_before_any_work(model: Path) -> None:
    command = ("sensitivity", "--model", model, *QUICK)
    error = error_of(*command, "--budget-mb", "0.1")
    assert "--budget-mb 0.1 is too small: with the fewest bits everywhere the DiT's weights take 0." in error
    assert "holds the whole DiT in float" in error_of(*command, "--budget-mb", "100")


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--top", "1", "--budget-mb", "1"], "--top and --budget-mb exclude each other", 2),
        (["--output", "r.toml"], "--output needs one of --top, --exclude-above, --budget-mb, --target-cosine", 2),
        (["--method", "none"], "method none quantizes nothing that could be measured", 2),
        (["--alpha", "1.5"], "alpha 1.5 is outside 0..1", 2),
        (["--cfg-pair", "both"], "unknown cfg_pair 'both' (one of: halves, difference)", 2),
        (["--prompts", "1000"], "--prompts 1000 is outside 1..", 2),
        (["--recipe", "nope.toml"], "the recipe nope.toml cannot be read", 1),
        (["--plot", "p.gif"], "--plot p.gif: only .png and .svg are written", 1),
        (["--plot", "nowhere/p.png"], "cannot write nowhere/p.png", 1),
        (["--top", "1", "--output", "nowhere/r.toml"], "cannot write nowhere/r.toml", 1),
        (["--top", "7"], "--top 7 would leave nothing to quantize: there are 7", 1),
        (["--model", "nope"], "no such folder", 1),
    ],
)
def test_mistakes_are_one_line(model: Path, here: Path, arguments: list[str], said: str, code: int) -> None:
    assert said in error_of("sensitivity", "--model", model, *QUICK, *arguments, code=code).replace(f"{here}/", "")
    assert files_in(here) == []


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_trt.tooling.plots.find_spec", lambda name: None)
    assert "--plot needs the package matplotlib, which comes with the plot extra" in error_of(
        "sensitivity", *QUICK, "--plot", "p.png"
    )
