"""The picture of docs/listening.md: `python tests/screenshots.py survey.html docs/listening.png`.

A survey's page goes in; a question of it as a desktop and as a phone show it comes out, side by side, light theme.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import browser

if TYPE_CHECKING:
    from playwright.sync_api import Playwright

DESKTOP, PHONE = {"width": 860, "height": 812}, {"width": 375, "height": 812}
STYLE = (
    "margin: 0; padding: 24px; background: #d9dce1; display: flex; gap: 24px; align-items: start; width: max-content"
)
BOARD = f'<!doctype html><body style="{STYLE}">{{}}</body>'


def take(running: Playwright, page: Path, target: Path) -> None:
    """Answer the first two questions, and show the third when it is heard and rated."""
    with tempfile.TemporaryDirectory() as profiles:
        shots = []
        for name, viewport in (("desktop", DESKTOP), ("phone", PHONE)):
            context = browser.start(running, Path(profiles) / name, viewport=viewport, color_scheme="light")
            tab = context.pages[0]
            tab.goto(page.resolve().as_uri())
            tab.get_by_label("Your name or initials").fill("Ada")
            tab.keyboard.press("Enter")
            for rating in "345":
                tab.keyboard.press(" ")
                tab.locator("#ratings button:enabled").first.wait_for()
                tab.keyboard.press(rating)
                if rating != "5":
                    tab.keyboard.press("Enter")
            shots.append(tab.screenshot())
            context.close()
        context = browser.start(running, Path(profiles) / "board", viewport={"width": 1400, "height": 900})
        pictures = (f'<img src="data:image/png;base64,{base64.b64encode(shot).decode()}">' for shot in shots)
        context.pages[0].set_content(BOARD.format("".join(pictures)))
        context.pages[0].locator("body").screenshot(path=target)
        context.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with browser.playwright() as running:
        take(running, Path(sys.argv[1]), Path(sys.argv[2]))
