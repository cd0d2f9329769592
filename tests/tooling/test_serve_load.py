"""The load test of `dit-trt serve`, at its smallest: its table is of servers that were really asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dit_trt.engines.bundle import Bundle
from dit_trt.tooling.serve_load import command


def test_its_table(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_TRT_TOKEN", raising=False)
    path = tmp_path / "load.md"
    words = ["--bundle", str(tiny_sqs.folder), "--clients", "1,2", "--requests", "2", "--rounds", "1", "--steps", "3"]
    result = CliRunner().invoke(command, [*words, "--output", str(path)])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in path.read_text().splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows] == [["| 1", "1"], ["| 1", "4"], ["| 2", "1"], ["| 2", "4"]]
    found = json.loads(path.with_suffix(".json").read_text())["loads"]
    assert [len(load["latencies"]) for load in found] == [2] * 4
    assert all(load["processor"] >= 0 and min(load["batches"]) >= 1 for load in found)
    assert found[2]["batches"] == [1, 1]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--output", "load.json"], "give --output a file like load.md"),
        (["--output", "load.md", "--clients", "1,x"], "--clients 1,x must be whole numbers from 1 on"),
        (["--output", "load.md", "--batches", "0"], "--batches 0 must be whole numbers from 1 on"),
    ],
)
def test_its_mistakes(tiny_sqs: Bundle, more: list[str], told: str) -> None:
    result = CliRunner().invoke(command, ["--bundle", str(tiny_sqs.folder), *more])
    assert result.exit_code == 1 and told in result.output
