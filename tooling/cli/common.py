"""What all commands share: --json and --debug, errors as one line, progress on stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...engines.errors import UserError
from ...engines.home import expanded
from ..plain_json import plain

if TYPE_CHECKING:
    from ...runtime.settings import Settings

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """A line for the person watching; never on stdout, which belongs to results."""
    stderr.print(message, markup=False)


def show(line: str) -> None:
    """A line of the result itself, for people: on stdout, which --json keeps for its one object."""
    if not click.get_current_context().params["as_json"]:
        click.echo(line)


def tell(line: str) -> None:
    """A result of work that took its time: on stdout too, but on stderr with --json, for who watches a script."""
    if click.get_current_context().params["as_json"]:
        say(line)
    else:
        click.echo(line)


def show_table(rows: Sequence[Sequence[object]], left: int = 1) -> None:
    """`show` rows in columns, the first of them being the heads: `left` columns to the left, the others to the right.

    Whole numbers get their thousands apart.
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        aligned = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))]
        show("  ".join(aligned).rstrip())


class UsageError(UserError):
    """A mistake that the command line alone shows. Exit code 2, as click's own."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Values are checked where they are used; in this block, which reads no file, what they raise is a UsageError."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from None


def note_unused(negative_prompt: str | None, settings: Settings) -> None:
    """Say so where a negative prompt changes nothing."""
    if negative_prompt is not None and settings.cfg_scale == 1:
        say("note: without guidance (cfg 1) the negative prompt does not count; give --cfg")


def dit_command(function: Callable[..., dict]) -> Callable[..., None]:
    """Wrap a command's body, which returns its JSON object and prints the human's with `show` or `tell` itself.

    Adds --json and --debug. UserError becomes one line and exit code 1 (UsageError: 2); an object with `passed: false`
    exits 1 too.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def wrapped(as_json: bool, debug: bool, **options: object) -> None:
        try:
            result = function(**options)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except click.ClickException:
            raise
        except BrokenPipeError:
            os._exit(1)
        except UserError as error:
            if debug:
                raise
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        except ModuleNotFoundError as error:
            if debug or (error.name or "").startswith("dit_trt"):
                raise
            _fail(
                f"this command needs the package {error.name}, which comes with the {_extra(error.name)} extra: "
                f'pip install -c constraints.txt -e ".[{_extra(error.name)}]" in a clone of dit-trt',
                1,
            )
        except OSError as error:
            if debug:
                raise
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"{error.strerror or error}{where}{_fix(error.errno)}", 1)
        except MemoryError:
            if debug:
                raise
            _fail("out of memory; close other programs, or take a smaller model", 1)
        except ImportError as error:
            if debug or not _interrupted(error):
                raise
            _fail("interrupted", 130)
        if as_json:
            click.echo(json.dumps(plain(result)))
        if result.get("passed") is False:
            sys.exit(1)

    return wrapped


EXTRAS = {
    **{
        "onnxruntime": "onnxruntime",
        "huggingface_hub": "hub",
        "ray": "ray",
        "fsspec": "ray",
        "matplotlib": "plot",
        "gradio": "studio",
    },
    **dict.fromkeys(("fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client"), "serve"),
}


def _extra(package: str | None) -> str:
    return EXTRAS.get(package or "", "build")


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _fix(code: int | None) -> str:
    if code == errno.ENAMETOOLONG:
        return "; give a shorter name"
    return "; choose another place with --output or DIT_TRT_HOME" if code in (*_UNWRITABLE, *_FULL) else ""


def _interrupted(error: BaseException | None) -> bool:
    """Ctrl-C while a C extension loads surfaces as an ImportError caused by it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, code: int) -> None:
    """One line, whatever a file name or another program's message brings along."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in message)
    click.echo(f"Error: {line}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def progress(description: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A bar with steps and ETA on a terminal, a line now and then elsewhere; yields `done(n)`.

    unit: of the steps, to show how many a second there are.
    """
    if not stderr.is_terminal:
        last, start, first = -1, time.monotonic(), -1

        def done_plainly(n: int) -> None:
            nonlocal last, first
            first = n if first < 0 else first
            tenth = 10 * n // max(total, 1)
            if tenth > last:
                last = tenth
                took = time.monotonic() - start
                left = "" if n <= first else f", about {took * (total - n) / (n - first):.0f} s left"
                rate = f", {(n - first) / took:.3g} {unit}/s" if unit and n > first else ""
                say(f"{description} {n}/{total}{left}{rate}")

        yield done_plainly
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        *([TextColumn("{task.fields[rate]}")] if unit else []),
    )
    with Progress(*columns, console=stderr) as bar:
        task = bar.add_task(description, total=total, rate="")

        def done(n: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, completed=n, rate=f"{speed:.3g} {unit}/s" if speed else "")

        yield done


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def path_option(value: str | None) -> Path | None:
    return None if value is None else expanded(value)
