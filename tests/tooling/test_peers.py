"""Other people's quantizers on the tiny model's step graph: the same function, the same inputs, really in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hardware import saturates

from dit_trt.engines.base import open_engine
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.tooling import peers
from dit_trt.tooling.peers import (
    PEERS,
    Call,
    PeerPipeline,
    calibration_calls,
    fitted,
    int8_linears,
    make,
    open_step,
    step_linears,
)
from peers import require

PROMPTS = ["dog barking", "rain", "a cat"]
SETTINGS = Settings(steps=6, seed=7)


@pytest.fixture(scope="module")
def calls(tiny_float: Bundle) -> list[Call]:
    return calibration_calls(Pipeline(tiny_float), PROMPTS, SETTINGS, 8)


def error_of(step: Path, name: str, reference: Bundle, calls: Sequence[Call]) -> float:
    """Of the velocity, mean over calls."""
    exact = Pipeline(reference).engine("step")
    engine = open_step(PEERS[name], step, reference)
    pairs = [(exact.run(c)["velocity"], engine.run(fitted(c, engine.inputs))["velocity"]) for c in calls]
    return float(np.mean([np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs]))


def test_calls_are_those_of_the_sampler(tiny_float: Bundle, calls: list[Call]) -> None:
    """8 of 3 prompts: 2, 3 and 3, each from its own stretch of the schedule, with our calibration's seeds."""
    pipeline = Pipeline(tiny_float)
    places = []
    for index, prompt in enumerate(PROMPTS):
        conditioning = pipeline.condition(prompt, SETTINGS, pipeline.check_seconds(None))
        seen: list[Call] = []
        settings = replace(SETTINGS, seed=7 + index)
        pipeline.sample(conditioning, settings, observe=lambda step, inputs, _, seen=seen: seen.append({**inputs}))  # type: ignore[misc]
        for call in calls:
            same = [step for step, inputs in enumerate(seen) if np.array_equal(inputs["x"], call["x"])]
            if same:
                places.append((index, same[0]))
                assert call.keys() == {*conditioning.constants, *seen[same[0]]}
                for name, value in {**conditioning.constants, **seen[same[0]]}.items():
                    assert np.array_equal(call[name], value), name
    assert [index for index, _ in places] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [step // 3 for index, step in places if index == 0] == [0, 1]
    assert [step // 2 for index, step in places if index] == [0, 1, 2, 0, 1, 2]


def test_the_plain_graph_is_the_same_function(tiny_float: Bundle, calls: list[Call], tmp_path: Path) -> None:
    step = peers.plain_graph(tiny_float.path("step.onnx"), tmp_path / "plain.onnx")
    graph = onnx.load(step).graph
    names = {node.name: node for node in graph.node if node.op_type == "MatMul"}
    constants = {tensor.name for tensor in graph.initializer}
    linears = Checkpoint.open(tiny_float.manifest["model"]["source"]).linears
    parts = [part for found in peers.step_linears(linears).values() for part in found]
    assert len(parts) == 2 * 9
    assert all(names[part].input[1] in constants for part in parts), "the quantizers see weights of MatMuls"
    assert error_of(step, "ort-static", tiny_float, calls) < 1e-5
    engine = open_engine("openvino", step, {name: value.shape for name, value in calls[0].items()})
    peer, own = PeerPipeline(tiny_float, engine), Pipeline(tiny_float)
    conditioning = own.condition("rain", SETTINGS, own.check_seconds(None))
    assert peer.engine("step") is engine
    assert peer.engine("decoder") is not engine
    assert peer.sample(conditioning, SETTINGS) == pytest.approx(own.sample(conditioning, SETTINGS), abs=1e-3)


@pytest.mark.parametrize("name", ["ort-static", "ort-dynamic"])
def test_onnx_runtimes(name: str, tiny_float: Bundle, calls: list[Call], tmp_path: Path) -> None:
    linears = Checkpoint.open(tiny_float.manifest["model"]["source"]).linears
    step = make(PEERS[name], tiny_float, lambda: calls, linears, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made.json", "step.onnx"]
    assert 1e-4 < error_of(step, name, tiny_float, calls) < 0.3
    engine = open_step(PEERS[name], step, tiny_float)
    assert int8_linears(PEERS[name], step, engine, step_linears(linears), calls[0]) == 12
    model = onnx.load(step)
    for node in model.graph.node:  # one part of one Linear in float: the account says so
        if node.op_type in ("MatMul", "MatMulInteger") and "layers.1.self_attn.to_qkv.k" in node.name:
            node.name = "another"
    onnx.save_model(model, step)
    engine = open_step(PEERS[name], step, tiny_float)
    assert int8_linears(PEERS[name], step, engine, step_linears(linears), calls[0]) == 11


def test_what_is_made_is_kept(
    tiny_float: Bundle, calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = Checkpoint.open(tiny_float.manifest["model"]["source"]).linears
    made = []

    def write(graph: Path, calls: Sequence[Call], names: Sequence[str], folder: Path) -> Path:
        made.append(len(calls))
        (folder / "step.onnx").write_bytes(b"a graph")
        return folder / "step.onnx"

    peer = replace(PEERS["ort-static"], write=write)
    steps = {make(peer, tiny_float, lambda: calls, linears, tmp_path) for _ in range(2)}
    assert (made, steps) == ([8], {tmp_path / "step.onnx"})
    monkeypatch.setattr(peers, "version", lambda name: "99")
    make(peer, tiny_float, lambda: calls, linears, tmp_path)
    assert made == [8, 8]


def test_a_missing_peer_is_named(tiny_float: Bundle, tmp_path: Path) -> None:
    peer = replace(PEERS["nncf-int8"], packages=("no-such-quantizer",))
    with pytest.raises(UserError, match=r'no-such-quantizer is not installed: pip install -e ".\[peers\]"'):
        make(peer, tiny_float, lambda: [], [], tmp_path)


@pytest.mark.parametrize("name", ["nncf-int8", "nncf-int8-same", "nncf-int4"])
def test_nncf(name: str, tiny_float: Bundle, calls: list[Call], tmp_path: Path) -> None:
    require("nncf")
    linears = Checkpoint.open(tiny_float.manifest["model"]["source"]).linears
    step = make(PEERS[name], tiny_float, lambda: calls, linears, tmp_path)
    assert 1e-3 < error_of(step, name, tiny_float, calls) < 0.5
    engine = open_step(PEERS[name], step, tiny_float)
    # 4-bit weights run in int8 where OpenVINO quantizes their activations by itself.
    in_float = PEERS[name].dynamic and saturates("openvino")
    assert int8_linears(PEERS[name], step, engine, step_linears(linears), calls[0]) == (0 if in_float else 12)
    float_step = peers.plain_graph(tiny_float.path("step.onnx"), tmp_path / "plain.onnx")
    exact = open_step(PEERS[name], float_step, tiny_float)
    assert int8_linears(PEERS[name], float_step, exact, step_linears(linears), calls[0]) == 0
