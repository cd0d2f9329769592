"""The bench: turns are fair, numbers are what their names say, and contenders compute the same step."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import error_of, files_in, invoke, one_object
from hardware import exact_int8

from dit_trt.engines.errors import UserError
from dit_trt.engines.home import home as home_folder
from dit_trt.engines.openvino import has_bf16
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling import bench as benching
from dit_trt.tooling import step_child, step_contest, timed_steps
from dit_trt.tooling.bench import BASELINE, bench, interleaved, machine, markdown
from dit_trt.tooling.process_memory import Memory
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.synthetic_checkpoint import SHAPES, _tensors, write_checkpoint
from dit_trt.tooling.workflow import build
from peers import require

CONTENDERS = [BASELINE, "openvino fp32", "onnxruntime fp32", "openvino int8 (SQS)", "onnxruntime int8 (SQS)"]
if has_bf16():
    CONTENDERS += ["openvino fp32, rest in bf16", "openvino int8 (SQS), rest in bf16"]


@pytest.fixture(scope="module")
def report(tiny, home):
    return bench(str(tiny), 2, 1)


def test_every_means_there_is_computes_the_same_step(report):
    assert [row.name for row in report.rows] == CONTENDERS
    errors = {row.name: row.relative_error for row in report.rows}
    assert errors[BASELINE] == 0
    assert errors["openvino fp32"] < 1e-5
    assert errors["onnxruntime fp32"] < 1e-5
    assert 1e-3 < errors["openvino int8 (SQS)"] < 0.5
    assert 1e-3 < errors["onnxruntime int8 (SQS)"] < 0.5
    for row in report.rows:
        assert (row.linears, row.int8_linears) == ((14, 14) if "int8" in row.name else (0, 0))
        assert row.first_seconds > 0
        assert row.memory.rss_anon > 20e6
    if has_bf16():
        assert errors["openvino int8 (SQS), rest in bf16"] == pytest.approx(errors["openvino int8 (SQS)"], rel=0.5)


def test_int8_errs_alike_on_every_backend(report):
    exact_int8("openvino")
    errors = {row.name: row.relative_error for row in report.rows}
    assert errors["onnxruntime int8 (SQS)"] == pytest.approx(errors["openvino int8 (SQS)"], rel=0.1)


def test_sizes_are_the_bundles(report):
    torch_row, float_row, _, int8_row, *_ = report.rows
    assert torch_row.bundle_bytes is None
    assert int8_row.bundle_bytes < float_row.bundle_bytes
    assert int8_row.step_graph_bytes < float_row.step_graph_bytes / 2


def contested(name, seconds, bundle=None, **more):
    """A row of the bench, of seconds by contender and round."""
    memory = Memory(1, 2, 3)
    ratios = tuple(base / own for base, own in zip(seconds[BASELINE], seconds[name]))
    row = step_contest.Row(name, 1.0, 2.0, memory, memory, 0.25, more.get("int8"), tuple(seconds[name]), ratios)
    return benching._row(row, seconds, bundle, more.get("backend"), 12 * ("backend" in more))


def test_a_bundle_of_several_step_graphs_is_timed_in_the_right_one(tiny_float, tiny_grouped, tmp_path):
    """Its step is that of its pipeline, and its size that of all its step graphs and their tables."""
    x = benching._recorded_input(tiny_float)
    np.save(tmp_path / "x.npy", x)
    question = {"bundle": str(tiny_grouped.folder), "precision": None, "latents": x.shape[2], "threads": 1}
    question |= {"steps": 8, "step": 4, "prompt": benching.PROMPT, "x": str(tmp_path / "x.npy"), "embeds": None}
    pipeline, settings = Pipeline(tiny_grouped), Settings(steps=8, sampler="dpmpp-2m")
    seconds = pipeline.check_seconds(None)
    conditioning = pipeline.condition(benching.PROMPT, settings, seconds)
    assert pipeline.step_engine_of().graph(conditioning, 4) == "step-1"
    expected = pipeline.step_engine_of().run(conditioning, 4, x)["velocity"]
    step, _ = step_child.open_bundle(question | {"seconds": seconds})
    for _ in range(2):
        np.testing.assert_allclose(step(), expected, atol=1e-4 * np.abs(expected).max())
    row = contested("it", {BASELINE: [1.0], "it": [1.0]}, tiny_grouped)
    assert row.step_graph_bytes == sum(path.stat().st_size for path in tiny_grouped.folder.glob("step*"))


def test_a_peer_is_compared_with_sqs_of_its_backend():
    seconds = {BASELINE: [8.0, 4.0, 6.0], "openvino int8 (SQS)": [2.0, 1.0, 1.0], "NNCF": [4.0, 2.0, 2.0]}
    row = contested("NNCF", seconds, backend="openvino", int8=9)
    assert (row.over_sqs[0], row.linears, row.int8_linears, row.bundle_bytes) == (2.0, 12, 9, None)
    assert row.speedup[0] == 2.0
    assert (contested("NNCF", seconds, backend="openvino").int8_linears, row.linears) == (0, 12)  # 0 of 12 is told
    assert contested(BASELINE, seconds).over_sqs is None


# -------------------- PyTorch's ways, and diffusers'


@pytest.fixture(scope="module")
def torch_question(tiny, tiny_float, tmp_path_factory):
    """What `step_child` is told of the tiny model's step 4 of 8, and its FP32 engine's velocity."""
    return asked(str(tiny), tiny_float, tmp_path_factory.mktemp("torch"))


def asked(model, bundle, folder):
    x, pipeline = benching._recorded_input(bundle), Pipeline(bundle)
    np.save(folder / "x.npy", x)
    np.save(folder / "embeds.npy", pipeline._embed(benching.PROMPT))
    settings, seconds = Settings(steps=8), pipeline.check_seconds(None)
    question = {"model": model, "threads": 1, "sigma": float(settings.sigmas[4]), "seconds": seconds}
    question |= {"x": str(folder / "x.npy"), "embeds": str(folder / "embeds.npy")}
    conditioning = pipeline.condition(benching.PROMPT, settings, seconds)
    return question, pipeline.step_engine_of().run(conditioning, 4, x)["velocity"]


@pytest.mark.parametrize(
    ("variant", "error", "int8"),
    [("torch fp32", 1e-5, 0), ("torch bf16", 0.05, 0), ("torchao int8 dynamic", 0.2, 12)],
)
def test_pytorch_computes_the_same_step(torch_question, variant, error, int8):
    require({"torchao int8 dynamic": "torchao"}.get(variant, "torch"))
    question, expected = torch_question
    step, told = step_child.open_torch(question | {"variant": variant})
    found = np.linalg.norm(step() - expected) / np.linalg.norm(expected)
    assert found < error
    assert found > 1e-3 or error < 1e-3
    assert told == {"int8_linears": int8}


def test_diffusers_computes_the_same_step(home, tmp_path, monkeypatch, torch_question):
    """Of a block as Stable Audio Open's, in small: diffusers has no other."""
    require("diffusers")
    config = json.loads(json.dumps(SHAPES["sao-block"]))
    config["sample_size"] = 24 * 2048
    config["model"]["diffusion"]["config"].update(embed_dim=128, num_heads=2, cond_token_dim=64, global_cond_dim=128)
    config["model"]["conditioning"]["cond_dim"] = 64
    monkeypatch.setitem(SHAPES, "small-block", config)
    model = write_checkpoint("small-block", tmp_path / "small-block")
    bundle = build(Recipe("none"), str(model), "openvino", tmp_path / "float").bundle
    question, expected = asked(str(model), bundle, tmp_path)
    step, told = step_child.open_torch(question | {"variant": "diffusers fp32"})
    assert np.linalg.norm(step() - expected) < 1e-5 * np.linalg.norm(expected)
    assert told == {"int8_linears": 0}
    with pytest.raises(UserError, match="diffusers' DiT has feed-forwards of 4 times its width"):
        step_child.open_torch(torch_question[0] | {"variant": "diffusers fp32"})


def test_a_compiled_step_is_the_same_step(torch_question, monkeypatch):
    """Without the compiler, which takes minutes: that of PyTorch's which only traces."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    question, expected = torch_question
    step, _ = step_child.open_torch(question | {"variant": "torch fp32, compiled"})
    assert np.linalg.norm(step() - expected) < 1e-5 * np.linalg.norm(expected)
    assert len(compiled) == 1


def test_peers_are_contenders(tiny, home, monkeypatch):
    """Those that cannot are left out with the reason, the others timed; PyTorch's compiler is not tried here."""
    said = []
    plain = benching.VARIANTS[BASELINE]
    monkeypatch.setattr(benching, "VARIANTS", {BASELINE: plain, "torch bf16": plain, "no such": plain})
    monkeypatch.setattr(benching, "PEERS", {name: benching.PEERS[name] for name in ("nncf-int8", "ort-dynamic")})
    report = bench(str(tiny), 1, 1, say=said.append, peers=True)
    names = [row.name for row in report.rows if row.name not in CONTENDERS]
    assert names == ["torch bf16", "NNCF int8 (TRANSFORMER)", "ONNX Runtime quantize_dynamic"]
    assert any(line.startswith("left out: diffusers fp32: diffusers' DiT has feed-forwards") for line in said)
    assert any(line.startswith("left out: no such: ") for line in said)
    rows = {row.name: row for row in report.rows}
    assert [(rows[name].linears, rows[name].int8_linears) for name in names] == [(0, 0), (12, 12), (12, 12)]
    assert all(rows[name].relative_error < 0.5 for name in names)


def test_the_baseline_is_one_time_itself(report):
    assert report.rows[0].speedup == (1, 1, 1)
    assert all(row.step_ms[1] <= row.step_ms[0] <= row.step_ms[2] for row in report.rows)
    assert all(row.speedup[1] <= row.speedup[0] <= row.speedup[2] for row in report.rows)


def test_ratios_are_taken_within_rounds(monkeypatch):
    """A machine ten times slower in one round leaves the ratios as they are."""
    now, slow = 0.0, 1.0

    def perf_counter():
        return now

    def costing(seconds):
        def step():
            nonlocal now
            now += seconds * slow

        return step

    monkeypatch.setattr(timed_steps.time, "perf_counter", perf_counter)
    contenders = {BASELINE: costing(8.0), "fast": costing(2.0)}

    def done(n):
        nonlocal slow
        slow = 10.0 if n == 1 else 1.0

    seconds = interleaved(contenders, 3, done)
    assert seconds == {BASELINE: [8.0, 80.0, 8.0], "fast": [2.0, 20.0, 2.0]}
    row = contested("fast", seconds)
    assert row.speedup == (4.0, 4.0, 4.0)
    assert row.step_ms[0] == 2000.0


def test_everybody_comes_first_once():
    order = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "abc"}
    interleaved(contenders, 3)
    firsts = [name for name, _ in itertools.groupby(order)]
    assert "".join(firsts) == "abcbcacab"


def test_the_table_has_a_line_for_each(report):
    lines = markdown(report).splitlines()
    assert "1 threads" in lines[0]
    rows = [line for line in lines[2:] if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in rows[2:]] == CONTENDERS
    assert len({line.count("|") for line in rows}) == 1
    starts = [line for line in lines if "process start to WAV" in line and "after the first step" in line]
    assert [line.partition(":")[0] for line in starts] == ["openvino", "onnxruntime"]


def test_cold_starts_are_whole_processes(report, tiny_sqs, monkeypatch):
    assert [start.backend for start in report.cold_starts] == ["openvino", "onnxruntime"]
    assert all(min(start.first, start.later, start.first_step) > 0 for start in report.cold_starts)
    run, seen = subprocess.run, []
    monkeypatch.setattr(benching.subprocess, "run", lambda *a, **k: seen.append((a[0], k["env"])) or run(*a, **k))
    start = benching.cold_start(tiny_sqs, runs=2)
    assert start.backend == tiny_sqs.backend and min(start.first, start.later, start.first_step) > 0
    assert [command[0] for command, _ in seen] == [sys.executable] * 5
    assert ["--stop-after" in command for command, _ in seen] == [False, False, True, False, True]
    assert len({env["DIT_TRT_HOME"] for _, env in seen}) == 1 and seen[0][1]["DIT_TRT_HOME"] != str(home_folder())


def test_the_command(tiny, report, tmp_path, monkeypatch, home):
    before = files_in(home / "bundles")
    monkeypatch.setattr(benching, "cold_start", lambda bundle: benching.ColdStart(bundle.backend, 2.0, 1.0, 0.5))
    result = invoke(
        "bench", "--shape", tiny, "--rounds", 1, "--threads", 1, "--output", tmp_path / "results.md", "--json"
    )
    answer = one_object(result.stdout)
    assert set(answer) == {"machine", "shapes"}
    assert [row["name"] for row in answer["shapes"][0]["rows"]] == CONTENDERS
    assert answer["machine"] == machine()
    text = (tmp_path / "results.md").read_text()
    assert text.startswith(machine())
    assert text.count("| openvino int8 (SQS) |") == 1
    assert files_in(home / "bundles") == before  # `run` takes the newest: it must not be one that was made to be timed


def test_an_unwritable_report_is_refused_before_the_work(tmp_path):
    assert "cannot write" in error_of("bench", "--output", tmp_path / "nowhere" / "results.md")
    assert "unknown --shape" in error_of("bench", "--shape", tmp_path / "nothing", "--rounds", 1)


# -------------------- synthetic checkpoints


def test_one_block_of_stable_audio_opens_sizes(tmp_path):
    checkpoint = Checkpoint.open(str(write_checkpoint("sao-block", tmp_path / "block")))
    dit = checkpoint.sizes.dit
    assert (dit.embed_dim, dit.num_heads, dit.kv_heads, dit.dim_heads, dit.ff_inner) == (1536, 24, 12, 64, 6144)
    assert (checkpoint.sizes.max_latents, checkpoint.sizes.context_tokens) == (1024, 130)
    weights = sum(linear.in_features * linear.out_features for linear in checkpoint.linears)
    assert weights == 43_646_976  # 1/24 of the DiT's 168 Linears
    ff2 = checkpoint.tensor(next(x for x in checkpoint.linears if x.kind == "ff.ff.2").key())
    assert ff2.std() == pytest.approx(6144**-0.5, rel=0.01)
    gamma = checkpoint.tensor("model.model.transformer.layers.0.pre_norm.gamma")
    assert 5 < (gamma > 5).sum() < 40


def test_the_same_seed_gives_the_same_weights():
    config = json.loads(json.dumps(SHAPES["sao-block"]))
    config["model"]["diffusion"]["config"].update(embed_dim=128, num_heads=2, cond_token_dim=64, global_cond_dim=128)
    config["model"]["conditioning"]["cond_dim"] = 64
    first, again, other = (dict(_tensors(config, seed)) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
