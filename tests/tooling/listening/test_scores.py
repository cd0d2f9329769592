"""Means and bootstrap intervals against plain loops and against all resamples there are."""

import itertools

import numpy as np
import pytest

from dit_trt.tooling.listening.scores import scores

MODELS = ["a", "b"]


def ratings(raters, prompts, missing=0.0, seed=0):
    rng = np.random.default_rng(seed)
    table = np.clip(np.rint(rng.normal(3, 0.7, (2, raters, prompts)) + np.array([0.8, -0.4])[:, None, None]), 1, 5)
    return np.where(rng.random(table.shape) < missing, np.nan, table)


def by_loops(table, resamples, seed):
    """Indices drawn one by one, lists averaged: no weights, no einsum."""
    rng = np.random.default_rng(seed)
    models, raters, prompts = table.shape
    means = []
    for _ in range(resamples):
        rows, columns = rng.integers(raters, size=raters), rng.integers(prompts, size=prompts)
        means.append([np.nanmean([table[m, row, column] for row in rows for column in columns]) for m in range(models)])
    means = np.array(means)
    return [np.percentile(values, [2.5, 97.5]) for values in (means[:, 0], means[:, 1], means[:, 1] - means[:, 0])]


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_intervals_are_those_of_plain_loops(missing):
    table = ratings(8, 5, missing)
    first, second = scores(MODELS, table)
    for place, score in enumerate((first, second)):
        seen = [value for value in table[place].ravel() if not np.isnan(value)]
        assert score.mean == pytest.approx(sum(seen) / len(seen))
        assert score.ratings == len(seen)
    assert first.difference is None
    assert first.difference_interval is None
    assert second.difference == pytest.approx(second.mean - first.mean)
    found = (first.interval, second.interval, second.difference_interval)
    for interval, expected in zip(found, by_loops(table, 4000, seed=7)):
        np.testing.assert_allclose(interval, expected, atol=0.06)


def test_intervals_are_those_of_all_resamples_there_are():
    """3 raters x 3 prompts: 27 x 27 equally likely resamples. Means are discrete, so the bounds are its very values."""
    table = ratings(3, 3, seed=3)[:1]
    means = [
        table[0][np.ix_(rows, columns)].mean()
        for rows in itertools.product(range(3), repeat=3)
        for columns in itertools.product(range(3), repeat=3)
    ]
    (score,) = scores(["a"], table, resamples=200_000)
    np.testing.assert_allclose(score.interval, np.percentile(means, [2.5, 97.5]), atol=0.12)
    low, high = score.interval
    assert np.mean(np.array(means) < low - 1e-9) <= 0.03
    assert np.mean(np.array(means) > high + 1e-9) <= 0.03
    assert np.mean(np.array(means) <= low + 1e-9) >= 0.02
    assert np.mean(np.array(means) >= high - 1e-9) >= 0.02


def test_raters_who_agree_on_everything_leave_no_doubt():
    first, second = scores(MODELS, np.stack([np.full((4, 5), 4.0), np.full((4, 5), 2.0)]))
    assert (first.mean, first.interval) == (4, (4, 4))
    assert (second.difference, second.difference_interval) == (-2, (-2, -2))


def test_a_raters_own_level_cancels_in_the_difference():
    """Half of the raters give 1 and 2, half 4 and 5: each mean is in doubt, their difference is not."""
    level = np.array([1.0, 1, 1, 4, 4, 4])[:, None] + np.zeros((6, 5))
    first, second = scores(MODELS, np.stack([level, level + 1]))
    assert first.interval[1] - first.interval[0] > 1.5
    np.testing.assert_allclose(second.difference_interval, (1, 1))


def test_a_model_that_nobody_rated():
    table = ratings(3, 4)
    table[1] = np.nan
    first, second = scores(MODELS, table)
    assert np.isfinite(first.interval).all()
    assert second.ratings == 0
    assert np.isnan([second.mean, *second.interval, second.difference, *second.difference_interval]).all()
