"""Conditioners: token ids and seconds in, the cross-attention tokens and the global vector of the DiT out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engines.errors import UserError
from .t5 import MAX_TOKENS, T5Config, T5Encoder

NUMBERS = ("seconds_start", "seconds_total")  # what a run has a value for
T5_TOKENS = 128  # stable-audio-tools' default max_length


class LearnedPositionalEmbedding(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch] -> [batch, dim + 1]: the number itself, then sines and cosines of learned frequencies."""
        x = x[:, None]
        f = x * self.weights[None] * (2 * torch.pi)
        return torch.cat((x, f.sin(), f.cos()), dim=-1)


class NumberEmbedder(nn.Module):
    def __init__(self, features: int, dim: int = 256):
        super().__init__()
        self.embedding = nn.Sequential(LearnedPositionalEmbedding(dim), nn.Linear(dim + 1, features))


class NumberConditioner(nn.Module):
    """A number clamped to `[min_val, max_val]` seconds as one token of `output_dim` channels."""

    def __init__(self, output_dim: int, min_val: float = 0, max_val: float = 1):
        super().__init__()
        self.min_val, self.max_val = float(min_val), float(max_val)
        if not 0 < self.max_val - self.min_val < float("inf"):
            raise UserError(f"a number conditioner's min_val {min_val} must be below its max_val {max_val}")
        self.embedder = NumberEmbedder(output_dim)

    def forward(self, value: Tensor) -> Tensor:
        """value [batch] -> [batch, output_dim]."""
        value = value.clamp(self.min_val, self.max_val)
        return self.embedder.embedding((value - self.min_val) / (self.max_val - self.min_val))


class TokenTableConditioner(nn.Module):
    """The demo's text encoder: one learned row a token, no context; masked positions are zero (as T5's are)."""

    def __init__(self, output_dim: int, vocab_size: int, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.table = nn.Embedding(vocab_size, output_dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [batch, max_length] -> [batch, max_length, output_dim]."""
        return self.table(input_ids) * attention_mask[..., None].to(self.table.weight.dtype)


class T5Conditioner(nn.Module):
    """T5's encoder, its output projected to `output_dim` where `projects`; masked positions are zero."""

    def __init__(self, output_dim: int, config: T5Config, max_length: int, projects: bool):
        super().__init__()
        self.model = T5Encoder(config, max_length)
        self.proj_out = nn.Linear(config.d_model, output_dim) if projects else nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [batch, max_length] -> [batch, max_length, output_dim]."""
        embeds = self.proj_out(self.model(input_ids, attention_mask))
        return embeds * attention_mask[..., None].to(embeds.dtype)


@dataclass(frozen=True)
class Conditioning:
    """What a `model_config.json` says of its conditioning, validated.

    numbers: the number tokens behind the prompt's in the cross-attention context, in order; global_numbers: those of
    them that make the global vector. prompt_kind: `token_table` or `t5`. configs: each conditioner's own settings.
    """

    cond_dim: int
    prompt_tokens: int
    prompt_kind: str
    numbers: tuple[str, ...]
    global_numbers: tuple[str, ...]
    configs: Mapping[str, Mapping]

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer adds its own tokens (T5's end of the text) to a prompt."""
        return self.prompt_kind == "t5"

    @property
    def encoder(self) -> T5Config:
        """Of a `t5` prompt. Raises UserError naming what is not implemented."""
        return T5Config.from_dict(self.configs["prompt"]["encoder"])

    @property
    def projects(self) -> bool:
        """Whether a Linear follows a `t5` prompt's encoder, as stable-audio-tools decides it."""
        return bool(self.configs["prompt"].get("project_out")) or self.encoder.d_model != self.cond_dim

    @classmethod
    def from_model_config(cls, model_config: Mapping) -> Conditioning:
        """Raises UserError naming what is not implemented, KeyError, TypeError or ValueError for what is malformed."""
        conditioning, diffusion = model_config["model"]["conditioning"], model_config["model"]["diffusion"]
        if strange := [key for key in conditioning if key not in ("configs", "cond_dim") and conditioning[key]]:
            raise UserError(f"model.conditioning has settings that are not supported: {', '.join(strange)}")
        numbers, global_numbers = _number_ids(diffusion)
        named = ["prompt", *numbers]
        entries = conditioning["configs"]
        ids = [entry["id"] for entry in entries]
        if missing := [name for name in named if name not in ids]:
            raise UserError(f"this model's conditioning lacks {', '.join(missing)}")
        if unused := [name for i, name in enumerate(ids) if name not in named or name in ids[:i]]:
            wrong = ", ".join(map(repr, unused))
            raise UserError(f"the conditioners {wrong} are not of cross_attention_cond_ids, or are there twice")
        for entry in entries:
            _check_settings(entry)
        [kind] = [entry["type"] for entry in entries if entry["id"] == "prompt"]
        configs = {entry["id"]: entry["config"] for entry in entries}
        tokens = _prompt_tokens(kind, configs["prompt"])
        return cls(conditioning["cond_dim"], tokens, kind, numbers, global_numbers, configs)


_PROMPTS = ("t5", "token_table")
_SETTINGS = {
    "t5": ("t5_model_name", "max_length", "project_out", "enable_grad", "encoder"),
    "token_table": ("tokenizer", "vocab_size", "max_length"),
    "number": ("min_val", "max_val"),
}


def _check_settings(entry: Mapping) -> None:
    name, kind, config = entry["id"], entry["type"], entry["config"]
    kinds = _PROMPTS if name == "prompt" else ("number",)
    if kind not in kinds:
        raise UserError(f"the conditioner {name!r} is of type {kind!r}; supported: {', '.join(kinds)}")
    if unknown := [key for key in config if key not in _SETTINGS[kind]]:
        raise UserError(f"the conditioner {name!r} has settings that are not supported: {', '.join(unknown)}")
    if kind == "t5" and "encoder" not in config:
        encoder = f"the text encoder {config.get('t5_model_name', 't5-base')}"
        raise UserError(f"the checkpoint does not contain {encoder}; give its folder with --text-encoder DIR")


def _prompt_tokens(kind: str, config: Mapping) -> int:
    if kind != "t5":
        return int(config["max_length"])
    tokens = int(config.get("max_length", T5_TOKENS))
    if not 0 < tokens <= MAX_TOKENS:
        raise UserError(f"the conditioner 'prompt' has max_length={tokens}, which must be in 1..{MAX_TOKENS}")
    return tokens


def _number_ids(diffusion: Mapping) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The numbers of the cross attention, behind the prompt, and those of the global vector."""
    cross, global_ids = (list(diffusion.get(f"{kind}_cond_ids") or ()) for kind in ("cross_attention", "global"))
    numbers = cross[1:]
    if cross[:1] != ["prompt"] or "seconds_total" not in numbers or not _are_of(numbers, NUMBERS):
        only = f"only 'prompt', then {' and '.join(NUMBERS)} in any order, or seconds_total alone"
        raise UserError(f"this model's cross_attention_cond_ids={cross} is not supported ({only})")
    if not global_ids or not _are_of(global_ids, numbers):
        raise UserError(f"this model's global_cond_ids={global_ids} is not supported (only some of {numbers})")
    return tuple(numbers), tuple(global_ids)


def _are_of(names: list, known: Iterable[str]) -> bool:
    """Whether all are known, each there once."""
    return all(name in known for name in names) and all(name not in names[:i] for i, name in enumerate(names))


class MultiConditioner(nn.Module):
    """The conditioners of a `model_config.json` under stable-audio-tools' key names (`conditioners.<id>...`)."""

    def __init__(self, model_config: Mapping):
        super().__init__()
        self.config = Conditioning.from_model_config(model_config)
        self.conditioners = nn.ModuleDict({"prompt": _prompt_conditioner(self.config)})
        for name in self.config.numbers:
            self.conditioners[name] = NumberConditioner(self.config.cond_dim, **self.config.configs[name])

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conditioners["prompt"](input_ids, attention_mask)

    def numbers(self, *values: Tensor) -> Tensor:
        """values [batch], in the order of `config.numbers` -> [batch, numbers, cond_dim]."""
        pairs = zip(self.config.numbers, values, strict=True)
        return torch.stack([self.conditioners[name](value) for name, value in pairs], dim=1)

    def global_vector(self, numbers: Tensor) -> Tensor:
        """[batch, numbers, cond_dim] -> [batch, global_numbers * cond_dim]."""
        if self.config.global_numbers == self.config.numbers:
            return numbers.flatten(1)
        places = [self.config.numbers.index(name) for name in self.config.global_numbers]
        return torch.cat([numbers[:, place] for place in places], dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        """-> cross_attn_cond [batch, tokens + numbers, cond_dim], global_embed [batch, global_numbers * cond_dim]."""
        numbers = self.numbers(*values)
        return torch.cat((self.text(input_ids, attention_mask), numbers), dim=1), self.global_vector(numbers)


def _prompt_conditioner(config: Conditioning) -> nn.Module:
    if config.prompt_kind == "t5":
        return T5Conditioner(config.cond_dim, config.encoder, config.prompt_tokens, config.projects)
    return TokenTableConditioner(config.cond_dim, config.configs["prompt"]["vocab_size"], config.prompt_tokens)
