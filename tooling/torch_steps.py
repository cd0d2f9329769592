"""One step of the DiT in PyTorch, as people run it: eager, compiled, in bfloat16, by torchao's int8, by diffusers.

All compute what our step graph does, both guidance halves, and get the same inputs. Attention is PyTorch's fused
`scaled_dot_product_attention`, as stable-audio-tools and diffusers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..engines.errors import UserError
from ..exporters.checkpoint import Checkpoint
from ..exporters.diffusers_names import dit_names
from ..exporters.dit import DiffusionTransformer, DiTConfig, FusedLinear, SwiGLU
from ..exporters.float_graphs import context_names
from ..exporters.linears import DIT_PREFIX
from .simulate import conditioning_module

Float = NDArray[np.float32]
Step = Callable[[], Float]


@dataclass(frozen=True)
class Variant:
    """How PyTorch runs the DiT. torchao: int8 weights, activations quantized to int8 token by token."""

    compiled: bool = False
    bf16: bool = False
    torchao: bool = False


BASELINE = "torch fp32"
VARIANTS = {
    BASELINE: Variant(),
    "torch fp32, compiled": Variant(compiled=True),
    "torch bf16": Variant(bf16=True),
    "torch bf16, compiled": Variant(compiled=True, bf16=True),
    "torchao int8 dynamic": Variant(torchao=True),
    "torchao int8 dynamic, compiled": Variant(compiled=True, torchao=True),
}
DIFFUSERS = "diffusers fp32"


def torch_dit(checkpoint: Checkpoint, threads: int) -> DiffusionTransformer:
    """The DiT with the checkpoint's weights, each in memory once; PyTorch gets so many threads."""
    torch.set_num_threads(threads)
    with torch.device("meta"):
        dit = DiffusionTransformer(checkpoint.sizes.dit)
    weights = {name: torch.from_numpy(checkpoint.tensor(DIT_PREFIX + name)) for name in dit.state_dict()}
    dit.load_state_dict(weights, assign=True)
    for block in dit.transformer.blocks():
        block.self_attn.attend = block.cross_attn.attend = fused_attention
    return dit.eval().requires_grad_(False)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """3 x [batch, heads, tokens, dim] -> [batch, tokens, heads * dim]"""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def dit_step(
    dit: DiffusionTransformer, inputs: Mapping[str, Float], variant: Variant | None = None
) -> tuple[Step, int]:
    """A step of a DiT, which becomes the variant, and how many Linears of it are int8 then.

    inputs: those of the step graph. The velocity is float32 whatever it was computed in.
    """
    variant = variant or Variant()
    kind = torch.bfloat16 if variant.bf16 else torch.float32
    quantized = _torchao(dit) if variant.torchao else 0
    tables = dit.transformer.rotary_pos_emb.tables(inputs["x"].shape[-1] + 1)  # before its frequencies are rounded
    dit.to(kind)
    t = {name: torch.from_numpy(value).to(kind) for name, value in inputs.items()}
    pairs = [(t[f"context_k.{i}"], t[f"context_v.{i}"]) for i in range(dit.config.depth)]
    prepend = (t["global_embed"] + t["time_embed"])[:, None]
    cos, sin = (table.to(kind) for table in tables)
    run = torch.compile(dit.step) if variant.compiled else dit.step

    def step() -> Float:
        with torch.inference_mode():
            return run(t["x"], prepend, pairs, cos, sin).float().numpy()

    return step, quantized


class _Fused(nn.Module):
    """A FusedLinear whose product is an nn.Linear, which is what torchao looks for."""

    def __init__(self, fused: FusedLinear):
        super().__init__()
        self.sizes = list(fused.parts.values())
        out, inside = fused.weight.shape
        self.linear = nn.Linear(inside, out, bias=fused.bias is not None, device="meta")
        self.linear.weight, self.linear.bias = fused.weight, fused.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.sizes, dim=-1)


def _torchao(dit: DiffusionTransformer) -> int:
    """Quantize the blocks' Linears that a step runs, in place, and count those that are."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    count = 0
    for block in dit.transformer.blocks():
        block.self_attn.to_qkv = _Fused(block.self_attn.to_qkv)  # type: ignore[assignment]
        swiglu = block.ff.ff[0]
        assert isinstance(swiglu, SwiGLU)
        swiglu.proj = _Fused(swiglu.proj)  # type: ignore[assignment]
        quantize_(block, Int8DynamicActivationInt8WeightConfig())
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        count += sum(type(linear.weight.data) is not Tensor for linear in linears)
    return count


# -------------------- the inputs


@dataclass(frozen=True)
class Conditions:
    """What a prompt is to the DiT, before its embedders: context [2, tokens, dim], vector [2, dim], t [1]."""

    context: Tensor
    vector: Tensor
    t: Tensor


def conditions(
    checkpoint: Checkpoint, dit: DiffusionTransformer, embeds: Float, seconds: float, t: np.float32
) -> tuple[Conditions, dict[str, Float]]:
    """From a prompt's embedding [1, tokens, cond_dim]: the prompt's half first, then the unconditional one; and what a
    bundle's conditioning graph makes of it, the step's inputs but for x.
    """
    values = {"seconds_start": 0.0, "seconds_total": seconds}
    numbers = [torch.full((2,), values[name]) for name in checkpoint.sizes.conditioning.numbers]
    keep = torch.tensor([1.0, 0.0])
    with torch.inference_mode():
        graph = conditioning_module(checkpoint, dit)
        both = torch.from_numpy(embeds).repeat(2, 1, 1)
        global_embed, time_embed, *context = graph(both, *numbers, keep, torch.tensor([t]))
        tokens = graph.conditioner.numbers(*numbers)
        own = Conditions(
            torch.cat((both, tokens), dim=1) * keep[:, None, None],
            graph.conditioner.global_vector(tokens),
            torch.tensor([t]),
        )
    found = {"global_embed": global_embed, "time_embed": time_embed[0]}
    found |= dict(zip(context_names(checkpoint.sizes.dit.depth), context, strict=True))
    return own, {name: value.numpy() for name, value in found.items()}


# -------------------- diffusers


def diffusers_step(checkpoint: Checkpoint, x: Float, given: Conditions) -> Step:
    """diffusers' StableAudioDiTModel with the checkpoint's weights: as its pipeline calls it, all embedders included.

    Raises ModuleNotFoundError without diffusers, and UserError for a DiT that it does not have.
    """
    own = checkpoint.sizes.dit
    if own.ff_inner != 4 * own.embed_dim or own.qk_norm:
        raise UserError("diffusers' DiT has feed-forwards of 4 times its width, and no norms of heads")
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    with torch.device("meta"):
        model = diffusers_dit(own, x.shape[-1])
    model.load_state_dict(_diffusers_state(checkpoint, model.state_dict()), assign=True)
    model.eval().requires_grad_(False)
    rotary = get_1d_rotary_pos_embed(own.rotary_dim, x.shape[-1] + 1, use_real=True, repeat_interleave_real=False)
    latents, vector = torch.from_numpy(x), given.vector[:, None]

    def step() -> Float:
        with torch.inference_mode():
            found = model(latents, given.t, given.context, vector, rotary_embedding=rotary, return_dict=False)
            return found[0].numpy()

    return step


def diffusers_dit(config: DiTConfig, latents: int) -> Any:
    """A StableAudioDiTModel of those sizes, for so many latents."""
    from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=latents,
        in_channels=config.io_channels,
        out_channels=config.io_channels,
        num_layers=config.depth,
        attention_head_dim=config.dim_heads,
        num_attention_heads=config.num_heads,
        num_key_value_attention_heads=config.kv_heads,
        cross_attention_dim=config.context_dim,
        cross_attention_input_dim=config.cond_token_dim,
        global_states_input_dim=config.global_cond_dim,
    )


def _diffusers_state(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The DiT's tensors under diffusers' names; what it keeps apart is cut along the first axis."""
    state = {}
    for ours, theirs in dit_names(checkpoint.sizes.dit.depth).items():
        tensor, at = torch.from_numpy(checkpoint.tensor(ours)), 0
        for name in theirs:
            rows = wanted[name].shape[0]
            state[name] = tensor[at : at + rows].reshape(wanted[name].shape)
            at += rows
    return state
