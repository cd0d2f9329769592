"""Every kind of weight file read back exactly, in little memory; damaged ones are named with what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import python
from safetensors.torch import load_file, save_file

from dit_trt.engines.errors import UserError
from dit_trt.exporters.tensor_files import (
    Computed,
    Origin,
    Renamed,
    SafetensorsFile,
    TensorSource,
    open_weights,
    unwrapped,
)

LAYOUTS = [layouts.sharded, layouts.bare_ckpt, layouts.wrapped_ckpt]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_weights(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_holds(source: TensorSource, state: dict[str, torch.Tensor]) -> None:
    assert source.shapes == {key: tuple(value.shape) for key, value in state.items()}
    for key, value in state.items():
        array = source.read(key)
        assert array.dtype == np.float32 and array.flags.writeable and array.flags.c_contiguous
        np.testing.assert_array_equal(array, value.float().numpy())


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_holds_the_same_tensors(tiny: Path, tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    source = open_weights(write(tiny, tmp_path / "model"))
    state = layouts.weights(tiny)
    assert len(state) > 50
    assert_holds(source, state)
    for key, value in state.items():
        assert source.dtype(key) == "F32"
        assert source.file_of(key).is_file() and source.file_of(key) in source.files
        if value.ndim and len(value) > 2:
            np.testing.assert_array_equal(source.read(key, slice(1, 3)), value[1:3].numpy())
            np.testing.assert_array_equal(source.read(key, slice(2, None)), value[2:].numpy())
    assert {path.name for path in source.files} == {
        path.name for path in (tmp_path / "model").iterdir() if path.name not in layouts.SIDE_FILES
    }


def test_the_file_itself_may_be_given(tiny: Path, tmp_path: Path) -> None:
    assert_holds(open_weights(tiny / "model.safetensors"), layouts.weights(tiny))
    folder = layouts.sharded(tiny, tmp_path / "model")
    assert_holds(open_weights(folder / "model.safetensors.index.json"), layouts.weights(tiny))


def test_training_wrapped_in_safetensors(tiny: Path, tmp_path: Path) -> None:
    save_file(layouts.wrapped_state(layouts.weights(tiny)), tmp_path / "step=1000.safetensors")
    assert_holds(open_weights(tmp_path), layouts.weights(tiny))


def test_the_average_takes_the_place_of_the_dit() -> None:
    keys = ["diffusion.model.model.a", "diffusion.conditioner.b", "diffusion_ema.ema_model.model.a", "losses.c"]
    assert unwrapped(keys) == {
        "model.model.a": "diffusion_ema.ema_model.model.a",
        "conditioner.b": "diffusion.conditioner.b",
    }
    without = [key for key in keys if not key.startswith("diffusion_ema")]
    assert unwrapped(without) == {
        "model.model.a": "diffusion.model.model.a",
        "conditioner.b": "diffusion.conditioner.b",
    }
    assert unwrapped(["model.model.a", "losses.c"]) == {"model.model.a": "model.model.a", "losses.c": "losses.c"}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(params=["safetensors", "ckpt"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file with tensors of many types, one of no axes and one of no elements among them."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(5, 3, generator=generator).to(dtype) for name, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "vector": torch.arange(6.0)}
    others = {"steps": torch.tensor([3]), "float8": torch.zeros(4).to(torch.float8_e4m3fn), "flag": torch.tensor(True)}
    path = tmp_path / f"mixed.{request.param}"
    save = save_file if request.param == "safetensors" else torch.save
    save(state | others, path)
    return path, state


def test_all_float_types_become_fp32(mixed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, state = mixed
    source = open_weights(path)
    assert {name: source.dtype(name) for name in DTYPES} == {name: name for name in DTYPES}
    for key, value in state.items():
        np.testing.assert_array_equal(source.read(key), value.float().numpy())
        assert source.read(key).shape == source.shapes[key] == tuple(value.shape)
    assert source.read("vector", slice(4, 6)).tolist() == [4, 5]


def test_other_types_are_refused_when_they_are_asked_for(mixed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    source = open_weights(mixed[0])
    for key in ("steps", "float8", "flag"):
        with pytest.raises(UserError, match=rf"{mixed[0].name}: {key} is of type \w+; only F64, F32, F16, BF16"):
            source.read(key)


def test_an_array_is_the_readers_own(mixed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    source = open_weights(mixed[0])
    source.read("F32")[:] = 7
    np.testing.assert_array_equal(source.read("F32"), mixed[1]["F32"].numpy())


# -------------------- what a folder holds


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "other.safetensors", "model.ckpt"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "other.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["other.safetensors", "model.ckpt", "pytorch_model.bin"], "other.safetensors"),
        (["pytorch_model.bin", "other.ckpt"], "pytorch_model.bin"),
        (["other.ckpt", "notes.txt"], "other.ckpt"),
    ],
)
def test_which_file_of_a_folder_is_taken(tmp_path: Path, names: list[str], chosen: str) -> None:
    for name in names:
        state = {name: torch.ones(2)}
        save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
    assert open_weights(tmp_path).files == (tmp_path / chosen,)
    assert list(open_weights(tmp_path).shapes) == [chosen]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_several_files_are_listed(tmp_path: Path, suffix: str) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.{suffix}").touch()
    assert refused(tmp_path).endswith(f"files of weights (a.{suffix}, b.{suffix}): give the file itself")


def test_no_weights(tmp_path: Path) -> None:
    assert "holds no weights: no model.safetensors" in refused(tmp_path)
    (tmp_path / "weights.onnx").touch()
    assert "known endings: .safetensors, .safetensors.index.json, .ckpt" in refused(tmp_path / "weights.onnx")
    for name in ("weights.onnx.data", "a.safetensors", "a.ckpt", "a.safetensors.index.json"):
        assert "no such file" in refused(tmp_path / name).lower()


# -------------------- damaged safetensors and shards


def test_a_safetensors_file_that_is_cut_off_names_its_first_lost_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(100, 100) for name in ("a", "b", "c")}, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size, lost in ((len(whole) - 1, "c"), (header + 80_000, "c"), (header + 79_999, "b"), (header, "a")):
        path.write_bytes(whole[:size])
        end = header + 40_000 * ("abc".index(lost) + 1)
        assert f"{path} is cut off: {lost} ends at byte {end}, the file at {size}" in refused(path)
    path.write_bytes(whole[: header - 1])
    assert f"cut off in its header of {header - 8} bytes, the file has {header - 1}" in refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "(0 bytes) is not a safetensors file"),
        (b"abc", "(3 bytes) is not a safetensors file"),
        (b"<html><body>Not found</body></html>", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ((9).to_bytes(8, "little") + b'{"a": [1]', "has a damaged header"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "has a damaged header"),
        ((2).to_bytes(8, "little") + b"{}" + b"left over", "is not a readable safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in refused(path) and str(path) in refused(path)


def test_a_file_that_is_lost_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    source = open_weights(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        source.read("a")
    save_file({"b": torch.zeros(10)}, path)
    with pytest.raises(UserError, match=f"{path}: a cannot be read"):
        source.read("a")


def test_faults_of_shards_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = layouts.sharded(tiny, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    _, second, third = sorted(set(content["weight_map"].values()))
    key = next(key for key, place in content["weight_map"].items() if place == second)

    layouts.write_json(index, {"weight_map": content["weight_map"] | {key: third}})
    assert f"{index} says that {key} is in {third}, which does not have it" in refused(folder)
    layouts.write_json(index, {"weight_map": content["weight_map"] | {key: "../" + second}})
    assert f"names '../{second}'" in refused(folder)
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": [1]}', '{"weight_map": {"a": [1]}}'):
        index.write_text(broken)
        assert f"{index} is not an index of shards" in refused(folder)
    layouts.write_json(index, content)
    (folder / third).write_bytes((folder / third).read_bytes()[:-1])
    assert f"{folder / third} is cut off" in refused(folder)
    for name in (second, third):
        (folder / name).unlink()
    assert f"{index} names {second}, {third}: not in its folder" in refused(folder)


# -------------------- views


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFile:
    path = tmp_path_factory.mktemp("parts") / "model.safetensors"
    sizes = {"q": 4, "k": 1, "v": 6}
    save_file(
        {key: torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) for key, rows in sizes.items()}, path
    )
    return SafetensorsFile(path)


@given(st.one_of(st.none(), st.integers(-13, 13)), st.one_of(st.none(), st.integers(-13, 13)))
def test_rows_of_joined_tensors(parts: SafetensorsFile, start: int | None, stop: int | None) -> None:
    joined = Renamed({"qkv": Origin(parts, ("q", "k", "v"))})
    whole = np.concatenate([parts.read(key) for key in "qkv"])
    assert joined.shapes == {"qkv": (11, 3)} and joined.dtype("qkv") == "F32"
    np.testing.assert_array_equal(joined.read("qkv", slice(start, stop)), whole[start:stop])


def test_joined_tensors_read_no_part_that_is_not_asked_for(
    parts: SafetensorsFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    read = SafetensorsFile.read
    monkeypatch.setattr(
        SafetensorsFile, "read", lambda self, key, rows=slice(None): seen.append((key, rows)) or read(self, key, rows)
    )
    Renamed({"qkv": Origin(parts, ("q", "k", "v"))}).read("qkv", slice(3, 5))
    assert seen == [("q", slice(3, 4)), ("k", slice(None))]


def test_other_shapes_and_computed_tensors(parts: SafetensorsFile, tmp_path: Path) -> None:
    table = np.arange(5, dtype=np.float32)
    computed = Computed(tmp_path / "config.json", {"table": table})
    view = Renamed(
        {"flat": Origin(parts, ("v",), (18,)), "new": Origin(computed, ("table",)), "k": Origin(parts, ("k",))}
    )
    assert view.shapes == {"flat": (18,), "new": (5,), "k": (1, 3)}
    np.testing.assert_array_equal(view.read("flat", slice(2, 5)), parts.read("v").reshape(-1)[2:5])
    np.testing.assert_array_equal(view.read("new", slice(1, 3)), [1, 2])
    view.read("new")[:] = 9
    np.testing.assert_array_equal(view.read("new"), table)
    assert (view.file_of("new"), view.files) == (tmp_path / "config.json", parts.files)
    with pytest.raises(UserError, match=r"q is \[4, 3\], which cannot become \[5\]"):
        Renamed({"x": Origin(parts, ("q",), (5,))})


# -------------------- memory

MEMORY = """
import sys
from pathlib import Path
import numpy as np
from dit_trt.exporters import torch_files
from dit_trt.exporters.tensor_files import open_weights

def peak():  # MB of this process's memory, mapped pages of files included
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

if sys.argv[2] == "mapped":  # as if torch did not say where the storages lie
    torch_files._offsets = lambda tensors, records: None
source = open_weights(Path(sys.argv[1]))
np.matmul(np.ones((64, 64)), np.ones((64, 64)))
first, *rest = source.shapes
source.read(first)
before, total = peak(), 0
for key in rest:
    total += source.read(key).nbytes
print(total / 2**20, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "shards", "ckpt", "mapped"])
def test_reading_one_by_one_takes_the_memory_of_one(tmp_path: Path, kind: str) -> None:
    """40 tensors of 8 MB. Kept open, a mapping of the file alone would be 320 MB."""
    state = {f"layer.{i:02}": torch.full((2048, 1024), float(i)) for i in range(40)}
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "shards":
        path = layouts.save_shards(state, tmp_path, shards=2)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    finished = python(MEMORY, (str(path), kind))
    assert finished.returncode == 0, finished.stderr
    total, growth = map(float, finished.stdout.split())
    assert total == 39 * 8
    assert growth < 40, f"{growth} MB"


def test_a_whole_safetensors_file_is_what_safetensors_reads(tiny: Path) -> None:
    """The oracle of these tests is not this package's."""
    assert_holds(SafetensorsFile(tiny / "model.safetensors"), load_file(tiny / "model.safetensors"))
