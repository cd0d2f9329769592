"""Whatever is done to a bundle's bytes, opening it for a run is refused in one line."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from commands import error_of

from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST, REQUIRED
from dit_trt.runtime.pipeline import Pipeline

FILES = sorted({*REQUIRED, MANIFEST})
FLIPS = 12  # a file; at its ends and at seeded positions between


@pytest.fixture
def bundle(tiny_sqs: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sqs.folder, tmp_path / "copy"))


def refusal(bundle: Path) -> str:
    with pytest.raises(UserError) as error:
        Pipeline.open(bundle)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_list_of_files_is_that_of_a_real_bundle(bundle: Path) -> None:
    assert {path.name for path in bundle.iterdir()} >= set(FILES)
    assert Pipeline.open(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(bundle: Path, name: str) -> None:
    good = (bundle / name).read_bytes()
    rng = random.Random(name)
    for position in (0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(FLIPS))):
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        (bundle / name).write_bytes(bad)
        message = refusal(bundle)
        assert "build" in message and (name in message or "has bundle format" in message), f"byte {position}"


@pytest.mark.parametrize("name", FILES)
def test_cut_grown_emptied_or_gone(bundle: Path, name: str) -> None:
    good = (bundle / name).read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], b"", good + b"\0", good + good, b"\0" + good):
        (bundle / name).write_bytes(bad)
        assert name in refusal(bundle)
    (bundle / name).unlink()
    assert name in refusal(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_bundle(bundle: Path, tiny_float: Bundle, name: str) -> None:
    ours, theirs = (bundle / name).read_bytes(), (tiny_float.folder / name).read_bytes()
    shutil.copy(tiny_float.folder / name, bundle / name)
    if ours == theirs:  # the tokenizer, the text encoder, the decoder: the same in both
        assert Pipeline.open(bundle)
    else:
        assert "copy" in refusal(bundle)


def test_two_files_swapped(bundle: Path) -> None:
    one, other = bundle / "conditioning.onnx.data", bundle / "decoder.onnx.data"
    other.rename(bundle / "x")
    one.rename(other)
    (bundle / "x").rename(one)
    assert "has the wrong size" in refusal(bundle)


def test_the_command_says_so_too(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manifest = bundle / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"  ", b" ", 1))
    for command in (["run", "rain", "--bundle"], ["diff"]):
        assert "does not match its own sha256" in error_of(*command, bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
