"""A model with Stable Audio's autoencoder, from checkpoint to sound, against stable-audio-tools' own decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import invoke, one_object
from tiny import OOBLECK, OOBLECK_LATENTS, write_oobleck_checkpoint

import peers
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters import oobleck
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.runtime.wav import finish
from dit_trt.tooling.plan import plan_build
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.workflow import CalibrationOptions, build

TOLERANCE = 1e-4  # max |difference| / max |reference|: fp32, two dozen layers, another order of sums
SAMPLES = OOBLECK_LATENTS * 256


@pytest.fixture(scope="module")
def bundle(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = write_oobleck_checkpoint(tmp_path_factory.mktemp("models") / "oobleck", peers.oobleck(OOBLECK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oobleck, "TILE_SAMPLES", 40 * 256)
        return build(Recipe("none"), str(folder), "openvino", home / "fixtures" / "oobleck").bundle


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return peers.oobleck(OOBLECK)


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    assert found.dtype == np.float32 and found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() <= TOLERANCE * expected.abs().max()


def test_the_engines_only_ever_see_one_tile(pipeline: Pipeline) -> None:
    tile = pipeline.sizes["tile_latents"]
    assert 2 * pipeline.sizes["tile_overlap"] < tile < OOBLECK_LATENTS
    assert pipeline.engine("decoder").inputs == {"latents": (1, 16, tile)}
    assert pipeline.engine("encoder").inputs == {"audio": (1, 2, tile * 256)}


@torch.no_grad()
def test_sound_is_what_stable_audio_tools_decodes(pipeline: Pipeline, theirs: torch.nn.Module) -> None:
    settings = Settings(steps=4, seed=3)
    latents = pipeline.sample(pipeline.condition("dog", settings, 1.5), settings)
    assert latents.shape == (16, OOBLECK_LATENTS)
    expected = theirs.decode(torch.from_numpy(latents)[None])[0]
    assert_close(pipeline.decode(latents), expected)
    clip = next(pipeline.generate(["dog"], settings, 1.5))
    assert clip.audio.shape == (2, 12000)
    np.testing.assert_allclose(clip.audio, finish(expected.numpy(), 12000), atol=TOLERANCE)
    assert pipeline("dog", steps=1)[0].shape == (2, SAMPLES)


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES - 300, 50 * 256, 700])
@torch.no_grad()
def test_latents_are_what_stable_audio_tools_encodes(pipeline: Pipeline, theirs: torch.nn.Module, samples: int) -> None:
    """Of whole latents, in tiles; of less than a tile, followed by silence."""
    audio = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    latents = -(-samples // 256)
    padded = torch.nn.functional.pad(audio, (0, max(latents, pipeline.sizes["tile_latents"]) * 256 - samples))[None]
    torch.manual_seed(4)
    expected = theirs.encode(padded)
    torch.manual_seed(4)
    noise = torch.randn_like(expected)[0, :, :latents].numpy()
    mean, stdev = pipeline.encode(audio.numpy())
    assert_close(mean + stdev * noise, expected[0, :, :latents])
    assert stdev.min() > 1e-4 and stdev.std() > 0.05


def test_audio_that_cannot_be_encoded(pipeline: Pipeline, tiny_float: Bundle) -> None:
    for shape in ((1, 900), (2, 0), (2, SAMPLES + 1)):
        with pytest.raises(UserError, match=r"takes audio of 2 channels and at most 2\.30 s, not"):
            pipeline.encode(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match="the model tiny has no encoder"):
        Pipeline(tiny_float).encode(np.zeros((2, 900), np.float32))


def test_run_writes_the_length_that_was_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "dog.wav"
    arguments = ("run", "dog", "--bundle", bundle.folder, "--steps", 2, "--seconds", 1.25, "--output", output, "--json")
    assert one_object(invoke(*arguments).stdout)["files"] == [str(output)]
    audio, rate = soundfile.read(output, dtype="float32")
    assert audio.shape == (10000, 2) and rate == 8000
    assert np.abs(audio).max() == pytest.approx(1, abs=1e-4) and not np.allclose(audio[:, 0], audio[:, 1])


def test_a_dry_run_foretells_its_size(bundle: Bundle) -> None:
    plan = plan_build(Recipe("none"), bundle.manifest["model"]["source"], "openvino", None, CalibrationOptions())
    assert set(plan.parts) == {"text", "conditioning", "step", "decoder", "encoder", "scales", "tokenizer"}
    assert plan.size_bytes == pytest.approx(bundle.size_bytes, rel=0.01)
    for graph in ("decoder", "encoder"):
        assert 0 <= plan.data_files[graph] - bundle.path(f"{graph}.onnx.data").stat().st_size < 64
