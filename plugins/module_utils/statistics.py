# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Statistics of paired trials. The unit is one trial's median TPOT. Private to the collection."""

from __future__ import annotations

import random
import statistics
from typing import Any

#: measured noise below this is not believed: clocks and schedulers alone do as much
SMALLEST_FLOOR = 0.01
#: fewer pairs cannot reach p < 0.05 by a sign test (the smallest p of n pairs is 2**-n)
PAIRS_FOR_P = 5
RESAMPLES = 2000


def spread(values: list[float]) -> float:
    """How far equal trials lie apart: the largest over the smallest, less one."""
    return max(values) / min(values) - 1 if len(values) > 1 and min(values) > 0 else 0.0


def noise_floor(arms: list[list[float]]) -> float:
    """The largest spread inside any arm (A/A noise of this session), at least one per cent."""
    return max([SMALLEST_FLOOR, *(spread(values) for values in arms)])


def sign_test(ratios: list[float]) -> float | None:
    """One-sided p-value that speed-up ratios exceed 1, from their signs alone; ``None`` for fewer than five pairs."""
    pairs = len(ratios)
    if pairs < PAIRS_FOR_P:
        return None
    wins = sum(ratio > 1 for ratio in ratios)
    ways = 1.0
    total = 0.0
    for number in range(pairs + 1):
        if number >= wins:
            total += ways
        ways = ways * (pairs - number) / (number + 1)
    return float(total / 2**pairs)


def bootstrap_interval(ratios: list[float], confidence: float = 0.95) -> list[float] | None:
    """Percentile interval of the median ratio over resampled pairs; ``None`` for fewer than five pairs."""
    if len(ratios) < PAIRS_FOR_P:
        return None
    rng = random.Random(0)
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
