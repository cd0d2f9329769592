"""Ratings become each model's mean opinion score, its difference from the first model, and 95 % intervals of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .answers import Rater
from .survey import Key

RESAMPLES = 10_000
SEED = 2510_00313
LEVEL = (2.5, 97.5)  # percentiles
Interval = tuple[float, float]
METHOD = (
    f"95 % intervals: percentile bootstrap, {RESAMPLES:,} resamples of raters and of prompts (both drawn anew, with "
    "replacement, the same draw for every model); differences are from the first model"
)


@dataclass(frozen=True)
class Score:
    """A model's mean over all of its ratings; the difference is that of the means, and None for the first model."""

    model: str
    mean: float
    interval: Interval
    ratings: int
    difference: float | None
    difference_interval: Interval | None


def rating_table(key: Key, raters: Sequence[Rater]) -> NDArray[np.float64]:
    """Ratings [models, raters, prompts], NaN for what a rater has not rated."""
    prompts = sorted({prompt for _, prompt in key.questions.values()})
    table = np.full((len(key.models), len(raters), len(prompts)), np.nan)
    for row, rater in enumerate(raters):
        for question, rating in rater.ratings.items():
            model, prompt = key.questions[question]
            table[key.models.index(model), row, prompts.index(prompt)] = rating
    return table


def scores(models: Sequence[str], table: NDArray[np.float64], resamples: int = RESAMPLES) -> list[Score]:
    """table [models, raters, prompts] -> the models' scores, in order.

    The bootstrap draws raters and prompts (Owen's pigeonhole bootstrap): its intervals speak of other raters and other
    prompts of the same kind. A model that nobody rated gets NaN.
    """
    rng = np.random.default_rng(SEED)
    raters, prompts = table.shape[1:]
    of_raters = rng.multinomial(raters, np.full(raters, 1 / raters), resamples).astype(float)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples).astype(float)
    rated = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # a resample in which a model was not rated says nothing of it
        sums = np.einsum("br,mrp,bp->mb", of_raters, np.where(rated, table, 0.0), of_prompts, optimize=True)
        means = sums / np.einsum("br,mrp,bp->mb", of_raters, rated.astype(float), of_prompts, optimize=True)
        mean = [np.divide(np.nansum(one), seen.sum()) for one, seen in zip(table, rated)]
    found = []
    for place, model in enumerate(models):
        first = place == 0
        found.append(
            Score(
                model,
                float(mean[place]),
                _interval(means[place]),
                int(rated[place].sum()),
                None if first else float(mean[place] - mean[0]),
                None if first else _interval(means[place] - means[0]),
            )
        )
    return found


def _interval(values: NDArray[np.float64]) -> Interval:
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, LEVEL)
    return float(low), float(high)
