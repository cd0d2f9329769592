"""The tables of decoders and encoders: a `pretransform` type of model_config.json -> the module of its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..engines.errors import UserError
from .mel_pca import MelPcaDecoder
from .mel_vocoder import MelVocoder
from .oobleck import DecoderGraph, EncoderGraph, OobleckConfig


def _mel_pca(pretransform: Mapping) -> nn.Module:
    return MelPcaDecoder.from_config(dict(pretransform["config"]))


def _mel_vocoder(pretransform: Mapping) -> nn.Module:
    return MelVocoder.from_config(dict(pretransform["config"]))


def _oobleck_decoder(pretransform: Mapping) -> nn.Module:
    return DecoderGraph(OobleckConfig.from_pretransform(pretransform))


def _oobleck_encoder(pretransform: Mapping) -> nn.Module:
    return EncoderGraph(OobleckConfig.from_pretransform(pretransform))


Make = Callable[[Mapping], nn.Module]
DECODERS: dict[str, Make] = {"mel_pca": _mel_pca, "mel_vocoder": _mel_vocoder, "autoencoder": _oobleck_decoder}
ENCODERS: dict[str, Make] = {"autoencoder": _oobleck_encoder}


def decoder_from_config(model_config: Mapping) -> nn.Module:
    """The decoder of a model, without weights. Its `output_name` says what it makes of latents."""
    pretransform = model_config["model"]["pretransform"]
    kind = pretransform["type"]
    if kind not in DECODERS:
        raise UserError(f"the pretransform type {kind!r} is not supported; supported: {', '.join(DECODERS)}")
    return DECODERS[kind](pretransform)


def has_encoder(model_config: Mapping) -> bool:
    return model_config["model"]["pretransform"]["type"] in ENCODERS


def encoder_from_config(model_config: Mapping) -> nn.Module:
    """The encoder of a model that has one, without weights. Its `output_names` are of what it makes of audio."""
    pretransform = model_config["model"]["pretransform"]
    return ENCODERS[pretransform["type"]](pretransform)
