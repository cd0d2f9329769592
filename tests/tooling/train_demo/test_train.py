"""The demo's training, a few steps of it: it learns, is resumed where it stopped, and its pool must fit the model."""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dit_trt.exporters.model_files import DEMO
from dit_trt.tooling.train_demo.features import CLIP, FRAMES_PER_LATENT, HOP
from dit_trt.tooling.train_demo.train import (
    CHECKPOINT,
    MODEL_CONFIG,
    Clips,
    DemoModel,
    Trainer,
    demo_model,
    load_pool,
    tokenize,
    train,
    velocity_loss,
)

LATENTS = CLIP // (HOP * FRAMES_PER_LATENT)


def pool(clips: int = 4, channels: int = 128) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((clips, channels, LATENTS)).astype(np.float16),
        "first": np.arange(clips, dtype=np.int16),
        "second": np.array([-1, 5] * (clips // 2), np.int16),
        "seconds": np.full(clips, 3.5, np.float32),
    }


@pytest.fixture
def trainer() -> Trainer:
    """The demo's model with two blocks, on four clips."""
    torch.manual_seed(0)
    config = json.loads(MODEL_CONFIG.read_text("utf-8"))
    config["model"]["diffusion"]["config"]["depth"] = 2
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    clips = Clips(pool(), tokenizer, 32, batch=2, seed=0, device="cpu")
    return Trainer(DemoModel(config, torch.randn(32000, 16)), clips)


def test_the_model_config_is_that_of_the_training_s_clips():
    config = json.loads(MODEL_CONFIG.read_text("utf-8"))
    assert config["sample_size"] == CLIP
    numbers = [each["config"] for each in config["model"]["conditioning"]["configs"] if each["type"] == "number"]
    assert all(each["max_val"] >= CLIP / config["sample_rate"] for each in numbers)


def test_it_learns(trainer):
    batch = trainer.clips.draw()

    def loss() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(velocity_loss(trainer.model, *batch))

    before = loss()
    for _ in range(25):
        trainer.advance(2e-3)
    assert trainer.step == 25 and loss() < 0.97 * before


def test_it_goes_on_where_it_stopped(trainer):
    trainer.advance(1e-3)
    state = copy.deepcopy(trainer.state(12.5))
    torch.manual_seed(2)
    trainer.advance(1e-3)
    wanted = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.resume(state) == 12.5 and trainer.step == 1
    torch.manual_seed(2)
    trainer.advance(1e-3)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_captions_are_cut_at_the_model_s_length():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids, mask = tokenize(tokenizer, ["dog", "dog " * 40], 32)
    assert ids.shape == mask.shape == (2, 32) and mask.sum(axis=1).tolist() == [1, 32] and not ids[0, 1:].any()


def test_a_pool_of_another_model_is_refused(tmp_path):
    np.savez(tmp_path / "pool.npz", **pool(channels=64))
    with pytest.raises(SystemExit, match=r"the pool has 64 channels, model_config\.json 128"):
        load_pool(tmp_path / "pool.npz", 128)


def test_a_run_without_a_checkpoint_is_not_exported(tmp_path):
    with pytest.raises(SystemExit, match=r"checkpoint\.pt is not there; train first"):
        demo_model(json.loads(MODEL_CONFIG.read_text("utf-8")), torch.zeros(8, 4), tmp_path / "no-run")


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"hours of training")
    with pytest.raises(SystemExit, match="go on with --resume, or name another folder"):
        train(argparse.Namespace(run=tmp_path, resume=False))
    assert (tmp_path / CHECKPOINT).read_bytes() == b"hours of training"
