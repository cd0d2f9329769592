"""Which workers a cluster has room for: a node's processors or GPUs, divided among seats. Plain data, no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seat:
    """Room for one worker on a node: `threads` of its processors, and a GPU of its own or none."""

    node: str
    threads: int
    gpus: int = 0


@dataclass(frozen=True)
class Room:
    """How workers are seated: at most `workers`, each with `threads`, or all of a node's; on GPUs one each."""

    workers: int | None
    threads: int | None
    on_gpus: bool

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], workers: int | None, wants_gpus: bool) -> Room:
        """wants_gpus: the bundle runs on GPUs; where no node has any, processors are taken.

        So many workers divide the cluster's processors evenly; without a number there is one worker a node.
        """
        on_gpus = wants_gpus and any(_count(node, "GPU") for node in nodes)
        if workers is None or on_gpus:
            return cls(workers, None, on_gpus)
        return cls(workers, max(1, sum(_count(node, "CPU") for node in nodes) // workers), False)

    def seats(self, nodes: Iterable[Mapping[str, Any]]) -> list[Seat]:
        """All that these nodes have room for: the first seat of every node, then the second, ..."""
        found: list[tuple[int, int, Seat]] = []
        for place, node in enumerate(nodes):
            cores, gpus = _count(node, "CPU"), _count(node, "GPU")
            if self.on_gpus:
                each, seats = 1, gpus
            else:
                each = min(self.threads or cores, cores)
                seats = cores // each if each else 0
            seats = seats if self.on_gpus or self.workers is not None else min(seats, 1)
            found += [(i, place, Seat(node["NodeID"], each, int(self.on_gpus))) for i in range(seats)]
        return [seat for _, _, seat in sorted(found, key=lambda each: each[:2])]

    def free(self, nodes: Iterable[Mapping[str, Any]], taken: Sequence[Seat], closed: Sequence[Seat]) -> list[Seat]:
        """Where a worker can still be seated. taken: seats with a worker; closed: those where none could work."""
        gone = Counter(taken) + Counter(closed)
        found = []
        for seat in self.seats(nodes):
            if gone[seat]:
                gone[seat] -= 1
            else:
                found.append(seat)
        return found if self.workers is None else found[: max(0, self.workers - len(taken))]


def _count(node: Mapping[str, Any], resource: str) -> int:
    return int(node.get("Resources", {}).get(resource, 0))
