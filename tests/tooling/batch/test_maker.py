"""A worker's bundle: found on its machine, or another backend's of the same recipe; if neither, the fix."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.base import BACKENDS, Backend
from dit_trt.engines.bundle import Bundle
from dit_trt.engines.errors import UserError
from dit_trt.runtime.pipeline import Settings
from dit_trt.tooling.batch.clips import Failed, Plan
from dit_trt.tooling.batch.maker import ClipMaker, Job, bundle_here, content_of, runnable

PLAN = Plan((Caption("a", "rain"),), Settings(steps=2), 0.3)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine's empty home."""
    monkeypatch.setenv("DIT_TRT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def without(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = Backend.unusable
    told: Callable[[Backend], str | None] = lambda self: (  # noqa: E731
        "it is not installed: pip install it" if self is BACKENDS[backend] else unusable(self)
    )
    monkeypatch.setattr(Backend, "unusable", told)


def test_a_bundle_is_found_at_its_place_or_by_its_name(tiny_sqs: Bundle, tiny_float: Bundle, elsewhere: Path) -> None:
    content = content_of(tiny_sqs)
    assert bundle_here(tiny_sqs.folder, content).folder == tiny_sqs.folder
    there = elsewhere / "bundles" / "tiny-sqs"
    shutil.copytree(tiny_sqs.folder, there)
    assert bundle_here(Path("/nowhere/tiny-sqs"), content).folder == there
    with pytest.raises(
        UserError, match=f"{platform.node()} has another bundle at .*; copy .* to the same place or to b"
    ):
        bundle_here(tiny_float.folder, content)
    with pytest.raises(
        UserError, match="has no bundle x; copy /nowhere/x to the same place or to bundles/ of its DIT_"
    ):
        bundle_here(Path("/nowhere/x"), content)
    damaged = bytearray((there / "step.onnx.data").read_bytes())
    damaged[5] ^= 1
    (there / "step.onnx.data").write_bytes(damaged)
    with pytest.raises(UserError, match=r"is damaged: step\.onnx\.data does not match"):
        bundle_here(Path("/nowhere/tiny-sqs"), content)


def test_where_its_backend_cannot_run_the_recipe_is_built_for_another(
    tiny_float: Bundle, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runnable(tiny_float) is tiny_float
    without("openvino", monkeypatch)
    other = runnable(tiny_float)
    assert other.backend == "onnxruntime" and other.folder.is_relative_to(elsewhere)
    assert other.manifest["recipe"] == tiny_float.manifest["recipe"]
    created = other.manifest["created"]
    assert runnable(tiny_float).manifest["created"] == created, "it is kept"
    maker = ClipMaker.of_job(Job.of(tiny_float, PLAN), threads=1)
    [(clip, _)] = maker.make([(PLAN.captions[0], 7)])  # type: ignore[misc]
    assert (maker.backend, clip.backend, clip.seed) == ("onnxruntime", "onnxruntime", 7)


def test_without_its_calibration_table_or_model_the_fix_is_named(
    tiny_sqs: Bundle, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("openvino", monkeypatch)
    with pytest.raises(UserError) as error:
        runnable(tiny_sqs)
    assert str(error.value) == (
        f"{platform.node()}: the backend openvino cannot run here (it is not installed: pip install it), and the "
        "recipe was not built for another (its calibration table is not on this machine); mend either, or build the "
        "bundle for a backend that all machines have"
    )
    moved = Bundle(Path(shutil.copytree(tiny_sqs.folder, tmp_path / "moved")))
    moved.manifest["model"]["source"] = "/nowhere"
    with pytest.raises(UserError, match=r"was not built for another \(the model that this bundle was built from"):
        runnable(moved)


def test_one_that_fails_in_a_batch_fails_alone(tiny_sqs: Bundle) -> None:
    maker = ClipMaker(tiny_sqs, PLAN)
    clips = [(Caption(str(i), text), i) for i, text in enumerate(["rain", "\ud800", "a cat"])]
    first, second, third = maker.make(clips)
    assert isinstance(second, Failed) and "is not UTF-8 text" in second.error
    for made, clip in ((first, clips[0]), (third, clips[2])):
        [alone] = maker.make([clip])
        assert isinstance(made, tuple) and made[1] == alone[1]  # type: ignore[index]
