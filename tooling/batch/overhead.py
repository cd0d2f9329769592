"""What a clip costs beside its computing: finished ones of a given length go the whole way, here and by Ray workers.

    python -m dit_trt.tooling.batch.overhead --ray auto --seconds 47.55

A worker hands over silence at once, so what is left is the way to the index: queue, transfer, write, flush, rename.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np

from ...calib_data.reader import Caption
from ...runtime.settings import Settings
from ...runtime.wav import encode
from .clips import Clip, ClipFolder, Made, Plan
from .cluster import Cluster
from .maker import ClipMaker, Job
from .store import LocalStore

RATE = 44100


class Silent(ClipMaker):
    """Has no bundle, and its clips ready."""

    def __init__(self, seconds: float):
        self.backend = "none"
        self._content = encode(np.zeros((2, round(seconds * RATE)), np.float32), RATE)
        self._sha256 = hashlib.sha256(self._content).hexdigest()

    def make(self, clips: Sequence[tuple[Caption, int]]) -> Iterator[Made]:
        for caption, seed in clips:
            yield Clip(caption.id, caption.text, seed, f"{caption.id}.wav", self._sha256), self._content


def opener(job: Job, threads: int | None) -> ClipMaker:
    return Silent(job.plan.seconds)


@click.command()
@click.option("--ray", "address", metavar="auto|ADDRESS", help="A cluster (default: this process alone).")
@click.option("--clips", default=500, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Length of a clip.")
def main(address: str | None, clips: int, seconds: float) -> None:
    """Print milliseconds a clip, and of the processor of this process alone."""
    plan = Plan(tuple(Caption(f"{i:05}", "silence") for i in range(clips)), Settings(), seconds)
    _run("here", plan, Silent(seconds).make(plan.clips))
    if address is None:
        return
    for workers in (1, 2):
        with Cluster(address, workers, False, print) as cluster:
            job = Job("", "", Plan((), plan.settings, seconds))
            list(cluster.make(job, [plan.clips[:1]] * workers, opener))  # opened
            _run(f"{workers} on Ray", plan, cluster.make(job, [[clip] for clip in plan.clips], opener))


def _run(name: str, plan: Plan, source: Iterator[Made]) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = ClipFolder(LocalStore(Path(place)), plan)
        begun, before = time.monotonic(), _processor()
        for made in source:
            folder.enter(made)
        took, count = time.monotonic() - begun, len(folder.finished)
        print(
            f"{name}: {1000 * took / count:.2f} ms a clip, {1000 * (_processor() - before) / count:.2f} ms of CPU here"
        )


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
