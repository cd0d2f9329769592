"""Clips made by workers on a Ray cluster. They only compute: what they make is written by who asked for it.

So a worker that dies, with its node or alone, leaves nothing half-written. Its batch is made again, clip by clip, by
others; a clip that has lost so many workers as `LIVES` says is given up, and so is a seat that has lost as many in a
row without a clip given up. When no seat is left, the clips that are left fail with the reason.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...calib_data.reader import Caption
from ...engines.errors import UserError, last_line
from .clips import Made
from .maker import ClipMaker, Job, failed, reason
from .seats import Room, Seat

LIVES = 3
AHEAD = 2  # batches a worker has at once, so that it does not wait for the next one
LOOK_SECONDS = 2.0  # between looks at which nodes there are
NEW_NODE_SECONDS = 30.0  # how long a node is waited for when the last one is lost
SLOW_START_SECONDS = 60.0
HEALTH_SECONDS = 20.0  # a cluster answers in one

Batch = Sequence[tuple[Caption, int]]
Opener = Callable[[Job, int | None], ClipMaker]


class Worker:
    """What runs on the cluster: one process with one open bundle."""

    def __init__(self, job: Job, threads: int | None, opener: Opener):
        self._asked = job, threads, opener
        self._maker: ClipMaker | None = None

    def open(self) -> dict[str, Any]:
        """Open the bundle -> backend and host, or with `error` why it cannot be opened here."""
        job, threads, opener = self._asked
        try:
            self._maker = maker = opener(job, threads)
        except Exception as error:
            return {"host": platform.node(), "backend": None, "error": reason(error)}
        return {"host": platform.node(), "backend": maker.backend, "error": None}

    def make(self, clips: Batch) -> list[Made]:
        assert self._maker is not None
        return [*self._maker.make(clips)]


@dataclass
class _Seated:
    """A worker as it is seen from here: its actor, the batches it has in their order, and what it has done."""

    seat: Seat
    actor: Any
    opening: Any
    batches: dict[Any, Batch] = field(default_factory=dict)
    host: str = ""
    backend: str | None = None
    clips: int = 0


class Cluster:
    """A connection to a Ray cluster. `make` yields clips as they are finished; `workers` tells then who made them.

    Until it is left what is printed goes to stderr: Ray tells of lost nodes on stdout, which is the results'.
    """

    def __init__(self, address: str, workers: int | None, wants_gpus: bool, say: Callable[[str], object]):
        self._printing = contextlib.redirect_stdout(sys.stderr)
        self._ray, self._say = _connected(address), say
        self._room = Room.of(self._nodes(), workers, wants_gpus)
        self._seated: list[_Seated] = []
        self._losses: Counter[Seat] = Counter()  # in a row
        self._closed: list[Seat] = []
        self._reasons: dict[str, str] = {}  # node -> why no worker is there
        self._told: list[dict[str, Any]] = []

    def __enter__(self) -> Cluster:
        self._printing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._printing.__exit__(None, None, None)

    @property
    def workers(self) -> list[dict[str, Any]]:
        """host, backend, threads, clips and error of every worker there was."""
        return [*self._told, *map(_facts, self._seated)]

    def make(self, job: Job, batches: Sequence[Batch], opener: Opener = ClipMaker.of_job) -> Iterator[Made]:
        ray, queue = self._ray, deque(batches)
        lives: Counter[str] = Counter()
        begun, slow_told = time.monotonic(), False
        looked, alone_since = float("-inf"), float("inf")
        while queue or any(each.batches for each in self._seated):
            now = time.monotonic()
            if now - looked > LOOK_SECONDS:
                self._seat_more(job, opener, len(queue))
                looked = now
            for each in self._seated:
                while queue and each.opening is None and len(each.batches) < AHEAD:
                    batch = queue.popleft()
                    each.batches[each.actor.make.remote(batch)] = batch
            if not self._seated:
                alone_since = min(alone_since, now)
                if looked > alone_since + (0 if self._reasons else NEW_NODE_SECONDS):  # and found no seat
                    yield from self._give_up(queue)
                    return
                time.sleep(0.2)
                continue
            alone_since = float("inf")
            waiting = [ref for each in self._seated for ref in (each.opening, *each.batches) if ref is not None]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=LOOK_SECONDS)
            if not slow_told and now - begun > SLOW_START_SECONDS and all(each.opening for each in self._seated):
                self._say("no worker has started yet: the cluster may be busy, see `ray status`; still waiting")
                slow_told = True
            for ref in ready:
                worker = next(each for each in self._seated if ref == each.opening or ref in each.batches)
                try:
                    found = ray.get(ref)
                except ray.exceptions.RayError as error:
                    yield from self._lost(worker, error, queue, lives)
                    continue
                if ref == worker.opening:
                    self._opened(worker, found)
                    continue
                del worker.batches[ref]
                worker.clips += len(found)
                self._losses[worker.seat] = 0
                yield from found

    def _nodes(self) -> list[dict[str, Any]]:
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        return sorted(alive, key=lambda node: (node.get("NodeManagerAddress", ""), node["NodeID"]))

    def _seat_more(self, job: Job, opener: Opener, batches: int) -> None:
        """Workers for free seats, for no more than there are batches for."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = self._nodes()
        there = {node["NodeID"] for node in nodes}
        self._closed = [seat for seat in self._closed if seat.node in there]
        idle = sum(not each.batches for each in self._seated)
        room = max(0, batches - idle)
        for seat in self._room.free(nodes, [each.seat for each in self._seated], self._closed)[:room]:
            where = NodeAffinitySchedulingStrategy(seat.node, soft=False)
            kind = self._ray.remote(Worker).options(
                num_cpus=seat.threads, num_gpus=seat.gpus, scheduling_strategy=where, max_restarts=0
            )
            actor = kind.remote(job, seat.threads, opener)
            self._seated.append(_Seated(seat, actor, actor.open.remote()))

    def _opened(self, worker: _Seated, found: dict[str, Any]) -> None:
        worker.opening, worker.host, worker.backend = None, found["host"], found["backend"]
        if found["error"] is not None:
            self._say(f"note: no worker on {found['host']}: {found['error']}")
            self._close(worker, found["error"])

    def _lost(self, worker: _Seated, error: Exception, queue: deque[Batch], lives: Counter[str]) -> Iterator[Made]:
        """Who has the batches it had: those that others take again, and clips that have been lost too often."""
        why = f"{type(error).__name__}: {_told(error)}"
        self._say(f"note: a worker on {worker.host or 'a node'} was lost ({type(error).__name__}); its clips go on")
        self._losses[worker.seat] += 1
        running, *later = worker.batches.values() or [()]
        queue.extendleft(reversed(later))
        again = []
        for clip in running:
            lives[clip[0].id] += 1
            if lives[clip[0].id] < LIVES:
                again.append([clip])
            else:
                self._losses[worker.seat] = 0  # it was the clip
                yield failed(clip, f"{LIVES} workers were lost while making it (out of memory?): {why}")
        queue.extendleft(reversed(again))
        if self._losses[worker.seat] >= LIVES:
            self._close(worker, f"its worker was lost {LIVES} times: {why}")
        else:
            self._remove(worker, why)

    def _close(self, worker: _Seated, why: str) -> None:
        self._closed.append(worker.seat)
        self._reasons[worker.seat.node] = why
        self._remove(worker, why)

    def _remove(self, worker: _Seated, why: str) -> None:
        self._told.append({**_facts(worker), "error": why})
        self._seated.remove(worker)
        self._ray.kill(worker.actor)

    def _give_up(self, queue: deque[Batch]) -> Iterator[Made]:
        why = "; ".join(dict.fromkeys(self._reasons.values())) or "the cluster has no node left that could"
        for batch in queue:
            for clip in batch:
                yield failed(clip, f"no worker could make it: {why}")


def _facts(worker: _Seated) -> dict[str, Any]:
    threads, clips = worker.seat.threads, worker.clips
    return {"host": worker.host, "backend": worker.backend, "threads": threads, "clips": clips, "error": None}


def _told(error: Exception) -> str:
    """Ray's first line says what happened; that of an error in an actor's own code is its traceback's last."""
    if "Traceback" in str(error) or "creation task" in str(error):
        return last_line(error)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def check_address(address: str) -> None:
    """Raises UserError for what is neither `auto` nor HOST:PORT."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--ray {address} is no address; {_KNOWN}")


_KNOWN = "give --ray auto on a machine of the cluster, or --ray HOST:PORT of its head (ray start --head tells it)"


def _healthy(address: str) -> bool:
    """What Ray's own command says, in a process that can be given up: `ray.init` tries for minutes."""
    named = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *named]
    try:
        return subprocess.run(command, capture_output=True, timeout=HEALTH_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _connected(address: str) -> Any:
    """The module `ray`, connected. Raises UserError for an address that nothing answers at."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    check_address(address)
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {address} ({error.strerror or error}); {_KNOWN}") from None
    if not _healthy(address):
        if address == "auto":
            raise UserError(
                "no Ray cluster runs on this machine: start one with `ray start --head`, or leave out --ray"
            )
        raise UserError(f"no Ray cluster answers at {address} (it is none, or it is ill); {_KNOWN}")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise UserError(f"Ray cannot connect to {address} ({last_line(error)}); {_KNOWN}") from None
    return ray
