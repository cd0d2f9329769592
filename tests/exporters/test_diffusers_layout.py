"""A pipeline that diffusers' own classes saved, read and run by our modules; and what is refused of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import peers
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import fold_weight_norm
from dit_trt.exporters.conditioners import NumberConditioner
from dit_trt.exporters.diffusers_layout import is_diffusers, read_diffusers
from dit_trt.exporters.dit import DiffusionTransformer, DiTConfig, RotaryEmbedding
from dit_trt.exporters.oobleck import DecoderGraph, EncoderGraph, OobleckConfig
from dit_trt.exporters.tensor_files import TensorSource

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of diffusers about itself and torch
TOLERANCE = 1e-5  # max |difference| / max |reference|, fp32
LATENTS, CHANNELS, CONTEXT = 24, 8, 128
DIT = {
    "sample_size": LATENTS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_attention_heads": 2,
    "cross_attention_dim": CONTEXT,
    "cross_attention_input_dim": CONTEXT,
    "global_states_input_dim": 2 * CONTEXT,
}
VAE = {
    "encoder_hidden_size": 2 * CHANNELS,
    "downsampling_ratios": [3, 4, 2],
    "channel_multiples": [1, 2, 3],
    "decoder_channels": 6,
    "decoder_input_channels": CHANNELS,
    "audio_channels": 1,
    "sampling_rate": 8000,
}
PROJECTION = {"text_encoder_dim": CONTEXT, "conditioning_dim": CONTEXT, "min_value": 2, "max_value": 300}
CONFIG = {  # what the above is in stable-audio-tools' words, written out by hand
    "model_type": "diffusion_cond",
    "sample_size": LATENTS * 24,
    "sample_rate": 8000,
    "audio_channels": 1,
    "model": {
        "pretransform": {
            "type": "autoencoder",
            "iterate_batch": True,
            "config": {
                "encoder": {
                    "type": "oobleck",
                    "requires_grad": False,
                    "config": {
                        "in_channels": 1,
                        "channels": 16,
                        "c_mults": [1, 2, 3],
                        "strides": [3, 4, 2],
                        "latent_dim": 16,
                        "use_snake": True,
                    },
                },
                "decoder": {
                    "type": "oobleck",
                    "config": {
                        "out_channels": 1,
                        "channels": 6,
                        "c_mults": [1, 2, 3],
                        "strides": [3, 4, 2],
                        "latent_dim": 8,
                        "use_snake": True,
                        "final_tanh": False,
                    },
                },
                "bottleneck": {"type": "vae"},
                "latent_dim": 8,
                "downsampling_ratio": 24,
                "io_channels": 1,
            },
        },
        "conditioning": {
            "configs": [
                {"id": "prompt", "type": "t5", "config": {"t5_model_name": "t5-base", "max_length": 77}},
                {"id": "seconds_start", "type": "number", "config": {"min_val": 2, "max_val": 300}},
                {"id": "seconds_total", "type": "number", "config": {"min_val": 2, "max_val": 300}},
            ],
            "cond_dim": 128,
        },
        "diffusion": {
            "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
            "global_cond_ids": ["seconds_start", "seconds_total"],
            "type": "dit",
            "config": {
                "io_channels": 8,
                "embed_dim": 256,
                "depth": 2,
                "num_heads": 4,
                "cond_token_dim": 128,
                "global_cond_dim": 256,
                "project_cond_tokens": False,
                "transformer_type": "continuous_transformer",
            },
        },
        "io_channels": 8,
    },
}


class Pipeline:
    """The three models with weights, random everywhere, and the folder in which they saved themselves."""

    def __init__(self, folder: Path):
        dit = peers.require("diffusers.models.transformers.stable_audio_transformer")
        vae = peers.require("diffusers.models.autoencoders.autoencoder_oobleck")
        projection = peers.require("diffusers.pipelines.stable_audio.modeling_stable_audio")
        self.folder = folder
        self.transformer = randomized(dit.StableAudioDiTModel(**DIT))
        self.vae = peers.randomize_autoencoder(vae.AutoencoderOobleck(**VAE)).eval()
        self.projection = randomized(projection.StableAudioProjectionModel(**PROJECTION))
        self.transformer.save_pretrained(folder / "transformer")
        self.vae.save_pretrained(folder / "vae")
        self.projection.save_pretrained(folder / "projection_model")
        layouts.write_json(folder / "model_index.json", layouts.INDEX)
        layouts.write_json(folder / "scheduler" / "scheduler_config.json", layouts.SCHEDULER)
        layouts.write_json(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 77, "extra_ids": 100})


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in module.named_parameters():
            random = torch.randn(value.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.3 * random)
            else:
                value.copy_(random * (1.5 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.3))
    return module.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copied(pipeline: Pipeline, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline.folder, tmp_path / "pipeline")


def state(source: TensorSource, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below a prefix as a state dict, weight norm folded as Checkpoint does it."""
    found = {}
    for key in source.shapes:
        if not key.startswith(prefix) or key.endswith("weight_v"):
            continue
        value = source.read(key)
        if key.endswith("weight_g"):
            key, value = key[:-2], fold_weight_norm(value, source.read(f"{key[:-1]}v"))
        found[key.removeprefix(prefix)] = torch.from_numpy(value)
    return found


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_configuration_is_that_of_stable_audio_tools(pipeline: Pipeline) -> None:
    assert is_diffusers(pipeline.folder)
    assert read_diffusers(pipeline.folder)[0] == CONFIG


def test_defaults_are_stable_audio_open(copied: Path) -> None:
    """All its sizes are diffusers' defaults; only the projection model has none."""
    for part in ("transformer", "vae"):
        (copied / part / "config.json").write_text("{}")
    for name, value in (("conditioning_dim", 768), ("text_encoder_dim", 768)):
        change(copied, "projection_model/config.json", name, value)
    with pytest.raises(UserError, match=r"transformer_blocks\.10\.attn1\.to_k\.weight and \d+ more"):  # of 24 blocks
        read_diffusers(copied)


@torch.no_grad()
def test_the_transformer_is_the_same_function(pipeline: Pipeline) -> None:
    embeddings = peers.require("diffusers.models.embeddings")
    config, source = read_diffusers(pipeline.folder)
    ours = DiffusionTransformer(DiTConfig.from_model_config(config)).eval()
    ours.load_state_dict(state(source, "model.model."))
    assert ours.transformer.blocks()[1].ff_norm.beta.abs().min() > 0
    x, t = draw(2, CHANNELS, LATENTS), torch.tensor([0.9, 0.2])
    context, global_embed = draw(2, 5, CONTEXT), draw(2, 2 * CONTEXT)
    rotary = embeddings.get_1d_rotary_pos_embed(32, LATENTS + 1, use_real=True, repeat_interleave_real=False)
    expected = pipeline.transformer(x, t, context, global_embed[:, None], rotary_embedding=rotary).sample
    assert_close(ours(x, t, context, global_embed), expected)


@torch.no_grad()
def test_the_autoencoder_is_the_same_function(pipeline: Pipeline) -> None:
    config, source = read_diffusers(pipeline.folder)
    autoencoder = OobleckConfig.from_pretransform(config["model"]["pretransform"])
    weights = state(source, "pretransform.")
    encoder, decoder = EncoderGraph(autoencoder).eval(), DecoderGraph(autoencoder).eval()
    for half, name in ((encoder, "encoder"), (decoder, "decoder")):
        half.load_state_dict({key: value for key, value in weights.items() if key.startswith(f"model.{name}.")})
    assert len(encoder.state_dict()) + len(decoder.state_dict()) == len(weights)
    latents, audio = draw(2, CHANNELS, 5), draw(2, 1, 5 * 24)
    assert_close(decoder(latents), pipeline.vae.decode(latents).sample)
    expected = pipeline.vae.encode(audio).latent_dist
    for found, want in zip(encoder(audio), (expected.mean, expected.std), strict=True):
        assert_close(found, want)


@torch.no_grad()
def test_the_number_conditioners_are_the_same_functions(pipeline: Pipeline) -> None:
    config, source = read_diffusers(pipeline.folder)
    seconds = torch.tensor([0.0, 2.0, 47.5, 301.0])
    expected = pipeline.projection(start_seconds=seconds, end_seconds=seconds)
    for name, want in (
        ("seconds_start", expected.seconds_start_hidden_states),
        ("seconds_total", expected.seconds_end_hidden_states),
    ):
        (settings,) = (c["config"] for c in config["model"]["conditioning"]["configs"] if c["id"] == name)
        ours = NumberConditioner(CONTEXT, **settings)
        ours.load_state_dict(state(source, f"conditioner.conditioners.{name}."))
        assert_close(ours(seconds), want[:, 0])


def test_every_tensor_is_read_from_its_file(pipeline: Pipeline) -> None:
    source = read_diffusers(pipeline.folder)[1]
    parts = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae", "projection_model")]
    assert source.files == tuple(pipeline.folder / part for part in parts)
    key = "model.model.transformer.rotary_pos_emb.inv_freq"
    np.testing.assert_array_equal(source.read(key), RotaryEmbedding(32).inv_freq.numpy())
    assert source.file_of(key) == pipeline.folder / "transformer" / "config.json"
    fused = "model.model.transformer.layers.1.self_attn.to_qkv.weight"
    assert source.file_of(fused) == pipeline.folder / parts[0]
    theirs = pipeline.transformer.transformer_blocks[1].attn1
    whole = torch.cat([getattr(theirs, f"to_{one}").weight for one in "qkv"]).detach().numpy()
    assert source.shapes[fused] == whole.shape
    for rows in (slice(None), slice(0, 256), slice(200, 600), slice(511, 513), slice(700, None), slice(300, 300)):
        np.testing.assert_array_equal(source.read(fused, rows), whole[rows])


def test_other_forms_of_the_same_weights(pipeline: Pipeline, copied: Path) -> None:
    """Shards, half precision by a variant's name, torch's new weight norm, a convolution without any."""
    expected = read_diffusers(pipeline.folder)[1]
    name = "diffusion_pytorch_model.safetensors"
    layouts.save_shards(load_file(copied / "transformer" / name), copied / "transformer", name.partition(".")[0])
    (copied / "transformer" / name).unlink()
    (copied / "projection_model" / name).rename(
        copied / "projection_model" / "diffusion_pytorch_model.fp16.safetensors"
    )
    vae = load_file(copied / "vae" / name)
    new = "parametrizations.weight.original"
    vae = {key.replace("weight_g", f"{new}0").replace("weight_v", f"{new}1"): value for key, value in vae.items()}
    g, v = (vae.pop(f"decoder.conv2.{new}{i}").numpy() for i in range(2))
    vae["decoder.conv2.weight"] = torch.from_numpy(fold_weight_norm(g, v))
    save_file(vae, copied / "vae" / name)
    found = read_diffusers(copied)[1]
    swap = {"weight_g": f"{new}0", "weight_v": f"{new}1"}
    last = "pretransform.model.decoder.layers.5.weight"
    np.testing.assert_array_equal(found.read(last), vae["decoder.conv2.weight"].numpy())
    rest = [key for key in expected.shapes if not key.startswith(last)]
    assert len(rest) == len(found.shapes) - 1
    for key in rest:
        tail = key.rpartition(".")[2]
        renamed = key.replace(tail, swap[tail]) if key.startswith("pretransform") and tail in swap else key
        np.testing.assert_array_equal(found.read(renamed), expected.read(key))


def test_back_and_forth(tmp_path: Path, pipeline: Pipeline) -> None:
    """A folder of stable-audio-tools that becomes a pipeline and is read again."""
    config, source = read_diffusers(pipeline.folder)
    folder = tmp_path / "model"
    layouts.write_json(folder / "model_config.json", config)
    save_file({key: torch.from_numpy(source.read(key)) for key in source.shapes}, folder / "model.safetensors")
    again, found = read_diffusers(layouts.diffusers(folder, tmp_path / "pipeline"))
    assert again == config
    assert found.shapes == source.shapes
    for key in source.shapes:
        np.testing.assert_array_equal(found.read(key), source.read(key))


def change(folder: Path, file: str, name: str, value: object) -> None:
    config = json.loads((folder / file).read_text())
    layouts.write_json(folder / file, config | {name: value})


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_diffusers(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("model_index.json", "_class_name", "AudioLDMPipeline", "_class_name='AudioLDMPipeline'"),
        ("model_index.json", "vae", ["diffusers", "AutoencoderKL"], "vae='AutoencoderKL' (only 'AutoencoderOobleck')"),
        ("model_index.json", "safety_checker", ["a", "B"], "safety_checker=['a', 'B'] (unknown)"),
        ("transformer/config.json", "qk_norm", "ln", "transformer qk_norm='ln' (unknown)"),
        ("transformer/config.json", "num_layers", 0, "transformer num_layers=0"),
        ("transformer/config.json", "in_channels", "8", "transformer in_channels='8'"),
        ("transformer/config.json", "out_channels", 9, "transformer out_channels=9 (only 8"),
        ("transformer/config.json", "attention_head_dim", 32, "attention_head_dim=32"),
        ("transformer/config.json", "time_proj_dim", 128, "time_proj_dim=128 (only 256"),
        ("transformer/config.json", "cross_attention_dim", 64, "cross_attention_input_dim=128 (only 64"),
        ("transformer/config.json", "global_states_input_dim", 128, "global_states_input_dim=128 (only 256"),
        ("vae/config.json", "downsampling_ratios", [3, 4], "the length of vae channel_multiples=3 (only 2"),
        ("vae/config.json", "downsampling_ratios", [3, 4, 0], "vae downsampling_ratios=[3, 4, 0]"),
        ("vae/config.json", "encoder_hidden_size", 32, "encoder_hidden_size=32 (only 16"),
        ("vae/config.json", "decoder_input_channels", 4, "decoder_input_channels=4 (only 8"),
        ("projection_model/config.json", "text_encoder_dim", 512, "text_encoder_dim=512 (only 128"),
        ("projection_model/config.json", "max_value", 2, "min_value=2 (less than max_value)"),
        ("projection_model/config.json", "max_value", None, "max_value=None"),
        ("scheduler/scheduler_config.json", "prediction_type", "epsilon", "scheduler prediction_type='epsilon'"),
        ("scheduler/scheduler_config.json", "sigma_data", 0.5, "scheduler sigma_data=0.5"),
        ("scheduler/scheduler_config.json", "shift", 3, "scheduler shift=3 (unknown)"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 10**30, "model_max_length=1000000000000000000"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    copied: Path, file: str, name: str, value: object, words: str
) -> None:
    change(copied, file, name, value)
    assert words in refused(copied)


def test_all_faults_are_named_at_once(copied: Path) -> None:
    change(copied, "model_index.json", "_class_name", "Other")
    change(copied, "transformer/config.json", "adaln", True)
    change(copied, "vae/config.json", "audio_channels", 0)
    change(copied, "scheduler/scheduler_config.json", "prediction_type", "sample")
    config = json.loads((copied / "projection_model" / "config.json").read_text())
    del config["max_value"]
    layouts.write_json(copied / "projection_model" / "config.json", config)
    message = refused(copied)
    for words in ("'Other'", "adaln=True", "audio_channels=0", "'sample'", "projection_model lacks max_value"):
        assert words in message


def test_settings_of_sampling_are_passed_over(copied: Path, pipeline: Pipeline) -> None:
    change(copied, "scheduler/scheduler_config.json", "sigma_min", 0.01)
    change(copied, "scheduler/scheduler_config.json", "solver_order", 3)
    change(copied, "model_index.json", "_name_or_path", "somewhere")
    assert read_diffusers(copied)[0] == read_diffusers(pipeline.folder)[0]


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_or_broken_file_is_named(copied: Path, file: str) -> None:
    (copied / file).write_text("{")
    assert f"{file} is not valid JSON" in refused(copied)
    (copied / file).write_text("[]")
    assert f"{file} does not hold a JSON object" in refused(copied)
    (copied / file).unlink()
    assert f"{file} cannot be read: No such file" in refused(copied)


def test_weights_of_another_structure(copied: Path) -> None:
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"transformer_blocks.0.attn1.to_q.bias": torch.zeros(256)}, file)
    assert "transformer hold what is not known: transformer_blocks.0.attn1.to_q.bias: not a model" in refused(copied)
    del state["transformer_blocks.1.attn2.to_k.weight"]
    save_file(state, file)
    assert "transformer lack transformer_blocks.1.attn2.to_k.weight: not a model" in refused(copied)
    save_file(state | {"transformer_blocks.1.attn2.to_k.weight": torch.zeros(128, 64)}, file)
    assert "attn2.to_k.weight and transformer_blocks.1.attn2.to_v.weight are [128, 64], [128, 128]" in refused(copied)
    file.unlink()
    assert f"{copied / 'transformer'} holds no weights" in refused(copied)


def test_what_is_no_pipeline(tmp_path: Path) -> None:
    assert not is_diffusers(tmp_path)
    (tmp_path / "transformer").mkdir()
    assert not is_diffusers(tmp_path)
