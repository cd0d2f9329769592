"""The table of decoders: a `pretransform` type of model_config.json -> the module that decodes latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..engines.errors import UserError
from .mel_pca import MelPcaDecoder

DECODERS: dict[str, Callable[[dict], nn.Module]] = {"mel_pca": MelPcaDecoder.from_config}


def decoder_from_config(model_config: Mapping) -> nn.Module:
    """The decoder of a model, without weights. Its `output_name` says what it makes of latents."""
    pretransform = model_config["model"]["pretransform"]
    kind = pretransform["type"]
    if kind not in DECODERS:
        raise UserError(f"the pretransform type {kind!r} is not supported; supported: {', '.join(DECODERS)}")
    return DECODERS[kind](dict(pretransform["config"]))
