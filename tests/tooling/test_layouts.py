"""One model in every layout that checkpoints come in: the bundles hold the same weights and make the same sound."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from commands import error_of, invoke, one_object

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.exporters.checkpoint import Checkpoint
from dit_trt.runtime.pipeline import Pipeline
from dit_trt.runtime.settings import Settings
from dit_trt.tooling.diff import compare
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.synthetic_checkpoint import write_checkpoint
from dit_trt.tooling.synthetic_models import MODELS
from dit_trt.tooling.workflow import CalibrationOptions, build, reference_bundle

CALIBRATION = CalibrationOptions(num_prompts=1, steps=2)
LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "sharded": layouts.sharded,
    "bare ckpt": layouts.bare_ckpt,
    "wrapped ckpt": layouts.wrapped_ckpt,
    "a file of a folder": lambda folder, target: layouts.wrapped_ckpt(folder, target) / "epoch=3-step=1000.ckpt",
    "diffusers": layouts.diffusers,
}


def for_diffusers() -> dict:
    """The tiny Stable Audio Open in sizes that diffusers holds: heads of 64, an encoder as wide as two latents."""
    config: dict = copy.deepcopy(MODELS["sao-tiny"])
    model = config["model"]
    model["diffusion"]["config"] |= {"num_heads": 2, "io_channels": 8}
    autoencoder = model["pretransform"]["config"]
    autoencoder["latent_dim"] = model["io_channels"] = 8
    autoencoder["encoder"]["config"] |= {"channels": 16, "c_mults": [1, 1, 1, 1, 1], "latent_dim": 16}
    autoencoder["decoder"]["config"] |= {"channels": 16, "c_mults": [1, 1, 1, 1, 1], "latent_dim": 8}
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Audio Open in tiny: T5, Oobleck, GQA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "sao-tiny", for_diffusers())
        return write_checkpoint("sao-tiny", tmp_path_factory.mktemp("layouts") / "sao-tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open Small in tiny: one number, projected tokens, normed heads, a flow."""
    return write_checkpoint("sao-small-tiny", tmp_path_factory.mktemp("layouts") / "sao-small-tiny")


def built(model: Path, target: Path) -> Bundle:
    return build(Recipe("sqs", lora_rank=4), str(model), "openvino", target, CALIBRATION).bundle


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built(model, tmp_path_factory.mktemp("bundles") / "expected")


def weights(bundle: Bundle) -> dict[str, str]:
    files = bundle.manifest["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "step.onnx"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bundle(layout: str, model: Path, expected: Bundle, tmp_path: Path) -> None:
    bundle = built(LAYOUTS[layout](model, tmp_path / "model"), tmp_path / "bundle")
    assert weights(bundle) == weights(expected)
    assert bundle.manifest["sizes"] == expected.manifest["sizes"]
    assert bundle.manifest["schedule"] == expected.manifest["schedule"]
    ours, theirs = (Pipeline(b)("dog barking", seconds=0.5, steps=2)[0] for b in (bundle, expected))
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(theirs).max() == 1


def test_a_linked_file_keeps_its_own_name_and_neighbours(model: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where every file is a link to one whose name is a hash."""
    blob, snapshot = tmp_path / "blobs" / "0a1b2c", tmp_path / "snapshot"
    layouts.without_weights(model, snapshot)
    blob.parent.mkdir()
    blob.write_bytes((model / "model.safetensors").read_bytes())
    (snapshot / "best.safetensors").symlink_to(blob)
    found = Checkpoint.open(str(snapshot / "best.safetensors"))
    assert (found.name, found.source) == ("best", str(snapshot / "best.safetensors"))
    assert Checkpoint.of_bundle({"source": found.source}).digest == found.digest
    with pytest.raises(
        UserError, match=r"the model that this bundle was built from cannot be opened again \(.*nowhere"
    ):
        Checkpoint.of_bundle({"source": str(tmp_path / "nowhere")})


def test_other_weights_are_another_bundle(model: Path, expected: Bundle, tmp_path: Path) -> None:
    """Guards the comparison: the DiT that a wrapped fine-tune did not average is not the one taken."""
    state = layouts.wrapped_state(layouts.weights(model))
    raw = {key.removeprefix("diffusion."): value for key, value in state.items() if key.startswith("diffusion.")}
    folder = layouts.without_weights(model, tmp_path / "model")
    layouts.save_file(raw, folder / "model.safetensors")
    changed = [
        name for name, sha in weights(built(folder, tmp_path / "bundle")).items() if weights(expected)[name] != sha
    ]
    assert {"step.onnx.data", "conditioning.onnx.data"} <= set(changed)
    assert not {"decoder.onnx.data", "text.onnx.data"} & set(changed)


def test_open_small_from_its_files_to_sound(small: Path, tmp_path: Path) -> None:
    """Its own defaults: 8 steps of ping-pong, no guidance and so one CFG half."""
    bundle = built(small, tmp_path / "bundle")
    assert bundle.manifest["linears"] == bundle.manifest["int8_linears"] == 7 * bundle.manifest["sizes"]["depth"]
    assert bundle.manifest["schedule"] == {
        **{"steps": 8, "sampler": "pingpong", "cfg": 1.0, "seed": 1000},
        **{"sigma_min": 0.3, "sigma_max": 1.0},
    }
    pipeline = Pipeline(bundle)
    assert pipeline.settings() == Settings.of_objective("rf_denoiser")
    seen: list[tuple[int, ...]] = []
    conditioning = pipeline.condition("rain", pipeline.settings(), 0.5)
    pipeline.sample(conditioning, pipeline.settings(), observe=lambda step, inputs, _: seen.append(inputs["x"].shape))
    sizes = bundle.manifest["sizes"]
    reference = reference_bundle(Checkpoint.open(str(small)), "openvino")
    difference = compare(bundle, reference, ["rain"])
    assert difference.cosine.shape == (1, 8) and 0.9 < difference.worst_step_cosine < 1
    with pytest.raises(UserError, match="is sampled without guidance, there is no pair"):
        build(Recipe("sqs", cfg_pair="difference"), str(small), "openvino", tmp_path / "pair", CALIBRATION)
    assert seen == [(1, sizes["io_channels"], sizes["max_latents"])] * 8
    run = ("run", "rain", "--bundle", bundle.folder, "--seconds", 0.5, "--output", tmp_path / "a.wav", "--json")
    assert one_object(invoke(*run, "--sigma-max", 0.2).stdout)["steps"] == 8, "below Open's sigma_min, one of a flow's"
    assert "sigma_min" in error_of(*run, "--sigma-max", 0.2, "--sampler", "dpmpp-2m", code=2)
    assert "is not for this model (rf_denoiser); it has: pingpong, euler" in error_of(
        *run, "--sampler", "dpmpp-2m", code=2
    )


def test_source_and_name_find_the_model_again(model: Path, expected: Bundle) -> None:
    again = Checkpoint.of_bundle(expected.manifest["model"])
    assert (again.digest, again.name) == (expected.manifest["model"]["digest"], "sao-tiny")
    assert "Synthetic weights" in expected.manifest["model"]["licence"]
    json.dumps(again.config)  # what caches are keyed by
