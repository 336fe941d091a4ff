"""95 % intervals of scores over the images that might have been drawn: Wilson's of a share, else a bootstrap over images."""

from __future__ import annotations

import numpy as np

from ..counts import Measure
from .pareto import binomial_interval

RESAMPLES = 2000
_AT_ONCE = 2**22  # weights of images


def score_interval(measure: Measure, contributions: np.ndarray) -> tuple[float, float]:
    """(low, high) of the score of N images. contributions: (N,) or (N, K), see `supernet.tasks.Task`."""
    if measure.proportion:
        low, high = binomial_interval(int(contributions.sum()), len(contributions))
        return float(low), float(high)
    low, high = np.percentile(resampled(measure, contributions), (2.5, 97.5))
    return float(low), float(high)


def difference_interval(measure: Measure, contributions: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(low, high) of one score minus another, of two models on the same N images: both see the same draws of them."""
    gaps = resampled(measure, contributions) - resampled(measure, reference)
    low, high = np.percentile(gaps, (2.5, 97.5))
    return float(low), float(high)


def resampled(measure: Measure, contributions: np.ndarray) -> np.ndarray:
    """Scores of `RESAMPLES` draws of N images with replacement, (RESAMPLES,); the same draws for the same N."""
    table = contributions.reshape(len(contributions), -1).astype(np.int64)  # (N, K)
    images, rng = len(table), np.random.default_rng(0)
    share, left, found = np.full(images, 1 / images), RESAMPLES, []
    while left:
        draws = min(left, max(1, _AT_ONCE // images))
        weights = rng.multinomial(images, share, size=draws)  # how often each image is drawn
        found.append(np.asarray(measure.number(weights @ table, images), float))
        left -= draws
    return np.concatenate(found)
