"""Synthetic checkpoints have the published models' keys and shapes exactly, and weights that compute."""

import copy
import json
import warnings
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from processes import python
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

import peers
from dit_trt.engines.errors import UserError
from dit_trt.exporters.dit import DiffusionTransformer, DiTConfig
from dit_trt.exporters.linears import block_linears
from dit_trt.exporters.oobleck import OobleckConfig, OobleckDecoder, OobleckEncoder
from dit_trt.tooling.synthetic_checkpoint import write_checkpoint
from dit_trt.tooling.synthetic_models import MODELS, TEXT_ENCODERS, model_tensors, t5_tensors
from dit_trt.tooling.synthetic_tensors import OUTLIER_GAIN, TensorSpec, draw, write_tensors

every_model = pytest.mark.parametrize("name", MODELS)


@cache
def shapes(name, prefix=""):
    """Key without its prefix -> shape."""
    specs = model_tensors(MODELS[name])
    return {spec.name.removeprefix(prefix): spec.shape for spec in specs if spec.name.startswith(prefix)}


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def their_dit(config):
    """stable-audio-tools' DiT on the meta device."""
    module = peers.require("stable_audio_tools.models.dit")
    diffusion = copy.deepcopy(config["model"]["diffusion"])
    with torch.device("meta"):
        return module.DiffusionTransformer(diffusion_objective=diffusion["diffusion_objective"], **diffusion["config"])


# -------------------- keys and shapes


@every_model
def test_the_dit_has_the_keys_and_shapes_of_stable_audio_tools(name):
    assert shapes(name, "model.model.") == shapes_of(their_dit(MODELS[name]))


@every_model
def test_the_autoencoder_has_the_keys_and_shapes_of_stable_audio_tools(name):
    factory = peers.stable_audio_tools("models.factory")
    pretransform = copy.deepcopy(MODELS[name]["model"]["pretransform"])
    with peers._stand_ins(*peers._NOT_CALLED), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", FutureWarning)  # its weight norm is torch's old one
        theirs = factory.create_pretransform_from_config(pretransform, 44100)
    assert shapes(name, "pretransform.") == shapes_of(theirs)


@every_model
def test_the_number_conditioners_have_the_keys_and_shapes_of_stable_audio_tools(name):
    conditioning = MODELS[name]["model"]["conditioning"]
    embedder = peers.stable_audio_tools("models.adp").NumberEmbedder
    expected = {}
    for entry in conditioning["configs"]:
        if entry["type"] == "number":
            own = shapes_of(embedder(features=conditioning["cond_dim"]))
            expected |= {f"{entry['id']}.embedder.{key}": shape for key, shape in own.items()}
    assert shapes(name, "conditioner.conditioners.") == expected


@every_model
def test_nothing_else_is_in_the_file(name):
    parts = ("model.model.", "pretransform.model.", "conditioner.conditioners.seconds_")
    assert [key for key in shapes(name) if not key.startswith(parts)] == []


@every_model
def test_the_text_encoder_has_the_keys_and_shapes_of_transformers(name):
    transformers = peers.require("transformers")
    config = TEXT_ENCODERS[name]
    with torch.device("meta"):
        theirs = shapes_of(transformers.T5EncoderModel(transformers.T5Config(**config)))
    assert theirs.pop("encoder.embed_tokens.weight") == theirs["shared.weight"]  # one tensor under two names
    assert {spec.name: spec.shape for spec in t5_tensors(config)} == theirs


@pytest.mark.parametrize("name", ["sao", "sao-tiny"])
def test_our_own_modules_read_them(name):
    config = DiTConfig.from_model_config(MODELS[name])
    pretransform = OobleckConfig.from_pretransform(MODELS[name]["model"]["pretransform"])
    with torch.device("meta"):
        dit = DiffusionTransformer(config)
        halves = {"encoder": OobleckEncoder(pretransform.encoder), "decoder": OobleckDecoder(pretransform.decoder)}
    own = shapes(name, "model.model.")
    assert own == shapes_of(dit)
    assert all(
        own[linear.name + ".weight"] == (linear.out_features, linear.in_features) for linear in block_linears(config)
    )
    for half, module in halves.items():
        folded = {
            key.replace("weight_v", "weight"): shape
            for key, shape in shapes(name, f"pretransform.model.{half}.").items()
        }
        folded = {key: shape for key, shape in folded.items() if not key.endswith("weight_g")}
        assert folded == shapes_of(module)


def elements(name, prefix=""):
    return sum(prod(shape) for shape in shapes(name, prefix).values())


@pytest.mark.parametrize(
    ("name", "dit", "buffers", "numbers"),
    [("sao", 1_056_828_544, 110_608, 2), ("sao-small", 340_879_488, 16 * 3 * 1024 + 32, 1)],
)
def test_the_published_sizes(name, dit, buffers, numbers):
    """Stable Audio Open 1.0's file is 4,853.79 MB: 1,213,448,210 fp32 values."""
    found = shapes(name, "model.model.")
    constant = sum(prod(shape) for key, shape in found.items() if key.endswith(("beta", "inv_freq")))
    assert (elements(name, "model.model.") - constant, constant) == (dit, buffers)
    assert elements(name, "pretransform.") == 156_112_514
    assert elements(name, "conditioner.") == numbers * 198_272
    assert elements(name) == {"sao": 1_213_448_210, "sao-small": 497_239_458}[name]
    assert sum(prod(spec.shape) for spec in t5_tensors(TEXT_ENCODERS[name])) == 109_628_544
    config = MODELS[name]
    assert config["sample_size"] == {"sao": 2_097_152, "sao-small": 524_288}[name]
    assert elements(name + "-tiny") < 1_100_000


# -------------------- files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return {name: write_checkpoint(name, folder / name) for name in MODELS if name.endswith("-tiny")}


def test_files_are_those_of_the_lists(written):
    for name, folder in written.items():
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        weights, text_encoder = "model.safetensors", "text_encoder/model.safetensors"
        others = {"model_config.json", "LICENSE", "text_encoder/config.json", "tokenizer/tokenizer.json"}
        assert files == {weights, text_encoder, *others}
        assert json.loads((folder / "model_config.json").read_text()) == MODELS[name]
        assert json.loads((folder / "text_encoder" / "config.json").read_text()) == TEXT_ENCODERS[name]
        assert "ynthetic" in (folder / "LICENSE").read_text()
        for file, specs in (
            (weights, list(model_tensors(MODELS[name]))),
            (text_encoder, list(t5_tensors(TEXT_ENCODERS[name]))),
        ):
            found = load_file(folder / file)
            assert found.keys() == {spec.name for spec in specs}
            for spec in specs:
                torch.testing.assert_close(found[spec.name], draw(spec, 0), rtol=0, atol=0)
            with safe_open(folder / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}


def test_a_seed_means_its_bytes(written, tmp_path):
    name = "sao-tiny"
    again, other = (write_checkpoint(name, tmp_path / str(seed), seed) for seed in (0, 1))
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert all((again / file).read_bytes() == (written[name] / file).read_bytes() for file in files)
    weights = load_file(again / "model.safetensors"), load_file(other / "model.safetensors")
    constant = {key for key in weights[0] if torch.equal(weights[0][key], weights[1][key])}
    assert constant == {key for key in weights[0] if key.endswith(("norm.beta", "inv_freq"))}


def test_the_order_of_tensors_does_not_matter(tmp_path):
    specs = list(model_tensors(MODELS["sao-tiny"]))
    write_tensors(tmp_path / "backwards.safetensors", specs[::-1], 0)
    found = load_file(tmp_path / "backwards.safetensors")
    assert all(torch.equal(found[spec.name], draw(spec, 0)) for spec in specs)


def test_a_draw_has_the_statistics_it_names():
    value = draw(TensorSpec("one", (4000, 50), 3.0, 0.5), 0)
    assert value.mean().item() == pytest.approx(3.0, abs=0.01)
    assert value.std().item() == pytest.approx(0.5, rel=0.01)
    rows = draw(TensorSpec("one", (4000, 50), loud=slice(2000, None)), 0).square().mean(dim=1).sqrt()
    assert rows[:2000].max() < 2
    loud = rows[2000:] > OUTLIER_GAIN / 2
    assert 8 < loud.sum() < 40
    assert rows[2000:][loud].mean().item() == pytest.approx(OUTLIER_GAIN, rel=0.1)
    frequencies = draw(TensorSpec("a.inv_freq", (16,)), 0).double()
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(16) / 16), rtol=1e-6)


def test_an_interrupted_file_is_absent(tmp_path, monkeypatch):
    def stop(spec, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr("dit_trt.tooling.synthetic_tensors.draw", stop)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "model.safetensors", [TensorSpec("one", (3,))], 0)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """400 MB of file in 20 tensors of 20 MB add less than 5 of them to the memory that Python and torch take."""
    code = f"""
import resource
from pathlib import Path
from dit_trt.tooling.synthetic_tensors import TensorSpec, draw, write_tensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
draw(TensorSpec("first", (1000,)), 0)
before = peak()
specs = [TensorSpec(str(i), (5_000_000,)) for i in range(20)]
write_tensors(Path({str(tmp_path / "large.safetensors")!r}), specs, 0)
assert peak() - before < 100e6, peak() - before
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "large.safetensors").stat().st_size > 400e6


def test_the_tokenizer_ends_as_t5s_does(written):
    tokenizer = Tokenizer.from_file(str(written["sao-small-tiny"] / "tokenizer" / "tokenizer.json"))
    encoded = tokenizer.encode("dög barking")
    assert encoded.ids[-1] == 1 == tokenizer.token_to_id("</s>")
    assert tokenizer.token_to_id("<pad>") == 0
    assert len(encoded.ids) == len("dög barking".encode()) + 1
    assert min(encoded.ids[:-1]) > 2 and max(encoded.ids) < TEXT_ENCODERS["sao-small-tiny"]["vocab_size"]
    assert tokenizer.decode(encoded.ids) == "dög barking"


def test_the_command(tmp_path):
    module = "from dit_trt.tooling.synthetic_checkpoint import command; command()"
    finished = python(module, ["sao-tiny", str(tmp_path / "it"), "--seed", "5", "--json"])
    assert json.loads(finished.stdout) == {"model": str(tmp_path / "it"), "shape": "sao-tiny", "seed": 5}
    key = "model.model.transformer.project_in.weight"
    spec = next(spec for spec in model_tensors(MODELS["sao-tiny"]) if spec.name == key)
    assert torch.equal(load_file(tmp_path / "it" / "model.safetensors")[key], draw(spec, 5))
    with pytest.raises(UserError, match=r"unknown shape 'huge' \(one of: sao-block, sao-dit, sao, sao-small, sao-tiny"):
        write_checkpoint("huge", tmp_path / "huge")
    assert not (tmp_path / "huge").exists()


# -------------------- what they compute


NARROW = {  # all blocks of the published models, fewer channels
    "sao": {"embed_dim": 192, "num_heads": 6, "cond_token_dim": 96, "global_cond_dim": 192},
    "sao-small": {"embed_dim": 256, "num_heads": 4, "cond_token_dim": 96, "global_cond_dim": 96},
    "sao-tiny": {},
    "sao-small-tiny": {},
}


@pytest.mark.parametrize(("name", "sizes"), NARROW.items(), ids=NARROW)
@torch.no_grad()
def test_activations_stay_in_range_through_all_blocks(name, sizes):
    config = copy.deepcopy(MODELS[name])
    config["model"]["diffusion"]["config"].update(sizes)
    dit, width = their_dit(config), config["model"]["diffusion"]["config"]
    prefix = "model.model."
    specs = [spec for spec in model_tensors(config) if spec.name.startswith(prefix)]
    dit.load_state_dict({spec.name.removeprefix(prefix): draw(spec, 0) for spec in specs}, assign=True)
    residual, products = [], []
    for block in dit.eval().transformer.layers:
        block.register_forward_hook(lambda module, given, out: residual.append(rms(out)))
        block.ff.ff[2].register_forward_pre_hook(lambda module, given: products.append(given[0].abs().amax(dim=(0, 1))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 130, generator=generator).repeat(2, 1, 1)
    context = torch.randn(1, 30, width["cond_token_dim"], generator=generator)
    embed = torch.randn(1, width["global_cond_dim"], generator=generator).repeat(2, 1)
    both = torch.cat((context, torch.zeros_like(context)))
    velocity = dit._forward(x, torch.full((2,), 0.5), cross_attn_cond=both, global_embed=embed)
    assert 0.3 < rms(velocity) < 3
    assert 0.05 < rms(velocity[0] - velocity[1]) < 2  # the prompt matters
    assert len(residual) == width["depth"]
    assert all(0.5 < value < 6 for value in residual)
    assert all(values.max() > 10 * values.median() for values in products)  # ff.2's input has loud channels
    assert max(values.max() for values in products) < 1000


def rms(x):
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def test_the_autoencoder_makes_sound_and_latents_of_ordinary_size(written):
    config = MODELS["sao-tiny"]["model"]["pretransform"]
    theirs = peers.oobleck(config)
    prefix = "pretransform.model."
    state = load_file(written["sao-tiny"] / "model.safetensors")
    theirs.model.load_state_dict({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
    generator = torch.Generator().manual_seed(0)
    audio = theirs.decode(torch.randn(1, 64, 9, generator=generator))
    assert 0.02 < rms(audio) < 0.5
    latents = theirs.model.encode(0.3 * torch.randn(1, 2, 2048 * 9, generator=generator))
    assert 0.05 < rms(latents) < 3
