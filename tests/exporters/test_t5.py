"""The T5 encoder equals transformers', by torch and as a graph; what of a config.json is read, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import load_file
from tiny import T5, t5_config, write_t5
from torch import Tensor

from dit_trt.engines.errors import UserError
from dit_trt.exporters import float_graphs
from dit_trt.exporters.conditioners import MultiConditioner
from dit_trt.exporters.graph_weights import graph_weights
from dit_trt.exporters.qdq import is_weight, write_graph
from dit_trt.exporters.t5 import T5Config, T5Encoder, position_buckets
from peers import require

RELATIVE = 1e-5
KINDS = ("relu", "gated-gelu")
SHAPES: dict[str, dict] = {
    "as tiny": {},
    "narrow heads": {"d_model": 24, "d_kv": 5, "num_heads": 7, "num_layers": 3},
    "few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "loud norms": {"layer_norm_epsilon": 0.3},
}


def encoder(folder: Path, tokens: int) -> T5Encoder:
    """Of the files in `folder`."""
    module = T5Encoder(T5Config.from_dict(load_json(folder / "config.json")), tokens)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.eval().requires_grad_(False)


def load_json(path: Path) -> dict:
    import json

    return json.loads(path.read_text("utf-8"))


def prompts(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids of 1 to `tokens` tokens, the rest padding."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.linspace(1, tokens, batch).round().long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return torch.randint(3, T5["vocab_size"], (batch, tokens), generator=generator) * mask, mask  # type: ignore[arg-type]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_equals_transformers(tmp_path: Path, kind: str, changes: dict) -> None:
    transformers = require("transformers")
    folder = write_t5(tmp_path / "t5", feed_forward_proj=kind, **changes)
    theirs = transformers.T5EncoderModel.from_pretrained(folder).eval()
    ids, mask = prompts(4, 150)
    real = mask.bool()
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    found = encoder(folder, 150)(ids, mask)
    assert found.isfinite().all()
    assert_close(found[real], expected[real])
    unlike = encoder(folder, 150)(ids, torch.ones_like(mask))
    assert (unlike - expected)[0, 0].abs().max() > 0.01 * expected.abs().max(), "the mask does nothing here"


def test_names_and_shapes_are_those_transformers_saves(tmp_path: Path) -> None:
    transformers = require("transformers")
    for kind in KINDS:
        config = {**T5, "feed_forward_proj": kind}
        theirs = transformers.T5EncoderModel(transformers.T5Config(**config))
        theirs.save_pretrained(tmp_path)
        saved = {name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()}
        ours = T5Encoder(T5Config.from_dict(load_json(tmp_path / "config.json")), 4)
        assert {name: value.shape for name, value in ours.state_dict().items()} == saved


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 20), (32, 9), (8, 100), (4, 2), (64, 128), (128, 4096)])
def test_buckets_equal_transformers(buckets: int, most: int) -> None:
    theirs = require("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    position = torch.arange(600)
    expected = theirs(position[None] - position[:, None], True, buckets, most)
    assert position_buckets(600, buckets, most).long().equal(expected)


def test_buckets_by_hand() -> None:
    """Of 8: half for later keys; of those 4, distances 0 and 1, then up to 4, then all above (sqrt(2 x 8) = 4)."""
    assert position_buckets(10, 8, 8)[0].tolist() == [0, 5, 6, 6, 7, 7, 7, 7, 7, 7]
    assert position_buckets(10, 8, 8)[9].tolist() == [3, 3, 3, 3, 3, 3, 2, 2, 1, 0]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    module = encoder(write_t5(tmp_path), 9)
    ids, mask = prompts(3, 9)
    other = torch.where(mask.bool(), ids, ids + 5)
    assert not other.equal(ids)
    assert module(other, mask)[mask.bool()].equal(module(ids, mask)[mask.bool()])


def test_a_text_of_padding_alone_is_finite(tmp_path: Path) -> None:
    zeros = torch.zeros(1, 7, dtype=torch.int64)
    assert encoder(write_t5(tmp_path), 7)(zeros, zeros).isfinite().all()


# -------------------- as a graph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 40], ids=["as wide as the context", "projected"])
def test_the_text_graph_equals_torch(tmp_path: Path, kind: str, width: int) -> None:
    changes = {"feed_forward_proj": kind, "d_model": width}
    config = t5_config(max_length=128, **changes)
    module = MultiConditioner(config)
    torch.manual_seed(0)
    state = load_file(write_t5(tmp_path / "t5", **changes) / "model.safetensors")
    module.conditioners["prompt"].model.load_state_dict(state)
    assert ("conditioners.prompt.proj_out.bias" in module.state_dict()) == (width == 40)
    module.eval().requires_grad_(False)

    weights = {f"conditioner.{name}": value.numpy() for name, value in module.state_dict().items()}
    path = tmp_path / "text.onnx"
    write_graph(float_graphs._EXPORTS["text"](config), path, weights.__getitem__)
    onnx.checker.check_model(str(path), full_check=True)
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    written = {tensor.name: tuple(tensor.dims) for tensor in initializers if is_weight(tensor)}
    assert written == graph_weights(config)["text"]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ids, mask = prompts(5, 128)
    for one_id, one_mask in zip(ids[:, None], mask[:, None], strict=True):
        feeds = {"input_ids": one_id.numpy(), "attention_mask": one_mask.numpy()}
        expected = module.text(one_id, one_mask)
        assert not expected[:, int(one_mask.sum()) :].any() and expected[:, : int(one_mask.sum())].all()
        for found in (session.run(None, feeds)[0], compiled(feeds)["prompt_embeds"]):
            assert_close(torch.from_numpy(np.array(found)), expected)


# -------------------- config.json

BASE = {  # of t5-base, as published: it says nothing of its activation
    "architectures": ["T5ForConditionalGeneration"],
    **{"d_ff": 3072, "d_kv": 64, "d_model": 768, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1},
    **{"initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5"},
    **{"n_positions": 512, "num_heads": 12, "num_layers": 12, "output_past": True, "pad_token_id": 0},
    **{"relative_attention_num_buckets": 32, "task_specific_params": {}, "vocab_size": 32128},
}


def test_t5_base() -> None:
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
    rest = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    assert asdict(T5Config.from_dict(BASE)) == {**sizes, **rest, "feed_forward_proj": "relu"}
    with torch.device("meta"):
        module = T5Encoder(T5Config.from_dict(BASE), 128)
    assert sum(value.numel() for value in module.state_dict().values()) == 109_628_544


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_is_read(tmp_path: Path, kind: str) -> None:
    transformers = require("transformers")
    config = transformers.T5Config(**{**T5, "feed_forward_proj": kind, "tie_word_embeddings": False})
    for values in (config.to_dict(), config.to_diff_dict()):
        assert asdict(T5Config.from_dict(values)).items() <= config.to_dict().items()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({name: bad}, name) for name in ("d_model", "num_layers", "vocab_size") for bad in (0, -1, 1.5, "7", None)),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu' (only relu or gated-gelu)"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj=['relu']"),
        ({"dense_act_fn": "gelu_new"}, "dense_act_fn='gelu_new' (only 'relu')"),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": False}, "is_gated_act=False (only True)"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
        ({"model_type": "umt5"}, "model_type='umt5' (only 't5')"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets=30"),
        ({"relative_attention_max_distance": 8}, "relative_attention_num_buckets=32"),
        ({"quantization_config": {"bits": 8}}, "quantization_config={'bits': 8} (unknown)"),
    ],
)
def test_what_is_not_implemented_is_named(changes: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        T5Config.from_dict({**BASE, **changes})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(UserError, match=r"d_ff=0 .*; num_heads=None .*; rotary=True"):
        T5Config.from_dict({**BASE, "d_ff": 0, "num_heads": None, "rotary": True})


@pytest.mark.parametrize("values", [None, [], "t5", 7])
def test_no_object_is_named(values: object) -> None:
    with pytest.raises(UserError, match=r"config\.json of the T5 encoder is no JSON object"):
        T5Config.from_dict(values)
