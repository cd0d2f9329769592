"""What is asked for, and the bounded waiting list from which batches of alike jobs are taken."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ..settings import Settings


@dataclass(frozen=True)
class Sound:
    """What became of a job. batch: clips that were computed at once; seconds: that it took them all."""

    content: bytes
    batch: int
    seconds: float


@dataclass(eq=False)
class Job:
    """One clip to make. settings: its own `seed` is that of the clip; format: `wav` or `flac`.

    gone: who asked does not wait any more.
    """

    model: str
    prompt: str
    settings: Settings
    seconds: float
    negative_prompt: str | None = None
    format: str = "wav"
    result: Future[Sound] = field(default_factory=Future)
    gone: bool = False

    @property
    def alike(self) -> tuple[Any, ...]:
        """Jobs of which this is equal can go through the step graphs together; seed, prompt and format are free."""
        return self.model, replace(self.settings, seed=0), self.seconds, self.negative_prompt

    def __post_init__(self) -> None:
        self.result.set_running_or_notify_cancel()  # from here on nobody's cancelling is in the way of its result


class Full(Exception):
    """The waiting list has no place left."""


class Closed(Exception):
    """No jobs are taken any more, or the job was given up."""


class WaitingList:
    """Jobs in the order of their arrival, `places` at most. Any thread may call it."""

    def __init__(self, places: int):
        self.places = places
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = self._taken = False

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Raises Full or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._jobs) >= self.places:
                raise Full
            self._jobs.append(job)
            self._changed.notify()

    def remove(self, job: Job) -> None:
        """Free the place of a job that still waits."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    @property
    def idle(self) -> bool:
        """Nobody waits, and what was taken is finished: `take` was called again."""
        with self._changed:
            return not self._jobs and not self._taken

    def take(self, most: Callable[[Job], int]) -> list[Job]:
        """Wait for a job; it and those like it, in order: 1, 2, 4, ... of them, `most` of the first at most.

        Powers of two, since every size of a batch is compiled once and its engine stays open. Empty when the list was
        closed.
        """
        with self._changed:
            self._taken = False
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return []
            self._taken = True
            first = self._jobs[0]
            alike = [job for job in self._jobs if job.alike == first.alike][: most(first)]
            taken = alike[: 1 << (len(alike).bit_length() - 1)]
            for job in taken:
                self._jobs.remove(job)
            return taken

    def close(self) -> list[Job]:
        """Take no more jobs -> those that waited, which are off the list."""
        with self._changed:
            self._closed = True
            left = [*self._jobs]
            self._jobs.clear()
            self._changed.notify_all()
            return left
