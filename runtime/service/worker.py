"""The one thread that generates: batches off the waiting list go through their bundle's pipeline, sounds come out."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, replace

from ...engines.errors import UserError, last_line
from ..pipeline import Pipeline
from ..step_engine import Conditioning
from ..wav import encode
from .jobs import Closed, Job, Sound, WaitingList

LONGEST_WAIT = 3600  # seconds that anybody is told to come back after, at most
Observer = Callable[[int, float], object]


class EngineFailed(Exception):
    """A clip could not be made. The message is one line for who asked; the server goes on."""


class _GivenUp(Exception):
    """Nobody waits for what runs any more, or the service stops."""


@dataclass
class Pace:
    """What a clip takes, measured: seconds of a step, and of all that is not a step. Newer clips count more."""

    step: float
    rest: float

    def learn(self, step: float, rest: float) -> None:
        self.step += 0.3 * (step - self.step)
        self.rest += 0.3 * (rest - self.rest)


@dataclass
class _Running:
    """Where the thread is. done: steps of `jobs`, all together."""

    jobs: list[Job]
    done: int = 0


class Worker:
    """Owns the pipelines, by the bundles' names; nothing else may generate with them. A context manager.

    places: of the waiting list; max_batch: clips computed at once (1: none); observe(clips, seconds) is called after
    each batch, log with a line for the operator when an engine fails.
    """

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        places: int = 16,
        max_batch: int = 4,
        observe: Observer = lambda clips, seconds: None,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.pipelines = dict(pipelines)
        self.waiting = WaitingList(places)
        self.max_batch = max_batch
        self.observe, self.log = observe, log
        self.clips = 0
        self.draining = False
        self._running: _Running | None = None
        self._stopping = False
        self._paces: dict[str, Pace] = {}
        self._thread = threading.Thread(target=self._loop, name="generate", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def warm_up(self) -> None:
        """Before the thread starts: compile what a request needs and time two steps of every bundle.

        Raises UserError when a bundle cannot run.
        """
        for name, pipeline in self.pipelines.items():
            settings, batch = pipeline.settings(steps=2), 1
            jobs = [Job(name, "warm up", settings, 0.1)]
            self._generate(_Running(jobs))
            conditioning = pipeline.condition("warm up", settings, 0.1)
            while (batch := 2 * batch) <= self._most(pipeline):
                pipeline.sample_batch(Conditioning.together([conditioning] * batch), settings, [0] * batch)
            self._timed(jobs)  # now that nothing is compiled in it

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Clips being computed."""
        now = self._running
        return 0 if now is None else len(now.jobs)

    def submit(self, job: Job) -> None:
        """Raises `jobs.Full`, or `jobs.Closed` when the service stops."""
        if self.draining:
            raise Closed
        self.waiting.put(job)

    def cancel(self, job: Job) -> None:
        """Who asked has gone: its place is free at once; what runs for nobody else ends with the step."""
        job.gone = True
        self.waiting.remove(job)

    def stop(self) -> None:
        """Give up what waits and what runs: who asked is told at once, the thread ends with its step."""
        self._stopping = self.draining = True
        now = self._running
        for job in (*self.waiting.close(), *(now.jobs if now is not None else ())):
            _settle(job, Closed())

    def retry_after(self) -> int:
        """Whole seconds until a place on the waiting list should be free: until what runs is finished."""
        now = self._running
        if now is None or (pace := self._paces.get(now.jobs[0].model)) is None:
            return 1
        steps = now.jobs[0].settings.steps * len(now.jobs)
        left = (steps - now.done) * pace.step + len(now.jobs) * pace.rest
        return max(1, min(math.ceil(left), LONGEST_WAIT))

    # -------------------- the thread

    def _loop(self) -> None:
        while jobs := self.waiting.take(lambda job: self._most(self.pipelines[job.model])):
            self._make(jobs)

    def _make(self, jobs: list[Job]) -> None:
        """Every job gets its sound or its error; of several that fail together each gets a try of its own."""
        try:
            sounds = self._timed(jobs)
        except _GivenUp:
            for job in jobs:
                _settle(job, Closed())
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._make([job])
                return
            reason = " ".join(last_line(error).split())
            told = reason if isinstance(error, UserError) else "the engine failed; the server's log has the reason"
            _settle(jobs[0], EngineFailed(told))
            self.log(f"{jobs[0].model} failed: {type(error).__name__}: {reason}")
        else:
            self.clips += len(jobs)
            self.observe(len(jobs), sounds[0].seconds)
            for job, sound in zip(jobs, sounds):
                _settle(job, sound)

    def _timed(self, jobs: list[Job]) -> list[Sound]:
        """Generate, and remember how fast it went."""
        self._running = now = _Running(jobs)
        begun = time.perf_counter()
        try:
            contents, steps = self._generate(now)
        finally:
            self._running = None
        seconds = time.perf_counter() - begun
        step, rest = steps / jobs[0].settings.steps, max(0.0, seconds / len(jobs) - steps)
        self._paces.setdefault(jobs[0].model, Pace(step, rest)).learn(step, rest)
        return [Sound(content, len(jobs), seconds) for content in contents]

    def _generate(self, now: _Running) -> tuple[list[bytes], float]:
        """-> encoded sounds, a clip's share of the seconds that the steps took."""
        first, jobs = now.jobs[0], now.jobs

        def on_step(clip: int, step: int) -> None:
            now.done += step >= 0
            if self._stopping or all(job.gone for job in jobs):
                raise _GivenUp

        clips = self.pipelines[first.model].generate(
            [job.prompt for job in jobs],
            replace(first.settings, seed=0),
            first.seconds,
            first.negative_prompt,
            on_step=on_step,
            batch=len(jobs),
            seeds=[job.settings.seed for job in jobs],
        )
        steps, contents = 0.0, []
        for job, clip in zip(jobs, clips):
            steps = sum(clip.step_seconds)
            contents.append(encode(clip.audio, clip.sample_rate, job.format))
        return contents, steps

    def _most(self, pipeline: Pipeline) -> int:
        """Clips of a batch, at most."""
        return min(self.max_batch, pipeline.max_batch or self.max_batch)


def _settle(job: Job, outcome: Sound | Exception) -> None:
    """Its result, unless it has one: two threads may come at the same time."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Sound):
            job.result.set_result(outcome)
        else:
            job.result.set_exception(outcome)
