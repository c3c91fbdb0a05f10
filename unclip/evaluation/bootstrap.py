"""How sure a figure is: bootstrap intervals of means, Wilson's interval of shares, the sign test of preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from unclip.errors import UsageError

CONFIDENCE = 0.95
RESAMPLES = 2000
_BLOCK = 250


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> str:
        return f"{self.low:.1%} to {self.high:.1%}"


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of (N,) and its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13). UsageError: no values."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise UsageError(f"values of shape {x.shape} have no mean to resample; expected one or more")
    return _ends(float(x.mean()), [counts @ x / len(x) for counts in _counts(len(x), resamples, seed)], confidence)


def pair_interval(
    values: np.ndarray,
    wanted: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of the `wanted` elements of (N, N), and the interval that comes of resampling the N samples, which rows and
    columns share: pairs are not independent. UsageError: nothing is wanted.
    """
    chosen = np.asarray(wanted, dtype=np.float64)
    if not chosen.any():
        raise UsageError("no pair is wanted, so there is no mean")
    x = np.where(chosen > 0, values, 0.0).astype(np.float64)
    means = []
    for counts in _counts(len(x), resamples, seed):
        total = np.einsum("ri,ri->r", counts @ x, counts)
        pairs = np.einsum("ri,ri->r", counts @ chosen, counts)
        means.append(total[pairs > 0] / pairs[pairs > 0])
    return _ends(float(x.sum() / chosen.sum()), means, confidence)


def crossed_interval(
    values: np.ndarray,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of what is known of (V, P), values from 0 to 1 of V voters on P pairs with nan where there is none, and its
    pigeonhole bootstrap interval (Owen 2007): voters and pairs are resampled, each by themselves.

    Votes on one pair go together, and so do those of one voter; an interval of independent votes (`wilson`) would be
    too narrow. This one errs to the wide side where voters do not differ. Where all values are 0 or all are 1 there is
    nothing to resample, and it is `wilson` with the pairs for trials. UsageError: nothing is known.
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x) if x.ndim == 2 else np.zeros((0, 0), dtype=bool)
    if not known.any():
        raise UsageError(f"values of shape {x.shape} have no mean to resample; expected one or more")
    mean = float(x[known].mean())
    if mean in (0.0, 1.0):
        pairs = int(known.any(0).sum())
        return wilson(mean * pairs, pairs, confidence)
    filled, means = np.where(known, x, 0.0), []
    for voters, pairs_ in zip(
        _counts(x.shape[0], resamples, seed), _counts(x.shape[1], resamples, seed + 1), strict=True
    ):
        total = np.einsum("rv,rv->r", voters, pairs_ @ filled.T)
        votes = np.einsum("rv,rv->r", voters, pairs_ @ known.T)
        means.append(total[votes > 0] / votes[votes > 0])
    return _ends(mean, means, confidence)


def wilson(successes: float, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """A share and its score interval (Wilson 1927), which stays within 0 and 1 and holds for few trials too.

    UsageError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UsageError(f"{successes:g} successes of {trials} trials; expected 0 to all of 1 or more")
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return Interval(p, max(0.0, middle - reach), min(1.0, middle + reach))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as uneven, were both equally likely (ties left out); 1 of none."""
    if wins < 0 or losses < 0:
        raise UsageError(f"{wins} wins and {losses} losses; expected 0 or more")
    total, more = wins + losses, max(wins, losses)
    tail = sum(math.comb(total, k) for k in range(more, total + 1))
    return min(1.0, 2 * tail / 2**total)


def _counts(size: int, resamples: int, seed: int) -> list[np.ndarray]:
    """How often each of `size` samples is drawn in each resample, (R, size) in blocks."""
    if resamples < 1:
        raise UsageError(f"{resamples} resamples, expected 1 or more")
    rng = np.random.default_rng(seed)
    shares = np.full(size, 1 / size)
    rows = [min(_BLOCK, resamples - start) for start in range(0, resamples, _BLOCK)]
    return [rng.multinomial(size, shares, size=count).astype(np.float64) for count in rows]


def _ends(value: float, means: Sequence[np.ndarray], confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}, expected a share between 0 and 1")
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
