"""Tasks in as many processes as there are cores, of one thread each; what a process needs is made in it once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

Own = TypeVar("Own")
Task = TypeVar("Task")
Made = TypeVar("Made")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_own: Any


def in_processes(
    function: Callable[[Own, Task], Made], tasks: Sequence[Task], make: Callable[[], Own], processes: int | None = None
) -> Iterator[Made]:
    """function(what `make` returned in its process, task) of every task, in order.

    processes: default one for each core; 1 is this one. All that goes to a process is pickled.
    """
    processes = processes or os.cpu_count() or 1
    if processes == 1:
        own = make()
        yield from (function(own, task) for task in tasks)
        return
    with _one_thread_each(), multiprocessing.get_context("spawn").Pool(processes, _start, (make,)) as pool:
        yield from pool.imap(partial(_call, function), tasks, chunksize=8)


def _start(make: Callable[[], object]) -> None:
    global _own
    _own = make()


def _call(function: Callable[[Any, Task], Made], task: Task) -> Made:
    return function(_own, task)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """For processes that are started in here."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
