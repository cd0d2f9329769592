"""What goes into the demo's checkpoint of a decoder: the PCA alone, or a trained one of the same PCA and sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import CONFIG, Tiny, vocoder_config

from dit_trt.exporters.pretransforms import decoder_from_config
from dit_trt.tooling.train_demo.export import decoder_state


@pytest.fixture()
def pool() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    buffers = Tiny(CONFIG).pretransform.named_buffers()
    return {f"pca.{name}": rng.standard_normal(value.shape, np.float32) for name, value in buffers}


@pytest.fixture()
def run(pool: dict[str, np.ndarray], tmp_path: Path) -> Path:
    config = vocoder_config()
    decoder = decoder_from_config(config)
    for name, buffer in decoder.named_buffers():
        buffer.copy_(torch.from_numpy(pool[f"pca.{name}"]))
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    (tmp_path / "decoder.json").write_text(json.dumps(config["model"]["pretransform"]["config"]))
    return tmp_path


def test_griffin_lims_is_the_pools_pca(pool: dict[str, np.ndarray]) -> None:
    found = decoder_state(pool, CONFIG, None)
    assert {f"pca.{name}" for name in found} == set(pool)
    decoder_from_config(CONFIG).load_state_dict(found)


def test_a_trained_one_of_the_same_sizes_and_pca(pool: dict[str, np.ndarray], run: Path) -> None:
    config = vocoder_config()
    decoder_from_config(config).load_state_dict(decoder_state(pool, config, run))
    other = copy.deepcopy(config)
    other["model"]["pretransform"]["config"]["dim"] += 1
    for wrong in (other, CONFIG):
        with pytest.raises(SystemExit, match=r'needs a pretransform of type mel_vocoder, .* "dim": 24'):
            decoder_state(pool, wrong, run)
    with pytest.raises(SystemExit, match="another pool: its mean differs"):
        decoder_state({**pool, "pca.mean": pool["pca.mean"] + 1}, config, run)
