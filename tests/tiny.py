"""A tiny model with every part of the real one: GQA, partial RoPE, outlier channels, a dead channel, a tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dit_trt.exporters.conditioners import MultiConditioner
from dit_trt.exporters.dit import DiffusionTransformer, DiTConfig
from dit_trt.exporters.mel_pca import MelPcaDecoder

WORDS = ["[unk]", "dog", "barking", "rain", "cat", "a", "puppy", "woofs", "siren", "the"]
MAX_LATENTS = 24
DEAD_CHANNEL = 5  # of the first block's ff.2 input: its value and gate rows are zero

CONFIG = {
    "model_type": "diffusion_cond",
    "sample_size": MAX_LATENTS * 256,
    "sample_rate": 8000,
    "audio_channels": 2,
    "model": {
        "pretransform": {
            "type": "mel_pca",
            "config": {
                "latent_dim": 16,
                "downsampling_ratio": 256,
                "io_channels": 2,
                "n_fft": 256,
                "hop_length": 64,
                "n_mels": 20,
                "frames_per_latent": 4,
                "griffin_lim_iterations": 4,
            },
        },
        "conditioning": {
            "configs": [
                {
                    "id": "prompt",
                    "type": "token_table",
                    "config": {"tokenizer": "tokenizer.json", "vocab_size": len(WORDS), "max_length": 6},
                },
                {"id": "seconds_start", "type": "number", "config": {"min_val": 0, "max_val": 4}},
                {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 4}},
            ],
            "cond_dim": 64,
        },
        "diffusion": {
            "type": "dit",
            "diffusion_objective": "v",
            "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
            "global_cond_ids": ["seconds_start", "seconds_total"],
            "config": {
                "io_channels": 16,
                "embed_dim": 128,
                "depth": 2,
                "num_heads": 4,
                "cond_token_dim": 64,
                "project_cond_tokens": False,
                "global_cond_dim": 128,
                "transformer_type": "continuous_transformer",
                "ff_kwargs": {"mult": 2},
            },
        },
        "io_channels": 16,
    },
}

OOBLECK_LATENTS = 72  # three tiles
OOBLECK_HALF = {"channels": 4, "c_mults": [1, 3], "strides": [16, 16], "use_snake": True}
OOBLECK = {  # `model.pretransform` as Stable Audio Open has it, in small
    "type": "autoencoder",
    "iterate_batch": True,
    "config": {
        "encoder": {
            "type": "oobleck",
            "requires_grad": False,
            "config": {"in_channels": 2, "latent_dim": 32, **OOBLECK_HALF},
        },
        "decoder": {
            "type": "oobleck",
            "config": {"out_channels": 2, "latent_dim": 16, "final_tanh": False, **OOBLECK_HALF},
        },
        "bottleneck": {"type": "vae"},
        "latent_dim": 16,
        "downsampling_ratio": 256,
        "io_channels": 2,
    },
}


def oobleck_config() -> dict:
    """The tiny model with an Oobleck autoencoder in place of the demo's decoder, and longer."""
    config: dict = copy.deepcopy(CONFIG)
    config["sample_size"] = OOBLECK_LATENTS * 256
    config["model"]["pretransform"] = copy.deepcopy(OOBLECK)
    return config


class Tiny(torch.nn.Module):
    """The torch modules of one checkpoint under its key names, for tests that need an independent float model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.add_module("model", DiffusionTransformer(DiTConfig.from_model_config(CONFIG)))
        self.conditioner = MultiConditioner(CONFIG)
        self.pretransform = MelPcaDecoder.from_config(CONFIG["model"]["pretransform"]["config"])  # type: ignore[index]

    @property
    def dit(self) -> DiffusionTransformer:
        return self.model.model  # type: ignore[return-value]


def random_model(seed: int = 0) -> Tiny:
    """Every weight random and non-zero; a few input channels of every Linear 20 x louder (a DiT's outliers)."""
    torch.manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("inv_freq", "beta")):
                continue
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else parameter.numel()
            parameter.copy_(torch.randn(parameter.shape) / fan_in**0.5)
            if name.endswith("gamma"):
                parameter.add_(1.0)
                parameter[::37] *= 20
            if name.endswith("ff.ff.0.proj.weight"):
                parameter[3::61] *= 20
        first = model.dit.transformer.blocks()[0]
        projection = first.ff.ff[0].proj
        inner = projection.weight.shape[0] // 2
        for row in (DEAD_CHANNEL, DEAD_CHANNEL + inner):
            projection.weight[row] = 0
            projection.bias[row] = 0
        model.dit.transformer.project_out.weight.mul_(0.01)  # small enough that guided sampling stays stable
        model.pretransform.log_range.copy_(torch.tensor([-9.0, 3.0]))
        model.pretransform.mel_inverse.abs_()
    return model.eval().requires_grad_(False)


def write_checkpoint(folder: Path, model: Tiny | None = None) -> Path:
    return _write(folder, CONFIG, (model or random_model()).state_dict())


def write_oobleck_checkpoint(folder: Path, autoencoder: torch.nn.Module) -> Path:
    """autoencoder: stable-audio-tools' pretransform of `OOBLECK`; its weights are g and v of its weight norm."""
    state = {name: value for name, value in random_model().state_dict().items() if not name.startswith("pretransform.")}
    state |= {f"pretransform.{name}": value for name, value in autoencoder.state_dict().items()}
    return _write(folder, oobleck_config(), state)


def _write(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "LICENSE").write_text("CC0: a test model.\n")
    return folder
