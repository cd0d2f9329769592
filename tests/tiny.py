"""A tiny model with every part of the real one: GQA, partial RoPE, outlier channels, a dead channel, a tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dit_trt.exporters.conditioners import MultiConditioner
from dit_trt.exporters.dit import DiffusionTransformer, DiTConfig
from dit_trt.exporters.pretransforms import decoder_from_config
from dit_trt.exporters.t5 import T5Config, T5Encoder

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


def vocoder_config() -> dict:
    """The tiny model with the neural decoder in place of Griffin-Lim."""
    config: dict = copy.deepcopy(CONFIG)
    pretransform = config["model"]["pretransform"]
    pretransform["type"] = "mel_vocoder"
    del pretransform["config"]["griffin_lim_iterations"]
    pretransform["config"] |= {"dim": 24, "hidden": 40, "blocks": 2, "kernel": 5, "bins": 100}
    return config


T5_PIECES = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS[1:]), *"abcdefghijklmnopqrstuvwxyz"]
T5 = {  # a text encoder's config.json, as transformers writes it; its table is longer than the tokenizer's, as T5's is
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 64,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 48,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "task_specific_params": {"summarization": {"num_beams": 4}},
}


def t5_config(
    numbers: Sequence[str] = ("seconds_start", "seconds_total"), max_length: int = 16, **encoder: object
) -> dict:
    """The tiny model with T5 for its prompts, and these numbers. encoder: settings of `T5` changed."""
    config: dict = copy.deepcopy(CONFIG)
    conditioning, diffusion = config["model"]["conditioning"], config["model"]["diffusion"]
    settings = {"t5_model_name": "t5-base", "max_length": max_length, "encoder": {**T5, **encoder}}
    of_numbers = {entry["id"]: entry for entry in conditioning["configs"] if entry["type"] == "number"}
    conditioning["configs"] = [
        {"id": "prompt", "type": "t5", "config": settings},
        *(of_numbers[name] for name in numbers),
    ]
    diffusion["cross_attention_cond_ids"] = ["prompt", *numbers]
    diffusion["global_cond_ids"] = [*numbers]
    diffusion["config"]["global_cond_dim"] = len(numbers) * conditioning["cond_dim"]
    return config


class Tiny(torch.nn.Module):
    """The torch modules of one checkpoint under its key names, for tests that need an independent float model."""

    def __init__(self, config: dict = CONFIG) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.add_module("model", DiffusionTransformer(DiTConfig.from_model_config(config)))
        self.conditioner = MultiConditioner(config)
        self.pretransform = decoder_from_config(config)

    @property
    def dit(self) -> DiffusionTransformer:
        return self.model.model  # type: ignore[return-value]


def random_model(seed: int = 0, config: dict = CONFIG) -> Tiny:
    """Every weight random and non-zero; a few input channels of every Linear 20 x louder (a DiT's outliers)."""
    torch.manual_seed(seed)
    model = Tiny(config)
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


def write_vocoder_checkpoint(folder: Path) -> Path:
    config = vocoder_config()
    return _write(folder, config, random_model(config=config).state_dict())


def write_oobleck_checkpoint(folder: Path, autoencoder: torch.nn.Module) -> Path:
    """autoencoder: stable-audio-tools' pretransform of `OOBLECK`; its weights are g and v of its weight norm."""
    state = {name: value for name, value in random_model().state_dict().items() if not name.startswith("pretransform.")}
    state |= {f"pretransform.{name}": value for name, value in autoencoder.state_dict().items()}
    return _write(folder, oobleck_config(), state)


def write_t5(folder: Path, **changes: object) -> Path:
    """A tiny random T5, as transformers saves one: config.json, model.safetensors, tokenizer.json. changes: of `T5`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**T5, **changes}
    encoder = T5Encoder(T5Config.from_dict(config), tokens=1)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, value in encoder.state_dict().items():
        # q k^T is not scaled: so loud a softmax still attends to several tokens
        scale = 1.0 if value.ndim == 1 or "shared" in name or "bias" in name else 0.7 / value.shape[1] ** 0.5
        state[name] = scale * torch.randn(value.shape, generator=generator)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    t5_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def t5_tokenizer() -> Tokenizer:
    """Of T5's kind: pieces with scores, one `</s>` behind every text."""
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(T5_PIECES)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def _write(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "LICENSE").write_text("CC0: a test model.\n")
    return folder
