"""Fixtures of the command line's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dit_trt.engines.bundle import Bundle


@pytest.fixture
def run(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """`dit-trt run` with the tiny bundle and two steps, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return ("run", "--bundle", tiny_sqs.folder, "--steps", "2")


@pytest.fixture
def model_copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, free to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))
