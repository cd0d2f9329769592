"""What goes wrong on a Ray worker, by the caption that asks for it; workers open their bundles with these."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_trt.calib_data.reader import Caption
from dit_trt.engines.errors import UserError
from dit_trt.tooling.batch.clips import Made
from dit_trt.tooling.batch.maker import ClipMaker, Job

POISON, DEADLY = "a cat", "the siren"


class Faulty(ClipMaker):
    """One caption fails, one takes its process with it."""

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        for caption, _ in clips:
            if caption.text == DEADLY:
                os._exit(1)
        return super().make(clips)


class Together(ClipMaker):
    """Makes three clips and goes on when another worker is there, each entered in `folder`; takes its time for each."""

    folder: Path
    made = 0

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        limit = time.monotonic() + 60
        while self.made >= 3 and len([*self.folder.iterdir()]) < 2 and time.monotonic() < limit:
            time.sleep(0.02)
        self.made += len(clips)
        time.sleep(0.03 * len(clips))
        return super().make(clips)


def together(folder: Path, job: Job, threads: int | None) -> ClipMaker:
    maker = Together.of_job(job, threads)
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    maker.folder = folder
    return maker


def faulty(folder: Path, job: Job, threads: int | None) -> ClipMaker:
    maker = Faulty.of_job(job, threads)
    condition = maker._pipeline.condition

    def poisoned(prompt: str, *rest: Any) -> Any:
        if prompt == POISON:
            raise RuntimeError("poison")
        return condition(prompt, *rest)

    maker._pipeline.condition = poisoned  # type: ignore[method-assign]
    return maker


def nowhere(folder: Path, job: Job, threads: int | None) -> ClipMaker:
    raise UserError("the backend cannot run here: mend it")


def deadly(folder: Path, job: Job, threads: int | None) -> ClipMaker:
    os._exit(1)
