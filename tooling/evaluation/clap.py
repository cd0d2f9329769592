"""LAION-CLAP as the paper uses it: how well a clip fits its caption, the cosine of their embeddings.

`laion/clap-htsat-fused` is the checkpoint 630k-audioset-fusion-best in transformers' layout. It is read from a folder
that the user has, `--weights clap=DIR`:

    pip install "transformers>=4.45"
    hf download laion/clap-htsat-fused --local-dir clap
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...engines.errors import UserError, last_line
from ...engines.home import sha256
from .embedders import Float, Kind, mono

RATE = 48_000


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
        self.version = sha256(weights)[:16]

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] -> [1, d]: mono at 48 kHz, through 16 bits and back, as in stable-audio-metrics."""
        samples = (mono(audio, rate, RATE).clip(-1, 1) * 32767).astype(np.int16).astype(np.float32) / 32767
        inputs = self._processor(audio=[samples], sampling_rate=RATE, return_tensors="pt")
        return self._vectors(self._model.get_audio_features(**inputs))

    def embed_text(self, captions: Sequence[str]) -> Float:
        """-> [captions, d]"""
        inputs = self._processor(text=list(captions), return_tensors="pt", padding=True, truncation=True)
        return self._vectors(self._model.get_text_features(**inputs))

    @staticmethod
    def _vectors(found: Any) -> Float:
        tensor = getattr(found, "pooler_output", found)  # transformers 5 has it in an output object
        return tensor.detach().numpy().astype(np.float32)


def open_embedder(weights: Path | None = None) -> Clap:
    """Raises UserError when transformers or the weights are not there."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError('clap needs transformers: pip install "transformers>=4.45"')
    if weights is None or not weights.is_dir():
        raise UserError(
            "clap needs its weights: hf download laion/clap-htsat-fused --local-dir clap, then --weights clap=clap"
        )
    return Clap(weights)
