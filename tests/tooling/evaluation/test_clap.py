"""CLAP: a small random model of its architecture against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hearing import RATE, noise
from numpy.typing import NDArray

from dit_trt.engines.errors import UserError
from dit_trt.tooling.evaluation.embedders import TextEmbedder, mono, open_embedder


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
