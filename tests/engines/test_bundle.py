"""Writing a bundle: whole or absent, whatever happens on the way."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bundles import FILES, fill, make, refusal, tree

from dit_trt.engines.bundle import Bundle, bundles_folder, find_bundle, list_bundles, new_bundle
from dit_trt.engines.errors import UserError
from dit_trt.engines.manifest import MANIFEST


def test_a_finished_bundle_holds_what_was_written(bundle):
    opened = Bundle(bundle).verify()
    assert {name: opened.path(name).read_bytes() for name in opened.manifest["files"]} == FILES
    assert opened.size_bytes == sum(map(len, FILES.values()))
    assert opened.backend == "openvino"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["one"]
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, MANIFEST])
    assert bundle.stat().st_mode & 0o777 == 0o755


class Sudden(BaseException):
    """As KeyboardInterrupt and SystemExit, not an Exception."""


@pytest.mark.parametrize("error", [ValueError, UserError, OSError, KeyboardInterrupt, Sudden])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path, error, old):
    target = tmp_path / "bundles" / "one"
    target.parent.mkdir()
    if old:
        make(target)
    before = tree(tmp_path)
    with pytest.raises(error), new_bundle(target) as work:
        fill(work, {**FILES, "step.onnx": b"half of"})
        assert tree(tmp_path) != before
        raise error
    assert tree(tmp_path) == before


def test_a_bundle_without_a_manifest_is_not_finished(tmp_path):
    with pytest.raises(AssertionError), new_bundle(tmp_path / "one") as work:
        (work / "step.onnx").write_bytes(b"a graph")
    assert tree(tmp_path) == {}


def test_a_bundle_that_could_not_be_opened_never_takes_the_place(bundle):
    before = tree(bundle.parent)
    with pytest.raises(UserError, match=r"does not list step\.onnx"), new_bundle(bundle) as work:
        fill(work, {name: content for name, content in FILES.items() if name != "step.onnx"})
    assert tree(bundle.parent) == before


def test_a_link_to_a_bundle_stays_one(bundle, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    make(link, created="2027-01-01T00:00:00+00:00")
    assert link.is_symlink() and Bundle(bundle).verify().manifest["created"].startswith("2027")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundles", "link"]
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_the_work_of_a_living_build_is_never_swept(bundle):
    with new_bundle(bundle) as first:
        fill(first)
        make(bundle, created="2027-01-01T00:00:00+00:00")
        assert (first / MANIFEST).is_file()
    assert Bundle(bundle).verify().manifest["created"].startswith("2026")
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_in_the_home_folder_any_build_sweeps_what_others_left(own_home):
    left = bundles_folder() / ".gone.123-abc_d"
    left.mkdir(parents=True)
    make(bundles_folder() / "one")
    assert [path.name for path in bundles_folder().iterdir()] == ["one"]


def test_elsewhere_only_the_leftovers_of_this_bundle_are_swept(tmp_path):
    for name in (".one.123-abc", ".two.123-abc", ".one.notes", ".onesie-1"):
        (tmp_path / name).mkdir()
    make(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".one.notes", ".onesie-1", ".two.123-abc", "one"]


def test_a_new_bundle_replaces_an_old_one_whole(bundle):
    make(bundle, {**FILES, "other.txt": b"newer"}, created="2027-01-01T00:00:00+00:00")
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*FILES, "other.txt", MANIFEST])
    assert Bundle(bundle).verify().manifest["created"].startswith("2027")
    assert [path.name for path in bundle.parent.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_failure_while_taking_its_place_keeps_the_old_bundle(bundle, monkeypatch, error):
    before = tree(bundle.parent)
    rename = Path.rename

    def fail_at_the_end(self, target):
        if target == bundle and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_end)
    monkeypatch.setattr("dit_trt.engines.folders.exchange", lambda one, other: False)  # a system that cannot swap
    with pytest.raises(type(error)):
        make(bundle, {**FILES, "other.txt": b"newer"})
    assert tree(bundle.parent) == before


def test_a_reader_always_finds_a_bundle_while_it_is_replaced(bundle):
    """Two folders are swapped in one step: no look ever finds neither."""
    done = threading.Event()

    def replace():
        for i in range(60):
            make(bundle, {**FILES, "other.txt": str(i).encode()})
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    looks = 0
    while not done.is_set():
        assert (bundle / MANIFEST).is_file()
        looks += 1
    writer.join()
    assert looks > 60 and Bundle(bundle).verify().path("other.txt").read_bytes() == b"59"


def test_a_bundle_set_aside_by_a_killed_build_comes_back(bundle):
    bundle.rename(bundle.parent / f".{bundle.name}.999999999-x.old")
    with pytest.raises(ZeroDivisionError), new_bundle(bundle):
        raise ZeroDivisionError
    assert Bundle(bundle).verify()
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("content", [{}, {"thesis.txt": b"years of work"}], ids=["empty folder", "folder"])
def test_a_folder_that_is_no_bundle_is_refused_and_never_touched(tmp_path, content):
    target = tmp_path / "mine"
    target.mkdir()
    for name, value in content.items():
        (target / name).write_bytes(value)
    before = tree(tmp_path)
    assert "--output" in refusal(make, target)
    assert tree(tmp_path) == before


def test_a_file_at_the_target_is_refused_and_never_touched(tmp_path):
    (tmp_path / "mine").write_bytes(b"years of work")
    assert "--output" in refusal(make, tmp_path / "mine")
    assert tree(tmp_path) == {"mine": b"years of work"}


def test_parents_are_made(tmp_path):
    assert Bundle(make(tmp_path / "a" / "b" / "one")).verify()


KILLED = """
import sys, time
from bundles import fill
from dit_trt.engines.bundle import bundles_folder, new_bundle
with new_bundle(bundles_folder() / "one") as work:
    fill(work)
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_killed_write_leaves_no_bundle_and_does_not_stand_in_the_way(own_home):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), *filter(None, sys.path))),
    }
    child = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, env=environment)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    [left] = bundles_folder().iterdir()  # all was written but the last rename
    assert Bundle(left).verify()
    assert list_bundles() == []
    assert "dit-trt build" in refusal(find_bundle, None)
    make(bundles_folder() / "one")
    assert [found.folder.name for found in list_bundles()] == ["one"]
