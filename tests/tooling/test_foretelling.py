"""A calibration says how long it will take as soon as one call of the model has been timed."""

from __future__ import annotations

import pytest

from dit_trt.tooling.workflow import foretelling


@pytest.mark.parametrize(
    ("counts", "times", "calls", "expected"),
    [
        ([0, 0, 1, 2], [0, 50, 62, 75], 5000, "took 12.0 s: the 4999 to come take about 16 h 40 min"),
        ([3, 1, 2, 3, 4, 5], [0, 9, 9, 9, 11, 13], 100, "took 2.0 s: the 96 to come take about 3 min"),  # resumed
        ([0, 0, 1, 2], [0, 1, 1.5, 2], 100, None),
        ([7], [0], 7, None),
    ],
)
def test_told_once_after_the_first_new_call(
    counts: list[int], times: list[float], calls: int, expected: str | None
) -> None:
    clock, said, seen = iter(times), [], []
    counted = foretelling(seen.append, calls, said.append, lambda: next(clock))
    for n in counts:
        counted(n)
    assert seen == counts
    assert len(said) == (expected is not None)
    assert expected is None or expected in said[0]
