"""aiSFX: 512-d embeddings of sound effects, for a distance of sets where OpenL3's weights are not at hand.

Ma et al. 2022, "Representation learning for the automatic indexing of sound effects libraries". Its weights (CC BY 4.0)
come inside the wheel of aisfx, whose pins (numpy 1.23 and others) are not needed:

    pip install --no-deps aisfx==0.1.2

The checkpoint is a pickle: its bytes are pinned, it is read with nothing but numbers allowed, and kept as safetensors.
The spectrogram is Essentia's, which the network was trained with, written anew here: equal to 1e-5 (a test has values).
"""

from __future__ import annotations

import importlib.util
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...engines.errors import UserError
from ...engines.home import home, sha256
from .embedders import Float, Kind, mono

INSTALL = "pip install --no-deps aisfx==0.1.2"
SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"
RATE, FRAME, HOP, BANDS = 44_100, 2048, 1024, 96
BLOCK = 100  # frames: 2.3 s
LOUDEST = 9.457798957824707  # of the spectrograms it was trained on
_NORM, _EPSILON = ("running_mean", "running_var", "weight", "bias"), 1e-5  # BatchNorm2d's


class AiSFX:
    """Embedder of kind `embedding`. state: the network's tensors, by their names in the checkpoint."""

    name, version = "aiSFX", f"0.1.2 {SHA256[:8]}"
    kind: Kind = "embedding"
    notice: str | None = "aiSFX's weights are under CC BY 4.0 (Alison B. Ma and Alexander Lerch)"

    def __init__(self, state: dict[str, Tensor]):
        self._state = state

    def embed(self, audio: Float, rate: int) -> Float:
        """audio [channels, samples] -> [blocks of 2.3 s, half overlapping, 512]; a shorter clip ends in silence."""
        frames = mel_spectrogram(mono(audio, rate, RATE)) / LOUDEST
        count = max(1, 1 + (len(frames) - BLOCK) // (BLOCK // 2))
        frames = np.pad(frames, ((0, max(0, BLOCK - len(frames))), (0, 0)))
        blocks = np.stack([frames[i * BLOCK // 2 : i * BLOCK // 2 + BLOCK] for i in range(count)])
        with torch.inference_mode():
            return self._network(torch.from_numpy(blocks.astype(np.float32))).numpy()

    def _network(self, x: Tensor) -> Tensor:
        """Four blocks of two convolutions; the mean over bands, then the largest over time."""
        x = x[:, None]
        for block in range(1, 5):
            for layer in (1, 2):
                prefix = f"embedding_net.conv_block{block}"
                x = F.conv2d(x, self._state[f"{prefix}.conv{layer}.weight"], padding=1)
                mean, var, weight, bias = (self._state[f"{prefix}.bn{layer}.{name}"] for name in _NORM)
                x = F.relu(F.batch_norm(x, mean, var, weight, bias, eps=_EPSILON))
            if block < 4:
                x = F.max_pool2d(x, 2)
        return x.mean(dim=3).amax(dim=2)


def mel_spectrogram(audio: Float) -> NDArray[np.float64]:
    """audio [samples] at 44.1 kHz -> [frames, 96]: log10(1 + 10^4 mel power), as Essentia's streaming chain has it.

    Frames of 2048 around every 1024th sample, symmetric Hann window; HTK's mel bands from 0 to 22,050 Hz, triangles in
    mel, each with weights of sum 1.
    """
    count = -(-len(audio) // HOP) + 1
    padded = np.pad(audio.astype(np.float64), (FRAME // 2, FRAME + HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP][:count]
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME))) ** 2
    corners = np.linspace(0, _mel(RATE / 2), BANDS + 2)
    bins = _mel(np.linspace(0, RATE / 2, FRAME // 2 + 1))
    low, middle, high = (corners[i : i + BANDS, None] for i in range(3))
    filters = np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None)
    filters /= filters.sum(axis=1, keepdims=True)
    return np.log10(1e4 * (power @ filters.T) + 1)


def _mel(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return np.asarray(1127.01048 * np.log(1 + np.asarray(hertz) / 700))


def open_embedder(weights: Path | None = None) -> AiSFX:
    """weights: its checkpoint.pth (default: the aisfx package's own). Raises UserError when it is not there."""
    kept = home() / "embedders" / f"aisfx-{SHA256[:16]}.safetensors"
    if kept.is_file():
        return AiSFX(load_file(kept))
    path = weights
    if path is None:
        found = importlib.util.find_spec("aisfx")  # located, never imported
        if found is None or found.origin is None:
            raise UserError(f"aisfx's weights come with its package: {INSTALL}")
        path = Path(found.origin).parent / "models" / "checkpoint.pth"
    if not path.is_file() or sha256(path) != SHA256:
        raise UserError(f"{path} is not the checkpoint of aisfx 0.1.2: {INSTALL}")
    scalar = import_module("numpy._core.multiarray").scalar
    numbers: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Int64DType,
    ]  # of an unused table
    with torch.serialization.safe_globals(numbers):
        state, _ = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name: value for name, value in state.items() if name.startswith("embedding_net.")}
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, part)
    part.replace(kept)
    return AiSFX(load_file(kept))
