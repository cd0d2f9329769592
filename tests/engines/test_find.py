"""Bundles found by folder, by name or by age, and the home folder they are in."""

import pytest
from bundles import edit, make, refusal

from dit_trt.engines.bundle import bundles_folder, find_bundle, list_bundles, unusable_bundles
from dit_trt.engines.home import home
from dit_trt.engines.manifest import FORMAT, MANIFEST


def three():
    """Three bundles, the newest neither first nor last by name, the newest of all a float one."""
    make(bundles_folder() / "b", created="2026-03-01T00:00:00+00:00")
    make(bundles_folder() / "a", created="2026-01-01T00:00:00+00:00")
    make(bundles_folder() / "c", created="2026-02-01T00:00:00+00:00")
    make(bundles_folder() / "float", created="2026-04-01T00:00:00+00:00", method="none")


def test_bundles_are_listed_newest_first(own_home):
    assert list_bundles() == []
    three()
    assert [found.folder.name for found in list_bundles()] == ["float", "b", "c", "a"]


def test_newest_is_by_time_not_by_text(own_home):
    make(bundles_folder() / "first", created="2026-01-03T00:30:00+02:00")
    make(bundles_folder() / "second", created="2026-01-02T23:00:00+00:00")
    assert [found.folder.name for found in list_bundles()] == ["second", "first"]
    assert find_bundle(None).folder.name == "second"


def test_a_damaged_bundle_is_not_listed(own_home):
    three()
    (bundles_folder() / "b" / "step.onnx").unlink()
    (bundles_folder() / "notes.txt").write_text("not a folder")
    assert [found.folder.name for found in list_bundles()] == ["float", "c", "a"]


def test_a_damaged_newest_bundle_is_not_passed_over_in_silence(own_home):
    three()
    step = bundles_folder() / "float" / "step.onnx"
    step.write_bytes(b"x")
    message = refusal(find_bundle, None)
    assert message.startswith("the newest bundle cannot be used: the bundle float is damaged: step.onnx ")
    assert message.endswith("build it again, or name another, as b")
    assert find_bundle(None, quantized=True).folder.name == "b"
    assert list(unusable_bundles()) == [bundles_folder() / "float"]
    (bundles_folder() / "b" / MANIFEST).write_bytes(b"")
    assert "the newest bundle cannot be used" in refusal(find_bundle, None, True)
    assert list(unusable_bundles()) == [bundles_folder() / "b", bundles_folder() / "float"]


def test_a_damaged_older_bundle_does_not_stand_in_the_way(own_home):
    three()
    (bundles_folder() / "c" / "step.onnx").unlink()
    assert find_bundle(None, quantized=True).folder.name == "b"


def test_bundles_of_an_older_format_are_not_called_none(own_home):
    three()
    for folder in bundles_folder().iterdir():
        edit(folder, lambda values: values.update(format=1))
    assert f"has bundle format 1, this version reads {FORMAT}; build it again" in refusal(find_bundle, None)


def test_only_fp32_is_not_called_none(own_home):
    make(bundles_folder() / "float", method="none")
    assert refusal(find_bundle, None, True).startswith("there is no quantized bundle yet, only FP32; make one with: ")


def test_without_a_name_the_newest_is_found(own_home):
    three()
    assert find_bundle(None).folder.name == "float"
    assert find_bundle(None, quantized=True).folder.name == "b"


def test_a_bundle_is_found_by_name_and_by_folder(own_home, tmp_path):
    three()
    assert find_bundle("c").folder == bundles_folder() / "c"
    elsewhere = make(tmp_path / "elsewhere")
    assert find_bundle(str(elsewhere)).folder == elsewhere


def test_an_unknown_name_says_which_there_are(own_home):
    assert "dit-trt build" in refusal(find_bundle, "nope")
    three()
    message = refusal(find_bundle, "nope")
    assert "'nope'" in message
    assert "float, b, c, a" in message


@pytest.mark.parametrize("quantized", [False, True])
def test_no_bundle_names_the_command(own_home, quantized):
    if quantized:
        make(bundles_folder() / "float", method="none")
    assert "dit-trt build --method sqs --bits w8a8" in refusal(find_bundle, None, quantized)


def test_the_home_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x"
    assert bundles_folder() == tmp_path / "x" / "bundles"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIT_TRT_HOME", "~/y")
    assert home() == tmp_path / "y"


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_home_is_the_users_cache(tmp_path, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DIT_TRT_HOME")
    if value is not None:
        monkeypatch.setenv("DIT_TRT_HOME", value)
    assert home() == tmp_path / "cache" / "dit-trt"
