"""The waiting list by itself: its order, its places, and what goes together, for any order of arrival."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_trt.runtime.service.jobs import Closed, Full, Job, WaitingList
from dit_trt.runtime.settings import Settings


def job(kind: int, seed: int = 0, model: str = "a") -> Job:
    return Job(model, f"{kind}-{seed}", Settings(steps=kind + 1, seed=seed), 1.0, None, "wav" if seed % 2 else "flac")


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 9))
def test_batches_are_alike_powers_of_two_and_begin_with_the_oldest(kinds: list[int], most: int) -> None:
    waiting = WaitingList(30)
    left = [job(kind, seed) for seed, kind in enumerate(kinds)]
    for each in left:
        waiting.put(each)
    while left:
        batch = waiting.take(lambda first: most)
        alike = [each for each in left if each.settings.steps == left[0].settings.steps]
        assert batch == alike[: len(batch)]
        assert len(batch) in (1, 2, 4, 8)
        assert len(batch) <= min(most, len(alike)) < 2 * len(batch)
        left = [each for each in left if each not in batch]
        assert len(waiting) == len(left)
    assert waiting.close() == []
    assert waiting.take(lambda first: most) == []


def test_what_keeps_jobs_apart() -> None:
    one = job(1)
    assert one.alike == job(1, seed=9).alike
    others = [
        job(2),
        job(1, model="b"),
        Job("a", "1", one.settings, 2.0),
        Job("a", "1", one.settings, 1.0, "rain"),
        Job("a", "1", Settings(steps=2, cfg_scale=3), 1.0),
        Job("a", "1", Settings(steps=2, sampler="dpmpp-2m"), 1.0),
    ]
    assert all(one.alike != other.alike for other in others)


def test_places_are_bounded_and_freed() -> None:
    waiting = WaitingList(2)
    jobs = [job(i) for i in range(3)]
    waiting.put(jobs[0])
    waiting.put(jobs[1])
    with pytest.raises(Full):
        waiting.put(jobs[2])
    waiting.remove(jobs[0])
    waiting.remove(jobs[0])  # who is not there is no mistake: it may have been taken
    waiting.put(jobs[2])
    assert not waiting.idle
    assert waiting.take(lambda first: 4) == [jobs[1]]
    assert waiting.close() == [jobs[2]]
    assert not waiting.idle  # what was taken is not finished before the next `take`
    assert waiting.take(lambda first: 4) == []
    assert waiting.idle
    with pytest.raises(Closed):
        waiting.put(jobs[0])
