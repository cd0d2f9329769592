"""An analysis' folder is whole or absent, and takes the place of nothing but an older one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import files_in

from dit_trt.engines.errors import UserError
from dit_trt.tooling.figures.folder import INDEX, check_folder, new_analysis


def fill(work: Path, *names: str) -> None:
    for name in names:
        (work / name).write_text(name)
    (work / INDEX).write_text(json.dumps({"files": names}))


def test_an_older_analysis_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "there" / "out"
    for name in ("a.png", "b.png"):
        with new_analysis(target) as work:
            fill(work, name)
    assert files_in(tmp_path) == ["there", "there/out", f"there/out/{INDEX}", "there/out/b.png"]


@pytest.mark.parametrize("stands", [True, False])
def test_what_fails_leaves_what_there_was(tmp_path: Path, stands: bool) -> None:
    target = tmp_path / "out"
    if stands:
        with new_analysis(target) as work:
            fill(work, "a.png")
    before = files_in(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_analysis(target) as work:
        fill(work, "b.png")
        raise KeyboardInterrupt
    assert files_in(tmp_path) == before


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_analysis(target) as work:
        fill(work, "a.png")
    check_folder(target)
    (target / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match=r"out holds mine\.txt, which is of no analysis; choose another --output"):
        check_folder(target)
    with pytest.raises(UserError, match=r"mine\.txt is a file; give --output a folder"):
        check_folder(target / "mine.txt")
    with pytest.raises(UserError, match=r"cannot write into .*; choose another place with --output"):
        check_folder(target / "mine.txt" / "deeper")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
