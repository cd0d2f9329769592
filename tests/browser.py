"""A real Chromium, headless, driven by Playwright, for the tests of pages.

The browser is the system's: Playwright's own download is not used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
INSTALL = "apt-get install -y --no-install-recommends chromium"


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def require() -> str:
    """The browser's path; where there is none the test skips here and fails in CI, as without a peer."""
    if (path := find()) is not None:
        return path
    message = f"no Chromium is installed: {INSTALL}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def playwright() -> Iterator[Playwright]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        yield running


def start(running: Playwright, profile: Path, **options: Any) -> BrowserContext:
    """A browser with the profile of that folder, which keeps what pages store. Close it to end the browser."""
    sandbox = [] if os.name != "posix" or os.geteuid() else ["--no-sandbox"]  # root has no other choice
    return running.chromium.launch_persistent_context(
        profile, executable_path=require(), args=[*sandbox, "--mute-audio"], headless=True, **options
    )
