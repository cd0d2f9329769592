"""How a step scales: the points that are measured, the model that is fitted, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dit_trt.engines.bundle import Bundle
from dit_trt.tooling import scaling
from dit_trt.tooling.scaling import Model, Point, fit, settings_of


def test_the_points() -> None:
    found = settings_of(1024, 2)
    assert [each for each in found if each[0] == 1 and each[2] == 2] == [
        *((1, n, 2) for n in (64, 128, 256, 384, 512, 768, 1024))
    ]
    assert {each for each in found if each[0] > 1} == {(2, 256, 2), (4, 256, 2), (8, 256, 2)}
    assert (1, 1024, 1) in found and len(set(found)) == len(found)
    assert [each[2] for each in settings_of(64, 12) if each[:2] == (1, 64)] == [12, 1, 2, 4, 8]
    assert min(latents for _, latents, _ in settings_of(8, 1)) == 2


def test_the_model_is_found_again() -> None:
    true = Model(0.7, 0.003, 2e-6)
    points = [Point(*each, true(Point(*each, 0))) for each in settings_of(1024, 2)]
    other = [Point(1, 1024, 1, 1e6)]  # of fewer threads: not fitted
    found = fit([*points, *other], 2)
    np.testing.assert_allclose([found.fixed, found.by_token, found.by_pair], [0.7, 0.003, 2e-6], rtol=1e-6)


def test_no_term_is_negative() -> None:
    points = [Point(1, n, 1, 0.01 * 2 * (n + 1) - 0.05) for n in (16, 32, 64, 128)]  # a fixed gain, which cannot be
    found = fit(points, 1)
    assert found.fixed == 0 and found.by_token > 0 and found.by_pair >= 0


def test_tokens_are_those_of_both_halves() -> None:
    assert Point(3, 64, 1, 1.0).tokens == 3 * 2 * 65
    assert Model(1.0, 2.0, 0.5)(Point(1, 1, 1, 0.0)) == 1 + 4 * (2 + 0.5 * 2)


def test_the_command(tiny_sqs: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "CLIPS", (1, 2))
    monkeypatch.setattr(scaling, "FRACTIONS", (0.25, 0.5, 1))
    path = tmp_path / "scaling.md"
    words = [str(tiny_sqs.folder), "--rounds", "1", "--threads", "1", "--output", str(path)]
    result = CliRunner().invoke(scaling.command, words)
    assert result.exit_code == 0, result.output
    rows = [line for line in path.read_text().splitlines() if line.startswith("| ")][1:]
    assert [tuple(map(int, row.split("|")[1:5])) for row in rows] == [
        *[(1, 6, 14, 1), (1, 12, 26, 1), (1, 24, 50, 1), (2, 6, 28, 1)]
    ]
    assert len(json.loads(path.with_suffix(".json").read_text())["points"]) == 4
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(scaling.command, [*words[:-1], str(tmp_path / "scaling.json")])
    assert refused.exit_code == 1 and "give --output a file like scaling.md" in refused.output
