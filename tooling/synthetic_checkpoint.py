"""Seeded checkpoints of real sizes without real weights: to time, to test memory, to prove loading.

    python -m dit_trt.tooling.synthetic_checkpoint sao FOLDER

`sao` and `sao-small` are Stable Audio Open 1.0 and Small whole, to the last key and shape, with their text encoder and
a tokenizer beside them (`text_encoder/`, `tokenizer/`, as diffusers lays them out); `sao-tiny` and `sao-small-tiny` are
the same in small. They are written one tensor at a time.

`sao-block` is one block of Stable Audio Open 1.0 at its own width and length (D 1536, 24 heads, 12 key/value heads,
1024 latents + 1 token, 130 context tokens) with a text encoder and decoder of the demo's kinds; `sao-dit` has all 24
blocks. Weights are normal with the variance that keeps activations in range; norms and the SwiGLU have loud channels,
as trained transformers do, so that quantizing them is not easier than the real thing. Nothing any of them makes of a
prompt is sound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from ..engines.errors import UserError
from ..exporters.conditioners import MultiConditioner
from ..exporters.dit import DiffusionTransformer, DiTConfig
from ..exporters.pretransforms import decoder_from_config
from .cli.common import dit_command, path_option, show
from .synthetic_models import MODELS, TEXT_ENCODERS, model_tensors, t5_tensors
from .synthetic_tensors import OUTLIER_GAIN, OUTLIERS, write_tensors


def _stable_audio_open(depth: int) -> dict:
    """The published sizes of Stable Audio Open 1.0's DiT, `depth` blocks of it."""
    numbers = {"min_val": 0, "max_val": 512}
    return {
        "model_type": "diffusion_cond",
        "sample_size": 2097152,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": {
                "type": "mel_pca",
                "config": {
                    "latent_dim": 64,
                    "downsampling_ratio": 2048,
                    "io_channels": 2,
                    "n_fft": 2048,
                    "hop_length": 512,
                    "n_mels": 40,
                    "frames_per_latent": 4,
                    "griffin_lim_iterations": 8,
                },
            },
            "conditioning": {
                "configs": [
                    {
                        "id": "prompt",
                        "type": "token_table",
                        "config": {"tokenizer": "tokenizer.json", "vocab_size": 256, "max_length": 128},
                    },
                    {"id": "seconds_start", "type": "number", "config": numbers},
                    {"id": "seconds_total", "type": "number", "config": numbers},
                ],
                "cond_dim": 768,
            },
            "diffusion": {
                "type": "dit",
                "diffusion_objective": "v",
                "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
                "global_cond_ids": ["seconds_start", "seconds_total"],
                "config": {
                    "io_channels": 64,
                    "embed_dim": 1536,
                    "depth": depth,
                    "num_heads": 24,
                    "cond_token_dim": 768,
                    "project_cond_tokens": False,
                    "global_cond_dim": 1536,
                    "transformer_type": "continuous_transformer",
                },
            },
            "io_channels": 64,
        },
    }


SHAPES = {"sao-block": _stable_audio_open(1), "sao-dit": _stable_audio_open(24)}  # what `bench` makes for itself
LICENSE = """\
Synthetic weights, drawn by dit-trt from a seed. They have the names and sizes of a published model's tensors, nothing
of its contents, and make no sound of a prompt. CC0 1.0: do with them what you like.
"""


class _Model(nn.Module):
    """All modules of a checkpoint under its key names."""

    def __init__(self, config: dict):
        super().__init__()
        self.model = nn.Module()
        self.model.add_module("model", DiffusionTransformer(DiTConfig.from_model_config(config)))
        self.conditioner = MultiConditioner(config)
        self.pretransform = decoder_from_config(config)


def write_checkpoint(shape: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of a shape of `SHAPES` (fp16) or `MODELS` (fp32); the same seed gives the same bytes.

    model_config.json comes last: where it is, the rest is whole. Raises UserError for an unknown shape.
    """
    if shape not in SHAPES and shape not in MODELS:
        raise UserError(f"unknown shape {shape!r} (one of: {', '.join((*SHAPES, *MODELS))})")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").unlink(missing_ok=True)
    if shape in MODELS:
        config = MODELS[shape]
        _write_text_encoder(folder, TEXT_ENCODERS[shape], seed)
        write_tensors(folder / "model.safetensors", list(model_tensors(config)), seed)
        (folder / "LICENSE").write_text(LICENSE, "utf-8")
    else:
        config = SHAPES[shape]
        (folder / "tokenizer.json").write_text(_byte_tokenizer().to_str(), "utf-8")
        save_file(dict(_tensors(config, seed)), folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    return folder


def _write_text_encoder(folder: Path, config: dict, seed: int) -> None:
    for name in ("text_encoder", "tokenizer"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    write_tensors(folder / "text_encoder" / "model.safetensors", list(t5_tensors(config)), seed)
    (folder / "tokenizer" / "tokenizer.json").write_text(_t5_tokenizer().to_str(), "utf-8")


def _tensors(config: dict, seed: int) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _Model(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        yield name, _tensor(name, shape, generator)


def _tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("inv_freq"):
        dim = 2 * shape[0]
        return 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
    if name.endswith("beta"):
        return torch.zeros(shape)
    if name.endswith("log_range"):
        return torch.tensor([-9.0, 3.0])
    value = torch.randn(shape, generator=generator)
    if name.endswith("gamma"):
        return _with_outliers((1 + 0.1 * value)[:, None], generator)[:, 0].half()
    value /= (shape[-1] if len(shape) > 1 else shape[0]) ** 0.5
    if name.endswith("ff.ff.0.proj.weight"):
        value = _with_outliers(value, generator)
    if name.endswith("preprocess_conv.weight") or name.endswith("postprocess_conv.weight"):
        value *= 0.1
    if name.endswith("mel_inverse"):
        value = value.abs()
    return value.half()


def _with_outliers(rows: Tensor, generator: torch.Generator) -> Tensor:
    """[rows, ...] with about one in a hundred rows `OUTLIER_GAIN` times louder."""
    loud = torch.rand(rows.shape[0], generator=generator) < OUTLIERS
    return torch.where(loud[:, None], rows * OUTLIER_GAIN, rows)


def _byte_tokenizer() -> Tokenizer:
    """One token a byte: every prompt has tokens, no vocabulary is needed."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _t5_tokenizer() -> Tokenizer:
    """One token a byte again, from 3 on, with T5's own 0 to 2 (`<pad>`, `</s>`, `<unk>`) and its `</s>` at the end."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@click.command()
@click.argument("shape")
@click.argument("folder")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@dit_command
def command(shape: str, folder: str, seed: int) -> dict:
    """Write the checkpoint of SHAPE (sao, sao-small, sao-tiny, sao-small-tiny, sao-block, sao-dit) into FOLDER.

    sao takes 5.3 GB of disk, sao-small 2.5, sao-dit 2.1.
    """
    path = path_option(folder)
    assert path is not None
    write_checkpoint(shape, path, seed)
    show(str(path))
    return {"model": str(path), "shape": shape, "seed": seed}


if __name__ == "__main__":
    command(prog_name="python -m dit_trt.tooling.synthetic_checkpoint")
