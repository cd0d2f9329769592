"""A home with the demo in FP32 and as README builds it, the studio that serves it, and the browser that opens it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import browser
import pytest
import studios
from commands import invoke
from tiny import OOBLECK, write_oobleck_checkpoint

import peers
from dit_trt.engines.bundle import Bundle
from dit_trt.exporters import oobleck
from dit_trt.tooling.recipe import Recipe
from dit_trt.tooling.workflow import build

if TYPE_CHECKING:
    from playwright.sync_api import Page, Playwright

SQS, FLOAT = "demo-sqs", "demo-fp32"
Open = Callable[..., "Page"]


@pytest.fixture(scope="session")
def studio_home(demo_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles `demo-fp32` and, newer, `demo-sqs`."""
    home = tmp_path_factory.mktemp("studio-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIT_TRT_HOME", str(demo_home))  # it has the graphs already
        invoke("build", "--method", "none", "--output", home / "bundles" / FLOAT)
    (sqs,) = (folder for folder in (demo_home / "bundles").iterdir() if "sqs" in folder.name)
    shutil.copytree(sqs, home / "bundles" / SQS)
    return home


@pytest.fixture(scope="module")
def address(studio_home: Path) -> Iterator[str]:
    """Of a running studio. At the end it has asked no other machine for anything, printed no error and left no file."""
    browser.require()
    with studios.running("--bundle", SQS, home=studio_home) as (found, _):
        yield found


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    browser.require()
    with browser.playwright() as running:
        yield running


@pytest.fixture
def visit(playwright: Playwright, tmp_path: Path, address: str) -> Iterator[Open]:
    """Open the page in a fresh browser. Errors of the page and requests to anywhere else fail the test."""
    contexts, faults = [], []

    def opened(**options: object) -> Page:
        context = browser.start(playwright, tmp_path / f"profile-{len(contexts)}", **options)
        contexts.append(context)
        page = context.pages[0]
        page.on("pageerror", lambda error: faults.append(f"the page failed: {error}"))
        page.on("request", lambda one: one.url.startswith((address, "data:", "blob:")) or faults.append(one.url))
        page.goto(address)
        page.get_by_label("Prompt", exact=True).wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="session")
def oobleck_bundle(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model with an encoder, which can begin from a recording."""
    folder = write_oobleck_checkpoint(tmp_path_factory.mktemp("models") / "oobleck", peers.oobleck(OOBLECK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oobleck, "TILE_SAMPLES", 40 * 256)
        return build(Recipe("none"), str(folder), "openvino", home / "fixtures" / "studio-oobleck").bundle
