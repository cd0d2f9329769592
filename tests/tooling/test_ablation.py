"""The ablation table on the tiny model: rows measured once and kept, peers beside them, the Markdown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dit_trt.engines.errors import UserError
from dit_trt.runtime.pipeline import Settings
from dit_trt.tooling import ablation as ablating
from dit_trt.tooling.ablation import Ablation
from dit_trt.tooling.ablation_report import markdown
from dit_trt.tooling.ablation_rows import ROWS, Row, chosen_rows
from dit_trt.tooling.fidelity import Trial
from dit_trt.tooling.peers import PEERS
from dit_trt.tooling.workflow import CalibrationOptions

TRIAL = Trial(("dog barking", "rain"), (5000,), Settings(steps=4))
CALIBRATION = CalibrationOptions(num_prompts=3, steps=8)
NAMES = ["openvino/fp32", "openvino/w8a8-sqs", "onnxruntime/w8a8-sqs", "onnxruntime/ort-static"]


def tiny_ablation(tiny: Path, **options: object) -> Ablation:
    return Ablation(str(tiny), TRIAL, CALIBRATION, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tiny: Path, tiny_table_file: Path) -> Ablation:
    ablation = tiny_ablation(tiny)
    assert ablation.run(chosen_rows(",".join(NAMES)), 3) == {}
    return ablation


def test_numbers_of_the_rows(done: Ablation) -> None:
    assert list(done.results) == NAMES
    exact, sqs, ort_sqs, static = done.results.values()
    assert exact["worst_step_cosine"] == pytest.approx(1, abs=1e-6)
    assert (exact["snr_db"], exact["log_mel_db"], exact["linears"]) == (200, 0, 0)
    for row in (sqs, ort_sqs, static):
        assert row["worst_step_cosine"] < 0.99999
        assert row["worst_step_cosine"] == min(row["cosine_by_step"]) == row["cosine_by_step"][row["worst_step"]]
        assert row["log_mel_db"] > 0
        assert len(row["ratios"]) == 3
    assert (sqs["linears"], sqs["int8_linears"], sqs["smoothing"], sqs["range"]) == (14, 14, "static", "static")
    assert (static["linears"], static["int8_linears"], static["smoothing"], static["range"]) == (
        12,
        12,
        "none",
        "static",
    )
    assert static["worst_step_cosine"] < 0.5 < sqs["worst_step_cosine"], "outliers, and nothing that smooths them"
    assert sqs["ratios"] == ort_sqs["ratios"] == [1, 1, 1], "each backend has its own baseline"
    assert sqs["step_bytes"] < exact["step_bytes"] / 2
    assert static["bundle_bytes"] - static["step_bytes"] == exact["bundle_bytes"] - exact["step_bytes"]


def test_what_is_done_is_not_done_again(tiny: Path, done: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("done before")

    for name in ("build", "measure", "interleaved", "calibration_calls"):
        monkeypatch.setattr(ablating, name, never)
    again = tiny_ablation(tiny)
    assert again.run(chosen_rows("openvino/fp32,*/w8a8-sqs,*/ort-static"), 3) == {}
    assert again.results == done.results
    with pytest.raises(AssertionError, match="done before"):  # other rounds are another timing
        again.run(chosen_rows("openvino/fp32"), 4)


def test_an_interrupted_run_goes_on(tiny: Path, done: Ablation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second row; the next run takes the first as it is, and what the trial is decides what is kept."""
    trial = Trial(("rain",), (5000,), Settings(steps=4))
    rows = chosen_rows("openvino/fp32,openvino/w8a8-sqs")
    measured = []

    @contextlib.contextmanager
    def watch(what: str, total: int) -> Iterator[Callable[[int], object]]:
        measured.append(what)
        if what == "openvino/w8a8-sqs" and measured.count(what) == 1:
            raise KeyboardInterrupt
        yield lambda calls: None

    with pytest.raises(KeyboardInterrupt):
        Ablation(str(tiny), trial, CALIBRATION, watch).run(rows, 2)
    Ablation(str(tiny), trial, CALIBRATION, watch).run(rows, 2)
    assert [what for what in measured if "/" in what] == ["openvino/fp32", "openvino/w8a8-sqs", "openvino/w8a8-sqs"]
    assert tiny_ablation(tiny).results == done.results


def test_fresh_builds_again_and_measures_only_what_changed(
    tiny: Path, done: Ablation, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, measured = [], []
    build, measure = ablating.build, ablating.measure
    monkeypatch.setattr(ablating, "build", lambda *a: built.append(a[0].method) or build(*a))
    monkeypatch.setattr(ablating, "measure", lambda *a: measured.append(1) or measure(*a))
    fresh = tiny_ablation(tiny, fresh=True)
    fresh.run(chosen_rows("openvino/w8a8-sqs"), 3)
    assert (built, measured) == (["sqs"], []), "the same bytes have the same digest"
    fresh.results["openvino/w8a8-sqs"]["digest"] = "of another build"
    fresh.run(chosen_rows("openvino/w8a8-sqs"), 3)
    assert (built, measured) == (["sqs"], [1])


def test_a_row_that_cannot_be_is_left_out_with_its_reason(tiny: Path, done: Ablation) -> None:
    lost = Row("openvino", "lost", "Lost", {"method": "sqs", "include": ("no such",)})
    other = tiny_ablation(tiny)
    left_out = other.run([lost, *chosen_rows("openvino/fp32")], 3)
    assert list(left_out) == ["openvino/lost"]
    assert "'no such' matches no Linear" in left_out["openvino/lost"]
    assert other.results == done.results


def test_the_table(done: Ablation) -> None:
    results = {name: result for name, result in done.results.items() if name != "openvino/fp32"}
    results["openvino/w8a8-sqs"] = {**results["openvino/w8a8-sqs"], "snr_db": 12.34, "ratios": [1.0, 2.0, 2.0]}
    text = markdown(ROWS, results, TRIAL, "the command", "the machine", {"a/b": "why"})
    lines = text.splitlines()
    assert lines[0] == "the machine" and "    the command" in lines and "- a/b: why" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 * 2 + 3
    assert len({line.count("|") for line in tables}) == 1
    assert "2 prompts x 1 seeds (from 5000)" in text and "4 steps, cfg 7" in text
    sqs = next(line for line in tables if line.startswith("| W8A8 SQS |"))
    assert "| 12.3 dB |" in sqs and "| 14 of 14 |" in sqs and sqs.endswith("| 2.00 (1.00-2.00) |")
    assert f"| {results['openvino/w8a8-sqs']['worst_step_cosine']:.4f} (" in sqs
    backends = [line for line in lines if line.startswith("**")]
    assert backends == ["**openvino**", "**onnxruntime**"]


def test_rows() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({json.dumps([row.backend, row.recipe, row.peer, row.step_channel]) for row in ROWS}) == len(ROWS), (
        "no row twice"
    )
    assert {row.peer for row in ROWS if row.peer} == set(PEERS)
    assert [row.name for row in chosen_rows("*/ort-*,openvino/fp32")] == [
        *("openvino/fp32", "onnxruntime/ort-static", "onnxruntime/ort-dynamic")
    ]
    with pytest.raises(UserError, match="--rows openvino/nothing matches no row; there are: openvino/fp32, "):
        chosen_rows("openvino/fp32,openvino/nothing")


def test_the_papers_simulation_is_a_row_without_a_time(tiny: Path, done: Ablation) -> None:
    [row] = chosen_rows("*/step-channel-w8a8")
    ablation = tiny_ablation(tiny)
    assert ablation.run([row], 3) == {}
    result = ablation.results[row.name]
    assert "ratios" not in result and result["int8_linears"] == result["linears"] == 0
    assert 0.5 < result["worst_step_cosine"] < 1
