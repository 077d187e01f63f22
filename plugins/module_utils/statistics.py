# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Statistics of paired trials. The unit is one trial's figure, such as its median TPOT. Private to the collection.

Figures are compared as ratios, so everything here is done on logarithms. A pair of identical trials differs by
chance; the *noise floor* is how far, as one standard deviation, measured in the session itself. A win must stand
clear of it. With few pairs, where no test can reach significance, every single pair must; from five pairs on the
median must, every pair must agree, and a sign test and a bootstrap interval must say so too. On arms that are the
same, each rule calls a difference in fewer than 5 of 100 sessions; ``tests/unit/test_error_rates.py`` proves both
sides of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

#: a floor below this is not believed: clocks and schedulers alone do as much
SMALLEST_FLOOR = 0.01
#: fewer pairs do not even tell the noise
FEWEST_PAIRS = 3
#: fewer pairs cannot reach p < 0.05 by a sign test (the smallest p of n pairs is 2**-n)
PAIRS_FOR_P = 5
SIGNIFICANCE = 0.05
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial's figure, in the order of the session: of which arm, and of which pair."""

    arm: str
    pair: int
    value: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the pairs of two arms say: ratios of the baseline's figure to the tested one's, above 1 where it is less."""

    ratios: list[float]
    floor: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def p_value(self) -> float | None:
        return sign_test(self.ratios)

    @functools.cached_property
    def interval(self) -> list[float] | None:
        return bootstrap_interval(self.ratios)

    @property
    def direction(self) -> int:
        """1 if the tested arm has the smaller figure beyond doubt, -1 if the larger, 0 if nobody can tell."""
        if len(self.ratios) < FEWEST_PAIRS:
            return 0
        least, most = min(self.ratios), max(self.ratios)
        if len(self.ratios) < PAIRS_FOR_P:
            return 1 if least > 1 + self.floor else -1 if most < 1 / (1 + self.floor) else 0
        if least > 1 and self.median > 1 + self.floor:
            interval, p_value = self.interval, self.p_value
            return int(interval is not None and interval[0] > 1 and p_value is not None and p_value <= SIGNIFICANCE)
        if most < 1 and self.median < 1 / (1 + self.floor):
            return -1
        return 0


def compare(trials: Sequence[Trial], baseline: str, tested: str) -> Comparison:
    """The pairs of two arms, and the session's noise from all trials of both, given in the order of the session."""
    values = {arm: {t.pair: math.log(t.value) for t in trials if t.arm == arm} for arm in (baseline, tested)}
    pairs = sorted(set(values[baseline]) & set(values[tested]))
    logs = [values[baseline][pair] - values[tested][pair] for pair in pairs]
    return Comparison([math.exp(value) for value in logs], max(SMALLEST_FLOOR, math.expm1(pair_noise(trials, logs))))


def pair_noise(trials: Sequence[Trial], logs: Sequence[float]) -> float:
    """Standard deviation of the log ratio of two equal trials: the larger of two estimates, so that neither flatters.

    The first sees what happens between neighbours only, as a pair does: trials of one arm that followed each other
    in the ABBA order, and how far the pairs disagree among themselves. The second sees all trials of an arm, so
    also a slow drift. Neither depends on which arm is faster.
    """
    both = itertools.pairwise(trials)
    neighbours = [math.log(one.value / other.value) for one, other in both if one.arm == other.arm]
    squares = sum(value**2 for value in neighbours) + _squares(logs)
    freedom = len(neighbours) + max(0, len(logs) - 1)
    by_neighbours = math.sqrt(squares / freedom) if freedom else 0.0
    arms = [[math.log(t.value) for t in trials if t.arm == arm] for arm in sorted({t.arm for t in trials})]
    freedom = sum(len(values) - 1 for values in arms)
    by_arms = math.sqrt(2 * sum(map(_squares, arms)) / freedom) if freedom else 0.0
    return max(by_neighbours, by_arms)


def _squares(values: Sequence[float]) -> float:
    return sum((value - statistics.fmean(values)) ** 2 for value in values) if values else 0.0


def sign_test(ratios: list[float]) -> float | None:
    """One-sided p-value that ratios exceed 1, from their signs alone; ``None`` for fewer than five pairs."""
    pairs = len(ratios)
    if pairs < PAIRS_FOR_P:
        return None
    wins = sum(ratio > 1 for ratio in ratios)
    return float(sum(math.comb(pairs, number) for number in range(wins, pairs + 1)) / 2**pairs)


def stands_above(upper: Sequence[float], lower: Sequence[float]) -> bool:
    """Whether one sample is above another beyond chance: the exact one-sided rank-sum test (Mann and Whitney, 1947).

    Three values on each side must be apart wholly (p = 1/20), five may overlap a little. Fewer than three tell nothing.
    """
    if min(len(upper), len(lower)) < FEWEST_PAIRS:
        return False
    inversions = sum(high <= low for high in upper for low in lower)
    orders = sum(_orders(len(upper), len(lower), number) for number in range(inversions + 1))
    return orders / math.comb(len(upper) + len(lower), len(upper)) <= SIGNIFICANCE


@functools.cache
def _orders(upper: int, lower: int, inversions: int) -> int:
    """How many orders of two samples have that many inversions, by which of the two holds the largest value."""
    if inversions < 0:
        return 0
    if not upper or not lower:
        return int(inversions == 0)
    return _orders(upper - 1, lower, inversions) + _orders(upper, lower - 1, inversions - upper)


def bootstrap_interval(ratios: list[float], confidence: float = 0.95) -> list[float] | None:
    """Percentile interval of the median ratio over resampled pairs; ``None`` for fewer than five pairs."""
    if len(ratios) < PAIRS_FOR_P:
        return None
    rng = random.Random(0)  # the same evidence always gives the same interval
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _sample in range(RESAMPLES))
    tail = int((1 - confidence) / 2 * RESAMPLES)
    return [medians[tail], medians[-tail - 1]]


def describe(values: list[float]) -> dict[str, Any]:
    """Median, mean, standard deviation and the values themselves."""
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "trials": values,
    }
