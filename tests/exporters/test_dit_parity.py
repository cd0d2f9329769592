"""Our DiT and number conditioner against stable-audio-tools' and diffusers', random weights everywhere."""

import copy

import pytest
import torch

from dit_trt.engines.errors import UserError
from dit_trt.exporters.conditioners import MultiConditioner, NumberConditioner
from dit_trt.exporters.dit import DiffusionTransformer, DiTConfig, split_fused
from dit_trt.tooling.torch_steps import diffusers_dit
from peers import require

TOLERANCE = 1e-5  # max |difference| / max |reference|, fp32

CONFIGS = {  # name: (sizes, latents); odd lengths, two or three query heads to each key/value head
    "two heads a key, 64": (DiTConfig(8, 256, 2, 4, 128, 96), 17),
    "three heads a key, 32": (DiTConfig(6, 192, 3, 6, 64, 40), 33),
    "one head a key, 128": (DiTConfig(4, 256, 1, 2, 256, 32), 1),
    "heads normed, tokens projected": (DiTConfig(8, 256, 2, 2, 48, 96, project_cond_tokens=True, qk_norm=True), 17),
}
sizes = pytest.mark.parametrize(("config", "latents"), CONFIGS.values(), ids=CONFIGS)
OPEN_1 = {name: case for name, case in CONFIGS.items() if not case[0].qk_norm}  # diffusers knows no other


def randomize(module, seed=0):
    """Fill every parameter and LayerNorm shift with random values: a zero-initialised output hides all."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        leaf = name.rpartition(".")[2]
        if leaf == "inv_freq":
            continue
        random = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            if leaf == "gamma" or ".q_norm.weight" in name or ".k_norm.weight" in name:
                value.copy_(1 + 0.3 * random)
            elif value.ndim > 1 and "timestep_features" not in name:
                value.copy_(random * 1.5 / value[0].numel() ** 0.5)
            else:
                value.copy_(random * (1 if value.ndim > 1 else 0.2))
    return module


def inputs(config, latents, batch=3, tokens=7):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return (
        draw(batch, config.io_channels, latents),
        torch.tensor([0.99873, 0.5, 0.18555]),
        torch.cat((draw(batch - 1, tokens, config.cond_token_dim), torch.zeros(1, tokens, config.cond_token_dim))),
        draw(batch, config.global_cond_dim),
    )


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0.1
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def model_config(config, **changes):
    return {
        "model_type": "diffusion_cond",
        "model": {
            "diffusion": {
                "type": "dit",
                "diffusion_objective": "v",
                "config": {
                    "io_channels": config.io_channels,
                    "embed_dim": config.embed_dim,
                    "depth": config.depth,
                    "num_heads": config.num_heads,
                    "cond_token_dim": config.cond_token_dim,
                    "global_cond_dim": config.global_cond_dim,
                    "project_cond_tokens": config.project_cond_tokens,
                    "transformer_type": "continuous_transformer",
                    **({"attn_kwargs": {"qk_norm": "ln"}} if config.qk_norm else {}),
                    **changes,
                },
            }
        },
    }


def theirs_of_stable_audio_tools(config, **changes):
    """Their model, built from the same `model.diffusion.config` that ours reads."""
    module = require("stable_audio_tools.models.dit")
    settings = model_config(config, **changes)["model"]["diffusion"]["config"]
    return module.DiffusionTransformer(diffusion_objective="v", **settings).eval()


@sizes
def test_state_dict_is_that_of_stable_audio_tools(config, latents):
    theirs = theirs_of_stable_audio_tools(config).state_dict()
    ours = DiffusionTransformer(config).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert set(dict(DiffusionTransformer(config).named_parameters())) == set(
        dict(theirs_of_stable_audio_tools(config).named_parameters())
    )
    name = "transformer.rotary_pos_emb.inv_freq"
    torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=0)


@sizes
@torch.no_grad()
def test_equals_stable_audio_tools(config, latents):
    theirs = randomize(theirs_of_stable_audio_tools(config))
    ours = DiffusionTransformer(DiTConfig.from_model_config(model_config(config))).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, context, global_embed = inputs(config, latents)
    expected = theirs._forward(x, t, cross_attn_cond=context, global_embed=global_embed)
    assert_close(ours(x, t, context, global_embed), expected)
    split_fused(ours)
    assert_close(ours(x, t, context, global_embed), expected)


@torch.no_grad()
def test_feed_forward_multiple_of_stable_audio_tools():
    config, latents = DiTConfig(8, 128, 1, 2, 64, 96, ff_mult=2.5), 5
    theirs = randomize(theirs_of_stable_audio_tools(config, ff_kwargs={"mult": 2.5}))
    read = DiTConfig.from_model_config(model_config(config, ff_kwargs={"mult": 2.5}))
    assert read == config
    ours = DiffusionTransformer(read).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, context, global_embed = inputs(config, latents)
    assert_close(
        ours(x, t, context, global_embed),
        theirs._forward(x, t, cross_attn_cond=context, global_embed=global_embed),
    )


def to_diffusers(state):
    """Our state dict under the names of diffusers' StableAudioDiTModel (q, k and v apart)."""
    renamed = {}
    tops = {
        "to_timestep_embed": "timestep_proj",
        "to_global_embed": "global_proj",
        "to_cond_embed": "cross_attention_proj",
        "transformer.project_in": "proj_in",
        "transformer.project_out": "proj_out",
        "preprocess_conv": "preprocess_conv",
        "postprocess_conv": "postprocess_conv",
    }
    inner = {
        "pre_norm.gamma": "norm1.weight",
        "pre_norm.beta": "norm1.bias",
        "cross_attend_norm.gamma": "norm2.weight",
        "cross_attend_norm.beta": "norm2.bias",
        "ff_norm.gamma": "norm3.weight",
        "ff_norm.beta": "norm3.bias",
        "self_attn.to_out.weight": "attn1.to_out.0.weight",
        "cross_attn.to_q.weight": "attn2.to_q.weight",
        "cross_attn.to_out.weight": "attn2.to_out.0.weight",
        "ff.ff.0.proj.weight": "ff.net.0.proj.weight",
        "ff.ff.0.proj.bias": "ff.net.0.proj.bias",
        "ff.ff.2.weight": "ff.net.2.weight",
        "ff.ff.2.bias": "ff.net.2.bias",
    }
    for name, value in state.items():
        if name == "timestep_features.weight":
            renamed["time_proj.weight"] = value[:, 0]
        elif name.startswith("transformer.layers."):
            index, _, rest = name.removeprefix("transformer.layers.").partition(".")
            block = f"transformer_blocks.{index}."
            if rest == "self_attn.to_qkv.weight":
                for part, rows in zip("qkv", value.chunk(3)):
                    renamed[f"{block}attn1.to_{part}.weight"] = rows
            elif rest == "cross_attn.to_kv.weight":
                for part, rows in zip("kv", value.chunk(2)):
                    renamed[f"{block}attn2.to_{part}.weight"] = rows
            else:
                renamed[block + inner[rest]] = value
        elif name != "transformer.rotary_pos_emb.inv_freq":
            top = next(top for top in tops if name.startswith(top + "."))
            renamed[tops[top] + name.removeprefix(top)] = value
    return renamed


@pytest.mark.parametrize(("config", "latents"), OPEN_1.values(), ids=OPEN_1)
@torch.no_grad()
def test_equals_diffusers(config, latents):
    embeddings = require("diffusers.models.embeddings")
    theirs = diffusers_dit(config, latents).eval()
    ours = randomize(DiffusionTransformer(config).eval())
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    x, t, context, global_embed = inputs(config, latents)
    rotary = embeddings.get_1d_rotary_pos_embed(
        config.rotary_dim, latents + 1, use_real=True, repeat_interleave_real=False
    )
    expected = theirs(x, t, context, global_embed[:, None], rotary_embedding=rotary).sample
    assert_close(ours(x, t, context, global_embed), expected)


@sizes
def test_every_parameter_reaches_the_velocity(config, latents):
    """Guards the comparisons above: none of them passes because a branch is zero."""
    model = randomize(DiffusionTransformer(config))
    model(*inputs(config, latents)).square().sum().backward()
    dead = [name for name, value in model.named_parameters() if not value.grad.abs().max() > 1e-6]
    assert dead == []


@sizes
@torch.no_grad()
def test_an_empty_context_adds_nothing(config, latents):
    """The unconditional half of guidance: zeros in, cross attention exactly zero out (there is no bias)."""
    model = randomize(DiffusionTransformer(config))
    x, t, context, global_embed = inputs(config, latents)
    with_zeros = model(x, t, torch.zeros_like(context), global_embed)
    without = copy.deepcopy(model)
    for layer in without.transformer.layers:
        layer.cross_attn.to_out.weight.zero_()
    torch.testing.assert_close(with_zeros, without(x, t, context, global_embed), rtol=0, atol=0)


@torch.no_grad()
def test_number_conditioner_equals_stable_audio_tools():
    adp = require("stable_audio_tools.models.adp")
    theirs = randomize(adp.NumberEmbedder(features=24))
    ours = NumberConditioner(24, min_val=0, max_val=512)
    ours.embedder.load_state_dict(theirs.state_dict())
    seconds = torch.tensor([-3.0, 0.0, 0.1, 10.0, 47.55, 512.0, 600.0])
    # NumberConditioner.forward of stable-audio-tools (its module needs torchaudio): clamp, to 0..1, embed
    expected = theirs(seconds.clamp(0, 512) / 512)
    assert_close(ours(seconds), expected)
    # Within rounding: vectorized sines of one number differ by its place in the tensor.
    torch.testing.assert_close(ours(seconds)[0], ours(seconds)[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(seconds)[5], ours(seconds)[6], rtol=1e-5, atol=1e-6)

    shifted = NumberConditioner(24, min_val=-2, max_val=6)
    shifted.embedder.load_state_dict(theirs.state_dict())
    assert_close(shifted(torch.tensor([0.5])), theirs(torch.tensor([2.5 / 8])))


@torch.no_grad()
def test_conditioning_is_tokens_then_both_numbers():
    config = model_config(CONFIGS["two heads a key, 64"][0])
    config["model"]["diffusion"] |= {
        "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
        "global_cond_ids": ["seconds_start", "seconds_total"],
    }
    number = {"type": "number", "config": {"min_val": 0, "max_val": 4}}
    config["model"]["conditioning"] = {
        "cond_dim": 24,
        "configs": [
            {"id": "prompt", "type": "token_table", "config": {"vocab_size": 50, "max_length": 5}},
            {"id": "seconds_start", **number},
            {"id": "seconds_total", **number},
        ],
    }
    module = randomize(MultiConditioner(config))
    assert "conditioners.seconds_total.embedder.embedding.0.weights" in module.state_dict()
    assert "conditioners.seconds_start.embedder.embedding.1.bias" in module.state_dict()
    ids, mask = torch.tensor([[3, 49, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    start, total = torch.tensor([0.0]), torch.tensor([3.0])
    cross, global_embed = module(ids, mask, start, total)
    assert cross.shape == (1, 7, 24)
    assert global_embed.shape == (1, 48)
    assert (cross[:, 3:5] == 0).all()
    assert cross[0, 1].equal(module.conditioners["prompt"].table.weight[49])
    assert cross[:, 5].equal(module.conditioners["seconds_start"](start))
    assert cross[:, 6].equal(module.conditioners["seconds_total"](total))
    assert global_embed.equal(torch.cat((cross[:, 5], cross[:, 6]), dim=-1))


def refused(config):
    with pytest.raises(UserError) as error:
        DiTConfig.from_model_config(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_unsupported_settings_are_named_at_once():
    config = model_config(
        CONFIGS["two heads a key, 64"][0],
        patch_size=2,
        num_memory_tokens=64,
        global_cond_type="adaLN",
        attn_kwargs={"qk_norm": "l2"},
        project_cond_tokens="yes",
        ff_kwargs={"mult": 4, "use_conv": True},
        depth=0,
    )
    config["model"]["diffusion"]["type"] = "udit"
    config["model"]["diffusion"]["diffusion_objective"] = "rectified_flow"
    config["model"]["diffusion"]["prepend_cond_ids"] = ["prompt"]
    config["model_type"] = "autoencoder"
    message = refused(config)
    for name in (
        "model_type='autoencoder'",
        "type='udit'",
        "diffusion_objective='rectified_flow'",
        "patch_size=2",
        "num_memory_tokens=64",
        "global_cond_type='adaLN'",
        "attn_kwargs.qk_norm='l2'",
        "project_cond_tokens='yes'",
        "prepend_cond_ids=['prompt']",
        "use_conv=True",
        "depth=0",
    ):
        assert name in message, name
    assert "mult" not in message
    assert "embed_dim" not in message


@pytest.mark.parametrize(
    "name", ["io_channels", "embed_dim", "depth", "num_heads", "cond_token_dim", "global_cond_dim"]
)
@pytest.mark.parametrize("value", [None, -1, 1.5, "64"])
def test_a_missing_or_wrong_size_is_named(name, value):
    assert name in refused(model_config(CONFIGS["two heads a key, 64"][0], **{name: value}))


def test_projected_tokens_are_the_default_as_in_stable_audio_tools():
    config = model_config(CONFIGS["two heads a key, 64"][0])
    del config["model"]["diffusion"]["config"]["project_cond_tokens"]
    assert DiTConfig.from_model_config(config).project_cond_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "embed_dim 256 / num_heads 3"),
        ({"num_heads": 16}, "whole number >= 32"),
        ({"cond_token_dim": 80}, "cond_token_dim 80"),
        ({"cond_token_dim": 192}, "the 4 query heads"),
    ],
)
def test_sizes_that_do_not_fit_together(changes, message):
    assert message in refused(model_config(CONFIGS["two heads a key, 64"][0], **changes))


@pytest.mark.parametrize("config", [{}, {"model": None}, {"model": {"diffusion": {"type": "dit"}}}])
def test_not_a_diffusion_config(config):
    assert "model.diffusion.config" in refused(config)


def test_the_published_sizes_of_stable_audio_open():
    config = DiTConfig(64, 1536, 24, 24, 768, 1536)
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == 1_056_828_544
    assert sum(b.numel() for b in model.buffers()) == 110_608
    assert (config.dim_heads, config.kv_heads, config.rotary_dim, config.ff_inner) == (64, 12, 32, 6144)


def test_the_published_sizes_of_stable_audio_open_small():
    config = DiTConfig(64, 1024, 16, 8, 768, 768, project_cond_tokens=True, qk_norm=True)
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == 340_879_488
    assert (config.dim_heads, config.kv_heads, config.rotary_dim, config.context_dim) == (128, 8, 64, 1024)
