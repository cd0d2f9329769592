"""The command line as a person and a script meet it: help, the JSON contract, files, the verdict of diff."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import QUICK_CALIBRATION, error_of, files_in, invoke, one_object
from processes import dit_trt

from dit_trt.calib_data.reader import heldout_prompts
from dit_trt.engines.bundle import Bundle, bundles_folder, list_bundles
from dit_trt.engines.manifest import MANIFEST, write_manifest
from dit_trt.tooling.cli import COMMANDS

LONGEST = 24 * 256 / 8000  # seconds of the tiny model


# -------------------- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(flag):
    output = invoke(flag).stdout
    for name, text in COMMANDS.items():
        assert name in output
        assert text in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    output = invoke(command, "--help").stdout
    assert "Examples:" in output
    assert f"dit-trt {command}" in output
    assert "--json" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, invoke(command, "--help").stdout.splitlines())) <= 80


def test_an_option_of_build_is_a_line_under_its_heading(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("build", "--help").stdout.split("\n\n")
    sections = {text.splitlines()[0]: text.splitlines()[1:] for text in shown if "\n  -" in text}
    headings = [
        "Build",
        "Recipe",
        "Smoothing and ranges",
        "Low-rank branch",
        "4-bit weights",
        "TensorRT",
        "Calibration",
        "Other",
    ]
    assert [*sections] == [f"{heading}:" for heading in headings]
    assert all(line.startswith("  -") for lines in sections.values() for line in lines)
    assert [line.split()[0] for line in sections["4-bit weights:"]] == ["--w4", "--group-size", "--rounding"]


def test_version():
    assert invoke("--version").stdout == "dit-trt, version 0.1.0\n"


def test_an_unknown_command_is_a_usage_error():
    assert "'biuld'" in error_of("biuld", code=2)


# -------------------- the JSON contract


def build(tiny, output, *arguments):
    result = invoke("build", "--model", tiny, "--output", output, *QUICK_CALIBRATION, "--json", *arguments)
    return one_object(result.stdout), result.stderr


def test_build_json(tiny, tmp_path, tiny_table):
    value, _ = build(tiny, tmp_path / "out")
    bundle = Bundle(tmp_path / "out").verify()
    assert value == {
        "bundle": str(tmp_path / "out"),
        "backend": "openvino",
        "linears": 14,
        "int8_linears": 14,
        "size_bytes": bundle.size_bytes,
    }
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != MANIFEST)
    assert value["size_bytes"] == on_disk
    assert bundle.manifest["recipe"]["method"] == "sqs"
    assert bundle.manifest["recipe"]["bits"] == "w8a8"


def test_build_none_quantizes_nothing(tiny, tmp_path, tiny_sqs):
    value, stderr = build(tiny, tmp_path / "out", "--method", "none")
    assert (value["linears"], value["int8_linears"]) == (0, 0)
    assert value["size_bytes"] > tiny_sqs.size_bytes
    assert "calibrat" not in stderr
    assert Bundle(tmp_path / "out").verify().manifest["recipe"]["bits"] == "fp32"


@pytest.mark.parametrize(
    ("arguments", "linears"),
    [
        (["--exclude", "ff.ff.2"], 12),
        (["--exclude", "transformer.layers.1.*"], 7),
        (["--exclude", "ff.ff.2", "--exclude", "cross_attn.to_kv"], 10),
        (["--include", "ff.*"], 4),
        (["--include", "ff.*", "--exclude", "*.0.ff.ff.2"], 3),
    ],
)
def test_patterns_choose_linears(tiny, tmp_path, tiny_table, arguments, linears):
    value, stderr = build(tiny, tmp_path / "out", *arguments)
    assert (value["linears"], value["int8_linears"]) == (linears, linears)
    assert f"{linears} Linears asked for, {linears} in int8" in stderr


def test_build_without_an_output_goes_to_the_home_folder_and_replaces_itself(tiny, tiny_table):
    results = [invoke("build", "--model", tiny, *QUICK_CALIBRATION, "--json") for _ in range(2)]
    first, second = (Path(one_object(result.stdout)["bundle"]) for result in results)
    assert first == second
    assert first.parent == bundles_folder()
    assert first.name.startswith("tiny-sqs-w8a8-openvino-")
    assert list_bundles()[0].folder == first
    assert [path for path in bundles_folder().iterdir() if first.name in path.name] == [first]
    shutil.rmtree(first)


def test_run_json(run, tiny_sqs, tmp_path):
    result = invoke(*run, "dog barking", "rain", "--num-variations", "2", "--seed", "7", "--json")
    value = one_object(result.stdout)
    names = ["dog-barking-7.wav", "dog-barking-8.wav", "rain-9.wav", "rain-10.wav"]
    step_ms = value.pop("step_ms")
    assert isinstance(step_ms, float)
    assert step_ms > 0
    assert value == {
        "bundle": str(tiny_sqs.folder),
        "seed": 7,
        "files": names,
        "steps": 2,
        "seconds": LONGEST,
    }
    assert files_in(tmp_path) == sorted(names)
    for name in names:
        audio, rate = soundfile.read(tmp_path / name, always_2d=True)
        assert rate == 8000
        assert audio.shape == (24 * 256, 2)
        assert np.abs(audio).max() == pytest.approx(1, abs=1e-4)


def test_clips_at_once_are_the_same_files(run, tmp_path):
    alone = one_object(invoke(*run, "dog", "rain", "--num-variations", "2", "--json").stdout)["files"]
    sounds = [(tmp_path / name).read_bytes() for name in alone]
    result = invoke(*run, "dog", "rain", "--num-variations", "2", "--batch", "3", "--json", "--output", "batch")
    assert [(tmp_path / name).read_bytes() for name in one_object(result.stdout)["files"]] == sounds
    assert "sampling 8/8" in result.stderr
    assert "leave --batch out" in error_of(*run, "dog", "--batch", "2", "--stop-after", "1", code=2)


def test_a_coded_pair_is_computed_clip_by_clip(run, tiny, tiny_table, tmp_path):
    build(tiny, tmp_path / "pair", "--method", "sqt", "--cfg-pair", "difference")
    result = invoke("run", "--bundle", tmp_path / "pair", "dog", "rain", "--steps", "2", "--batch", "2")
    assert result.exit_code == 0
    assert "note: this bundle codes the guidance pair; it takes 1 clip at a time" in result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_diff_json(tiny_sqs):
    result = invoke("diff", tiny_sqs.folder, "--num-prompts", "2", "--steps", "4", "--min-cosine", "-1", "--json")
    value = one_object(result.stdout)
    numbers = ("worst_step_cosine", "mean_step_cosine", "mean_relative_error", "final_latent_snr_db")
    assert value["passed"] is True
    assert {"passed", "worst_step", *numbers} <= value.keys()
    assert all(isinstance(value[name], float) and math.isfinite(value[name]) for name in numbers)
    assert value["worst_step"] in range(4)
    assert 0 < value["worst_step_cosine"] <= value["mean_step_cosine"] < 1
    assert value["mean_relative_error"] > 0
    assert "PASS" in result.stderr


def test_a_fresh_process_prints_one_object(tiny, tiny_table, tmp_path):
    """Native libraries print past Python's sys.stdout: only a real process shows it."""
    bundle = str(tmp_path / "bundle")
    runs = [
        dit_trt("build", "--model", str(tiny), "--output", bundle, *QUICK_CALIBRATION, "--json"),
        dit_trt("run", "rain", "--bundle", bundle, "--steps", "2", "--output", str(tmp_path / "a.wav"), "--json"),
        dit_trt("diff", bundle, "--steps", "2", "--num-prompts", "1", "--min-cosine", "0", "--json"),
    ]
    keys = ["int8_linears", "files", "passed"]
    for finished, key in zip(runs, keys):
        assert finished.returncode == 0, finished.stderr
        assert key in one_object(finished.stdout)


def test_without_json_stdout_is_the_files_alone(run, tmp_path):
    result = invoke(*run, "rain", "--output", tmp_path / "rain.wav")
    assert result.stdout == f"{tmp_path / 'rain.wav'}\n"
    assert "sampling" in result.stderr


def test_a_diff_is_on_stdout_its_progress_is_not(tiny_sqs):
    result = invoke("diff", tiny_sqs.folder, "--against", tiny_sqs.folder, "--num-prompts", "1", "--steps", "2")
    assert "PASS: worst_step_cosine 1.0000" in result.stdout
    assert "final latents with dpmpp-2m: identical" in result.stdout
    assert "comparing" in result.stderr and "comparing" not in result.stdout


def test_a_negative_prompt_that_does_not_count_is_told(run, tiny_sqs):
    diff = ("diff", tiny_sqs.folder, "--against", tiny_sqs.folder, "--num-prompts", "1", "--steps", "2")
    for command in ((*run, "dog barking"), diff):
        told = invoke(*command, "--negative-prompt", "rain", "--cfg", "1").stderr
        assert "note: without guidance (cfg 1) the negative prompt does not count" in told
        assert "does not count" not in invoke(*command, "--negative-prompt", "rain", "--cfg", "2").stderr


# -------------------- diff's verdict


def test_a_diff_under_its_bar_fails(tiny_sqs):
    result = invoke(
        "diff", tiny_sqs.folder, "--num-prompts", "1", "--steps", "2", "--min-cosine", "1", "--json", code=1
    )
    value = one_object(result.stdout)
    assert value["passed"] is False
    assert value["worst_step_cosine"] < 1
    assert "FAIL" in result.stderr


@pytest.mark.parametrize("against", [(), ("--against",)], ids=["FP32 of its checkpoint", "itself"])
def test_a_bundle_is_no_different_from_itself(tiny_float, tiny_sqs, against):
    bundle = tiny_sqs if against else tiny_float
    options = (*against, bundle.folder) if against else ()
    result = invoke("diff", bundle.folder, *options, "--num-prompts", "1", "--steps", "3", "--json")
    value = one_object(result.stdout)
    assert value["passed"] is True
    assert value["worst_step_cosine"] == pytest.approx(1, abs=1e-6)
    assert value["mean_relative_error"] == pytest.approx(0, abs=1e-6)
    assert value["final_latent_snr_db"] > 100


def test_a_diff_of_prompts_of_ones_own(tiny_sqs, tiny_float, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("# three\na dog barks\nrain\nthunder\n", "utf-8")
    options = ("--against", tiny_float.folder, "--steps", "3", "--min-cosine", "-1", "--json")
    ours = one_object(invoke("diff", tiny_sqs.folder, *options, "--num-prompts", "2").stdout)
    assert ours["prompts"] == heldout_prompts()[:2]
    found = one_object(invoke("diff", tiny_sqs.folder, *options, "--prompts", mine).stdout)
    assert found["prompts"] == ["a dog barks", "rain", "thunder"]
    assert found["mean_relative_error"] != ours["mean_relative_error"]
    fewer = one_object(invoke("diff", tiny_sqs.folder, *options, "--prompts", mine, "--num-prompts", "1").stdout)
    assert fewer["prompts"] == ["a dog barks"] and fewer["mean_relative_error"] != found["mean_relative_error"]


def test_diff_against_another_model_is_refused(tiny_sqs, tmp_path):
    other = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "other"))
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["model"]["digest"] = "0" * 64
    write_manifest(other, manifest)
    assert "different models" in error_of("diff", tiny_sqs.folder, "--against", other, "--steps", "2")


def test_diff_of_a_model_that_changed_says_so(tiny_table, model_copy, tmp_path):
    build(model_copy, tmp_path / "out", "--method", "none")
    config = json.loads((model_copy / "model_config.json").read_text())
    (model_copy / "model_config.json").write_text(json.dumps({**config, "sample_size": 20 * 256}))
    assert "has changed" in error_of("diff", tmp_path / "out", "--steps", "2")
    shutil.rmtree(model_copy)
    assert str(model_copy) in error_of("diff", tmp_path / "out", "--steps", "2")


@pytest.mark.parametrize(("bits", "bar"), [("w8a8", 0.9), ("w4a8", 0.8)])
def test_the_bar_is_that_of_the_coarsest_linear(tiny_sqs, tmp_path, bits, bar):
    folder = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["layers"][3]["bits"] = bits
    write_manifest(folder, manifest)
    result = invoke("diff", folder, "--against", folder, "--num-prompts", "1", "--steps", "1", "--json")
    assert one_object(result.stdout)["min_cosine"] == bar


# -------------------- run's files


def test_a_very_long_prompt_works_and_says_what_is_not_seen(run, tmp_path):
    result = invoke(*run, "dog " * 500, "--output", "a.wav")
    assert "note: the last 494 tokens of the prompt" in result.stderr
    invoke(*run, " ".join(["dog"] * 6), "--output", "b.wav")
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_outputs_go_where_they_are_told(run, tmp_path):
    invoke(*run, "rain", "--output", "deep/er/a.wav", "--seconds", "0.5")
    assert soundfile.info(tmp_path / "deep" / "er" / "a.wav").frames == 4000
    invoke(*run, "rain", "--output", "clips/")
    invoke(*run, "Dog; barking / 'loud'!", "??", "--output", "clips")
    expected = ["deep", "deep/er", "deep/er/a.wav", "clips"]
    expected += [f"clips/{name}.wav" for name in ("rain-1000", "dog-barking-loud-1000", "clip-1001")]
    assert files_in(tmp_path) == sorted(expected)
