"""Work that reports by a callback becomes an iterator of its reports, which can be stopped from elsewhere."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(Exception):
    """Asked for from outside; raised where the work reports next."""


def reports(work: Callable[[Callable[[Any], None]], Any], stop: threading.Event) -> Iterator[Any]:
    """What `work(say)` says, as it says it, in a thread of its own, and then what it returns.

    Whoever leaves the iterator early, or sets `stop`, ends the work at its next report. Raises what the work raises,
    and Stopped.
    """
    said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def say(report: Any) -> None:
        if stop.is_set():
            raise Stopped
        said.put(("said", report))

    def run() -> None:
        try:
            said.put(("returned", work(say)))
        except BaseException as error:
            said.put(("raised", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        kind = "said"
        while kind == "said":
            kind, value = said.get()
            if kind == "raised":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
