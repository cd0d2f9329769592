"""The demo's neural decoder: its fixed part in numpy, its graph on both CPU engines, extreme latents, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import vocoder_config, write_vocoder_checkpoint

from dit_trt.engines.errors import UserError
from dit_trt.engines.onnxruntime import ONNXRuntimeEngine
from dit_trt.engines.openvino import OpenVINOEngine
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.float_graphs import export_topologies
from dit_trt.exporters.mel_vocoder import MOST_GAIN, QUIET, MelVocoder
from dit_trt.exporters.pretransforms import decoder_from_config
from dit_trt.exporters.qdq import write_graph

CONFIG = vocoder_config()["model"]["pretransform"]["config"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(str(write_vocoder_checkpoint(tmp_path_factory.mktemp("models") / "vocoder")))


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint) -> MelVocoder:
    module = decoder_from_config(checkpoint.config)
    names = module.state_dict()
    module.load_state_dict({name: torch.from_numpy(checkpoint.tensor(f"pretransform.{name}")) for name in names})
    assert isinstance(module, MelVocoder)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(checkpoint: Checkpoint, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "decoder.onnx"
    write_graph(export_topologies(checkpoint.config, home / "graphs")["decoder"], path, checkpoint.tensor)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def draw(*shape: int, loud: float = 1.0) -> np.ndarray:
    return loud * np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def test_a_head_that_says_nothing_leaves_the_mel_bands_magnitude(decoder: MelVocoder) -> None:
    """The fixed part, against numpy; and what the head adds to the logarithm, no more than MOST_GAIN."""
    latents = draw(2, 16, 5)
    b = {name: value.numpy() for name, value in decoder.named_buffers()}
    rows = (latents.swapaxes(1, 2) * b["scale"]) @ b["components"] + b["mean"]
    low, high = b["log_range"]
    mel = np.exp(np.clip(rows.reshape(2, 20, 20), low, high)) - np.exp(low)
    expected = (mel @ b["mel_inverse"][:100].T + QUIET).swapaxes(1, 2)
    bias, weight = decoder.head.bias.clone(), decoder.head.weight.clone()
    for gain, phase, factor in ((0.0, 0.0, 1), (0.7, 1.2, np.exp(0.7)), (1e9, 3.0, np.exp(MOST_GAIN)), (-1e9, 0, 0)):
        decoder.head.weight.zero_()
        decoder.head.bias.copy_(torch.tensor([gain, phase]).repeat_interleave(100))
        found = decoder(torch.from_numpy(latents)).numpy()
        assert found.shape == (2, 2, 129, 20) and not found[:, :, 100:].any()
        np.testing.assert_allclose(found[:, 0, :100], expected * factor * np.cos(phase), rtol=1e-4)
        np.testing.assert_allclose(found[:, 1, :100], expected * factor * np.sin(phase), rtol=1e-4)
    decoder.head.bias.copy_(bias)
    decoder.head.weight.copy_(weight)


@pytest.mark.parametrize("engine", [OpenVINOEngine, ONNXRuntimeEngine])
@pytest.mark.parametrize("loud", [1.0, 1e5])
def test_the_graph_equals_its_module(decoder: MelVocoder, graph: Path, engine: type, loud: float) -> None:
    for batch, length in ((1, 3), (2, 11)):
        latents = draw(batch, 16, length, loud=loud)
        expected = decoder(torch.from_numpy(latents)).numpy()
        assert np.isfinite(expected).all() and np.abs(expected).max() > 0.1
        found = engine(graph, {"latents": latents.shape}).run({"latents": latents})["spectrum"]
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dim", 0, "dim 0 (a positive integer)"),
        ("kernel", 4, "kernel 4 (an odd integer)"),
        ("bins", 130, "bins 130 (at most n_fft / 2 + 1)"),
        ("hop_length", "64", "hop_length '64' (a positive integer)"),
        ("hop_length", 63, "hop_length 63 (an even integer that divides n_fft)"),
        ("blocks", None, "'blocks'"),
    ],
)
def test_sizes_that_are_none_are_refused_in_one_line(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: object, message: str
) -> None:
    folder = write_vocoder_checkpoint(tmp_path / "bad")
    config = json.loads((folder / "model_config.json").read_text())
    sizes = config["model"]["pretransform"]["config"]
    sizes[name] = value
    if value is None:
        del sizes[name]
    (folder / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(folder))
    assert str(error.value) == f"{folder / 'model_config.json'} lacks or misstates {message}"
