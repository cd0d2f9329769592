"""Latents in, sound out, without a bundle: by Griffin-Lim, by a trained decoder, or by the one of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from ...exporters.mel_vocoder import MelVocoder
from ...exporters.pretransforms import decoder_from_config
from ...runtime.griffin_lim import griffin_lim, istft
from .features import HOP, N_FFT, decode_magnitude
from .train_decoder import CONFIG, WEIGHTS

Audio = NDArray[np.float32]
Buffers = dict[str, NDArray[np.float32]]
Decode = Callable[[NDArray[np.float32]], Audio]
"""latents [channels, n] -> float32 [2048 n]"""


def buffers_of(module: nn.Module) -> Buffers:
    """The PCA of a decoder, as `features` takes it."""
    return {name: value.numpy() for name, value in module.named_buffers()}


def by_griffin_lim(buffers: Buffers, iterations: int) -> Decode:
    return lambda latents: griffin_lim(decode_magnitude(latents, buffers), N_FFT, HOP, iterations)


def by_network(decoder: MelVocoder) -> Decode:
    def decode(latents: NDArray[np.float32]) -> Audio:
        with torch.no_grad():
            real, imaginary = decoder(torch.from_numpy(latents)[None])[0].numpy()
        return istft((real + 1j * imaginary).T, N_FFT, HOP)

    return decode


def open_run(run: Path) -> MelVocoder:
    """What `train_decoder` has made there."""
    decoder = MelVocoder.from_config(json.loads((run / CONFIG).read_text()))
    decoder.load_state_dict(load_file(run / WEIGHTS))
    return decoder.eval()


def open_checkpoint(folder: Path, iterations: int) -> tuple[Decode, Buffers]:
    """The decoder of a folder of model_config.json and model.safetensors, and its PCA. iterations: of Griffin-Lim."""
    config: Mapping = json.loads((folder / "model_config.json").read_text())
    module, prefix = decoder_from_config(config), "pretransform."
    weights = load_file(folder / "model.safetensors").items()
    state = {name.removeprefix(prefix): value.float() for name, value in weights if name.startswith(prefix)}
    module.load_state_dict(state)
    module.eval()
    buffers = buffers_of(module)
    decode = by_network(module) if isinstance(module, MelVocoder) else by_griffin_lim(buffers, iterations)
    return decode, buffers
