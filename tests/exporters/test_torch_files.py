"""torch's checkpoints: views and strides, what is never unpickled, what is damaged."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch

from dit_trt.engines.errors import UserError
from dit_trt.exporters import torch_files
from dit_trt.exporters.tensor_files import open_weights


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_weights(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture(params=["offsets", "mapped"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the bytes: where torch says that they are, and through its mapping of the file."""
    if request.param == "mapped":
        monkeypatch.setattr(torch_files, "_offsets", lambda tensors, records: None)
    return request.param


def test_views_strides_and_parameters(tmp_path: Path, means: str) -> None:
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    state = {
        "base": base,
        "rows": base[3:7],
        "transposed": base.T,
        "columns": base[:, 2:5],
        "every other": base[::2],
        "half": base.half().T,
        "expanded": torch.tensor([[1.5]]).expand(3, 4),
        "parameter": torch.nn.Parameter(base[0]),
        "empty": base[:0],
        "scalar": base[1, 1],
    }
    torch.save(state, tmp_path / "model.ckpt")
    source = open_weights(tmp_path)
    assert (source._offsets is None) == (means == "mapped")
    assert source.shapes == {key: tuple(value.shape) for key, value in state.items()}
    for key, value in state.items():
        expected = value.detach().float().numpy()
        array = source.read(key)
        assert array.flags.writeable and array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected)
        if value.ndim:
            for rows in (slice(1, 3), slice(2, None), slice(0, 0)):
                np.testing.assert_array_equal(source.read(key, rows), expected[rows])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_offsets_do_not_depend_on_alignment(tmp_path: Path, size: int) -> None:
    state = {f"{'k' * i}": torch.arange(i * size, (i + 1) * size, dtype=torch.float32) for i in range(1, 20)}
    torch.save(state, tmp_path / "a name of some length.ckpt")
    source = open_weights(tmp_path)
    assert source._offsets is not None
    for key, value in state.items():
        np.testing.assert_array_equal(source.read(key), value.numpy())


def test_an_offset_is_believed_only_where_a_record_of_the_size_begins(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(8), "b": torch.ones(8)}, tmp_path / "model.ckpt")
    records = torch_files._records(tmp_path / "model.ckpt")
    tensors = torch_files._state_dict(tmp_path / "model.ckpt", "meta")
    offsets = torch_files._offsets(tensors, records)
    assert offsets is not None and all(records[offset] == 32 for offset in offsets.values())
    for wrong in ({offset + 1: size for offset, size in records.items()}, dict.fromkeys(records, 31)):
        assert torch_files._offsets(tensors, wrong) is None


class Touch:
    """An object whose unpickling is a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_is_never_run(tiny: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    folder = layouts.wrapped_ckpt(tiny, tmp_path / "model", hyper_parameters=Touch(trap))
    path = folder / "epoch=3-step=1000.ckpt"
    message = refused(path)
    assert f"code ({os.name}.mkdir)" in message
    assert f"unwrap_model.py --model-config model_config.json --ckpt-path {path.name} --use-safetensors" in message
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap does not work"


def test_a_pickled_model_is_not_read(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.ckpt")
    assert "code (torch.nn.modules.linear.Linear)" in refused(tmp_path / "model.ckpt")


def test_what_holds_no_state_dict(tmp_path: Path) -> None:
    for content in ([torch.ones(2)], {"epoch": 3}, {"state_dict": [1]}, {"state_dict": {}}, torch.ones(2)):
        torch.save(content, tmp_path / "model.ckpt")
        assert "holds no state dict" in refused(tmp_path / "model.ckpt")


def test_the_format_before_zip_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=False)
    assert "torch's format before 1.6" in refused(tmp_path / "model.ckpt")
    assert "save it again" in refused(tmp_path / "model.ckpt")


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    for content, words in (
        (b"", "is not a torch checkpoint"),
        (b"<html></html>", "is not a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        assert words in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/notes.txt", "nothing")
    assert "a zip archive, but not one of torch.save" in refused(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "model.pt"))
    assert "is a TorchScript program" in refused(tmp_path / "model.pt")


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **replaced: bytes) -> None:
    """The same archive with other content in some records, or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, replaced.get(name.partition("/")[2], content))


def test_archives_that_were_made_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.arange(300.0)}, path)
    rewritten(path)  # records no longer aligned, the offsets not those that torch would work out
    np.testing.assert_array_equal(open_weights(path).read("a"), np.arange(300))
    rewritten(path, zipfile.ZIP_DEFLATED)
    assert "was compressed after torch.save" in refused(path)
    torch.save({"a": torch.arange(300.0)}, path)
    rewritten(path, byteorder=b"big")
    assert "another byte order" in refused(path)


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.arange(300.0)}, path)
    whole = path.read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "is cut off or damaged" in refused(path)
    for pickled in (b"", b"\x80\x02", b"garbage", b"\x80\x02}q\x00X\xff\xff\xff\x7f."):
        path.write_bytes(whole)
        rewritten(path, **{"data.pkl": pickled})
        assert "is damaged: torch cannot read" in refused(path)


def test_a_file_that_is_lost_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.arange(30.0)}, path)
    source = open_weights(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="has become shorter since it was opened: a cannot be read"):
        source.read("a")
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        source.read("a")
