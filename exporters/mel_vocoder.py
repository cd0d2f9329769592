"""The demo's neural decoder: latents in, complex spectrogram out (the runtime's `istft` then makes the sound).

A Vocos (Siuzdak 2023) on the log-mel frames that `MelPcaDecoder` finds: ConvNeXt blocks at the frame rate, and a head
of magnitude and phase. The magnitude is a correction of the mel bands' own, nearly right before any training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mel_pca import MelPcaDecoder, positive_sizes

QUIET = 0.02
"""Added to magnitudes before they are corrected (a full-scale sine is n_fft / 4), so that silence can be, too."""
MOST_GAIN = 3.0
"""The most that the head adds to a log magnitude."""


class Block(nn.Module):
    """ConvNeXt in one dimension: depthwise convolution, norm, two Linears, scaled and added."""

    def __init__(self, dim: int, hidden: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.gain = nn.Parameter(torch.full((dim,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, frames, dim] -> the same shape."""
        y = self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2))
        return x + self.gain * self.down(F.gelu(self.up(y)))


class MelVocoder(MelPcaDecoder):
    """The buffers are MelPcaDecoder's, all else is trained (`tooling/train_demo/train_decoder.py`).

    bins: how many of the n_fft / 2 + 1 the head makes, from 0 Hz up; those above are zero.
    """

    output_name = "spectrum"

    def __init__(
        self,
        latent_dim: int,
        n_fft: int,
        n_mels: int,
        frames_per_latent: int,
        *,
        dim: int,
        hidden: int,
        blocks: int,
        kernel: int,
        bins: int,
    ):
        super().__init__(latent_dim, n_fft, n_mels, frames_per_latent)
        self.all_bins, self.bins = n_fft // 2 + 1, bins
        self.input = nn.Linear(n_mels, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, hidden, kernel) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2 * bins)

    @classmethod
    def from_config(cls, config: Mapping) -> MelVocoder:
        """`model.pretransform.config` of a model_config.json -> a decoder of no weights yet.

        Raises KeyError or ValueError for a size it needs, here or when the sound is made.
        """
        sizes = ("latent_dim", "n_fft", "n_mels", "frames_per_latent")
        own = ("dim", "hidden", "blocks", "kernel", "bins")
        positive_sizes(config, (*sizes, "hop_length", *own))
        if config["kernel"] % 2 == 0:
            raise ValueError(f"kernel {config['kernel']} (an odd integer)")
        if config["n_fft"] % config["hop_length"] or config["hop_length"] % 2:
            raise ValueError(f"hop_length {config['hop_length']} (an even integer that divides n_fft)")
        if config["bins"] > config["n_fft"] // 2 + 1:
            raise ValueError(f"bins {config['bins']} (at most n_fft / 2 + 1)")
        return cls(*(config[name] for name in sizes), **{name: config[name] for name in own})

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, L] -> real and imaginary part [batch, 2, n_fft / 2 + 1, frames_per_latent L]."""
        log_mel = self.log_mel(latents)
        x = self.input_norm(self.input((log_mel - self.log_range[0]) / 4))
        for block in self.blocks:
            x = block(x)
        gain, phase = self.head(self.norm(x)).chunk(2, dim=2)
        magnitude = (self.mel(log_mel) @ self.mel_inverse[: self.bins].T + QUIET) * gain.clamp(max=MOST_GAIN).exp()
        spectrum = torch.stack((magnitude * phase.cos(), magnitude * phase.sin()), dim=1)
        return F.pad(spectrum, (0, self.all_bins - self.bins)).transpose(2, 3)
