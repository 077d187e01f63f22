# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What to try next, ranked by what it could unlock. Pure; private to the collection.

With A_i the share of drafts whose position i was accepted, the acceptance length at K' <= K is
tau(K') = 1 + A_1 + … + A_K' (exact for greedy chains). The cost of a step relative to no speculation is
r(K) = TPOT_K * tau_K / TPOT_0, and the speed-up tau(K) / r(K).
"""

from __future__ import annotations

from typing import Any

TRAINED = "trained"


def frontier(
    arms: dict[str, dict[str, Any]], cost: float | None, speedup: float, train: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Levers with expected unlock, cost and the gate that would prove or refute each; the largest unlock first."""
    rates = arms[TRAINED]["acceptance_per_position"]
    length = arms[TRAINED]["acceptance_length"]
    if not rates:
        return []
    levers = [*_draft_length(rates, length, cost, speedup), *_training(rates, length, speedup, train)]
    if cost is not None:
        levers.append(
            {
                "lever": "cheaper drafting",
                "expected": f"a step costs {cost:.2f} times one without speculation; a free draft would give {length:.2f}×",
                "unlock": length / speedup,
                "cost": "a smaller draft vocabulary or fewer draft layers, then training again",
                "gate": "TPOT at the same acceptance length",
            }
        )
    return sorted(levers, key=lambda lever: -float(lever["unlock"]))


def _draft_length(rates: list[float], length: float, cost: float | None, speedup: float) -> list[dict[str, Any]]:
    count = len(rates)
    last = rates[-1] / rates[-2] if count > 1 and rates[-2] else rates[-1]
    longer = length + rates[-1] * last
    levers = [
        {
            "lever": f"K = {count + 1} instead of {count}",
            "expected": f"acceptance length about {longer:.2f} if position {count + 1} is accepted as often as the last",
            "unlock": longer / length,
            "cost": "one more measurement; no training",
            "gate": f"TPOT at K = {count + 1} below that at K = {count}, by more than the noise floor",
        }
    ]
    if count > 1:
        shorter = length - rates[-1]
        levers.append(
            {
                "lever": f"K = {count - 1} instead of {count}",
                "expected": f"acceptance length {shorter:.2f}; pays if the last position costs more than"
                f" {rates[-1] / length:.0%} of a step",
                "unlock": 1.0 if rates[-1] / length > 0.1 else 1.05,
                "cost": "one more measurement; no training. Two values of K give the cost of a position",
                "gate": f"TPOT at K = {count - 1} below that at K = {count}, by more than the noise floor",
            }
        )
    return levers


def _training(rates: list[float], length: float, speedup: float, train: dict[str, Any] | None) -> list[dict[str, Any]]:
    perfect = 1 + len(rates)
    accuracy = training_accuracy(train, 0)
    gap = f"; training reached {accuracy:.2f} at the first position, serving {rates[0]:.2f}" if accuracy is not None else ""
    return [
        {
            "lever": "more and closer data, longer training",
            "expected": f"at most {perfect / length:.2f} times the acceptance length{gap}",
            "unlock": 1 + (perfect / length - 1) / 2,
            "cost": "data in the target's own words, then training again",
            "gate": "acceptance by position on held-out prompts",
        }
    ]


def training_accuracy(train: dict[str, Any] | None, position: int) -> float | None:
    """Training accuracy at a position: of EAGLE3 by position, of DFlash over the block."""
    last = (train or {}).get("last", {})
    accuracies = last.get("accs") or []
    if position < len(accuracies):
        return float(accuracies[position])
    return float(last["acc"]) if "acc" in last else None
