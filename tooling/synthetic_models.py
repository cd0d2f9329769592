"""The published models as lists of tensors: every key and shape of their checkpoints, and what to draw each from.

`sao` is stabilityai/stable-audio-open-1.0, `sao-small` stable-audio-open-small, both as stable-audio-tools saves them
(buffers included, the autoencoder's weight norm as `weight_g` and `weight_v`, no text encoder); the text encoder is
T5-base's encoder as transformers saves it. The `-tiny` ones have the same structure in small: heads of at least 32
channels, and conditioning whose width is whole heads. Spelled out here rather than read from our own modules, so that
tests can hold those against a list made without them.

Weights are normal with the variance that keeps activations in range, branches scaled so that the residual stream stays
of the order of its input at any depth. Norms, SwiGLU and attention's values have loud channels, as in trained models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from .synthetic_tensors import TensorSpec

Specs = Iterator[TensorSpec]


def _autoencoder(channels: int) -> dict:
    """`model.pretransform`: Oobleck, 64 latent channels, 2048 samples a latent (published: 128 channels)."""
    half = {"channels": channels, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "use_snake": True}
    encoder = {"in_channels": 2, **half, "latent_dim": 128}
    decoder = {"out_channels": 2, **half, "latent_dim": 64, "final_tanh": False}
    return {
        "type": "autoencoder",
        "iterate_batch": True,
        "config": {
            "encoder": {"type": "oobleck", "requires_grad": False, "config": encoder},
            "decoder": {"type": "oobleck", "config": decoder},
            "bottleneck": {"type": "vae"},
            "latent_dim": 64,
            "downsampling_ratio": 2048,
            "io_channels": 2,
        },
    }


def _model(
    latents: int, channels: int, max_length: int, numbers: Mapping[str, int], objective: str, dit: Mapping[str, object]
) -> dict:
    """A model_config.json. channels: the autoencoder's; numbers: the longest seconds of each number conditioner."""
    prompt = {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": max_length}}
    seconds = [
        {"id": name, "type": "number", "config": {"min_val": 0, "max_val": most}} for name, most in numbers.items()
    ]
    return {
        "model_type": "diffusion_cond",
        "sample_size": 2048 * latents,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": _autoencoder(channels),
            "conditioning": {"configs": [prompt, *seconds], "cond_dim": dit["cond_token_dim"]},
            "diffusion": {
                "type": "dit",
                "diffusion_objective": objective,
                "cross_attention_cond_ids": ["prompt", *numbers],
                "global_cond_ids": [*numbers],
                "config": {"io_channels": 64, **dit, "transformer_type": "continuous_transformer"},
            },
            "io_channels": 64,
        },
    }


def _dit(embed_dim: int, depth: int, num_heads: int, cond_dim: int, numbers: int, **more: object) -> dict[str, object]:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "cond_token_dim": cond_dim}
    return {**sizes, "global_cond_dim": numbers * cond_dim, **more}


_START_AND_TOTAL = {"seconds_start": 512, "seconds_total": 512}
_TOTAL = {"seconds_total": 256}
_OPEN = {"project_cond_tokens": False}
_SMALL = {"attn_kwargs": {"qk_norm": "ln"}}  # project_cond_tokens is left out: true by default
MODELS = {
    "sao": _model(1024, 128, 128, _START_AND_TOTAL, "v", _dit(1536, 24, 24, 768, 2, **_OPEN)),
    "sao-small": _model(256, 128, 64, _TOTAL, "rf_denoiser", _dit(1024, 16, 8, 768, 1, **_SMALL)),
    "sao-tiny": _model(96, 4, 12, _START_AND_TOTAL, "v", _dit(128, 2, 4, 64, 2, **_OPEN)),
    "sao-small-tiny": _model(64, 4, 8, _TOTAL, "rf_denoiser", _dit(128, 2, 2, 64, 1, **_SMALL)),
}


def _t5(d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int, vocab_size: int) -> dict:
    """config.json of a T5 encoder of the first version (ReLU, shared relative positions)."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "vocab_size": vocab_size,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


_T5_BASE = _t5(768, 64, 3072, 12, 12, 32128)
_T5_TINY = _t5(64, 16, 128, 2, 4, 320)
TEXT_ENCODERS = {"sao": _T5_BASE, "sao-small": _T5_BASE, "sao-tiny": _T5_TINY, "sao-small-tiny": _T5_TINY}


def model_tensors(config: Mapping) -> Specs:
    """Every tensor of model.safetensors for a `model_config.json` of `MODELS`."""
    model = config["model"]
    yield from _under("model.model.", _dit_tensors(model["diffusion"]["config"]))
    yield from _under("pretransform.model.", _autoencoder_tensors(model["pretransform"]["config"]))
    for entry in model["conditioning"]["configs"]:
        if entry["type"] == "number":
            prefix = f"conditioner.conditioners.{entry['id']}.embedder.embedding."
            yield from _under(prefix, _number_tensors(model["conditioning"]["cond_dim"]))


def _under(prefix: str, specs: Specs) -> Specs:
    return (spec.under(prefix) for spec in specs)


# -------------------- the diffusion transformer


def _dit_tensors(config: Mapping) -> Specs:
    d, c = config["embed_dim"], config["cond_token_dim"]
    projected = d if config.get("project_cond_tokens", True) else c
    channels = config["io_channels"]
    yield TensorSpec("timestep_features.weight", (128, 1))
    for name, width, out, bias in (
        ("to_timestep_embed", 256, d, True),
        ("to_cond_embed", c, projected, False),
        ("to_global_embed", config["global_cond_dim"], d, False),
    ):
        yield from _linear(f"{name}.0", out, width, bias)
        yield from _linear(f"{name}.2", out, out, bias)
    yield from _linear("transformer.project_in", d, channels)
    yield from _linear("transformer.project_out", channels, d, gain=0.4)  # of a residual stream of rms 2 to 4
    dim_heads = d // config["num_heads"]
    yield TensorSpec("transformer.rotary_pos_emb.inv_freq", (max(dim_heads // 2, 32) // 2,))
    qk_norm = config.get("attn_kwargs", {}).get("qk_norm") == "ln"
    branch = (3 * config["depth"]) ** -0.5  # 3 branches a block: together they add about the variance they start from
    for i in range(config["depth"]):
        yield from _under(f"transformer.layers.{i}.", _block(d, projected, dim_heads if qk_norm else None, branch))
    for name in ("preprocess_conv", "postprocess_conv"):  # each is added to its own input
        yield TensorSpec(f"{name}.weight", (channels, channels, 1), std=0.1 * channels**-0.5)


def _block(d: int, context: int, qk_norm: int | None, branch: float) -> Specs:
    """qk_norm: the channels a head that are normalised before the attention, where they are."""
    inner = 4 * d
    for attention, norm, projections in (
        ("self_attn", "pre_norm", (("to_qkv", 3 * d, d, slice(2 * d, None)),)),
        (
            "cross_attn",
            "cross_attend_norm",
            (("to_q", d, d, None), ("to_kv", 2 * context, context, slice(context, None))),
        ),
    ):
        yield from _norm(norm, d)
        for name, out, width, loud in projections:  # loud: of attention's values alone; of keys they would decide it
            yield from _linear(f"{attention}.{name}", out, width, loud=loud)
        yield from _linear(f"{attention}.to_out", d, d, gain=branch)
        for name in ("q_norm", "k_norm") if qk_norm else ():
            yield TensorSpec(f"{attention}.{name}.weight", (qk_norm or 0,), 1, 0.1)
            yield TensorSpec(f"{attention}.{name}.bias", (qk_norm or 0,), std=0.05)
    yield from _norm("ff_norm", d)
    yield from _linear("ff.ff.0.proj", 2 * inner, d, True, loud=slice(inner))  # SwiGLU's values
    yield from _linear("ff.ff.2", d, inner, True, gain=branch)


def _linear(name: str, out: int, width: int, bias: bool = False, gain: float = 1, loud: slice | None = None) -> Specs:
    yield TensorSpec(f"{name}.weight", (out, width), std=gain * width**-0.5, loud=loud)
    if bias:
        yield TensorSpec(f"{name}.bias", (out,), std=0.05 * gain)


def _norm(name: str, dim: int) -> Specs:
    yield TensorSpec(f"{name}.gamma", (dim,), 1, 0.1, loud=slice(None))
    yield TensorSpec(f"{name}.beta", (dim,), std=0)


# -------------------- conditioners


def _number_tensors(dim: int) -> Specs:
    yield TensorSpec("0.weights", (128,))
    yield from _linear("1", dim, 257, True)


def t5_tensors(config: Mapping) -> Specs:
    """Every tensor of the text encoder's model.safetensors for a config.json of `TEXT_ENCODERS`."""
    d, heads = config["d_model"], config["num_heads"]
    inner = config["d_kv"] * heads
    yield TensorSpec("shared.weight", (config["vocab_size"], d))
    for i in range(config["num_layers"]):
        attention = f"encoder.block.{i}.layer.0.SelfAttention"
        for name, std in (("q", (d * config["d_kv"]) ** -0.5), ("k", d**-0.5), ("v", d**-0.5)):
            yield TensorSpec(f"{attention}.{name}.weight", (inner, d), std=std)  # T5 does not divide q k by sqrt(d_kv)
        yield from _linear(f"{attention}.o", d, inner)
        if i == 0:
            buckets = config["relative_attention_num_buckets"]
            yield TensorSpec(f"{attention}.relative_attention_bias.weight", (buckets, heads), std=0.5)
        yield TensorSpec(f"encoder.block.{i}.layer.0.layer_norm.weight", (d,), 1, 0.1)
        yield from _linear(f"encoder.block.{i}.layer.1.DenseReluDense.wi", config["d_ff"], d)
        yield from _linear(f"encoder.block.{i}.layer.1.DenseReluDense.wo", d, config["d_ff"])
        yield TensorSpec(f"encoder.block.{i}.layer.1.layer_norm.weight", (d,), 1, 0.1)
    yield TensorSpec("encoder.final_layer_norm.weight", (d,), 1, 0.1, loud=slice(None))


# -------------------- the autoencoder


def _autoencoder_tensors(config: Mapping) -> Specs:
    encoder, decoder = (config[name]["config"] for name in ("encoder", "decoder"))
    yield from _under("encoder.layers.", _encoder(encoder))
    yield from _under("decoder.layers.", _decoder(decoder))


def _widths(half: Mapping) -> list[int]:
    """Channels before the first block and after each, from the audio's side."""
    return [half["channels"] * c for c in (1, *half["c_mults"])]


def _encoder(half: Mapping) -> Specs:
    widths, last = _widths(half), len(half["strides"]) + 1
    yield from _conv("0", (widths[0], half["in_channels"], 7))
    for i, stride in enumerate(half["strides"], 1):
        width, wider = widths[i - 1 : i + 1]
        for unit in range(3):
            yield from _unit(f"{i}.layers.{unit}.layers", width)
        yield from _snake(f"{i}.layers.3", width)
        yield from _conv(f"{i}.layers.4", (wider, width, 2 * stride))
    yield from _snake(f"{last}", widths[-1])
    yield from _conv(f"{last + 1}", (half["latent_dim"], widths[-1], 3))


def _decoder(half: Mapping) -> Specs:
    widths, strides = _widths(half)[::-1], half["strides"][::-1]
    last = len(strides) + 1
    yield from _conv("0", (widths[0], half["latent_dim"], 7))
    for i, stride in enumerate(strides, 1):
        wide, width = widths[i - 1 : i + 1]
        yield from _snake(f"{i}.layers.0", wide)
        yield from _conv(f"{i}.layers.1", (wide, width, 2 * stride), stride=stride)
        for unit in range(3):
            yield from _unit(f"{i}.layers.{unit + 2}.layers", width)
    yield from _snake(f"{last}", widths[-1])
    yield from _conv(f"{last + 1}", (half["out_channels"], widths[-1], 7), gain=0.1, bias=False)


def _unit(prefix: str, width: int) -> Specs:
    yield from _snake(f"{prefix}.0", width)
    yield from _conv(f"{prefix}.1", (width, width, 7))
    yield from _snake(f"{prefix}.2", width)
    yield from _conv(f"{prefix}.3", (width, width, 1), gain=0.2)


def _snake(name: str, width: int) -> Specs:
    for parameter in ("alpha", "beta"):  # logarithms
        yield TensorSpec(f"{name}.{parameter}", (width,), std=0.3)


def _conv(name: str, shape: tuple[int, int, int], stride: int = 0, gain: float = 0.7, bias: bool = True) -> Specs:
    """A convolution under weight norm, weight g v / ||v||, that multiplies the rms of white noise by `gain`.

    shape [out, in, kernel]; with a stride, that of a transposed one, [in, out, kernel]. The norm is that of a row, so g
    is the gain of a convolution; a transposed one's output sums, over all inputs, kernel / stride values of each row.
    """
    rows, columns = shape[:2]
    g = gain if not stride else gain * (columns * stride / rows) ** 0.5
    if bias:
        yield TensorSpec(f"{name}.bias", (columns if stride else rows,), std=0.05)
    yield TensorSpec(f"{name}.weight_g", (rows, 1, 1), g, 0.1 * g)
    yield TensorSpec(f"{name}.weight_v", shape, std=prod(shape[1:]) ** -0.5)
