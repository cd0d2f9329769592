"""A survey of three models and five prompts, and the browser that it is opened in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import browser
import pytest
from surveys import MODELS, sounds

from dit_trt.tooling.listening.survey import Survey, write_survey

if TYPE_CHECKING:
    from playwright.sync_api import Playwright


@pytest.fixture(scope="session")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """15 sounds of 0.4 s."""
    return write_survey(sounds(), MODELS, 'Test <i> & "title"', tmp_path_factory.mktemp("survey"))


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    browser.require()
    with browser.playwright() as running:
        yield running
