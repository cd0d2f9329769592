"""Initializers read without the onnx package, against the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.initializers import Initializer, initializers


@pytest.mark.parametrize("graph", ["text", "conditioning", "step", "decoder"])
@pytest.mark.parametrize("fixture", ["tiny_float", "tiny_sqs"])
def test_they_are_those_the_onnx_package_reads(fixture: str, graph: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    path = bundle.path(f"{graph}.onnx")
    expected = [
        (
            tensor.name,
            tuple(tensor.dims),
            int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize,
        )
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for kind in [tensor.data_type]
    ]
    assert [(tensor.name, tensor.shape, tensor.bytes) for tensor in initializers(path)] == expected
    assert len(expected) > 1


def test_dims_may_be_packed(tmp_path: Path) -> None:
    """proto3 writers put all dims into one field: [300, 2] as varints, float32, 'w'."""
    tensor = b"\x0a\x03\xac\x02\x02" + b"\x10\x01" + b"\x42\x01w"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "a.onnx").write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert initializers(tmp_path / "a.onnx") == [Initializer("w", (300, 2), 4)]
    read = onnx.ModelProto.FromString((tmp_path / "a.onnx").read_bytes()).graph.initializer[0]
    assert (read.name, list(read.dims)) == ("w", [300, 2])


def test_a_file_cut_anywhere_is_a_users_error_or_shorter(tiny_sqs: Bundle, tmp_path: Path) -> None:
    content = tiny_sqs.path("conditioning.onnx").read_bytes()
    refused = 0
    for end in range(0, len(content), 97):
        (tmp_path / "cut.onnx").write_bytes(content[:end])
        try:
            assert len(initializers(tmp_path / "cut.onnx")) < 40
        except UserError as error:
            assert "is not a readable ONNX file" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("content", [b"\xff" * 40, b"not an ONNX file", b"\x38\x01"])
def test_nonsense_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match="not a readable ONNX file"):
        initializers(tmp_path / "a.onnx")
