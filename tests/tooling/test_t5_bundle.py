"""A model with T5, laid out as Stable Audio Open Small is (one number), from its files to a bundle that makes sound."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tiny import MAX_LATENTS, Tiny, random_model, t5_config, write_t5

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters import float_graphs
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.exporters.data_file import INLINE
from dit_trt.exporters.float_graphs import ModelSizes
from dit_trt.exporters.graph_weights import graph_weights
from dit_trt.exporters.qdq import write_graph
from dit_trt.runtime.pipeline import Pipeline, Settings
from dit_trt.runtime.schedule import sigma_to_t
from dit_trt.tooling.build import build_bundle, bundle_sizes
from dit_trt.tooling.contents import bundle_parts
from dit_trt.tooling.part_sizes import _t5_structure, part_sizes
from dit_trt.tooling.quantize import QuantizedRange
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.simulate import SimulatedModel
from dit_trt.tooling.smoothing import Smoothing

PROMPTS = ("dog barking", "", "rain 🌧 " + "cat " * 200)
TOKENS = 24
MODEL = "conditioner.conditioners.prompt.model."


class Case:
    def __init__(self, folder: Path, numbers: Sequence[str], **encoder: object):
        config = t5_config(numbers, TOKENS, **encoder)
        self.model: Tiny = random_model(config=config)
        write_t5(folder / "text_encoder", **encoder)
        written = copy.deepcopy(config)
        written["model"]["conditioning"]["configs"][0]["config"].pop("encoder")  # it is beside the model, not in it
        (folder / "model_config.json").write_text(json.dumps(written))
        state = self.model.state_dict()
        save_file(
            {name: value for name, value in state.items() if not name.startswith(MODEL)}, folder / "model.safetensors"
        )
        self.model.conditioner.conditioners["prompt"].model.load_state_dict(
            load_file(folder / "text_encoder" / "model.safetensors")
        )
        self.checkpoint = Checkpoint.open(str(folder))

    def build(self, target: Path, backend: str) -> Bundle:
        return build_bundle(self.checkpoint, Recipe("none"), backend, target).bundle


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One number, a projection behind T5."""
    return Case(tmp_path_factory.mktemp("small"), ["seconds_total"], d_model=40, feed_forward_proj="gated-gelu")


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def bundle(small: Case, home: Path, request: pytest.FixtureRequest) -> Bundle:
    return small.build(home / "fixtures" / f"t5-{request.param}", request.param)


def relative(found: NDArray, expected: torch.Tensor) -> float:
    want = expected.numpy()
    assert found.shape == want.shape
    return float(np.abs(found - want).max() / np.abs(want).max())


def test_the_manifest_says_how_prompts_become_tokens(bundle: Bundle, tiny_float: Bundle) -> None:
    assert bundle.manifest["tokenizer"] == {"special_tokens": True}
    assert tiny_float.manifest["tokenizer"] == {"special_tokens": False}
    sizes = bundle.manifest["sizes"]
    assert (sizes["prompt_tokens"], sizes["context_tokens"], sizes["cond_dim"]) == (TOKENS, TOKENS + 1, 64)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_conditioning_equals_torch(small: Case, bundle: Bundle, prompt: str) -> None:
    pipeline = Pipeline(bundle)
    assert pipeline.engine("conditioning", 128).inputs.keys() == {"prompt_embeds", "seconds_total", "keep", "t"}
    settings = Settings(steps=5)
    found = pipeline.condition(prompt, settings, 0.6, negative_prompt="siren")
    ids, mask = (
        torch.from_numpy(np.concatenate([pipeline._tokenizer(text)[i] for text in (prompt, "siren")])) for i in (0, 1)
    )
    assert ids[1].tolist()[:2] == [11, 1] and not ids[1, 2:].any()
    with torch.no_grad():
        cross, global_embed = small.model.conditioner(ids, mask, torch.full((2,), 0.6))
        assert relative(found.constants["global_embed"], small.model.dit.to_global_embed(global_embed)) < 1e-5
        pairs = small.model.dit.context_keys_values(cross)
        for i, pair in enumerate(pairs):
            for kind, want in zip("kv", pair, strict=True):
                assert want.shape[2] == TOKENS + 1
                assert relative(found.constants[f"context_{kind}.{i}"], want) < 2e-5


def test_tokens_that_do_not_fit_are_counted(bundle: Bundle) -> None:
    """24 tokens, one of them `</s>`."""
    pipeline = Pipeline(bundle)
    assert [pipeline.count_cut_tokens(text) for text in ("cat " * 23, "cat " * 24, "cat " * 200)] == [0, 1, 177]


def test_a_clip_equals_torch(small: Case, bundle: Bundle) -> None:
    """One step of the 2M solver ends at the denoised latents, v-prediction at sigma_max."""
    pipeline = Pipeline(bundle)
    settings = Settings(steps=1, sampler="dpmpp-2m", cfg_scale=3.0, sigma_max=20.0)
    conditioning = pipeline.condition("dog barking", settings, 0.6)
    latents = pipeline.sample(conditioning, settings)
    ids, mask = (torch.from_numpy(part) for part in pipeline._tokenizer("dog barking")[:2])
    sigma = float(settings.sigmas[0])
    noise = np.random.Generator(np.random.PCG64(settings.seed)).standard_normal((16, MAX_LATENTS), np.float32)
    x = torch.from_numpy(noise)[None] * sigma
    with torch.no_grad():
        cross, global_embed = small.model.conditioner(ids, mask, torch.tensor([0.6]))
        pair = torch.cat((cross, torch.zeros_like(cross)))
        t = torch.full((2,), float(sigma_to_t(np.array([sigma]))[0]))
        scaled = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1)
        v = small.model.dit(scaled, t, pair, global_embed.repeat(2, 1))
        guided = v[1:] + (v[:1] - v[1:]) * settings.cfg_scale
        expected = x / (sigma**2 + 1) - guided * sigma / (sigma**2 + 1) ** 0.5
    assert relative(latents[None], expected) < 1e-4
    [clip] = pipeline.generate(["dog barking"], settings, seconds=0.5)
    assert clip.audio.shape == (2, 4000) and np.abs(clip.audio).max() > 0.5


def test_foretold_sizes(small: Case, bundle: Bundle) -> None:
    """The data files to the byte, every part within 2 %."""
    told, real = part_sizes(small.checkpoint, Recipe("none"), 8), bundle_parts(bundle)
    assert told.parts.keys() == real.keys()
    for graph, size in told.data_files.items():
        assert 0 <= size - bundle.path(f"{graph}.onnx.data").stat().st_size < 64
    for part, size in told.parts.items():
        assert size == pytest.approx(real[part], rel=0.02), part


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize(("width", "layers", "tokens"), [(64, 1, 6), (40, 3, 6), (64, 2, 128)])
def test_the_structure_of_the_text_graph(tmp_path: Path, kind: str, width: int, layers: int, tokens: int) -> None:
    """All but its weights, which are exact."""
    config = t5_config(max_length=tokens, feed_forward_proj=kind, d_model=width, num_layers=layers)
    weights = graph_weights(config)["text"]
    path = tmp_path / "text.onnx"
    write_graph(float_graphs._EXPORTS["text"](config), path, lambda name: np.zeros(weights[name], np.float32))
    sizes = [4 * math.prod(shape) for shape in weights.values()]
    structure = path.stat().st_size - sum(size for size in sizes if size < INLINE)
    assert _t5_structure(ModelSizes(config).conditioning) == pytest.approx(structure, rel=0.02)


def test_simulation_takes_the_numbers_a_model_has(small: Case, bundle: Bundle) -> None:
    model = SimulatedModel(small.checkpoint, [QuantizedRange({}, Smoothing(), Settings().sigmas[:-1])])
    pipeline = Pipeline(bundle)
    inputs = {
        "prompt_embeds": np.concatenate([pipeline._embed(text) for text in ("dog", "")]),
        "seconds_total": np.full(2, 0.4, np.float32),
        "keep": np.array([1, 0], np.float32),
        "t": np.linspace(0.9, 0.1, 128, dtype=np.float32),
    }
    found, expected = model.conditioning(inputs), pipeline.engine("conditioning", 128).run(inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(found[name], torch.from_numpy(value)) < 2e-5


def test_two_numbers_in_the_other_order(tmp_path: Path, home: Path) -> None:
    """The runtime gives them by name; the graph puts them where the config says."""
    case = Case(tmp_path, ["seconds_total", "seconds_start"])
    assert bundle_sizes(case.checkpoint)["context_tokens"] == TOKENS + 2
    pipeline = Pipeline(case.build(home / "fixtures" / "t5-two", "openvino"))
    found = pipeline.condition("rain", Settings(steps=2), 0.6)
    ids, mask = (torch.from_numpy(part) for part in pipeline._tokenizer("rain")[:2])
    with torch.no_grad():
        cross, global_embed = case.model.conditioner(ids, mask, torch.tensor([0.6]), torch.tensor([0.0]))
        assert relative(found.constants["global_embed"][:1], case.model.dit.to_global_embed(global_embed)) < 1e-5
        [(key, _), *_] = case.model.dit.context_keys_values(cross)
        assert relative(found.constants["context_k.0"][:1], key) < 2e-5
