"""Calibration against torch hooks on the torch model; interrupted, resumed, cached, shipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import random_model, write_checkpoint

from dit_trt.calib_data.reader import choose_prompts, default_prompts
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling.calibrate import Plan, calibrate
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.tables import load_calibration, load_rows, shipped_table, slim_table
from dit_trt.tooling.workflow import CalibrationOptions, calibration_table

STEPS = 6
PROMPTS = ("dog barking", "rain")


def a_plan(checkpoint: Checkpoint, seed: int, reservoir: int = 64) -> Plan:
    return Plan(checkpoint.digest, PROMPTS, Settings(steps=STEPS, seed=seed), reservoir)


def hooked_absmax(reference: Bundle, plan: Plan) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """What torch hooks see when the torch model is driven along the product's own trajectories."""
    model, pipeline = random_model(), Pipeline(reference)
    seen: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.dit.transformer.blocks()):
        modules = {
            "self_attn.to_qkv": block.self_attn.to_qkv,
            "self_attn.to_out": block.self_attn.to_out,
            "cross_attn.to_q": block.cross_attn.to_q,
            "cross_attn.to_kv": block.cross_attn.to_kv,
            "cross_attn.to_out": block.cross_attn.to_out,
            "ff.ff.0.proj": block.ff.ff[0].proj,
            "ff.ff.2": block.ff.ff[2],
        }
        for kind, module in modules.items():
            name = f"transformer.layers.{i}.{kind}"
            module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    high: dict[str, NDArray] = {}
    low: dict[str, NDArray] = {}
    for index, prompt in enumerate(plan.prompts):
        settings = Settings(steps=STEPS, seed=plan.settings.seed + index)
        ids, mask, _ = pipeline._tokenizer(prompt)
        text = model.conditioner.text(torch.from_numpy(ids), torch.from_numpy(mask))
        numbers = model.conditioner.numbers(torch.zeros(1), torch.full((1,), pipeline.max_seconds))
        context = torch.cat((text, numbers), dim=1)
        both = torch.cat((context, torch.zeros_like(context)))
        inputs: list[NDArray] = []
        conditioning = pipeline.condition(prompt, settings, pipeline.max_seconds)
        pipeline.sample(conditioning, settings, observe=lambda step, x, y, inputs=inputs: inputs.append(x["x"].copy()))
        times = np.arctan(settings.sigmas[:-1]) * 2 / np.pi
        for step, x in enumerate(inputs):
            t = torch.full((2,), float(times[step]))
            model.dit(torch.from_numpy(x), t, both, numbers.flatten(1).repeat(2, 1))
            for name, value in seen.items():
                flat = value.reshape(-1, value.shape[-1]).numpy()
                rows = 1 if name.endswith("to_kv") else STEPS
                row = 0 if rows == 1 else step
                high.setdefault(name, np.full((rows, flat.shape[1]), -np.inf))
                low.setdefault(name, np.full((rows, flat.shape[1]), np.inf))
                high[name][row] = np.maximum(high[name][row], flat.max(axis=0))
                low[name][row] = np.minimum(low[name][row], flat.min(axis=0))
    return high, low


def test_ranges_equal_torch_hooks(tiny: Path, tiny_float: Bundle) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    plan = a_plan(checkpoint, seed=100)
    table = load_file(calibrate(checkpoint, tiny_float, plan))
    high, low = hooked_absmax(tiny_float, plan)
    assert {name.partition("/")[2] for name in table} == set(high) == {x.name for x in checkpoint.linears}
    for name in high:
        largest = max(np.abs(high[name]).max(), np.abs(low[name]).max())
        np.testing.assert_allclose(table[f"max/{name}"], high[name], atol=2e-4 * largest, rtol=0)
        np.testing.assert_allclose(table[f"min/{name}"], low[name], atol=2e-4 * largest, rtol=0)


def test_reservoir_rows_are_real_tokens_of_both_halves(tiny: Path, tiny_float: Bundle) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    table = load_file(calibrate(checkpoint, tiny_float, a_plan(checkpoint, seed=100)))
    for linear in checkpoint.linears:
        rows = table[f"rows/{linear.name}"].astype(np.float32)
        assert rows.shape == (64, linear.in_features) and rows.dtype == np.float32
        high, low = table[f"max/{linear.name}"].max(axis=0), table[f"min/{linear.name}"].min(axis=0)
        slack = 1e-3 * np.maximum(np.abs(high), np.abs(low)) + 1e-6
        assert (rows <= high + slack).all() and (rows >= low - slack).all()
        zero = ~rows.any(axis=1)
        if linear.kind in ("cross_attn.to_kv", "cross_attn.to_out"):
            assert zero[1::2].all(), "every second slot is of the unconditional half, whose context is zero"
            assert not zero[0::2].all()
        else:
            assert not zero.any() and len(np.unique(rows, axis=0)) > 48


def test_loaded_rows_know_their_steps(tiny: Path, tiny_float: Bundle) -> None:
    """Every row lies within the range that its own step recorded, and not all within that of one other step."""
    checkpoint = Checkpoint.open(str(tiny))
    path = calibrate(checkpoint, tiny_float, a_plan(checkpoint, seed=100))
    table, loaded = load_file(path), load_rows(path, checkpoint)
    assert list(loaded) and loaded.keys() == {linear.name for linear in checkpoint.linears}
    elsewhere = 0
    for linear in checkpoint.linears:
        rows, step = loaded[linear.name]
        assert rows.shape == (64, linear.in_features) and rows.dtype == np.float32 and step.shape == (64,)
        # Tables are kept for long: which row is of which step is part of their format.
        expected = np.zeros(64) if linear.graph == "conditioning" else np.arange(64) * STEPS // 64
        np.testing.assert_array_equal(step, expected)
        high, low = table[f"max/{linear.name}"], table[f"min/{linear.name}"]
        slack = 1e-3 * np.maximum(np.abs(high), np.abs(low)).max() + 1e-6
        assert (rows <= high[step] + slack).all() and (rows >= low[step] - slack).all()
        other = (step + 1) % len(high)
        elsewhere += int(((rows > high[other] + slack) | (rows < low[other] - slack)).sum())
    assert elsewhere


def test_a_table_without_rows_says_what_to_do(tiny: Path, tiny_float: Bundle, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    slim = tmp_path / "slim.safetensors"
    slim_table(calibrate(checkpoint, tiny_float, a_plan(checkpoint, seed=100)), slim)
    with pytest.raises(UserError, match=r"no token rows; use --recalibrate"):
        load_rows(slim, checkpoint)


@pytest.mark.parametrize("stop_at", [1, STEPS - 1, STEPS, STEPS + 3])
def test_interrupted_calibration_goes_on_and_ends_the_same(tiny: Path, tiny_float: Bundle, stop_at: int) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    plan = a_plan(checkpoint, seed=200)
    shutil.rmtree(plan.folder, ignore_errors=True)
    expected = load_file(calibrate(checkpoint, tiny_float, plan))
    shutil.rmtree(plan.folder)

    def interrupt(done: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, tiny_float, plan, interrupt)
    assert not plan.table.exists()
    calls: list[int] = []
    found = load_file(calibrate(checkpoint, tiny_float, plan, calls.append))
    assert calls[0] == stop_at, "the finished steps are not run again"
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert sorted(path.name for path in plan.folder.iterdir()) == [plan.table.name]


def test_finished_steps_are_not_computed_again(tiny: Path, tiny_float: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_trt.engines.openvino import OpenVINOEngine

    checkpoint = Checkpoint.open(str(tiny))
    plan = a_plan(checkpoint, seed=300)
    runs = {"step": 0}
    run = OpenVINOEngine.run

    def counted(self, inputs):  # type: ignore[no-untyped-def]
        runs["step"] += "velocity" in self.outputs
        return run(self, inputs)

    def interrupt(done: int) -> None:
        if done == STEPS + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(OpenVINOEngine, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, tiny_float, plan, interrupt)
    first = runs["step"]
    calibrate(checkpoint, tiny_float, plan)
    assert first == STEPS + 2 and runs["step"] == 2 * STEPS
    calibrate(checkpoint, tiny_float, plan)
    assert runs["step"] == 2 * STEPS, "a finished table is taken from the cache"


def test_what_is_cached_depends_on_everything_that_matters(tiny: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny))
    base = Plan(checkpoint.digest, PROMPTS, Settings(steps=STEPS))
    others = [
        Plan("other", PROMPTS, Settings(steps=STEPS)),
        Plan(checkpoint.digest, PROMPTS[::-1], Settings(steps=STEPS)),
        Plan(checkpoint.digest, PROMPTS, Settings(steps=STEPS + 1)),
        Plan(checkpoint.digest, PROMPTS, Settings(steps=STEPS, cfg_scale=3)),
    ]
    assert len({plan.digest for plan in [base, *others]}) == 5


def test_shipped_slim_table_never_understates(tiny: Path, tiny_float: Bundle, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "with-table")
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.digest == Checkpoint.open(str(tiny)).digest
    assert shipped_table(checkpoint) is None
    full = calibrate(checkpoint, tiny_float, a_plan(checkpoint, seed=100))
    slim_table(full, folder / "calibration.safetensors")
    slim, exact = (load_calibration(path or Path(), checkpoint).absmax for path in (shipped_table(checkpoint), full))
    for name, value in exact.items():
        assert slim[name].shape == value.shape and (slim[name] >= value).all()
        np.testing.assert_allclose(slim[name].max(axis=0), value.max(axis=0), rtol=2e-3, atol=1e-7)
        pairs = slim[name].reshape(-1, 2, value.shape[1]) if len(value) > 1 else slim[name][None]
        assert (pairs[:, 0] == pairs[:, -1]).all()
    messages: list[str] = []
    path = calibration_table(checkpoint, "openvino", CalibrationOptions(), say=messages.append)
    table = load_calibration(path, checkpoint).absmax
    assert "shipped" in messages[0]
    np.testing.assert_array_equal(table["transformer.layers.0.ff.ff.2"], slim["transformer.layers.0.ff.ff.2"])
    other = write_checkpoint(tmp_path / "other", random_model(seed=5))
    shutil.copy(folder / "calibration.safetensors", other)
    assert shipped_table(Checkpoint.open(str(other))) is None
    with pytest.raises(UserError, match="another checkpoint"):
        load_calibration(other / "calibration.safetensors", Checkpoint.open(str(other)))


@pytest.mark.parametrize(
    ("recipe", "kind", "words"),
    [
        (Recipe(alpha="auto"), "rows", "sample tokens"),
        (Recipe("sqd", cfg_pair="difference"), "difference", "ranges of the guidance pair's difference"),
    ],
)
def test_a_table_that_lacks_what_a_recipe_needs_is_made_afresh(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, kind: str, words: str
) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    checkpoint, options = Checkpoint.open(str(tiny)), CalibrationOptions(num_prompts=1, steps=2)
    path = calibration_table(checkpoint, "openvino", options)
    whole = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file({key: value for key, value in whole.items() if not key.startswith(kind)}, path, metadata)
    messages: list[str] = []
    assert calibration_table(checkpoint, "openvino", options, say=messages.append) == path
    assert messages == ["calibration table: from the cache"]
    messages.clear()
    assert calibration_table(checkpoint, "openvino", options, say=messages.append, recipe=recipe) == path
    assert messages[0].startswith(f"the calibration table at hand lacks {words}, which this recipe needs")
    assert load_file(path).keys() == whole.keys()
    messages.clear()
    calibration_table(checkpoint, "openvino", options, say=messages.append, recipe=recipe)
    assert messages == ["calibration table: from the cache"]


def test_audiocaps_csv_calibrates(tiny: Path, tmp_path: Path) -> None:
    csv = tmp_path / "test.csv"
    csv.write_text('audiocap_id,youtube_id,start_time,caption\n1,abc,10,A dog barks\n2,def,20,"Rain, and wind"\n')
    options = CalibrationOptions(prompts=str(csv), num_prompts=2, steps=2)
    assert options.chosen() == ["A dog barks", "Rain, and wind"]
    checkpoint = Checkpoint.open(str(tiny))
    table = load_calibration(calibration_table(checkpoint, "openvino", options), checkpoint).absmax
    assert table["transformer.layers.0.ff.ff.2"].shape == (2, 256)


def test_default_prompts_are_fifty_of_our_own() -> None:
    assert len(default_prompts()) == 50
    assert CalibrationOptions().chosen() == choose_prompts(default_prompts(), 50, 0)


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_unreadable_table(tiny: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{" if damage == "truncated" else b"not a table")
    with pytest.raises(UserError, match="--recalibrate"):
        load_calibration(path, Checkpoint.open(str(tiny)))
