"""`dit-trt studio`: a page in the browser that makes sound, and compares bundles by ear and by number."""

from __future__ import annotations

import contextlib
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from ...runtime.hosts import is_loopback, listening, url
from .common import dit_command, say, tell
from .completion import bundles

if TYPE_CHECKING:
    from ..studio.takes import Studio

EPILOG = """\b
Examples:
  dit-trt studio                       the newest bundle, on this machine
  dit-trt studio --bundle ./sqs-w8a8 --port 9000
"""


@click.command(epilog=EPILOG)
@click.option(
    "--bundle", metavar="DIR|NAME", shell_complete=bundles, help="Which is chosen first (default: the newest)."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; nobody is asked for a password.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one.")
@click.option("--device", metavar="D", help="The backend's device (default: CPU).")
@dit_command
def command(bundle: str | None, host: str, port: int, device: str | None) -> dict:
    """Open a page in the browser: prompt, progress, sound, and A/B of two bundles.

    It runs until Ctrl-C. Clips that were not downloaded are gone then.
    """
    from ...engines.base import choose_backend
    from ...engines.bundle import find_bundle
    from ..plots import check_matplotlib

    choose_backend(find_bundle(bundle).backend, device)  # what is wrong is told before anything heavy is loaded
    if find_spec("gradio") is None:
        raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
    check_matplotlib("the studio draws with")
    with listening(host, port) as bound:
        if not is_loopback(bound):
            say(f"note: whoever reaches {host} can use this page; it asks for no password")
        address = url(bound)
        say("loading the page")

        from ..studio.page import serve

        def ready(studio: Studio) -> None:
            tell(f"{address} (Ctrl-C ends it)")

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            serve(bound, bundle, device, ready)
    return {"address": address}
