"""What a clip costs beside its computing is told, and nothing is left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dit_trt.tooling.batch.overhead import main


def test_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["--clips", "3", "--seconds", "0.1"])
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"here: \d+\.\d\d ms a clip, \d+\.\d\d ms of CPU here\n", result.output)
    assert [*tmp_path.iterdir()] == []
