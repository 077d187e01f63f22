# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How often the gate is wrong: on arms that are the same, and on a draft that is truly a little faster.

Noise is both made up, in several shapes, and recorded: 24 trials of one server configuration, one after the other, on
a machine that was busy with other work. Everything is seeded, so that a rate is a fact of the code, not of the day.
"""

from __future__ import annotations

import json
import math
import pathlib
import random

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.statistics import Trial, compare
from ansible_collections.inference.spec_decode.tests.unit.measurements import judge, measurement

RECORDED = json.loads((pathlib.Path(__file__).parent / "data/same_arms.json").read_text())
SESSIONS = 400


def order(pairs):
    """ABBA, as the arms are measured."""
    return [(arm, pair) for pair in range(1, pairs + 1) for arm in (("S", "T") if pair % 2 else ("T", "S"))]


def session(noise, pairs, speedup=1.0):
    """One session's comparison; ``noise`` gives that many successive relative errors, as logarithms."""
    steps = order(pairs)
    trials = [
        Trial(arm, pair, 5.0 * math.exp(error) / (speedup if arm == "T" else 1.0))
        for (arm, pair), error in zip(steps, noise(len(steps)))
    ]
    return compare(trials, "S", "T").direction


def gauss(rng, sigma):
    return lambda count: [rng.gauss(0, sigma) for _each in range(count)]


def outliers(rng, sigma):
    return lambda count: [rng.gauss(0, sigma) * (5 if rng.random() < 0.1 else 1) for _each in range(count)]


def drifting(rng, sigma):
    return lambda count: [rng.gauss(0, sigma) + sigma * place for place in range(count)]


def lingering(rng, sigma):
    """A neighbour's load that stays a while: each trial remembers the one before."""

    def series(count):
        values = [rng.gauss(0, sigma)]
        while len(values) < count:
            values.append(0.8 * values[-1] + 0.6 * rng.gauss(0, sigma))
        return values

    return series


def bursts(rng, sigma):
    """Mostly still, now and then much slower."""
    return lambda count: [(3 * sigma if rng.random() < 0.3 else 0.0) + rng.gauss(0, sigma / 5) for _each in range(count)]


MODELS = {"gauss": gauss, "outliers": outliers, "drifting": drifting, "lingering": lingering, "bursts": bursts}


@pytest.mark.parametrize("pairs", [3, 4, 5, 8])
@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.15])
@pytest.mark.parametrize("model", MODELS)
def test_same_arms_are_inconclusive_at_least_95_times_in_100(model, sigma, pairs):
    noise = MODELS[model](random.Random(f"{model}{sigma}{pairs}"), sigma)
    decided = sum(session(noise, pairs) != 0 for _each in range(SESSIONS))
    assert decided <= 0.05 * SESSIONS


@pytest.mark.parametrize("pairs", [3, 5, 8])
@pytest.mark.parametrize("series", RECORDED["series"], ids=lambda series: series["name"])
def test_recorded_trials_of_same_arms_resampled(series, pairs):
    rng = random.Random(pairs)
    logs = [math.log(value) for value in series["tpot_ms"]]
    independent = sum(session(lambda count: rng.choices(logs, k=count), pairs) != 0 for _each in range(SESSIONS))
    assert independent <= 0.05 * SESSIONS

    # Successive trials as they were, from every start: with whatever the machine did meanwhile.
    starts = range(len(logs))
    decided = sum(session(lambda count, at=at: [logs[(at + i) % len(logs)] for i in range(count)], pairs) != 0 for at in starts)
    assert decided <= 1 + 0.05 * len(logs)


@pytest.mark.parametrize("pairs", [3, 4, 5, 8])
def test_true_win_of_10_per_cent_is_found_at_least_9_times_in_10(pairs):
    noise = gauss(random.Random(pairs), 0.02)
    found = [session(noise, pairs, speedup=1.1) for _each in range(SESSIONS)]
    assert found.count(1) >= 0.9 * SESSIONS and found.count(-1) == 0


@pytest.mark.parametrize("pairs", [3, 5])
def test_true_loss_of_10_per_cent_is_found_as_often(pairs):
    noise = gauss(random.Random(pairs), 0.02)
    found = [session(noise, pairs, speedup=1 / 1.1) for _each in range(SESSIONS)]
    assert found.count(-1) >= 0.9 * SESSIONS and found.count(1) == 0


@pytest.mark.parametrize("speculating", [False, True])
@pytest.mark.parametrize("series", RECORDED["series"], ids=lambda series: series["name"])
def test_whole_verdict_on_same_arms_is_inconclusive(series, speculating):
    """The gate from end to end, on recorded TPOT: with two arms that draft nothing, and with two that draft alike."""
    rng = random.Random(3)
    rates = (0.8, 0.6, 0.5) if speculating else ()
    decisions = []
    for _each in range(SESSIONS // 2):
        standing, trained = (rng.choices(series["tpot_ms"], k=3) for _arm in range(2))
        found = measurement(standing, trained, rates=rates, base_rates=rates)
        decisions.append(judge(found, train=None, convert=None)["decision"])
    assert decisions.count("inconclusive") >= 0.95 * len(decisions)


def test_more_noise_raises_the_floor():
    quiet, loud = (
        compare([Trial(a, p, 5 * math.exp(e)) for (a, p), e in zip(order(5), gauss(random.Random(1), s)(10))], "S", "T").floor
        for s in (0.01, 0.1)
    )
    assert quiet < loud
