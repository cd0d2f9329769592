"""Bad input on the command line: one line that names the fix, the right exit code, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import QUICK_CALIBRATION, error_of, files_in, invoke
from processes import dit_trt

from dit_trt.tooling.cli import main


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "empty home"))
    return tmp_path / "empty home"


# -------------------- bad values


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "gptq"], "unknown method 'gptq' (one of: none, sqs"),
        (["--bits", "w3a3"], "unknown bits 'w3a3' (one of: w8a8"),
        (["--bits", "fp32"], "bits"),
        (["--method", "no", "--bits", "no"], "unknown method 'no' (one of: none, sqs, sqd, sqt); unknown bits 'no'"),
        (["--backend", "cuda"], "unknown backend 'cuda' (one of: auto, openvino"),
        (["--alpha", "1.5"], "alpha 1.5 is outside 0..1"),
        (["--alpha", "nan"], "alpha nan is outside 0..1"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--calib-steps", "-1"], "--calib-steps"),
        (["--calib-steps", "1001"], "--calib-steps"),
        (["--alpha", "-0.1"], "alpha -0.1 is outside 0..1"),
        (["--alpha", "inf"], "alpha inf is outside 0..1"),
        (["--num-prompts", "nan"], "'nan'"),
        (["--prompt-seed", "0.5"], "'0.5'"),
        (["--calib-steps", "many"], "'many'"),
        (["--nonsense"], "--nonsense"),
        (["--alpha", "much"], "'much' is neither a number nor auto"),
        (["--bits-for", "ff.*"], "'ff.*' is not GLOB=BITS"),
        (["--bits-for", "=w8a8"], "'=w8a8' is not GLOB=BITS"),
        (["--bits-for", "ff.*=int4"], "unknown bits 'int4' for 'ff.*'"),
        (["--bits-for", "ff.*=w4a8", "--bits-for", "ff.*=float"], "bits_for names 'ff.*' more than once"),
        (["--group-size", "all"], "'all' is neither a whole number nor channel"),
        (["--bits", "w4a8", "--group-size", "7"], "group_size 7 is neither 0 (per output channel) nor in 16..1024"),
        (["--lora-rank", "1.5"], "'1.5'"),
        (["--lora-rank", "-1"], "lora_rank -1 is outside 0..1024"),
        (["--sqd-weights", "grouped:4"], "sqd_weights belongs to method sqd, not to sqs"),
        (["--method", "sqd", "--sqd-weights", "grouped:99"], "unknown sqd_weights 'grouped:99'"),
        (["--no-smoothing", "--alpha", "0.5"], "without smoothing there is no alpha"),
        (["--rounding", "gptq"], "rounding belong to 4-bit weights (bits w4a8)"),
        (["--method", "none", "--clip"], "method none quantizes nothing: clip do not apply"),
        (["--method", "none", "--bits", "w4a8"], "method none quantizes nothing: bits do not apply"),
    ],
)
def test_bad_build_values_are_usage_errors(tiny, tmp_path, arguments, said):
    assert said in error_of("build", "--model", tiny, "--output", tmp_path / "out", *arguments, code=2)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--exclude", "ff.2"], "the pattern 'ff.2' matches no Linear; kinds: self_attn.to_qkv, "),
        (["--include", "nope", "--exclude", "ff.ff.2"], "the pattern 'nope' matches no Linear"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--num-prompts", "51"], "50 prompts"),
    ],
)
def test_what_is_wrong_is_told_before_the_calibration(tiny, tmp_path, arguments, said):
    result = error_of("build", "--model", tiny, "--output", tmp_path / "out", *arguments)
    assert said in result
    assert "calibrating" not in result
    assert files_in(tmp_path) == []


def test_an_output_that_is_no_bundle_is_refused_before_the_calibration(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    result = invoke("build", "--model", tiny, "--output", tmp_path / "out", "--recalibrate", code=1)
    assert "is not a bundle" in result.stderr
    assert "calibrating" not in result.stderr
    assert files_in(tmp_path) == ["out", "out/thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps 0 is outside 1..1000"),
        (["--steps", "1001"], "steps 1001 is outside 1..1000"),
        (["--cfg", "-1"], "cfg -1.0 is outside 0..100"),
        (["--cfg", "101"], "cfg 101.0 is outside 0..100"),
        (["--cfg", "nan"], "cfg nan is outside 0..100"),
        (["--seed", "-1"], "seed -1 is outside 0.."),
        (["--sampler", "heun"], "unknown sampler 'heun' (one of: dpmpp-3m-sde,"),
        (["--steps", "0", "--cfg", "-1"], "steps 0 is outside 1..1000; cfg -1.0"),
        (["--num-variations", "0"], "--num-variations"),
        (["--output", "clip.mp3"], "only .wav is written"),
        (["--output", "clip.wav", "--num-variations", "2"], "is one file, but 2 clips are asked for"),
        (["--sigma-min", "0"], "sigma_min"),
        (["--sigma-min", "500"], "sigma_min"),
        (["--sigma-min", "nan"], "sigma_min"),
        (["--sigma-max", "0.3"], "sigma_max"),
        (["--sigma-max", "inf"], "sigma_max"),
        (["--sigma-max", "1000001"], "sigma_max"),
        (["--cfg", "inf"], "cfg inf is outside 0..100"),
        (["--steps", "nan"], "'nan'"),
        (["--seed", str(2**63)], "seed 9223372036854775808 is outside 0.."),
        (["--seed", str(2**63 - 1), "--num-variations", "2"], "leaves no seeds for all clips"),
        (["--num-variations", "1001"], "--num-variations"),
        ([""], "the prompt is empty"),
        (["  "], "the prompt is empty"),
        (["\udcff"], "is not UTF-8 text"),
        (["--negative-prompt", "\udcff"], "is not UTF-8 text"),
        (["-x"], "-x"),
    ],
)
def test_bad_run_values_are_usage_errors(run, tmp_path, arguments, said):
    assert said in error_of(*run, "rain", *arguments, code=2)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rain", "--seconds", "5"], "seconds 5 is outside 0.1..0.77, this model's longest"),
        (["rain", "--seconds", "0"], "seconds 0 is outside 0.1..0.77"),
        (["rain", "--seconds", "nan"], "seconds nan is outside"),
        (["rain", "--seconds", "inf"], "seconds inf is outside"),
        (["rain", "--seconds", "-1"], "seconds -1 is outside"),
        (["rain", "--device", "CPU.7"], "cannot compile text.onnx"),
        (["rain", "--bundle", "~nobodyhere/x"], "there is no such home folder"),
        (["rain", "--bundle", "a\nb"], "no bundle"),
        (["rain", "--bundle", "x" * 300], "File name too long"),
        (["rain", "--device", "TPU"], "OpenVINO has no device 'TPU' here; available: "),
        (["rain", "--bundle", "nope"], "no bundle 'nope'"),
    ],
)
def test_what_the_model_cannot_do_is_said_and_nothing_written(run, tmp_path, arguments, said):
    assert said in error_of(*run, *arguments)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a\nb/../c\x07", "a-b-c"),
        ("..", "clip"),
        ("x" * 10_000, "x" * 60),
        ("\N{GRINNING FACE}", "clip"),
        ("\N{CUNEIFORM SIGN A}" * 90, "\N{CUNEIFORM SIGN A}" * 45),
    ],
)
def test_any_prompt_has_a_file_name(run, tmp_path, prompt, name):
    seed = 2**63 - 1
    invoke(*run, "--seed", seed, "--", prompt)
    assert files_in(tmp_path) == [f"{name}-{seed}.wav"]


def test_a_missing_prompt_is_a_usage_error():
    assert "PROMPT" in error_of("run", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min-cosine", "2"], "--min-cosine 2.0 is outside -1..1"),
        (["--min-cosine", "inf"], "--min-cosine inf is outside -1..1"),
        (["--min-cosine", "-1.1"], "--min-cosine -1.1 is outside -1..1"),
        (["--num-prompts", "9"], "--num-prompts 9 is outside 1..8"),
        (["--steps", "1001"], "steps 1001 is outside 1..1000"),
        (["--cfg", "nan"], "cfg nan is outside 0..100"),
        (["--cfg", "101"], "cfg 101.0 is outside 0..100"),
        (["--min-cosine", "nan"], "--min-cosine nan is outside -1..1"),
        (["--num-prompts", "0"], "--num-prompts 0 is outside 1.."),
        (["--steps", "0"], "steps 0 is outside 1..1000"),
        (["--cfg", "-1"], "cfg -1.0 is outside 0..100"),
        (["--negative-prompt", "\udcff"], "is not UTF-8 text"),
    ],
)
def test_bad_diff_values_are_usage_errors(tiny_sqs, arguments, said):
    assert said in error_of("diff", tiny_sqs.folder, *arguments, code=2)


# -------------------- bad places and bundles


def test_an_unwritable_output_is_told_before_sampling(run, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    for output in ("file/clips", "file/a.wav", "file"):
        result = invoke(*run, "rain", "--output", output, code=1 if "/" in output else 2)
        assert "--output" in result.stderr
        assert "sampling" not in result.stderr
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("command", [["run", "rain"], ["diff"]])
def test_without_a_bundle_the_command_that_makes_one_is_named(empty_home, command):
    assert "dit-trt build" in error_of(*command)


def test_a_tampered_bundle_is_refused(tiny_sqs, tmp_path):
    folder = Path(shutil.copytree(tiny_sqs.folder, tmp_path / "bundle"))
    content = bytearray((folder / "step.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "step.onnx.data").write_bytes(content)
    for command in (["run", "rain", "--bundle"], ["diff"]):
        assert "step.onnx.data does not match its sha256" in error_of(*command, folder)


# -------------------- bad models


def test_a_missing_model_folder(tmp_path):
    assert "no such folder" in error_of("build", "--model", tmp_path / "nowhere")


def truncated(part):
    def damage(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(len(content) * part)])

    return damage


def rewrite_config(change):
    def damage(folder):
        config = json.loads((folder / "model_config.json").read_text())
        change(config)
        (folder / "model_config.json").write_text(json.dumps(config))

    return damage


DAMAGED = {
    "truncated weights": (truncated(0.5), "model.safetensors"),
    "truncated header": (truncated(0.001), "model.safetensors"),
    "empty weights": (truncated(0), "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights: no model.safetensors"),
    "no config": (lambda folder: (folder / "model_config.json").unlink(), "has no model_config.json"),
    "config not JSON": (lambda folder: (folder / "model_config.json").write_text("{"), "is not valid JSON"),
    "config a list": (lambda folder: (folder / "model_config.json").write_text("[]"), "model_config.json"),
    "config empty": (lambda folder: (folder / "model_config.json").write_text("{}"), "model_config.json"),
    "config without a model's part": (
        rewrite_config(lambda config: config["model"].pop("conditioning")),
        "model_config.json",
    ),
    "config of another size": (
        rewrite_config(lambda config: config["model"]["diffusion"]["config"].update(embed_dim=192, num_heads=3)),
        "model.safetensors",
    ),
    "deeper config": (
        rewrite_config(lambda config: config["model"]["diffusion"]["config"].update(depth=3)),
        "transformer.layers.2",
    ),
    "unknown text encoder": (
        rewrite_config(lambda config: config["model"]["conditioning"]["configs"][0].update(type="clap_text")),
        "'clap_text'",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_named_and_nothing_left(model_copy, tmp_path, damage, said):
    damage(model_copy)
    before = files_in(tmp_path)
    assert said in error_of("build", "--model", model_copy, "--method", "none", "--output", tmp_path / "out")
    assert files_in(tmp_path) == before


# -------------------- interruptions


@pytest.mark.parametrize(
    "where", ["write_graphs.export_topologies", "write_graphs.lint", "build.prove", "build.write_manifest"]
)
def test_ctrl_c_in_a_build_leaves_nothing(tiny, tiny_table, tmp_path, monkeypatch, where):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dit_trt.tooling.{where}", interrupt)
    result = invoke("build", "--model", tiny, "--output", tmp_path / "out", *QUICK_CALIBRATION, code=130)
    assert result.stderr.splitlines()[-1] == "Error: interrupted"
    assert files_in(tmp_path) == []


def test_a_full_disk_is_one_line(tiny, tiny_table, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "step.onnx.data")

    monkeypatch.setattr("dit_trt.tooling.write_graphs.write_graph", full)
    message = error_of("build", "--model", tiny, "--output", tmp_path / "out", *QUICK_CALIBRATION)
    assert (
        message == "Error: No space left on device (step.onnx.data); choose another place with --output or DIT_TRT_HOME"
    )
    assert files_in(tmp_path) == []


def test_debug_shows_the_traceback(empty_home):
    result = CliRunner().invoke(main, ["run", "rain", "--debug"])
    assert type(result.exception).__name__ == "UserError"


@pytest.mark.parametrize("missing", [["torch"], ["onnx"], ["torch", "onnx", "onnxscript", "polygraphy"]])
def test_build_without_the_build_extra_names_it(tiny, tmp_path, missing):
    finished = dit_trt("build", "--model", str(tiny), "--output", str(tmp_path / "out"), without=missing)
    assert finished.returncode == 1
    assert finished.stdout == ""
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert any(f"the package {name}," in last for name in missing)
    assert 'pip install -c constraints.txt -e ".[build]"' in last
    assert "Traceback" not in finished.stderr
    assert files_in(tmp_path) == []
