"""Stable Audio's autoencoder, Oobleck: audio in, mean and standard deviation of latents out; latents in, audio out.

The layers stand where stable-audio-tools has them, so weights keep their key names
(`decoder.layers.3.layers.1.weight`). The weight norm is gone: `weight` is g v / ||v||, which `Checkpoint.tensor` works
out. diffusers' `AutoencoderOobleck` is the same function under other names. `OobleckConfig` reads `model.pretransform`
of a model_config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines.errors import UserError
from .checks import is_size

DILATIONS = (1, 3, 9)
TILE_SAMPLES = 1 << 18  # the most a tile decodes to: 128 latents of Stable Audio Open


@dataclass(frozen=True)
class Half:
    """Sizes of an encoder or a decoder; the defaults are stable-audio-tools', a decoder's `final_tanh` apart."""

    audio_channels: int = 2
    channels: int = 128
    latent_dim: int = 32
    c_mults: tuple[int, ...] = (1, 2, 4, 8)
    strides: tuple[int, ...] = (2, 4, 8, 8)
    use_snake: bool = False
    final_tanh: bool = False

    @property
    def widths(self) -> list[int]:
        """Channels before the first block and after each, from the audio's side."""
        return [self.channels * c for c in (1, *self.c_mults)]


class Snake(nn.Module):
    """x + sin(exp(alpha) x)^2 / (exp(beta) + 1e-9), one alpha and beta a channel, stored as logarithms."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, channels, n] -> the same shape."""
        wave = torch.sin(x * self.alpha.exp()[:, None])
        return x + wave * wave * (self.beta.exp()[:, None] + 1e-9).reciprocal()


def activation(half: Half, channels: int) -> nn.Module:
    return Snake(channels) if half.use_snake else nn.ELU()


class ResidualUnit(nn.Module):
    def __init__(self, half: Half, channels: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            activation(half, channels),
            nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            activation(half, channels),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class EncoderBlock(nn.Module):
    """[batch, channels_in, stride * n] -> [batch, channels_out, n]."""

    def __init__(self, half: Half, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(ResidualUnit(half, channels_in, dilation) for dilation in DILATIONS),
            activation(half, channels_in),
            nn.Conv1d(channels_in, channels_out, 2 * stride, stride, math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DecoderBlock(nn.Module):
    """[batch, channels_in, n] -> [batch, channels_out, stride * n] (one sample less at the end for an odd stride)."""

    def __init__(self, half: Half, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            activation(half, channels_in),
            nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride, math.ceil(stride / 2)),
            *(ResidualUnit(half, channels_out, dilation) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OobleckEncoder(nn.Module):
    """audio [batch, audio_channels, ratio * L] -> [batch, latent_dim, L], ratio the product of the strides."""

    def __init__(self, half: Half):
        super().__init__()
        widths = half.widths
        self.layers = nn.Sequential(
            nn.Conv1d(half.audio_channels, widths[0], 7, padding=3),
            *(EncoderBlock(half, *sizes) for sizes in zip(widths, widths[1:], half.strides, strict=False)),
            activation(half, widths[-1]),
            nn.Conv1d(widths[-1], half.latent_dim, 3, padding=1),
        )

    def forward(self, audio: Tensor) -> Tensor:
        return self.layers(audio)


class OobleckDecoder(nn.Module):
    """latents [batch, latent_dim, L] -> audio [batch, audio_channels, ratio * L] (odd strides: a little less)."""

    def __init__(self, half: Half):
        super().__init__()
        widths = half.widths[::-1]
        self.layers = nn.Sequential(
            nn.Conv1d(half.latent_dim, widths[0], 7, padding=3),
            *(DecoderBlock(half, *sizes) for sizes in zip(widths, widths[1:], half.strides[::-1], strict=False)),
            activation(half, widths[-1]),
            nn.Conv1d(widths[-1], half.audio_channels, 7, padding=3, bias=False),
            nn.Tanh() if half.final_tanh else nn.Identity(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


class DecoderGraph(nn.Module):
    """latents of the diffusion model [batch, latent_dim, L] -> audio [batch, audio_channels, samples]."""

    output_name = "audio"

    def __init__(self, config: OobleckConfig):
        super().__init__()
        self.scale = config.scale
        self.model = nn.ModuleDict({"decoder": OobleckDecoder(config.decoder)})

    def forward(self, latents: Tensor) -> Tensor:
        return self.model["decoder"](latents if self.scale == 1 else latents * self.scale)


class EncoderGraph(nn.Module):
    """audio [batch, audio_channels, ratio * L] -> mean, stdev of the diffusion model's latents [batch, latent_dim, L].

    The VAE bottleneck: latents = mean + stdev * noise, with the noise left to the caller.
    """

    output_names = ("mean", "stdev")

    def __init__(self, config: OobleckConfig):
        super().__init__()
        self.scale = config.scale
        self.model = nn.ModuleDict({"encoder": OobleckEncoder(config.encoder)})

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = self.model["encoder"](audio).chunk(2, dim=1)
        stdev = F.softplus(scale) + 1e-4
        return (mean, stdev) if self.scale == 1 else (mean / self.scale, stdev / self.scale)


@dataclass(frozen=True)
class OobleckConfig:
    """The autoencoder of a model. `scale` is what the diffusion model's latents are multiplied with to be decoded."""

    encoder: Half
    decoder: Half
    latent_dim: int
    downsampling_ratio: int
    scale: float = 1.0

    @classmethod
    def from_pretransform(cls, pretransform: Mapping) -> OobleckConfig:
        """Read `model.pretransform` of type `autoencoder`.

        Raises UserError naming every setting this module does not implement, and sizes that contradict each other:
        a config is refused, never guessed. Settings of training, and of how stable-audio-tools cuts its work
        (`iterate_batch`, `chunked`, `model_half`), change no result here and are passed over.
        """
        try:
            outer, config = dict(pretransform), dict(pretransform["config"])
            parts = {name: dict(config.pop(name)) for name in ("encoder", "decoder", "bottleneck")}
            halves = {name: dict(parts[name].get("config") or {}) for name in ("encoder", "decoder")}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the autoencoder in model.pretransform lacks or misstates {error}") from None
        expected = (("encoder.type", "oobleck"), ("decoder.type", "oobleck"), ("bottleneck.type", "vae"))
        faults = [
            f"{name}={kind!r} (only {only!r})"
            for name, only in expected
            if (kind := parts[name.partition(".")[0]].get("type")) != only
        ]
        if faults:  # of another kind: its sizes would all be faults too
            raise _refusal(faults)
        encoder = _half("encoder", halves["encoder"], "in_channels", faults)
        decoder = _half("decoder", halves["decoder"], "out_channels", faults)
        sizes = {name: config.pop(name, None) for name in ("latent_dim", "downsampling_ratio", "io_channels")}
        faults += [f"{name}={value!r} (a whole number >= 1)" for name, value in sizes.items() if not is_size(value)]
        channels = {name: config.pop(name, None) for name in ("in_channels", "out_channels")}
        scale = outer.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            faults.append(f"scale={scale!r} (a positive number)")
        faults += [f"{name}={value!r}" for name, value in config.items() if value and name != "requires_grad"]
        faults += [
            f"{part}.{name}={value!r}"
            for part, settings in parts.items()
            for name, value in settings.items()
            if value and name not in ("type", "config", "requires_grad")
        ]
        faults += [f"{name}={value!r}" for name, value in outer.items() if value and name not in _OUTER]
        if not faults:
            for name, wanted, found in (
                ("encoder.latent_dim", 2 * sizes["latent_dim"], encoder.latent_dim),
                ("decoder.latent_dim", sizes["latent_dim"], decoder.latent_dim),
                ("the product of encoder.strides", sizes["downsampling_ratio"], math.prod(encoder.strides)),
                ("the product of decoder.strides", sizes["downsampling_ratio"], math.prod(decoder.strides)),
                ("encoder.in_channels", channels["in_channels"] or sizes["io_channels"], encoder.audio_channels),
                ("decoder.out_channels", channels["out_channels"] or sizes["io_channels"], decoder.audio_channels),
            ):
                if wanted != found:
                    faults.append(f"{name} is {found}, the rest of the configuration asks for {wanted}")
        if faults:
            raise _refusal(faults)
        return cls(encoder, decoder, sizes["latent_dim"], sizes["downsampling_ratio"], float(scale))

    def tiling(self, max_latents: int) -> dict[str, int]:
        """What the runtime must know to run both graphs in tiles (see runtime/tiles.py), in latents.

        A tile is about `TILE_SAMPLES` of sound: the engine's memory grows with it, and the shorter it is the more of it
        is overlap. As few tiles as that makes, all equally long, give the model's whole length.
        """
        overlap = max(decoder_radius(self.decoder.strides), encoder_radius(self.encoder.strides))
        longest = max(TILE_SAMPLES // self.downsampling_ratio, 4 * overlap)
        inner = max(max_latents - 2 * overlap, 0)
        count = max(math.ceil(inner / (longest - 2 * overlap)), 1)
        return {
            "tile_latents": min(math.ceil(inner / count) + 2 * overlap, max_latents),
            "tile_overlap": overlap,
            "encoder_channels": self.encoder.audio_channels,
        }


_OUTER = ("type", "config", "scale", "iterate_batch", "chunked", "model_half", "enable_grad")
_OFF = ("antialias_activation", "use_nearest_upsample")


def _refusal(faults: list[str]) -> UserError:
    return UserError("this model's autoencoder is not supported: " + "; ".join(faults))


def _half(part: str, config: dict, audio: str, faults: list[str]) -> Half:
    """One half's settings; what is wrong with them is added to `faults`."""
    values: dict = {"audio_channels": config.pop(audio, 2)}
    values |= {name: config.pop(name, getattr(Half, name)) for name in ("channels", "latent_dim", "c_mults", "strides")}
    values["use_snake"] = bool(config.pop("use_snake", False))
    if part == "decoder":
        values["final_tanh"] = bool(config.pop("final_tanh", True))
    for name in ("audio_channels", "channels", "latent_dim"):
        if not is_size(values[name]):
            faults.append(f"{part}.{audio if name == 'audio_channels' else name}={values[name]!r}")
    for name, least in (("c_mults", 1), ("strides", 2)):
        value = values[name]
        if isinstance(value, list | tuple) and value and all(is_size(v) and v >= least for v in value):
            values[name] = tuple(value)
        else:
            faults.append(f"{part}.{name}={value!r} (whole numbers >= {least})")
            values[name] = ()
    if values["c_mults"] and values["strides"] and len(values["c_mults"]) != len(values["strides"]):
        faults.append(f"{part} has {len(values['c_mults'])} c_mults and {len(values['strides'])} strides")
    faults += [f"{part}.{name}={value!r}" for name, value in config.items() if value or name not in _OFF]
    return Half(**values)


def decoder_radius(strides: Sequence[int]) -> int:
    """How many latents on either side of its own a sample of the decoder depends on.

    The samples of latent 0 are 0 .. ratio - 1. Back through the decoder, each layer maps an inclusive range [a, b] of
    its outputs to one of its inputs: a convolution of 7 with dilation d to [a - 3d, b + 3d], so three residual
    units to [a - 39, b + 39]; a transposed one of 2s, stride s and padding p = ceil(s / 2), whose output o reads the
    inputs i with 0 <= o + p - s i < 2s, to [floor((a + p) / s) - 1, floor((b + p) / s)].
    (Stable Audio Open: strides 2, 4, 4, 8, 8 -> 10 latents.)
    """
    a, b = -3, math.prod(strides) - 1 + 3
    for s in strides:
        a, b = a - 3 * sum(DILATIONS), b + 3 * sum(DILATIONS)
        p = math.ceil(s / 2)
        a, b = (a + p) // s - 1, (b + p) // s
    return max(3 - a, b + 3)


def encoder_radius(strides: Sequence[int]) -> int:
    """How many latents' worth of samples on either side of its own a latent depends on.

    Back through the encoder from latent 0: the last convolution to [-1, 1]; a strided one of 2s, stride s and padding
    p = ceil(s / 2) from [a, b] to [s a - p, s b - p + 2s - 1]; three residual units add 39, the first convolution 3.
    """
    a, b = -1, 1
    for s in reversed(strides):
        p = math.ceil(s / 2)
        a, b = s * a - p - 3 * sum(DILATIONS), s * b - p + 2 * s - 1 + 3 * sum(DILATIONS)
    ratio = math.prod(strides)
    return max(math.ceil((3 - a) / ratio), math.ceil((b + 3 - (ratio - 1)) / ratio))
