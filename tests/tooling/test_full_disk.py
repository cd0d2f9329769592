"""A full disk (a tmpfs, or else a file limit): one line, exit code 1, nothing half-written, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from full_disk import can_mount, on_full_disk

CALIBRATION = ("home/calibration", "home/diff", "home/compiled")


@pytest.fixture(scope="module", params=["disk", "file limit"])
def outcomes(request: pytest.FixtureRequest, tiny: Path, home: Path, tiny_table_file: Path, tmp_path_factory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("full")
    limited = request.param == "file limit" or not can_mount(folder / "try")
    return on_full_disk(folder / "disk", tiny, home, limited), limited


def test_a_full_disk_is_one_line_and_leaves_nothing(outcomes) -> None:  # type: ignore[no-untyped-def]
    found, limited = outcomes
    failed = [outcome for outcome in found if outcome["code"]]
    assert {outcome["name"].split(",")[0] for outcome in failed} == {
        *("calibrate", "build again", "run", "run again", "diff"),
    }
    for outcome in failed:
        assert (outcome["code"], outcome["traceback"], outcome["stdout"]) == (1, None, ""), outcome
        errors = [line for line in outcome["stderr"] if line.startswith("Error: ")]
        assert errors == outcome["stderr"][-1:]
        assert ("File too large" if limited else "No space left on device") in errors[0]
        assert "; choose another place with --output" in errors[0]
        assert [path for path in outcome["new"] if not path.startswith(CALIBRATION)] == []
        assert outcome["gone"] == [] or all("/journal/" in path for path in outcome["gone"]), outcome
        assert not [path for path in outcome["new"] if "part" in path or "tmp" in path or path.endswith(".json")]


def test_with_room_again_it_goes_on_where_it_stopped(outcomes) -> None:  # type: ignore[no-untyped-def]
    found, _ = outcomes
    by_name = {outcome["name"].split(",")[0]: outcome for outcome in found}
    assert by_name["later"]["code"] == by_name["later run"]["code"] == 0
    [first] = [line for line in by_name["later"]["stderr"] if line.startswith("calibrating ") and "/12" in line][:1]
    assert not first.startswith("calibrating 0/12"), "finished steps are kept on a disk that filled up on the way"
    assert "clip.wav" in by_name["later run"]["new"]
    assert not [path for path in by_name["later"]["new"] if path.endswith((".part", ".npz"))]
