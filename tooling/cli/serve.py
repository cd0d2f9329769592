"""`dit-trt serve`: bundles behind HTTP."""

from __future__ import annotations

import contextlib
import os

import click

from ...engines.errors import UserError
from ...engines.home import expanded
from .common import UsageError, dit_command, say, tell
from .completion import bundles as bundle_names
from .completion import files

EPILOG = """\b
Examples:
  dit-trt serve                          the newest bundle, on this machine
  dit-trt serve ./sqs-w8a8 ./fp32 --port 9000
  dit-trt serve --host 0.0.0.0 --token-file token.txt
  curl -d '{"prompt": "dog barking"}' -H 'Content-Type: application/json' \\
    localhost:8000/v1/audio/generations -o dog.wav
"""
SHORTEST_TOKEN = 16
FIX = "make one with `openssl rand -hex 32`"


@click.command(epilog=EPILOG)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...", shell_complete=bundle_names)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; any other needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option(
    "--token-file",
    metavar="FILE",
    shell_complete=files,
    help="Requests must bear its token (or that of $DIT_TRT_TOKEN).",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Requests that may wait; more get 429.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Alike requests computed at once; 1: none.",
)
@click.option(
    "--max-steps", type=click.IntRange(1, 1000), default=200, show_default=True, help="Limit of a request's steps."
)
@click.option("--max-seconds", type=click.FloatRange(0.1), help="Limit of its length (default: the model's).")
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    help="At the end, time for what was accepted.",
)
@click.option("--device", metavar="D", help="The backend's device (default: CPU).")
@dit_command
def command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    token_file: str | None,
    queue: int,
    max_batch: int,
    max_steps: int,
    max_seconds: float | None,
    grace: float,
    device: str | None,
) -> dict:
    """Serve bundles over HTTP: POST /v1/audio/generations.

    The first bundle is the default one; /openapi.json describes requests. SIGTERM or Ctrl-C finishes what was
    accepted.
    """
    from ...runtime.hosts import is_loopback, listening, url
    from ...runtime.pipeline import Pipeline
    from ...runtime.service.fields import Limits
    from ...runtime.service.metrics import Metrics
    from ...runtime.service.server import serve
    from ...runtime.service.worker import Worker

    token = _token(token_file)
    with listening(host, port) as bound:
        if token is None and not is_loopback(bound):
            raise UsageError(f"--host {host} can be reached from outside; give --token-file ({FIX})")
        pipelines: dict[str, Pipeline] = {}
        for given in bundles or (None,):
            pipeline = Pipeline.open(given, device)
            name = pipeline.bundle.folder.resolve().name
            if name in pipelines:
                raise UserError(f"two bundles are called {name}; give each once, under names of their own")
            pipelines[name] = pipeline
        longest = max(pipeline.longest_seconds for pipeline in pipelines.values())
        limits, metrics = Limits(max_steps, max_seconds or longest), Metrics()
        worker = Worker(pipelines, queue, max_batch, metrics.batch, _log)
        say(f"opening {', '.join(pipelines)}")
        worker.warm_up()
        where = f"serving {', '.join(pipelines)} on {url(bound)}"
        finished = serve(worker, limits, metrics, bound, token, grace, _log, lambda: tell(where))
    say("all that was accepted is finished" if finished else "stopped; what was not finished was answered with 503")
    return {"bundles": [str(p.bundle.folder) for p in pipelines.values()], "clips": worker.clips}


def _log(line: str) -> None:
    """From any thread; that nobody reads it any more is no reason to stop."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def _token(file: str | None) -> str | None:
    """What is in the file, else in the environment."""
    where = f"--token-file {file}" if file is not None else "DIT_TRT_TOKEN"
    if file is not None:
        try:
            text = expanded(file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{where} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}); {FIX}"
            ) from None
    elif (text := os.environ.get("DIT_TRT_TOKEN", "").strip()) == "":
        return None
    if len(text) < SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in text):
        raise UsageError(f"{where} must hold one line of {SHORTEST_TOKEN} or more letters and digits; {FIX}")
    return text
