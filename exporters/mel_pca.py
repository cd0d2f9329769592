"""The demo's decoder: latents in, magnitude spectrogram out (Griffin-Lim then turns it into sound)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class MelPcaDecoder(nn.Module):
    """Principal components of stacked log-mel frames, undone by three matrix products; nothing is trained.

    `log_range` clamps the log-mel values to those a full-scale sound can have, so that latents pushed too far
    by guidance become loud, not infinite. Its lower end is the floor that was added before the logarithm.
    """

    output_name = "magnitude"
    components: Tensor
    mean: Tensor
    scale: Tensor
    mel_inverse: Tensor
    log_range: Tensor

    def __init__(self, latent_dim: int, n_fft: int, n_mels: int, frames_per_latent: int):
        super().__init__()
        self.n_mels, self.frames_per_latent = n_mels, frames_per_latent
        values = n_mels * frames_per_latent
        self.register_buffer("components", torch.zeros(latent_dim, values))
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("scale", torch.zeros(latent_dim))
        self.register_buffer("mel_inverse", torch.zeros(n_fft // 2 + 1, n_mels))
        self.register_buffer("log_range", torch.zeros(2))

    @classmethod
    def from_config(cls, config: Mapping) -> MelPcaDecoder:
        """`model.pretransform.config` of a model_config.json -> a decoder of zero buffers, to be loaded.

        Raises KeyError or ValueError for a size it needs, here or when the sound is made.
        """
        sizes = ("latent_dim", "n_fft", "n_mels", "frames_per_latent")
        positive_sizes(config, (*sizes, "hop_length", "griffin_lim_iterations"))
        return cls(*(config[name] for name in sizes))

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, L] -> magnitude >= 0 [batch, n_fft / 2 + 1, frames_per_latent * L]."""
        return (self.mel(self.log_mel(latents)) @ self.mel_inverse.T).transpose(1, 2)

    def log_mel(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, L] -> log-mel frames [batch, frames_per_latent * L, n_mels], clamped."""
        rows = latents.transpose(1, 2) * self.scale @ self.components + self.mean
        log_mel = rows.unflatten(2, (self.frames_per_latent, self.n_mels)).flatten(1, 2)
        return torch.minimum(torch.maximum(log_mel, self.log_range[0]), self.log_range[1])

    def mel(self, log_mel: Tensor) -> Tensor:
        """Mean magnitudes >= 0 of the bands, the floor taken off."""
        return log_mel.exp() - self.log_range[0].exp()


def positive_sizes(config: Mapping, names: Iterable[str]) -> None:
    """Raises KeyError or ValueError unless each of `names` is a positive integer in `config`."""
    for name in names:
        if type(config[name]) is not int or not 0 < config[name] < 2**20:
            raise ValueError(f"{name} {config[name]!r} (a positive integer)")
