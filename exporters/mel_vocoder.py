"""The demo's neural decoder: latents in, complex spectrogram out (the runtime's `istft` then makes the sound).

A Vocos (Siuzdak 2023) on the log-mel frames that `MelPcaDecoder` finds: ConvNeXt blocks at the frame rate, and a head
of magnitude and phase. Two things are added. The magnitude is a correction of the mel bands' own, so it is nearly
right before any training. And since a convolution repeats itself on a steady tone, which makes the tone buzz at the
frame rate, every band also has a carrier, a phase that turns with the band's own frequency, for the head to use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mel_pca import MelPcaDecoder, positive_sizes

NEAR = 2
"""Bands on either side of one that share its frequency and its carrier."""
QUIET = 0.02
"""Added to magnitudes before their logarithm is corrected; far below the latents' own floor."""
LOG_GAIN = 3.0
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
    """`band_cycles` is the centre of each band in cycles a hop; the other buffers are MelPcaDecoder's.

    bins: how many of the n_fft / 2 + 1 the head makes, from 0 Hz up; those above are zero.
    """

    output_name = "spectrum"
    band_cycles: Tensor

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
        self.register_buffer("band_cycles", torch.zeros(n_mels))
        self.input = nn.Linear(n_mels, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, hidden, kernel) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2 * bins + 2 * n_mels)

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
        if config["bins"] > config["n_fft"] // 2 + 1:
            raise ValueError(f"bins {config['bins']} (at most n_fft / 2 + 1)")
        return cls(*(config[name] for name in sizes), **{name: config[name] for name in own})

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, L] -> real and imaginary part [batch, 2, n_fft / 2 + 1, frames_per_latent L]."""
        log_mel = self.log_mel(latents)
        x = self.input_norm(self.input((log_mel - self.log_range[0]) / 4))
        for block in self.blocks:
            x = block(x)
        size, tone = self.head(self.norm(x)).split((2 * self.bins, 2 * self.n_mels), dim=2)
        size, angle = size.chunk(2, dim=2)
        size = size.clamp(max=LOG_GAIN).exp()
        tone_re, tone_im = tone.chunk(2, dim=2)
        carrier_re, carrier_im = self.carriers(log_mel)
        inverse = self.mel_inverse[: self.bins].T
        real = size * angle.cos() + (tone_re * carrier_re - tone_im * carrier_im) @ inverse
        imag = size * angle.sin() + (tone_re * carrier_im + tone_im * carrier_re) @ inverse
        # Phases above are those in the middle of a frame, where neighbouring bins agree.
        middle = 1 - 2 * (torch.arange(self.bins, device=latents.device) % 2)
        magnitude = (self.mel(log_mel) @ inverse + QUIET) * middle
        spectrum = torch.stack((real * magnitude, imag * magnitude), dim=1)
        return F.pad(spectrum, (0, self.all_bins - self.bins)).transpose(2, 3)

    def carriers(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        """log_mel [batch, frames, n_mels] -> cosine and sine of every band's phase, the same shape.

        A band turns with the mean frequency of the energy near it, and takes its phase from the loudest band near it.
        """
        near = torch.stack(self._near(log_mel), dim=3)
        cycles = torch.stack(self._near(self.band_cycles), dim=1)
        cycles = (torch.softmax(2 * near, dim=3) * cycles).sum(dim=3)
        turns = (cycles - cycles.floor()).cumsum(dim=1)
        angle = (turns - turns.floor()) * (2 * math.pi)
        share = torch.softmax(8 * near, dim=3)
        cosine, sine = (torch.stack(self._near(part), dim=3) for part in (angle.cos(), angle.sin()))
        return (share * cosine).sum(dim=3), (share * sine).sum(dim=3)

    def _near(self, x: Tensor) -> list[Tensor]:
        """x [..., n_mels] -> of every band, those near it: 2 NEAR + 1 of the same shape; outside there is silence."""
        padded = F.pad(x, (NEAR, NEAR), value=-100.0) if x.dim() == 3 else F.pad(x, (NEAR, NEAR))
        return [padded[..., i : i + self.n_mels] for i in range(2 * NEAR + 1)]
