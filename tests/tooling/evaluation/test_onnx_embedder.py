"""Networks given as ONNX: any with a description, and the paper's two, by stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import soxr
from hearing import RATE, noise
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation import embedders
from dit_trt.tooling.evaluation.embedders import PUBLISHED, open_embedder, windows


def network(path: Path, samples: int, outputs: int = 3) -> NDArray[np.float32]:
    """A graph [windows, samples] -> [windows, outputs], and its matrix."""
    matrix = np.random.default_rng(2).standard_normal((samples, outputs)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["audio", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["n", samples])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return matrix


FACTS = {
    **{"name": "Mine", "kind": "embedding", "sample_rate": RATE, "channels": "mono"},
    **{"window_seconds": 0.01, "hop_seconds": 0.005},
}


def test_any_network_as_onnx(tmp_path: Path) -> None:
    matrix = network(tmp_path / "mine.onnx", 441)
    (tmp_path / "mine.json").write_text(json.dumps({**FACTS, "notice": "cite me"}))
    found = open_embedder(f"onnx:{tmp_path / 'mine.onnx'}")
    assert (found.name, found.kind, found.notice) == ("Mine", "embedding", "cite me")
    audio = noise(0, 0.05)
    expected = windows(audio.mean(axis=0), 441, 220) @ matrix
    np.testing.assert_allclose(found.embed(audio, RATE), expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "mine.json").write_text(json.dumps({**FACTS, "channels": "stereo-apart"}))
    apart = open_embedder(f"onnx:{tmp_path / 'mine.onnx'}")
    sides = [windows(channel, 441, 220) @ matrix for channel in audio]
    np.testing.assert_allclose(apart.embed(audio, RATE), np.hstack(sides), rtol=1e-4, atol=1e-5)
    assert apart.version != found.version
    np.testing.assert_array_equal(apart.embed(audio[:1], RATE)[:, :3], apart.embed(audio[:1], RATE)[:, 3:])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, r"has no mine\.json: it says what the network takes \(docs/evaluation\.md\)"),
        ({"name": "x"}, "does not say its kind, sample_rate, channels, window_seconds, hop_seconds"),
        ({**FACTS, "kind": "magic"}, "kind is one of embedding, logits; channels one of mono, stereo-apart"),
        ({**FACTS, "hop_seconds": 0}, "must be positive"),
    ],
)
def test_a_description_that_does_not_fit(tmp_path: Path, facts: dict | None, said: str) -> None:
    network(tmp_path / "mine.onnx", 441)
    if facts is not None:
        (tmp_path / "mine.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=said):
        open_embedder(f"onnx:{tmp_path / 'mine.onnx'}")


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").write_bytes(b"no")
    (tmp_path / "mine.json").write_text(json.dumps(FACTS))
    with pytest.raises(UserError, match=r"mine\.onnx is not a graph that ONNX Runtime opens: "):
        open_embedder(f"onnx:{tmp_path / 'mine.onnx'}")


def test_other_weights_beside_the_same_graph_are_another_version(tmp_path: Path) -> None:
    """What was heard is kept by the version; torch's exporter puts weights into a file of their own."""
    network(tmp_path / "mine.onnx", 441)
    model = onnx.load(tmp_path / "mine.onnx")
    (tmp_path / "mine.onnx").unlink()
    onnx.save(model, tmp_path / "mine.onnx", save_as_external_data=True, location="mine.data", size_threshold=0)
    (tmp_path / "mine.json").write_text(json.dumps(FACTS))
    first = open_embedder(f"onnx:{tmp_path / 'mine.onnx'}")
    weights = bytearray((tmp_path / "mine.data").read_bytes())
    weights[0] ^= 1
    (tmp_path / "mine.data").write_bytes(weights)
    assert open_embedder(f"onnx:{tmp_path / 'mine.onnx'}").version != first.version


def test_a_graph_of_another_shape_is_told(tmp_path: Path) -> None:
    network(tmp_path / "mine.onnx", 400)
    (tmp_path / "mine.json").write_text(json.dumps(FACTS))
    with pytest.raises(UserError, match=r"mine\.onnx does not take \[9, 441\], the sound's windows by samples: "):
        open_embedder(f"onnx:{tmp_path / 'mine.onnx'}").embed(noise(0, 0.05), RATE)
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["audio"], ["y"], keepdims=0)],
        "g",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["n", 441])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "mine.onnx"
    )
    with pytest.raises(UserError, match=r"mine\.onnx makes \[\] of 9 windows; it must be \[windows, d\]"):
        open_embedder(f"onnx:{tmp_path / 'mine.onnx'}").embed(noise(0, 0.05), RATE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_networks_are_the_users(tmp_path: Path, name: str) -> None:
    """Their framing, with a stand-in of theirs: what goes in has their rate, windows and channels."""
    with pytest.raises(UserError, match=f"give --weights {name}=FILE.onnx"):
        open_embedder(name)
    facts = PUBLISHED[name]
    samples = round(facts["window_seconds"] * facts["sample_rate"])
    network(tmp_path / "x.onnx", samples)
    found = open_embedder(name, tmp_path / "x.onnx")
    assert found.kind == {"openl3": "embedding", "passt": "logits"}[name]
    assert found.embed(noise(0, 10.0), RATE).shape == {"openl3": (20, 6), "passt": (1, 3)}[name]
    assert found.embed(noise(0, 11.0), RATE).shape == {"openl3": (22, 6), "passt": (2, 3)}[name]


def test_the_papers_networks_are_fed_as_stable_audio_metrics_feeds_them(tmp_path: Path) -> None:
    """Peak at -1 dB: PaSST's of the mono sound at its rate, OpenL3's of both sides together, through 44.1 kHz."""
    audio = (noise(0, 3.0) * np.array([[1.0], [0.25]], np.float32)).astype(np.float32)
    peak = 10 ** (-1 / 20)
    matrix = network(tmp_path / "passt.onnx", 320_000)
    heard = soxr.resample(audio.mean(axis=0), RATE, 32_000)
    expected = np.pad(heard * (peak / np.abs(heard).max()), (0, 320_000 - len(heard)))[None] @ matrix
    np.testing.assert_allclose(
        open_embedder("passt", tmp_path / "passt.onnx").embed(audio, RATE), expected, rtol=1e-3, atol=1e-2
    )

    matrix = network(tmp_path / "openl3.onnx", 48_000)
    at_48 = 2 * audio  # taken for a recording at 48 kHz: sound up to 24 kHz
    low = soxr.resample(at_48.T * (peak / np.abs(at_48).max()), 48_000, 44_100)
    sides = []
    for side in soxr.resample(low, 44_100, 48_000).T:
        padded = np.pad(side, (24_000, 0))
        count = 1 + -(-(len(padded) - 48_000) // 24_000)
        padded = np.pad(padded, (0, (count - 1) * 24_000 + 48_000 - len(padded)))
        sides.append(np.stack([padded[i * 24_000 : i * 24_000 + 48_000] for i in range(count)]) @ matrix)
    found = open_embedder("openl3", tmp_path / "openl3.onnx").embed(at_48.astype(np.float32), 48_000)
    np.testing.assert_allclose(found, np.hstack(sides), rtol=1e-3, atol=1e-2)
    quieter = open_embedder("openl3", tmp_path / "openl3.onnx").embed(audio / 4, RATE)
    np.testing.assert_allclose(
        quieter, open_embedder("openl3", tmp_path / "openl3.onnx").embed(audio, RATE), rtol=1e-3, atol=1e-3
    )


def test_peaks() -> None:
    audio = np.array([[0.1, -0.5], [0.2, 0.0]], np.float32)
    np.testing.assert_allclose(embedders.at_peak(audio, -20.0), audio / 5, rtol=1e-6)
    assert not embedders.at_peak(np.zeros((2, 4), np.float32), -1.0).any()
