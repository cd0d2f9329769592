"""A caption list and a bundle become a folder of clips, here or on a Ray cluster: the same bytes either way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...calib_data.reader import Caption
from ...engines.base import BACKENDS, choose_backend
from ...engines.bundle import Bundle
from ...engines.errors import UserError
from ...runtime.bundle_facts import BundleFacts
from ...runtime.pipeline import batch_size
from ..watching import Say, Watch, silent, unwatched
from .clips import ClipFolder, Failed, Made, Plan, held
from .cluster import Cluster, Opener
from .maker import ClipMaker, Job, content_of
from .store import Store

PLAN = "batch.json"
Batches = list[Sequence[tuple[Caption, int]]]


@dataclass(frozen=True)
class Outcome:
    """What a run did. clips: there are now; made: in this run, in `seconds`; workers: see `Cluster`."""

    clips: int
    made: int
    seconds: float
    failed: tuple[Failed, ...]
    workers: tuple[dict[str, Any], ...]


def generate_batch(
    bundle: Bundle,
    captions: Sequence[Caption],
    store: Store,
    seconds: float | None = None,
    chosen: dict[str, Any] | None = None,
    batch: int = 1,
    ray: str | None = None,
    workers: int | None = None,
    watch: Watch = unwatched,
    say: Say = silent,
    opener: Opener = ClipMaker.of_job,
) -> Outcome:
    """One clip a caption, written and entered as it is finished; what is there from before is kept.

    Each has a seed of its own, made of the settings' and its id. chosen: settings that are not the model's own. batch:
    clips computed at once. ray: the cluster's address; None: this process makes them. workers: on the cluster, at most
    (default: one a node, or a GPU for a bundle of GPUs). opener: how a worker opens the bundle.
    A clip that fails is entered with its error and does not stop others. Raises UserError for what stops all, as a full
    disk; the same call then goes on where this one was.
    """
    plan = _plan(bundle, captions, seconds, chosen or {})
    facts = {**plan.to_dict(), "bundle": {"name": bundle.folder.name, "content": content_of(bundle)}}
    with contextlib.ExitStack() as stack:
        cluster = None
        if ray is None:
            choose_backend(bundle.backend)
        else:
            cluster = stack.enter_context(Cluster(ray, workers, BACKENDS[bundle.backend].proof is not None, say))
        stack.enter_context(held(store, PLAN, facts, {}, "a batch"))
        folder = ClipFolder(store, plan)
        missing = folder.missing
        size = batch_size(len(missing), batch) or 1
        batches: Batches = [missing[begin : begin + size] for begin in range(0, len(missing), size)]
        begun, before = time.monotonic(), len(folder.finished)
        with _flushed(folder):
            if cluster is not None:
                _enter(cluster.make(Job.of(bundle, plan), batches, opener), folder, plan, watch)
            elif missing:
                _enter(_here(bundle, plan, batches), folder, plan, watch)
        took, made = time.monotonic() - begun, len(folder.finished) - before
        told = () if cluster is None else tuple(cluster.workers)
        return Outcome(len(folder.finished), made, took, tuple(folder.failed.values()), told)


def _plan(bundle: Bundle, captions: Sequence[Caption], seconds: float | None, chosen: dict[str, Any]) -> Plan:
    """What the manifest alone can tell is checked; a backend that is not here may be on the workers."""
    facts = BundleFacts(bundle)
    settings = facts.settings(**chosen)
    facts.check_sampler(settings)
    return Plan(tuple(captions), settings, facts.check_seconds(seconds))


def _here(bundle: Bundle, plan: Plan, batches: Batches) -> Iterator[Made]:
    maker = ClipMaker(bundle, plan)
    for clips in batches:
        yield from maker.make(clips)


def _enter(source: Iterator[Made], folder: ClipFolder, plan: Plan, watch: Watch) -> None:
    count = len(folder.finished)
    with watch("generating clips", len(plan.captions)) as done:
        done(count)
        for made in source:
            folder.enter(made)
            count += 1
            done(count)


@contextlib.contextmanager
def _flushed(folder: ClipFolder) -> Iterator[None]:
    """The index is whole when the run ends; when it ends badly, as whole as can be."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):
            folder.flush()
        raise
    folder.flush()
