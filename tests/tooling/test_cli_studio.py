"""`dit-trt studio` before there is a page: one line for what stands in its way. Its page: tests/tooling/studio."""

import PIL.Image
import pytest
from commands import error_of
from processes import dit_trt
from readme import ROOT


def test_an_unknown_bundle_and_none_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path))
    assert error_of("studio", "--bundle", "nope").startswith("Error: no bundle 'nope' in the home folder")
    assert error_of("studio") == "Error: there is no bundle yet; make one with: dit-trt build --method sqs --bits w8a8"


def test_a_host_that_is_not_this_machine(tiny_sqs):
    line = error_of("studio", "--bundle", tiny_sqs.folder, "--host", "192.0.2.1", "--port", 0)
    assert line.startswith("Error: cannot listen on 192.0.2.1:0: ")


def test_a_device_that_is_not_there_is_told_before_the_page(tiny_sqs):
    line = error_of("studio", "--bundle", tiny_sqs.folder, "--port", 0, "--device", "TPU")
    assert line.startswith("Error: OpenVINO has no device 'TPU' here; available: ")


@pytest.mark.parametrize(("package", "extra"), [("gradio", "studio"), ("matplotlib", "plot")])
def test_a_missing_extra_is_named(tiny_sqs, package, extra):
    finished = dit_trt("studio", "--bundle", str(tiny_sqs.folder), without=(package,))
    assert finished.returncode == 1
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("Error: ")
    assert (
        f'the package {package}, which comes with the {extra} extra: pip install -c constraints.txt -e ".[{extra}]"'
        in line
    )


def test_the_pictures_of_the_page_are_small():
    shown = sorted((ROOT / "docs").glob("studio-*.png"))
    assert [path.stem for path in shown] == [
        f"studio-{what}-{where}" for what in ("ab", "generated") for where in ("desktop", "phone")
    ]
    page = (ROOT / "docs" / "studio.md").read_text("utf-8")
    for path in shown:
        assert f"]({path.name})" in page
        assert path.stat().st_size < 150_000
        with PIL.Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
