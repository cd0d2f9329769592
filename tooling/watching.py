"""How long work tells whoever called it where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Say = Callable[[str], object]
# Given what runs and how many calls it takes, a context that yields `done(calls)`: a progress bar, most likely.
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def silent(message: str) -> None:
    """Says nothing."""


@contextlib.contextmanager
def unwatched(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda done: None
