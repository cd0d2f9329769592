"""The demo's decoders without a bundle: Griffin-Lim's and a trained one, of a run and of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dit_trt.runtime.griffin_lim import griffin_lim
from dit_trt.tooling.train_demo import features
from dit_trt.tooling.train_demo.decoders import by_griffin_lim, by_network, open_checkpoint, open_run
from dit_trt.tooling.train_demo.train_decoder import decoder_config, make_decoder


def test_a_checkpoints_decoder_is_that_of_its_type(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mels = rng.uniform(features.LOG_MIN, features.LOG_MAX, (4, 32, features.MELS)).astype(np.float32)
    pca, _ = features.fit_pca(mels, 1.0, (16,))
    latents = features.encode(mels[0], pca)
    config = decoder_config(pca)
    torch.manual_seed(0)
    decoder = make_decoder(pca, config)
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    (tmp_path / "decoder.json").write_text(json.dumps(config))
    trained = by_network(open_run(tmp_path))(latents)
    assert trained.shape == (8 * 2048,) and trained.std() > 0
    vague = griffin_lim(features.decode_magnitude(latents, pca), features.N_FFT, features.HOP, 2)
    np.testing.assert_array_equal(by_griffin_lim(pca, 2)(latents), vague)
    sizes = {**config, "griffin_lim_iterations": 64}
    fixed = {name: torch.from_numpy(value) for name, value in pca.items()}
    for kind, state, expected in (("mel_vocoder", decoder.state_dict(), trained), ("mel_pca", fixed, vague)):
        pretransform = {"type": kind, "config": sizes}
        (tmp_path / "model_config.json").write_text(json.dumps({"model": {"pretransform": pretransform}}))
        save_file({f"pretransform.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
        decode, buffers = open_checkpoint(tmp_path, 2)
        np.testing.assert_allclose(decode(latents), expected, atol=1e-5)
        assert all(np.array_equal(buffers[name], value) for name, value in pca.items())
