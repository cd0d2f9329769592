"""LAION-CLAP as the paper uses it: how well a clip fits its caption, the cosine of their embeddings.

`laion/clap-htsat-fused` is the checkpoint 630k-audioset-fusion-best in transformers' layout. It is read from a folder
that the user has, `--weights clap=DIR`:

    pip install "transformers>=4.45"
    hf download laion/clap-htsat-fused --local-dir clap

Where transformers' feature extractor and laion_clap, which stable-audio-metrics calls, part ways, laion_clap is
followed: a clip of up to 10 s is not fused with itself (transformers takes one clip of every batch for a longer one, as
laion_clap does in training only), and a caption is cut at 77 tokens. A longer clip is seen whole, shrunk, and in three
crops; they are drawn from a seed here, so that the same clip has the same number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.errors import UserError, last_line
from ...engines.home import sha256
from .embedders import Float, Kind, at_peak, mono

RATE, PEAK_DB, TOKENS = 48_000, -1.0, 77


class Clap:
    """Embedder of kind `text-audio`; folder: model, tokenizer and feature extractor as transformers saves them."""

    name = "CLAP"
    kind: Kind = "text-audio"
    notice: str | None = None

    def __init__(self, folder: Path):
        from transformers import ClapModel, ClapProcessor

        try:
            self._model: Any = ClapModel.from_pretrained(folder, local_files_only=True).eval()
            self._processor: Any = ClapProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a CLAP that transformers opens: {last_line(error)}") from None
        [weights] = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")][:1]
        self.version = f"{sha256(weights)[:16]}, laion_clap's front end"

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] -> [1, d]: mono at 48 kHz, its peak at -1 dB, through 16 bits and back."""
        heard = at_peak(mono(audio, rate, RATE), PEAK_DB)
        samples = (heard.clip(-1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
        with _seeded():
            inputs = self._processor(audio=[samples], sampling_rate=RATE, return_tensors="pt")
        [chunks] = inputs["input_features"]
        inputs["is_longer"][:] = bool((chunks[:1] != chunks[1:]).any())  # a short clip's four are the same
        return self._vectors(self._model.get_audio_features(**inputs))

    def embed_text(self, captions: Sequence[str]) -> Float:
        """-> [captions, d]"""
        inputs = self._processor(
            text=list(captions), return_tensors="pt", padding=True, truncation=True, max_length=TOKENS
        )
        return self._vectors(self._model.get_text_features(**inputs))

    @staticmethod
    def _vectors(found: Any) -> Float:
        tensor = getattr(found, "pooler_output", found)  # transformers 5 has it in an output object
        return tensor.detach().numpy().astype(np.float32)


@contextmanager
def _seeded() -> Iterator[None]:
    """numpy's global generator, which draws the crops, from a seed of ours; afterwards as it was."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


def open_embedder(weights: Path | None = None) -> Clap:
    """Raises UserError when transformers or the weights are not there."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError('clap needs transformers: pip install "transformers>=4.45"')
    if weights is None or not weights.is_dir():
        raise UserError(
            "clap needs its weights: hf download laion/clap-htsat-fused --local-dir clap, then --weights clap=clap"
        )
    return Clap(weights)
