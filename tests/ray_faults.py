"""What goes wrong on a Ray worker, by the caption that asks for it; workers open their bundles with these."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.errors import UserError
from dit_trt.tooling.batch.clips import Made
from dit_trt.tooling.batch.maker import ClipMaker, Job

POISON, DEADLY = "a cat", "the siren"


class Slow(ClipMaker):
    """Takes its time, so that there is some to be killed in."""

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        time.sleep(0.05 * len(clips))
        return super().make(clips)


class Faulty(ClipMaker):
    """One caption fails, one takes its process with it."""

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        for caption, _ in clips:
            if caption.text == DEADLY:
                os._exit(1)
        return super().make(clips)


def slow(job: Job, threads: int | None) -> ClipMaker:
    return Slow.of_job(job, threads)


def faulty(job: Job, threads: int | None) -> ClipMaker:
    maker = Faulty.of_job(job, threads)
    condition = maker._pipeline.condition

    def poisoned(prompt: str, *rest: Any) -> Any:
        if prompt == POISON:
            raise RuntimeError("poison")
        return condition(prompt, *rest)

    maker._pipeline.condition = poisoned  # type: ignore[method-assign]
    return maker


def nowhere(job: Job, threads: int | None) -> ClipMaker:
    raise UserError("the backend cannot run here: mend it")


def deadly(job: Job, threads: int | None) -> ClipMaker:
    os._exit(1)
