"""Recipe files: what is written is read back, and every fault of one is told in one line."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import error_of, invoke, one_object
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.tooling.recipe import CFG_PAIRS, LAYER_BITS, LORA_FORMS, ROUNDINGS, Recipe
from dit_trt.tooling.recipe_file import read_recipe, recipe_toml

patterns = st.lists(st.text()).map(tuple)
common = {
    "alpha": st.floats(0, 1) | st.just("auto"),
    "include": patterns,
    "exclude": patterns,
    "lora_rank": st.integers(1, 1024),
    "lora_form": st.sampled_from(LORA_FORMS),
    "cfg_pair": st.sampled_from(CFG_PAIRS),
}
four_bits = {"rounding": st.sampled_from(ROUNDINGS), "group_size": st.sampled_from([0, 16, 128])}
by_layer = st.dictionaries(st.text(), st.sampled_from(LAYER_BITS)).map(lambda pairs: tuple(pairs.items()))
quantized = (
    st.builds(Recipe, st.sampled_from(["sqs", "sqt"]), st.just("w4a8"), bits_for=by_layer, **common, **four_bits)
    | st.builds(Recipe, st.just("sqt"), st.just("w4a8"), w4=st.just("memory"), **common)
    | st.builds(Recipe, st.just("sqd"), sqd_weights=st.sampled_from(["shared", "requantize", "grouped:4"]), **common)
    | st.builds(Recipe, st.sampled_from(["sqs", "sqd"]), clip=st.booleans(), smooth=st.just(False))
)


@given(st.just(Recipe("none")) | quantized)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(recipe_toml(recipe), "utf-8")
    assert Recipe(**read_recipe(path)) == recipe


def test_what_is_written() -> None:
    text = recipe_toml(Recipe(alpha=0.5, exclude=('a"b', "c\\d\x7f")))
    assert text.startswith(
        'method = "sqs"\nbits = "w8a8"\nalpha = 0.5\nsmooth = true\n'
        'include = ["*"]\nexclude = ["a\\"b", "c\\\\d\\u007f"]\n'
    )
    assert recipe_toml(Recipe(bits_for=(("ff.*", "w4a8"), ("ff.ff.2", "float")))).endswith(
        '\n\n[bits_for]\n"ff.*" = "w4a8"\n"ff.ff.2" = "float"\n'
    )
    assert tomllib.loads(text)["exclude"] == ['a"b', "c\\d\x7f"]


def test_only_what_a_file_names_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('# by ear\nexclude = ["ff.ff.2"]\nalpha = 1\n')
    values = read_recipe(tmp_path / "r.toml")
    assert values == {"exclude": ("ff.ff.2",), "alpha": 1}
    assert Recipe(**values).to_dict() == Recipe(alpha=1.0, exclude=("ff.ff.2",)).to_dict()
    assert isinstance(Recipe(**values).alpha, float)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('metod = "sqs"', ["unknown key 'metod' (did you mean method?)"]),
        ("zzz = 1", ["unknown key 'zzz' (known: method, bits, alpha, smooth, include, exclude, bits_for, "]),
        ("[build]\nalpha = 0.5", ["unknown key 'build'"]),
        ("alpha = true", ['alpha takes a number or "auto", not a boolean']),
        ("alpha = 'most'", ['alpha takes a number or "auto", not a string']),
        ("smooth = 1", ["smooth takes true or false, not a number"]),
        ("lora_rank = 1.5", ["lora_rank takes a whole number, not a number"]),
        ("lora_rank = true", ["lora_rank takes a whole number, not a boolean"]),
        ("bits_for = ['ff.*']", ["bits_for takes a table of strings, not a list"]),
        ("[bits_for]\n'ff.*' = 4", ["bits_for takes a table of strings, not a table"]),
        ("[bits_for]\n'ff.*' = 'w3a3'", ["unknown bits 'w3a3' for 'ff.*'"]),
        ("alpha = 1.5", ["alpha 1.5 is outside 0..1"]),
        ("alpha = nan", ["alpha nan is outside 0..1"]),
        ("include = 'ff.*'", ["include takes a list of strings, not a string"]),
        ("exclude = ['a', 1]", ["exclude takes a list of strings, not a list of other things"]),
        ("method = 1979-05-27", ["method takes a string, not a date or time"]),
        ("method = 'none'\nalpha = 0.5", ["method none quantizes nothing"]),
        (
            "mehtod = 'sqs'\nbits = 'w3a3'\nalpha = 'x'\ninclude = 1\nexclude = {}",
            ["unknown key 'mehtod'", "alpha takes", "include takes", "exclude takes", "unknown bits 'w3a3'"],
        ),
        ("alpha = 0.5\nbits = w8a8", ["is not valid TOML", "line 2"]),
        ("alpha = 1\nalpha = 2", ["is not valid TOML"]),
        ("include = " + "[" * 100_000, ["is not valid TOML"]),
        ("alpha = " + "9" * 5000, ["is not valid TOML"]),
        (b"method = '\xff'", ["is not a text file in UTF-8"]),
    ],
)
def test_every_fault_of_a_file_is_told_in_one_line(tmp_path: Path, content: str | bytes, said: list[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("name", ["nowhere.toml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / name)


# -------------------- on the command line


def planned(*arguments: object) -> dict:
    return one_object(invoke("build", "--dry-run", "--json", *arguments).stdout)["recipe"]


def test_options_that_are_given_take_the_place_of_the_files(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(Recipe(alpha=0.25, include=("ff.*",), exclude=("*.0.ff.ff.2",))))
    file = ("--model", tiny, "--recipe", path)
    assert Recipe.from_dict(planned(*file)) == Recipe(**read_recipe(path))
    assert planned(*file, "--alpha", "0.95")["alpha"] == 0.95  # the option's default, but given
    changed = planned(*file, "--include", "cross_attn.*", "--exclude", "*to_q")
    assert (changed["include"], changed["exclude"], changed["alpha"]) == (["cross_attn.*"], ["*to_q"], 0.25)


def test_every_field_has_an_option(tiny: Path, tmp_path: Path) -> None:
    """What the options say is what a file says, and takes its place, also where that is the default."""
    recipe = Recipe(
        "sqs",
        "w4a8",
        "auto",
        include=("ff.*",),
        exclude=("*.0.ff.ff.2",),
        bits_for=(("ff.ff.2", "w8a8"), ("*.1.ff.*", "float")),
        lora_rank=7,
        lora_form="residual",
        clip=True,
        cfg_pair="difference",
        group_size=0,
        rounding="gptq",
    )
    words = "--method sqs --bits w4a8 --alpha auto --include ff.* --exclude *.0.ff.ff.2 --clip --cfg-pair difference"
    words += " --bits-for ff.ff.2=w8a8 --bits-for *.1.ff.*=float --lora-rank 7 --lora-form residual"
    words += " --group-size channel --rounding gptq"
    assert Recipe.from_dict(planned("--model", tiny, *words.split())) == recipe
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    back = "--alpha 0.95 --no-clip --cfg-pair halves --lora-rank 0 --lora-form svdquant --group-size 64"
    changed = planned("--model", tiny, "--recipe", tmp_path / "r.toml", *back.split(), "--rounding", "nearest")
    kept = {name: getattr(recipe, name) for name in ("method", "bits", "include", "exclude", "bits_for")}
    assert Recipe.from_dict(changed) == Recipe(**kept)


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ("--no-smoothing", Recipe(smooth=False)),
        ("--method sqd --sqd-weights grouped:3", Recipe("sqd", sqd_weights="grouped:3")),
        ("--method sqd --sqd-weights requantize", Recipe("sqd", sqd_weights="requantize")),
        ("--method sqt --bits w4a8 --w4 memory --group-size 128", Recipe("sqt", "w4a8", w4="memory", group_size=128)),
    ],
)
def test_other_methods_on_the_command_line(tiny: Path, tmp_path: Path, words: str, recipe: Recipe) -> None:
    assert Recipe.from_dict(planned("--model", tiny, *words.split())) == recipe
    (tmp_path / "r.toml").write_text("smooth = false")
    if recipe.smooth:
        file = ("--recipe", tmp_path / "r.toml", "--smoothing")
        assert Recipe.from_dict(planned("--model", tiny, *file, *words.split())) == recipe


def test_a_recipe_goes_out_of_a_bundle_and_in_again(tiny: Path, tmp_path: Path, tiny_float: Bundle) -> None:
    (tmp_path / "r.toml").write_text(invoke("inspect", tiny_float.folder, "--recipe").stdout)
    assert planned("--model", tiny, "--recipe", tmp_path / "r.toml") == tiny_float.manifest["recipe"]


def test_exit_codes(tmp_path: Path) -> None:
    """What only the file shows is a failure (1), what the command line shows a usage error (2)."""
    path = tmp_path / "r.toml"
    path.write_text("alpha = 2.0\n")
    assert f"the recipe {path}: alpha 2.0 is outside 0..1" in error_of("build", "--recipe", path, code=1)
    path.write_text("alpha = 0.5\n")
    assert "alpha 3.0 is outside 0..1" in error_of("build", "--recipe", path, "--alpha", "3", code=2)
    both = error_of("build", "--recipe", path, "--method", "no", "--bits", "no", code=2)
    assert "unknown method 'no'" in both
    assert "unknown bits 'no'" in both


def test_the_options_defaults_are_the_recipes() -> None:
    from dit_trt.tooling.cli.build import command

    defaults = {option.name: option.default for option in command.params}
    fields = asdict(Recipe())
    patterns = {name: fields.pop(name) for name in ("include", "exclude", "bits_for")}
    assert {name: defaults[name] for name in fields} == fields
    assert patterns.keys() <= defaults.keys()
