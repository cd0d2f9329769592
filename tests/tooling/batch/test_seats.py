"""Who sits where: a cluster's processors and GPUs divided among workers."""

from __future__ import annotations

import pytest

from dit_trt.tooling.batch.seats import Room, Seat


def node(name: str, cpus: float, gpus: float = 0) -> dict:
    return {"NodeID": name, "Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}


NODES = [node("a", 8), node("b", 2), node("head", 0)]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (None, [Seat("a", 8), Seat("b", 2)]),
        (1, [Seat("a", 8)]),
        (2, [Seat("a", 5), Seat("b", 2)]),
        (5, [Seat("a", 2), Seat("b", 2), Seat("a", 2), Seat("a", 2), Seat("a", 2)]),
        (99, [Seat("a", 1), Seat("b", 1), Seat("a", 1), Seat("b", 1), *[Seat("a", 1)] * 6]),
    ],
)
def test_processors_are_divided(workers: int | None, expected: list[Seat]) -> None:
    room = Room.of(NODES, workers, wants_gpus=False)
    assert room.free(NODES, [], []) == expected


def test_a_gpu_is_one_workers() -> None:
    nodes = [node("a", 8, 2), node("b", 64)]
    room = Room.of(nodes, None, wants_gpus=True)
    assert room.free(nodes, [], []) == [Seat("a", 1, 1)] * 2
    assert Room.of(nodes, 1, wants_gpus=True).free(nodes, [], []) == [Seat("a", 1, 1)]
    assert Room.of(nodes, None, wants_gpus=False).free(nodes, [], []) == [Seat("a", 8), Seat("b", 64)]
    assert Room.of(NODES, None, wants_gpus=True).free(NODES, [], []) == [Seat("a", 8), Seat("b", 2)]


def test_seats_taken_or_closed_are_not_free() -> None:
    room = Room.of(NODES, 5, wants_gpus=False)
    assert room.free(NODES, [Seat("a", 2)] * 3, [Seat("b", 2)]) == [Seat("a", 2)]
    assert room.free(NODES, [Seat("a", 2)] * 4 + [Seat("b", 2)], []) == []
    assert room.free(NODES[1:], [], []) == [Seat("b", 2)]
    assert room.free([*NODES[1:], node("new", 2)], [Seat("b", 2)], []) == [Seat("new", 2)]
    assert Room.of(NODES, 1, wants_gpus=False).free(NODES, [], [Seat("a", 8)]) == [Seat("b", 2)], "closed, so replaced"
