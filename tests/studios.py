"""A real `dit-trt studio` in a process of its own, and its page in the browser: for the tests, and for the pictures.

`python tests/studios.py docs` takes the pictures of docs/studio.md with the bundles of the home folder, which must hold
two of one model, FP32 among them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import browser
from processes import COMMAND

if TYPE_CHECKING:
    from playwright.sync_api import Page

DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 375, "height": 812}
# Names looked up and addresses connected to, but for this machine's own.
WATCH = """
import sys
def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost"):
        print("asked for", arguments[0], file=sys.stderr)
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
        print("connected to", arguments[1][0], file=sys.stderr)
sys.addaudithook(watch)
"""


@contextmanager
def running(*arguments: str, home: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address and the process, which is ended as a user ends it. It must end well, and have said nothing."""
    environment = os.environ | ({} if home is None else {"DIT_TRT_HOME": str(home)})
    environment.pop("CI", None)  # where packages keep quiet that would send statistics elsewhere
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-c", WATCH + COMMAND, "studio", "--port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" ")[0]
            yield address, process
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(30)
            errors.seek(0)
            said = errors.read()
        assert said == "loading the page\n", said
        assert code == 0


def settled(page: Page) -> str:
    """When what runs has ended: the line below the buttons."""
    page.locator("#status p:not(.now)").wait_for(timeout=60_000)
    page.get_by_role("button", name="Generate").and_(page.locator(":enabled")).wait_for()
    return page.locator("#status").inner_text().strip()


def press(page: Page, button: str, **fields: Any) -> str:
    """Fill in the fields, press the button and wait for the end; what the page says then."""
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.evaluate("document.querySelector('#status p').className = 'now'")
    page.get_by_role("button", name=button).click()
    return settled(page)


def take_pictures(folder: Path) -> None:
    with running() as (address, _), browser.playwright() as playwright, tempfile.TemporaryDirectory() as profiles:
        for name, viewport in (("desktop", DESKTOP), ("phone", PHONE)):
            context = browser.start(playwright, Path(profiles) / name, viewport=viewport, color_scheme="light")
            page = context.pages[0]
            page.goto(address)
            for button in ("Generate", "Compare"):
                said = press(page, button, Prompt="a dog barking", Steps=100)
                assert said == "Done.", said
                page.evaluate("document.activeElement.blur()")
                page.wait_for_timeout(1000)
                what = "generated" if button == "Generate" else "ab"
                _shrunk(page.screenshot(full_page=True), folder / f"studio-{what}-{name}.png")
            context.close()


def _shrunk(png: bytes, target: Path) -> None:
    """In 96 colours, which is a third of the bytes."""
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(96, dither=PIL.Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    take_pictures(Path(sys.argv[1]))
