"""T5's text encoder, written to be exported: token ids in, one vector a token out.

Parameter names are those of transformers' `T5EncoderModel`, so that its checkpoints load unchanged; the mathematics are
those of Raffel et al. 2020 (ReLU) and of T5 v1.1 and Flan-T5 (gated GELU). What differs from other transformers: q k^T
is not scaled, norms neither subtract a mean nor add a bias, and positions are a bias on the attention scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines.errors import UserError
from .checks import is_size

MAX_TOKENS = 2048  # the bucket of every pair of positions is a constant of the graph
_MASKED = -1e9  # the bias of padding: its weight underflows to 0


@dataclass(frozen=True)
class T5Config:
    """Sizes of one encoder (t5-base: 768, 64, 3072, 12, 12, 32128, 32)."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @property
    def is_gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"

    @classmethod
    def from_dict(cls, values: object) -> T5Config:
        """Read the `config.json` of a T5 model. Raises UserError naming every setting that is not implemented here."""
        if not isinstance(values, Mapping):
            raise UserError(f"the config.json of the T5 encoder is no JSON object: {values!r:.40}")
        found = {name: value for name, value in values.items() if name not in _NOT_THE_ENCODERS}
        sizes = {name: found.pop(name, _DEFAULTS.get(name)) for name in _SIZES}
        epsilon, kind = found.pop("layer_norm_epsilon", 1e-6), found.pop("feed_forward_proj", "relu")
        faults = [f"{name}={value!r} (a positive integer)" for name, value in sizes.items() if not is_size(value)]
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            faults.append(f"layer_norm_epsilon={epsilon!r} (a small positive number)")
        if not isinstance(kind, str) or kind not in _ACTIVATIONS:
            faults.append(f"feed_forward_proj={kind!r} (only {' or '.join(_ACTIVATIONS)})")
        else:
            only = {**_ONLY, "dense_act_fn": _ACTIVATIONS[kind], "is_gated_act": kind == "gated-gelu"}
            pairs = [(name, found.pop(name, value), value) for name, value in only.items()]
            faults += [f"{name}={value!r} (only {expected!r})" for name, value, expected in pairs if value != expected]
            faults += [f"{name}={value!r} (unknown)" for name, value in found.items()]
        if not faults:
            buckets, most = sizes["relative_attention_num_buckets"], sizes["relative_attention_max_distance"]
            if buckets % 4 or most <= buckets // 4:
                faults.append(f"relative_attention_num_buckets={buckets} (a multiple of 4, below 4 x {most})")
        if faults:
            raise UserError("this T5 encoder is not supported: " + "; ".join(faults))
        return cls(**sizes, layer_norm_epsilon=float(epsilon), feed_forward_proj=kind)


_DEFAULTS = {"relative_attention_max_distance": 128}
_SIZES = (
    *("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}
_ONLY = {"model_type": "t5", "is_decoder": False, "pruned_heads": {}}
# What a config.json also tells: of the decoder, of training and generation, of how it was saved.
_NOT_THE_ENCODERS = frozenset(
    {
        *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "n_positions"),
        *("is_encoder_decoder", "num_decoder_layers", "decoder_start_token_id", "decoder", "scale_decoder_outputs"),
        *("tie_word_embeddings", "tie_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
        *("dropout_rate", "classifier_dropout", "initializer_factor", "gradient_checkpointing"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "task_specific_params", "finetuning_task"),
        *("id2label", "label2id", "num_labels", "problem_type", "tokenizer_class", "prefix", "chunk_size_feed_forward"),
        *("use_cache", "output_past", "output_attentions", "output_hidden_states", "output_scores", "return_dict"),
        *("return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "remove_invalid_values"),
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("diversity_penalty", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
        "exponential_decay_length_penalty",
    }
)


def position_buckets(tokens: int, buckets: int, max_distance: int) -> Tensor:
    """int32 [tokens, tokens]: the bucket of key j seen from query i, half of them for keys that come after.

    Of each half, the first half are single distances; the others widen with the logarithm of the distance up to
    `max_distance`. Computed in fp32, in this order: at a bucket's bound the rounding decides.
    """
    position = torch.arange(tokens, device="cpu")
    offset = position[None] - position[:, None]
    distance, half = offset.abs(), buckets // 2
    exact = half // 2
    wide = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + wide.to(torch.int64)).clamp(max=half - 1)
    return (torch.where(distance < exact, distance, far) + half * (offset > 0)).to(torch.int32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.epsilon) * self.weight


class SelfAttention(nn.Module):
    """softmax(q k^T + bias) v; the first block's table makes the bias of all blocks."""

    def __init__(self, config: T5Config, with_bias_table: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if with_bias_table:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [batch, tokens, d_model], bias [batch, heads, tokens, tokens] -> [batch, tokens, d_model]."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(2, 3) + bias, dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """relu(x wi) wo, or gelu(x wi_0) * (x wi_1) wo with the tanh form of GELU."""

    def __init__(self, config: T5Config):
        super().__init__()
        if config.is_gated:
            self.wi_0, self.wi_1 = (nn.Linear(config.d_model, config.d_ff, bias=False) for _ in range(2))
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.is_gated = config.is_gated

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)))


class _Residual(nn.Module):
    """A norm and what follows it, under the name transformers has for that."""

    def __init__(self, config: T5Config, name: str, module: nn.Module):
        super().__init__()
        self.add_module(name, module)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self._name = name

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        return x + self.get_submodule(self._name)(self.layer_norm(x), *args)


class _Block(nn.Module):
    def __init__(self, config: T5Config, with_bias_table: bool):
        super().__init__()
        attention = _Residual(config, "SelfAttention", SelfAttention(config, with_bias_table))
        self.layer = nn.ModuleList([attention, _Residual(config, "DenseReluDense", FeedForward(config))])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList([_Block(config, with_bias_table=i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """The encoder of prompts of `tokens` tokens, padding included."""

    def __init__(self, config: T5Config, tokens: int):
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)
        # Real numbers also where all else is made on the meta device: they are of the graph, not of the checkpoint.
        self._buckets = position_buckets(
            tokens, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [batch, tokens] -> [batch, tokens, d_model]; masked rows mean nothing."""
        x = self.shared(input_ids)
        table = self.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
        by_position = table(self._buckets.to(x.device)).permute(2, 0, 1)
        # Chosen, not computed as bias + (1 - mask) * _MASKED: OpenVINO sums constants first, and rounds the bias away.
        bias = torch.where(attention_mask[:, None, None] > 0, by_position, _MASKED)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
