"""The exported float graphs equal their torch modules, at lengths and batches they were not exported at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tiny import MAX_LATENTS, random_model

from dit_trt.engines.bundle import Bundle
from dit_trt.exporters.float_graphs import context_names

RELATIVE = 1e-5
BATCHES = (1, 6)
LENGTHS = (3, 10, MAX_LATENTS)
MODEL = random_model()


def session(bundle: Bundle, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle.path(f"{name}.onnx"), providers=["CPUExecutionProvider"])


def assert_close(found: NDArray, expected: torch.Tensor) -> None:
    want = expected.numpy()
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= RELATIVE * np.abs(want).max()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("batch", BATCHES)
def test_text(tiny_float: Bundle, batch: int) -> None:
    ids = torch.randint(0, 10, (batch, 6), generator=torch.Generator().manual_seed(batch))
    mask = (torch.arange(6) < torch.arange(1, batch + 1)[:, None]).long()
    (found,) = session(tiny_float, "text").run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert_close(found, MODEL.conditioner.text(ids, mask))
    assert not found[0, 1:].any()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("steps", [1, 25, 100])
def test_conditioning(tiny_float: Bundle, batch: int, steps: int) -> None:
    embeds, total, t = randn(batch, 6, 64), torch.linspace(0.5, 3, batch), torch.linspace(0.19, 0.998, steps)
    start, keep = torch.zeros(batch), torch.arange(batch) % 2 == 0
    feeds = {"prompt_embeds": embeds, "seconds_start": start, "seconds_total": total, "keep": keep.float(), "t": t}
    outputs = session(tiny_float, "conditioning").run(None, {k: v.numpy() for k, v in feeds.items()})
    numbers = MODEL.conditioner.numbers(start, total)
    context = torch.cat((embeds, numbers), dim=1) * keep[:, None, None]
    assert_close(outputs[0], MODEL.dit.to_global_embed(numbers.flatten(1)))
    assert_close(outputs[1], MODEL.dit.time_embed(t))
    expected = [x for pair in MODEL.dit.context_keys_values(context) for x in pair]
    for found, want in zip(outputs[2:], expected, strict=True):
        assert_close(found, want)
    if batch > 1:
        assert not outputs[2][1].any(), "the unconditional half's keys must be exactly zero"


@pytest.mark.parametrize(("batch", "rows"), [*((batch, batch) for batch in BATCHES), (2, 1), (6, 3), (4, 3)])
@pytest.mark.parametrize("length", LENGTHS)
def test_step(tiny_float: Bundle, batch: int, rows: int, length: int) -> None:
    """Of the batch so many rows have a context; that of the others is zeros, for which the graph needs none."""
    x, context, total = randn(batch, 16, length), randn(batch, 8, 64), torch.full((batch,), 0.7)
    context[rows:] = 0
    numbers = MODEL.conditioner.numbers(torch.zeros(batch), total).flatten(1)
    pairs = [y for pair in MODEL.dit.context_keys_values(context) for y in pair]
    t = torch.tensor([0.83])
    feeds = {
        "x": x,
        "global_embed": MODEL.dit.to_global_embed(numbers),
        "time_embed": MODEL.dit.time_embed(t)[0],
        **dict(zip(context_names(2), (y[:rows] for y in pairs), strict=True)),
    }
    (found,) = session(tiny_float, "step").run(None, {k: v.numpy() for k, v in feeds.items()})
    assert_close(found, MODEL.dit(x, t.expand(batch), context, numbers))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_decoder(tiny_float: Bundle, batch: int, length: int) -> None:
    latents = randn(batch, 16, length)
    (found,) = session(tiny_float, "decoder").run(None, {"latents": latents.numpy()})
    assert_close(found, MODEL.pretransform(latents))


@pytest.mark.parametrize("name", ["text", "conditioning", "step", "decoder"])
def test_files_are_valid_and_name_weights_as_the_checkpoint_does(tiny_float: Bundle, name: str) -> None:
    path = tiny_float.path(f"{name}.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    weights = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer if "." in t.name}
    keys = set(MODEL.state_dict())
    parts = {"rope.cos", "rope.sin"} if name == "step" else set()
    assert weights, "a graph without weights proves nothing"
    for weight in weights - parts:
        head, _, parameter = weight.rpartition(".")
        assert weight in keys or f"{head.rpartition('.')[0]}.{parameter}" in keys


def test_no_two_weights_share_an_initializer(tiny_float: Bundle) -> None:
    """All beta buffers are zero: an exporter that shares equal tensors would fold two norms as one."""
    graph = onnx.load(tiny_float.path("step.onnx"), load_external_data=False).graph
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 6
    assert len({node.input[2] for node in norms}) == 6


def test_topologies_are_cached_by_configuration(tmp_path: Path) -> None:
    import copy

    from tiny import CONFIG

    from dit_trt.exporters import float_graphs

    first = float_graphs.export_topologies(CONFIG, tmp_path)
    again = float_graphs.export_topologies(CONFIG, tmp_path)
    assert {k: v.SerializeToString() for k, v in first.items()} == {k: v.SerializeToString() for k, v in again.items()}
    assert len(list(tmp_path.iterdir())) == 1
    longer = copy.deepcopy(CONFIG)
    longer["sample_size"] *= 2  # type: ignore[operator]
    float_graphs.export_topologies(longer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
