"""Conditioners: token ids and seconds in, the cross-attention tokens and the global vector of the DiT out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engines.errors import UserError


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


class MultiConditioner(nn.Module):
    """The conditioners of a `model_config.json` under stable-audio-tools' key names (`conditioners.<id>...`)."""

    def __init__(self, model_config: Mapping):
        super().__init__()
        conditioning = model_config["model"]["conditioning"]
        diffusion = model_config["model"]["diffusion"]
        expected = ["prompt", "seconds_start", "seconds_total"]
        for key, ids in (
            ("cross_attention_cond_ids", expected),
            ("global_cond_ids", expected[1:]),
        ):
            if list(diffusion.get(key, [])) != ids:
                raise UserError(f"this model's {key}={diffusion.get(key)} is not supported (only {ids})")
        dim = conditioning["cond_dim"]
        self.conditioners = nn.ModuleDict()
        for entry in conditioning["configs"]:
            kind, config = entry["type"], entry["config"]
            if kind == "number":
                module: nn.Module = NumberConditioner(dim, config.get("min_val", 0), config.get("max_val", 1))
            elif kind == "token_table":
                module = TokenTableConditioner(dim, config["vocab_size"], config["max_length"])
            else:
                known = "number, token_table (T5, which Stable Audio Open needs, is not yet)"
                raise UserError(f"the conditioner {entry['id']!r} is of type {kind!r}; supported: {known}")
            self.conditioners[entry["id"]] = module
        missing = [name for name in expected if name not in self.conditioners]
        if missing:
            raise UserError(f"this model's conditioning lacks {', '.join(missing)}")

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conditioners["prompt"](input_ids, attention_mask)

    def numbers(self, seconds_start: Tensor, seconds_total: Tensor) -> Tensor:
        """[batch], [batch] -> [batch, 2, cond_dim]."""
        start = self.conditioners["seconds_start"](seconds_start)
        return torch.stack((start, self.conditioners["seconds_total"](seconds_total)), dim=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, seconds_start: Tensor, seconds_total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> cross_attn_cond [batch, tokens + 2, cond_dim], global_embed [batch, 2 * cond_dim]."""
        numbers = self.numbers(seconds_start, seconds_total)
        return torch.cat((self.text(input_ids, attention_mask), numbers), dim=1), numbers.flatten(1)
