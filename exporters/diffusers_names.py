"""Names of diffusers' Stable Audio modules -> stable-audio-tools' names for the same tensors.

Both hold the same numbers; diffusers keeps q, k and v apart, and vectors of snakes as [1, channels, 1].
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from ..engines.errors import UserError
from .linears import DIT_PREFIX
from .tensor_files import Origin, TensorSource

Names = dict[str, tuple[str, ...]]  # stable-audio-tools' name -> diffusers' names, joined along the first axis

_DIT_TOPS = {
    "timestep_features": "time_proj",
    **{f"to_timestep_embed.{i}": f"timestep_proj.{i}" for i in (0, 2)},
    **{f"to_global_embed.{i}": f"global_proj.{i}" for i in (0, 2)},
    **{f"to_cond_embed.{i}": f"cross_attention_proj.{i}" for i in (0, 2)},
    "preprocess_conv": "preprocess_conv",
    "postprocess_conv": "postprocess_conv",
    "transformer.project_in": "proj_in",
    "transformer.project_out": "proj_out",
}
_DIT_BLOCK: Names = {
    "self_attn.to_qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
    "self_attn.to_out.weight": ("attn1.to_out.0.weight",),
    "cross_attn.to_q.weight": ("attn2.to_q.weight",),
    "cross_attn.to_kv.weight": ("attn2.to_k.weight", "attn2.to_v.weight"),
    "cross_attn.to_out.weight": ("attn2.to_out.0.weight",),
    **{f"ff.ff.{name}": (f"ff.net.{name}",) for name in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias")},
    **{
        f"{ours}.{leaf}": (f"{theirs}.{kind}",)
        for ours, theirs in (("pre_norm", "norm1"), ("cross_attend_norm", "norm2"), ("ff_norm", "norm3"))
        for leaf, kind in (("gamma", "weight"), ("beta", "bias"))
    },
}
_RESIDUAL_UNIT = {"snake1": "layers.0", "conv1": "layers.1", "snake2": "layers.2", "conv2": "layers.3"}
_WEIGHT_NORMS = (  # a convolution's weight: as it is, or g and v under torch's old or new names
    ("weight",),
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def dit_names(depth: int) -> Names:
    """StableAudioDiTModel. Its rotary frequencies are no tensor there."""
    names: Names = {f"{ours}.weight": (f"{theirs}.weight",) for ours, theirs in _DIT_TOPS.items()}
    names |= {f"to_timestep_embed.{i}.bias": (f"timestep_proj.{i}.bias",) for i in (0, 2)}
    for block in range(depth):
        for ours, theirs in _DIT_BLOCK.items():
            names[f"transformer.layers.{block}.{ours}"] = tuple(f"transformer_blocks.{block}.{key}" for key in theirs)
    return {DIT_PREFIX + name: keys for name, keys in names.items()}


def autoencoder_names(blocks: int, there: Container[str]) -> Names:
    """AutoencoderOobleck with `blocks` blocks in each half; `there` says which form of weight norm it was saved in."""
    names: Names = {}
    for theirs, ours in _autoencoder_modules(blocks).items():
        if theirs.rpartition(".")[2].startswith("snake"):
            leaves: tuple[str, ...] = ("alpha", "beta")
        else:
            forms = [form for form in _WEIGHT_NORMS if f"{theirs}.{form[0]}" in there]
            bias = () if theirs == "decoder.conv2" else ("bias",)
            leaves = (*(forms[0] if forms else _WEIGHT_NORMS[1]), *bias)
        names |= {f"pretransform.model.{ours}.{leaf}": (f"{theirs}.{leaf}",) for leaf in leaves}
    return names


def _autoencoder_modules(blocks: int) -> dict[str, str]:
    modules = {}
    for half, parts, first_unit in (
        ("encoder", {"snake1": "layers.3", "conv1": "layers.4"}, 0),
        ("decoder", {"snake1": "layers.0", "conv_t1": "layers.1"}, 2),
    ):
        modules[f"{half}.conv1"] = f"{half}.layers.0"
        for block in range(blocks):
            theirs, ours = f"{half}.block.{block}", f"{half}.layers.{block + 1}"
            modules |= {f"{theirs}.{part}": f"{ours}.{place}" for part, place in parts.items()}
            for unit in range(3):
                for part, place in _RESIDUAL_UNIT.items():
                    modules[f"{theirs}.res_unit{unit + 1}.{part}"] = f"{ours}.layers.{first_unit + unit}.{place}"
        modules[f"{half}.snake1"] = f"{half}.layers.{blocks + 1}"
        modules[f"{half}.conv2"] = f"{half}.layers.{blocks + 2}"
    return modules


def number_names() -> Names:
    """The two number conditioners of StableAudioProjectionModel."""
    return {
        f"conditioner.conditioners.{ours}.embedder.embedding.{leaf}": (f"{theirs}.time_positional_embedding.{leaf}",)
        for ours, theirs in (
            ("seconds_start", "start_number_conditioner"),
            ("seconds_total", "end_number_conditioner"),
        )
        for leaf in ("0.weights", "1.weight", "1.bias")
    }


def origins(source: TensorSource, names: Names, place: Path) -> dict[str, Origin]:
    """The tensors of `source` under stable-audio-tools' names and in its shapes.

    Raises UserError when `source`, the weights in `place`, lacks one of them or holds one more: that would be a model
    of another structure.
    """
    wanted = {key for keys in names.values() for key in keys}
    for text, odd in (
        ("lack", wanted - source.shapes.keys()),
        ("hold what is not known:", source.shapes.keys() - wanted),
    ):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise UserError(f"the weights in {place} {text} {min(odd)}{more}: not a model of its config.json")
    return {name: Origin(source, keys, _shape(name, source.shapes[keys[0]])) for name, keys in names.items()}


def _shape(name: str, found: tuple[int, ...]) -> tuple[int, ...] | None:
    if name.endswith("timestep_features.weight"):
        return (*found, 1)
    if name.startswith("pretransform.") and name.endswith((".alpha", ".beta")) and len(found) == 3:
        return (found[0] * found[1] * found[2],)
    return None
