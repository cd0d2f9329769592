"""Fixtures that the whole suite shares: a home of its own, one tiny model built once, the demo built as README says."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import readme
from tiny import write_checkpoint

from dit_trt.engines.bundle import Bundle

if TYPE_CHECKING:
    from dit_trt.tooling.tables import Calibration

# No test asserts a time: a busy machine is no defect. CI takes the same examples each time (as Hypothesis' own profile
# for it does); others are tried wherever else the tests run.
hypothesis.settings.register_profile(
    "here",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Bundles and caches of the tests never touch the user's."""
    folder = tmp_path_factory.mktemp("home")
    before = os.environ.get("DIT_TRT_HOME")
    os.environ["DIT_TRT_HOME"] = str(folder)
    yield folder
    if before is None:
        del os.environ["DIT_TRT_HOME"]
    else:
        os.environ["DIT_TRT_HOME"] = before


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder, random weights, two blocks."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_float(tiny: Path, home: Path) -> Bundle:
    from dit_trt.tooling.recipe import Recipe
    from dit_trt.tooling.workflow import build

    return build(Recipe("none"), str(tiny), "openvino", home / "fixtures" / "tiny-float").bundle


@pytest.fixture(scope="session")
def tiny_table_file(tiny: Path, home: Path) -> Path:
    """The calibration table of the tiny model, 3 prompts x 8 steps."""
    from dit_trt.exporters.checkpoint import Checkpoint
    from dit_trt.tooling.workflow import CalibrationOptions, calibration_table

    options = CalibrationOptions(num_prompts=3, steps=8)
    return calibration_table(Checkpoint.open(str(tiny)), "openvino", options)


@pytest.fixture(scope="session")
def tiny_table(tiny: Path, tiny_table_file: Path) -> Calibration:
    """What calibration saw of the tiny model's Linears."""
    from dit_trt.exporters.checkpoint import Checkpoint
    from dit_trt.tooling.tables import load_calibration

    return load_calibration(tiny_table_file, Checkpoint.open(str(tiny)))


@pytest.fixture(scope="session")
def tiny_sqs(tiny: Path, home: Path, tiny_table_file: Path) -> Bundle:
    from dit_trt.exporters.checkpoint import Checkpoint
    from dit_trt.tooling.build import build_bundle
    from dit_trt.tooling.recipe import Recipe

    target = home / "fixtures" / "tiny-sqs"
    return build_bundle(Checkpoint.open(str(tiny)), Recipe("sqs"), "openvino", target, tiny_table_file).bundle


@pytest.fixture(scope="session")
def tiny_scaled(tiny_float: Bundle, home: Path) -> Bundle:
    """The float bundle with two norm gains that are scaled at every step."""
    from step_bundles import scaled_bundle

    return scaled_bundle(tiny_float, home / "fixtures" / "tiny-scaled")


@pytest.fixture(scope="session")
def tiny_grouped(tiny_float: Bundle, tiny_scaled: Bundle, home: Path) -> Bundle:
    """The same with three step graphs; the bounds are the noise levels of steps 1 and 3 of `Settings(steps=6)`."""
    from step_bundles import grouped_bundle, slots_of

    from dit_trt.runtime.pipeline import Settings

    bounds = [float(Settings(steps=6).sigmas[step]) for step in (1, 3)]
    return grouped_bundle(tiny_scaled, home / "fixtures" / "tiny-grouped", bounds, slots_of(tiny_float))


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of its own in which the first command of README.md has built the demo model."""
    from commands import invoke

    folder = tmp_path_factory.mktemp("demo-home")
    command = shlex.split(readme.product()[0])
    assert command[:2] == ["dit-trt", "build"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_TRT_HOME", str(folder))
        invoke(*command[1:])
    return folder


@pytest.fixture
def newcomer(demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands who has followed README.md so far: an empty working directory, and the demo in the home."""
    monkeypatch.setenv("DIT_TRT_HOME", str(demo_home))
    monkeypatch.chdir(tmp_path)
    return tmp_path
