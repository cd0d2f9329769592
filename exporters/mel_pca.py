"""The demo's decoder: latents in, magnitude spectrogram out (Griffin-Lim then turns it into sound)."""

from __future__ import annotations

from collections.abc import Mapping

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
        for name in ("latent_dim", "n_fft", "n_mels", "frames_per_latent", "hop_length", "griffin_lim_iterations"):
            if type(config[name]) is not int or not 0 < config[name] < 2**20:
                raise ValueError(f"{name} {config[name]!r} (a positive integer)")
        return cls(config["latent_dim"], config["n_fft"], config["n_mels"], config["frames_per_latent"])

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, L] -> magnitude >= 0 [batch, n_fft / 2 + 1, frames_per_latent * L]."""
        rows = latents.transpose(1, 2) * self.scale @ self.components + self.mean
        log_mel = rows.unflatten(2, (self.frames_per_latent, self.n_mels)).flatten(1, 2)
        low, high = self.log_range[0], self.log_range[1]
        mel = torch.minimum(torch.maximum(log_mel, low), high).exp() - low.exp()
        return (mel @ self.mel_inverse.T).transpose(1, 2)
