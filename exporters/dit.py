"""The diffusion transformer of Stable Audio Open, written to be exported: tensors in, velocity out.

Parameter names and mathematics are those of stable-audio-tools (`models/dit.py`, `models/transformer.py`), so its
checkpoints load unchanged. What differs is the cut: `context_keys_values` and `time_embed` are constant over a
prompt, `step` runs at every sampling step; float_graphs exports them as graphs of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines.errors import UserError
from .checks import is_size

TIMESTEP_FEATURES = 256


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of one diffusion transformer (Stable Audio Open 1.0: 64, 1536, 24, 24, 768, 1536).

    project_cond_tokens: the context is projected to embed_dim, not to its own width; qk_norm: LayerNorm of every query
    and key head (both in Stable Audio Open Small: 64, 1024, 16, 8, 768, 768).
    """

    io_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    cond_token_dim: int
    global_cond_dim: int
    ff_mult: float = 4
    project_cond_tokens: bool = False
    qk_norm: bool = False

    @property
    def dim_heads(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def context_dim(self) -> int:
        """Width of the tokens that cross attention reads."""
        return self.embed_dim if self.project_cond_tokens else self.cond_token_dim

    @property
    def kv_heads(self) -> int:
        """Cross-attention key/value heads; `num_heads // kv_heads` query heads read each (GQA)."""
        return self.context_dim // self.dim_heads

    @property
    def rotary_dim(self) -> int:
        return max(self.dim_heads // 2, 32)

    @property
    def ff_inner(self) -> int:
        return int(self.embed_dim * self.ff_mult)

    @classmethod
    def from_model_config(cls, model_config: Mapping) -> DiTConfig:
        """Read `model.diffusion` of a stable-audio-tools `model_config.json`.

        Raises UserError naming every setting this module does not implement: a config is refused, never guessed.
        """
        try:
            diffusion = dict(model_config["model"]["diffusion"])
            config = dict(diffusion["config"])
            ff = dict(config.pop("ff_kwargs", None) or {})
            attention = dict(config.pop("attn_kwargs", None) or {})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"model_config.json has no usable model.diffusion.config ({error})") from None
        faults = [
            f"{name}={value!r} (only {expected!r})"
            for name, value, expected in (
                ("model_type", model_config.get("model_type"), "diffusion_cond"),
                ("model.diffusion.type", diffusion.get("type"), "dit"),
                *((name, config.pop(name, only), only) for name, only in _ONLY.items()),
            )
            if value != expected
        ]
        if (objective := diffusion.get("diffusion_objective", "v")) not in OBJECTIVES:
            faults.append(f"diffusion_objective={objective!r} (only {' or '.join(map(repr, OBJECTIVES))})")
        faults += [f"{name}={value!r}" for name, value in diffusion.items() if value and name not in _DIFFUSION]
        qk_norm, project = attention.pop("qk_norm", "none"), config.pop("project_cond_tokens", True)
        if qk_norm not in ("none", "ln"):
            faults.append(f"attn_kwargs.qk_norm={qk_norm!r} (only 'none' or 'ln')")
        if not isinstance(project, bool):
            faults.append(f"project_cond_tokens={project!r} (true or false)")
        sizes = {name: config.pop(name, None) for name in _SIZES}
        faults += [f"{name}={value!r} (a positive integer)" for name, value in sizes.items() if not is_size(value)]
        mult = ff.pop("mult", 4)
        if isinstance(mult, bool) or not isinstance(mult, int | float) or mult <= 0:
            faults.append(f"ff_kwargs.mult={mult!r} (a positive number)")
        faults += [f"{name}={value!r} (unknown)" for name, value in {**config, **ff, **attention}.items()]
        if all(is_size(value) for value in sizes.values()):
            faults += _shape_faults(sizes, bool(project))
        if faults:
            raise UserError("this model's configuration is not supported: " + "; ".join(faults))
        return cls(**sizes, ff_mult=mult, project_cond_tokens=project, qk_norm=qk_norm == "ln")


OBJECTIVES = ("v", "rf_denoiser")
# distribution_shift_options shape the noise levels of training; stable-audio-tools' sampling does not use them.
_DIFFUSION = (
    *("type", "config", "diffusion_objective", "cross_attention_cond_ids", "global_cond_ids"),
    "distribution_shift_options",
)
_SIZES = ("io_channels", "embed_dim", "depth", "num_heads", "cond_token_dim", "global_cond_dim")
_ONLY = {
    "patch_size": 1,
    "project_global_cond": True,
    "transformer_type": "continuous_transformer",
    "global_cond_type": "prepend",
    "timestep_cond_type": "global",
    "input_concat_dim": 0,
    "prepend_cond_dim": 0,
    "num_memory_tokens": 0,
    "rotary_pos_emb": True,
    "causal": False,
}


def _shape_faults(sizes: Mapping[str, int], project: bool) -> list[str]:
    """Heads must be whole, wide enough for RoPE, and shared evenly by the query heads."""
    dim, heads, cond = sizes["embed_dim"], sizes["num_heads"], sizes["cond_token_dim"]
    if dim % heads or dim // heads < 32:
        return [f"embed_dim {dim} / num_heads {heads} must be a whole number >= 32"]
    width = dim // heads
    if not project and (cond % width or heads % (cond // width)):
        return [f"cond_token_dim {cond} must hold whole heads of {width} that divide the {heads} query heads"]
    return []


class FusedLinear(nn.Module):
    """One weight matrix, several outputs: `to_qkv`, `to_kv` and SwiGLU's value and gate.

    `parts` maps each output's name to its rows. Exported graphs hold one MatMul a part (see `split_fused`): a split
    of a quantized product costs int8 kernels in TensorRT and time in OpenVINO.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool = False):
        super().__init__()
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(list(self.parts.values()), dim=-1)


class SplitLinear(nn.Module):
    """`FusedLinear` as separate Linears, named by part: `to_qkv.q.weight`, `ff.ff.0.proj.gate.bias`, ..."""

    def __init__(self, fused: FusedLinear):
        super().__init__()
        weights = fused.weight.split(list(fused.parts.values()))
        biases = fused.bias.split(list(fused.parts.values())) if fused.bias is not None else [None] * len(weights)
        for name, weight, bias in zip(fused.parts, weights, biases):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.detach().contiguous())
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().contiguous())
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


def split_fused(model: nn.Module) -> None:
    """Replace, in place, every FusedLinear of `model` by its SplitLinear."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FusedLinear):
                setattr(module, name, SplitLinear(child))


class LayerNorm(nn.Module):
    """Gain without bias, as a trained `gamma` and a constant `beta` buffer (stable-audio-tools' names)."""

    beta: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim  # a traced x.shape would not be a constant, which torch's older exporter needs
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.gamma, self.beta)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rot` channels of `x` [batch, heads, tokens, dim]; `cos`, `sin` [tokens, rot], fp32."""
    rot = cos.shape[-1]
    turned, rest = x[..., :rot], x[..., rot:]
    turned = turned * cos + rotate_half(turned) * sin
    return torch.cat((turned, rest), dim=-1)


def head_norm(dim_heads: int, used: bool) -> nn.Module:
    """What every query or key head passes through before RoPE."""
    return nn.LayerNorm(dim_heads, eps=1e-6) if used else nn.Identity()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v, heads merged: 3 x [batch, heads, tokens, dim] -> [batch, tokens, heads * dim].

    Spelled out: this is the shape in which every backend recognises attention and fuses it.
    """
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    attend = staticmethod(attention)  # a benchmark of PyTorch sets its fused one in its place

    def __init__(self, dim: int, dim_heads: int, qk_norm: bool = False):
        super().__init__()
        self.dim_heads = dim_heads
        self.to_qkv = FusedLinear(dim, {"q": dim, "k": dim, "v": dim})
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = head_norm(dim_heads, qk_norm), head_norm(dim_heads, qk_norm)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (split_heads(y, self.dim_heads) for y in self.to_qkv(x))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.to_out(self.attend(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v))


class CrossAttention(nn.Module):
    attend = staticmethod(attention)

    def __init__(self, dim: int, dim_heads: int, dim_context: int, qk_norm: bool = False):
        super().__init__()
        self.dim_heads = dim_heads
        self.repeats = dim // dim_context
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = FusedLinear(dim_context, {"k": dim_context, "v": dim_context})
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = head_norm(dim_heads, qk_norm), head_norm(dim_heads, qk_norm)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [batch, tokens, dim_context] -> k, v [batch, query heads, tokens, dim_heads]."""
        k, v = (split_heads(y, self.dim_heads) for y in self.to_kv(context))
        k = self.k_norm(k)
        return k.repeat_interleave(self.repeats, dim=1), v.repeat_interleave(self.repeats, dim=1)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.q_norm(split_heads(self.to_q(x), self.dim_heads))
        return self.to_out(self.attend(q, k, v))


def split_heads(x: Tensor, dim_heads: int) -> Tensor:
    return x.unflatten(-1, (-1, dim_heads)).transpose(1, 2)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = FusedLinear(dim, {"value": inner, "gate": inner}, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x)
        return value * F.silu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.ff = nn.Sequential(SwiGLU(dim, inner), nn.Identity(), nn.Linear(inner, dim))

    @property
    def out(self) -> nn.Linear:
        return self.ff[2]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class TransformerBlock(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.embed_dim
        self.pre_norm = LayerNorm(dim)
        self.self_attn = SelfAttention(dim, config.dim_heads, config.qk_norm)
        self.cross_attend_norm = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, config.dim_heads, config.context_dim, config.qk_norm)
        self.ff_norm = LayerNorm(dim)
        self.ff = FeedForward(dim, config.ff_inner)

    def zero_outputs(self) -> None:
        """Where training starts: every block is the identity."""
        for output in (self.self_attn.to_out, self.cross_attn.to_out, self.ff.out):
            for parameter in output.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + self.self_attn(self.pre_norm(x), cos, sin)
        x = self.attend_context(x, k, v)
        return x + self.ff(self.ff_norm(x))

    def attend_context(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add cross attention to as many rows of x as k and v have; to the others it would add zeros."""
        rows = k.shape[0]
        if not torch.compiler.is_exporting() and rows == x.shape[0]:  # PyTorch itself is spared the copies
            return x + self.cross_attn(self.cross_attend_norm(x), k, v)
        with_context = x[:rows]  # before the norm, which smoothing folds into and must find at the Linear
        attended = with_context + self.cross_attn(self.cross_attend_norm(with_context), k, v)
        return torch.cat((attended, x[rows:]))


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))

    def tables(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos, sin [tokens, dim], always computed in fp32: in bf16 an angle of 1024 rad is off by 2 rad."""
        angles = torch.outer(torch.arange(tokens, device=self.inv_freq.device).float(), self.inv_freq.float())
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class ContinuousTransformer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.project_in = nn.Linear(config.io_channels, config.embed_dim, bias=False)
        self.project_out = nn.Linear(config.embed_dim, config.io_channels, bias=False)
        self.rotary_pos_emb = RotaryEmbedding(config.rotary_dim)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.depth))

    def blocks(self) -> list[TransformerBlock]:
        return list(self.layers)  # type: ignore[arg-type]


class FourierFeatures(nn.Module):
    def __init__(self, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features // 2, 1))

    def forward(self, t: Tensor) -> Tensor:
        """t [batch, 1] -> [batch, out_features]."""
        f = 2 * torch.pi * t @ self.weight.T
        return torch.cat((f.cos(), f.sin()), dim=-1)


def embedder(dim_in: int, dim: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim_in, dim, bias=bias), nn.SiLU(), nn.Linear(dim, dim, bias=bias))


class DiffusionTransformer(nn.Module):
    """v = DiT(x, t, cross_attn_cond, global_embed); Fourier timestep features, prepended global conditioning.

    x [batch, io_channels, latents], t [batch] in 0..1, cross_attn_cond [batch, tokens, cond_token_dim],
    global_embed [batch, global_cond_dim] -> v like x. All fp32.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.timestep_features = FourierFeatures(TIMESTEP_FEATURES)
        self.to_timestep_embed = embedder(TIMESTEP_FEATURES, config.embed_dim, bias=True)
        self.to_cond_embed = embedder(config.cond_token_dim, config.context_dim, bias=False)
        self.to_global_embed = embedder(config.global_cond_dim, config.embed_dim, bias=False)
        self.transformer = ContinuousTransformer(config)
        self.preprocess_conv = nn.Conv1d(config.io_channels, config.io_channels, 1, bias=False)
        self.postprocess_conv = nn.Conv1d(config.io_channels, config.io_channels, 1, bias=False)
        for layer in self.transformer.blocks():
            layer.zero_outputs()
        nn.init.zeros_(self.preprocess_conv.weight)
        nn.init.zeros_(self.postprocess_conv.weight)

    def time_embed(self, t: Tensor) -> Tensor:
        """t [n] -> [n, embed_dim]."""
        return self.to_timestep_embed(self.timestep_features(t[:, None]))

    def context_keys_values(self, cross_attn_cond: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The key and value of every block's cross attention, each [batch, heads, tokens, dim_heads]."""
        context = self.to_cond_embed(cross_attn_cond)
        return [layer.cross_attn.keys_values(context) for layer in self.transformer.blocks()]

    def step(
        self, x: Tensor, prepend: Tensor, keys_values: list[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor
    ) -> Tensor:
        """The blocks. prepend [batch, 1, embed_dim] is global + timestep embedding; cos, sin [1 + latents, rotary].

        keys_values may have fewer rows than x: the last rows of x are then those whose context is zeros.
        """
        h = (self.preprocess_conv(x) + x).transpose(1, 2)
        h = torch.cat((prepend, self.transformer.project_in(h)), dim=1)
        for layer, (k, v) in zip(self.transformer.blocks(), keys_values):
            h = layer(h, cos, sin, k, v)
        v_out = self.transformer.project_out(h)[:, 1:].transpose(1, 2)
        return self.postprocess_conv(v_out) + v_out

    def forward(self, x: Tensor, t: Tensor, cross_attn_cond: Tensor, global_embed: Tensor) -> Tensor:
        prepend = (self.to_global_embed(global_embed) + self.time_embed(t))[:, None]
        cos, sin = self.transformer.rotary_pos_emb.tables(x.shape[-1] + 1)
        return self.step(x, prepend, self.context_keys_values(cross_attn_cond), cos, sin)
