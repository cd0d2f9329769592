"""What the neural decoder is trained against: spectral distances, and discriminators of spectrograms and periods.

All of it takes float32 audio [clips, samples] and keeps to the device of its own buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .features import FLOOR, FRAMES_PER_LATENT, HOP, MELS, N_FFT, mel_filters

SIZES = (2048, 1024, 512, 256, 128)
"""Windows of the multi-resolution distance, in samples; the hop is a quarter."""
SPECTROGRAMS = (2048, 1024, 512)
PERIODS = (3, 7, 11)
Judged = list[tuple[Tensor, list[Tensor]]]
"""For every discriminator its scores, and what its layers made on the way."""


class Features(nn.Module):
    """`features.log_mel` and `features.encode` in torch, of many clips at once."""

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", torch.from_numpy(mel_filters()), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def log_mel(self, audio: Tensor) -> Tensor:
        """audio [clips, samples], a multiple of HOP -> [clips, samples / HOP, MELS]"""
        padded = F.pad(audio, ((N_FFT - HOP) // 2,) * 2)
        frames = padded.unfold(1, N_FFT, HOP) * self.window
        return ((torch.fft.rfft(frames).abs() @ self.filters.T) + FLOOR).log()

    def latents(self, log_mel: Tensor, components: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """log_mel [clips, frames, MELS] -> [clips, channels, frames / 4]"""
        rows = log_mel.reshape(len(log_mel), -1, FRAMES_PER_LATENT * MELS)
        return ((rows - mean) @ components.T / scale).transpose(1, 2)


def inverse_stft(spectrum: Tensor, window: Tensor) -> Tensor:
    """`runtime.griffin_lim.istft` in torch: [clips, 2, bins, frames] -> audio [clips, frames * HOP]."""
    overlap, margin = N_FFT // HOP, (N_FFT - HOP) // 2
    complex_ = torch.complex(spectrum[:, 0], spectrum[:, 1]).transpose(1, 2)
    frames = (torch.fft.irfft(complex_, N_FFT) * window).unflatten(2, (overlap, HOP))
    count = frames.shape[1]
    squares = (window**2).unflatten(0, (overlap, HOP)).expand(1, count, overlap, HOP)

    def add(parts: Tensor) -> Tensor:
        shifted = [F.pad(parts[:, :, i], (0, 0, i, overlap - 1 - i)) for i in range(overlap)]
        return torch.stack(shifted).sum(dim=0).flatten(1)[:, margin : margin + count * HOP]

    return add(frames) / add(squares)


class SpectralDistance(nn.Module):
    """Multi-resolution STFT distance (Yamamoto et al. 2020): spectral convergence plus log magnitude, of all sizes."""

    def __init__(self, sizes: Sequence[int] = SIZES):
        super().__init__()
        self.sizes = tuple(sizes)
        for size in self.sizes:
            self.register_buffer(f"window{size}", torch.hann_window(size), persistent=False)

    def magnitude(self, audio: Tensor, size: int) -> Tensor:
        window = self.get_buffer(f"window{size}")
        spectrum = torch.stft(
            audio, size, size // 4, window=window, center=True, pad_mode="constant", return_complex=True
        )
        return spectrum.abs() * (N_FFT / size)

    def forward(self, audio: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """-> mean spectral convergence, mean difference of log magnitudes (natural, floored as the latents are)"""
        convergence, logarithmic = [], []
        for size in self.sizes:
            found, wanted = self.magnitude(audio, size), self.magnitude(target, size)
            off = (found - wanted).square().sum((1, 2)).clamp(min=1e-12).sqrt()
            convergence.append((off / (wanted.square().sum((1, 2)).sqrt() + 1)).clamp(max=10).mean())
            logarithmic.append(F.l1_loss((found + FLOOR).log(), (wanted + FLOOR).log()))
        return torch.stack(convergence).mean(), torch.stack(logarithmic).mean()


class SpectrogramDiscriminator(nn.Module):
    """Convolutions over the complex spectrogram, its magnitudes square-rooted."""

    window: Tensor

    def __init__(self, size: int, channels: int = 32):
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        inputs = (2, channels, channels, channels)
        layers = [weight_norm(nn.Conv2d(i, channels, (3, 9), (1, 2), (1, 4))) for i in inputs]
        layers.append(weight_norm(nn.Conv2d(channels, channels, 3, 1, 1)))
        self.layers = nn.ModuleList(layers)
        self.last = weight_norm(nn.Conv2d(channels, 1, 3, 1, 1))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = torch.stft(
                audio.float(),
                self.size,
                self.size // 4,
                window=self.window,
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            parts = torch.view_as_real(spectrum).permute(0, 3, 2, 1) * (N_FFT / self.size)  # clips, 2, frames, bins
            x = parts * (parts.square().sum(1, keepdim=True) + FLOOR**2) ** -0.25
        return _through(self.layers, self.last, x.contiguous(memory_format=torch.channels_last))


class PeriodDiscriminator(nn.Module):
    """HiFi-GAN's: the waveform folded to rows of `period` samples, convolved along the columns."""

    def __init__(self, period: int, channels: Sequence[int] = (1, 16, 32, 64, 128)):
        super().__init__()
        self.period = period
        pairs = itertools.pairwise(channels)
        self.layers = nn.ModuleList(weight_norm(nn.Conv2d(i, o, (5, 1), (3, 1), (2, 0))) for i, o in pairs)
        self.last = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, audio: Tensor) -> tuple[Tensor, list[Tensor]]:
        padded = F.pad(audio, (0, -audio.shape[1] % self.period))
        return _through(self.layers, self.last, padded.unflatten(1, (-1, self.period))[:, None])


def _through(layers: nn.ModuleList, last: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    found = []
    for layer in layers:
        x = F.leaky_relu(layer(x), 0.1)
        found.append(x)
    return last(x), found


class Discriminators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        of_spectra = [SpectrogramDiscriminator(size) for size in SPECTROGRAMS]
        self.all = nn.ModuleList([*of_spectra, *(PeriodDiscriminator(period) for period in PERIODS)])

    def forward(self, audio: Tensor) -> Judged:
        return [judge(audio) for judge in self.all]


def discriminator_loss(real: Judged, fake: Judged) -> Tensor:
    """The hinge loss, mean over the discriminators."""
    losses = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for (r, _), (f, _) in zip(real, fake)]
    return torch.stack(losses).mean()


def generator_loss(real: Judged, fake: Judged) -> tuple[Tensor, Tensor]:
    """-> hinge loss of the sounds made, and feature matching: mean distance of what the layers made, of real's size"""
    fooled = torch.stack([F.relu(1 - f.float()).mean() for f, _ in fake]).mean()
    matching = [
        F.l1_loss(f.float(), r.float()) / (r.float().abs().mean() + 1e-3)
        for (_, reals), (_, fakes) in zip(real, fake)
        for r, f in zip(reals, fakes)
    ]
    return fooled, torch.stack(matching).mean()
