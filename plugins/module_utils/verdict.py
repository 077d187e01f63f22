# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From measured trials to "ship", "do not ship" or "inconclusive". Pure; private to the collection.

Ship only when acceptance length and median TPOT both win, every pair by more than the session's own noise. A
DRAFT says what it would be; a VERDICT also satisfies every condition of a fair serving comparison.
"""

from __future__ import annotations

import statistics as std
from typing import Any

from . import levers
from .context import descriptor
from .errors import SpecDecodeError
from .statistics import bootstrap_interval, describe, noise_floor, sign_test

STANDING, TRAINED = "standing", "trained"
DEFAULTS: dict[str, float] = {
    "min_trials": 3,
    "min_acceptance_length": 1.0,
    "max_ttft_p99_ratio": 1.5,
    "max_error_rate": 0.0,
    "max_length_difference": 0.05,
    "max_text_mismatch": 0.05,
    "near_zero_acceptance": 0.15,
    "healthy_accuracy": 0.5,
    "impossible_tolerance": 0.05,
}


def judge(
    acceptance: dict[str, Any],
    thresholds: dict[str, float] | None = None,
    *,
    convert: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The verdict on one measurement, with every figure it rests on.

    ``acceptance`` is what ``measure_arms.py`` wrote. The other phases' results, where given, let a loss be
    diagnosed (training accuracy, layers captured and served) and prove that the prompts were held out.
    """
    limits = {**DEFAULTS, **(thresholds or {})}
    shapes = [_at(acceptance, concurrency, limits, convert, train) for concurrency in acceptance["plan"]["concurrencies"]]
    head = shapes[0]
    reasons = tier_reasons(acceptance, dataset, shapes, limits)
    decisions = {shape["decision"] for shape in shapes}
    # A draft that wins at one load and loses at another is not one to ship for both.
    decision = head["decision"] if len(decisions) == 1 else "do_not_ship" if "do_not_ship" in decisions else "inconclusive"
    return {
        "decision": decision,
        "tier": "DRAFT" if reasons else "VERDICT",
        "tier_reasons": reasons,
        "reasons": [reason for shape in shapes for reason in shape["reasons"]],
        "diagnosis": next((shape["diagnosis"] for shape in shapes if shape["diagnosis"]), ""),
        "arms": head["arms"],
        "speedup_tpot": head["speedup_tpot"],
        "greedy_outputs_equal": all(shape["texts_equal"] for shape in shapes),
        "shapes": shapes,
        "next_levers": head["next_levers"],
        "context": head["context"],
        "measured_at": acceptance["finished_at"],
        "expiry": {
            "holds_for": {
                "draft_sha": acceptance["draft"].get("sha"),
                "target_sha": acceptance["plan"]["target"].get("sha"),
                "hardware": acceptance["hardware"]["name"],
                "vllm": acceptance["arms"][STANDING]["resolved"]["version"],
                "prompts_sha256": acceptance["plan"]["prompts"].get("sha256"),
            },
            "rule": "stale as soon as any of these differs from what is served",
        },
    }


def _at(
    acceptance: dict[str, Any],
    concurrency: int,
    limits: dict[str, float],
    convert: dict[str, Any] | None,
    train: dict[str, Any] | None,
) -> dict[str, Any]:
    """The comparison at one concurrency, with its own exact context."""
    trials = [trial for trial in acceptance["trials"] if trial["concurrency"] == concurrency]
    usable = {name: {t["pair"]: t for t in trials if t["arm"] == name and not t["void"]} for name in (STANDING, TRAINED)}
    pairs = sorted(set(usable[STANDING]) & set(usable[TRAINED]))
    void = [f"trial {t['pair']} of the {t['arm']} arm is void: {t['void']}" for t in trials if t["void"]]
    if not pairs:
        raise SpecDecodeError(
            f"No pair of trials at concurrency {concurrency} can be used. {' '.join(void)}",
            "Measure again on a quiet machine.",
        )
    arms = {name: _arm([usable[name][pair] for pair in pairs], acceptance["arms"][name]) for name in usable}
    tpot = {name: arms[name]["tpot_ms"]["trials"] for name in arms}
    ratios = [before / after for before, after in zip(tpot[STANDING], tpot[TRAINED])]
    floor = noise_floor(list(tpot.values()))
    speedup = std.median(ratios)
    baseline_speculates = arms[STANDING]["drafts"] > 0
    length, base_length = arms[TRAINED]["acceptance_length"], arms[STANDING]["acceptance_length"]
    cost = std.median(tpot[TRAINED]) * length / std.median(tpot[STANDING])
    wins: list[str] = []
    losses: list[str] = []
    notes: list[str] = []
    (wins if all(ratio > 1 + floor for ratio in ratios) else notes).append(
        f"TPOT speed-up {speedup:.2f} at concurrency {concurrency}, pairs {_figures(ratios)},"
        f" noise floor {floor:.1%} of this session"
    )
    if all(ratio < 1 / (1 + floor) for ratio in ratios):
        losses.append(f"every pair's TPOT is worse than the standing arm's by more than the noise floor of {floor:.1%}")
    needed = max(base_length, limits["min_acceptance_length"], 0.0 if baseline_speculates else cost)
    if length > needed:
        wins.append(f"acceptance length {length:.2f} against {needed:.2f} needed")
    elif length <= base_length * (1 - floor) or (not baseline_speculates and length <= cost * (1 - floor)):
        losses.append(f"acceptance length {length:.2f} is below the {needed:.2f} that it needs to pay")
    else:
        notes.append(f"acceptance length {length:.2f} does not exceed the {needed:.2f} needed by more than noise")
    red = _guardrails(arms, limits, speedup, length, baseline_speculates)
    diagnosis = diagnose(arms, limits, speedup, floor, convert, train)
    if convert and _layers_mismatch(convert):
        losses.append("the draft is served on other layers than it was trained on")
    decision = "do_not_ship" if losses else "ship" if len(wins) == 2 and not red else "inconclusive"
    if decision == "inconclusive" and any("must stay" in reason for reason in red):
        decision = "do_not_ship"
    return {
        "concurrency": concurrency,
        "decision": decision,
        "reasons": [*losses, *red, *notes, *wins, *void],
        "diagnosis": diagnosis if decision == "do_not_ship" else "",
        "arms": arms,
        "pairs": len(pairs),
        "speedup_tpot": speedup,
        "speedup_pairs": ratios,
        "noise_floor": floor,
        "p_value": sign_test(ratios),
        "interval": bootstrap_interval(ratios),
        "step_cost": None if baseline_speculates else cost,
        "break_even_acceptance_length": None if baseline_speculates else cost,
        "texts_equal": _mismatch(trials, STANDING, TRAINED) == 0,
        "text_mismatch": {
            "across_arms": _mismatch(trials, STANDING, TRAINED),
            "within_standing": _mismatch(trials, STANDING, STANDING),
        },
        "next_levers": levers.frontier(arms, cost if not baseline_speculates else None, speedup, train),
        "context": {name: descriptor(acceptance, name, arms[name], concurrency) for name in arms},
    }


def _arm(trials: list[dict[str, Any]], arm: dict[str, Any]) -> dict[str, Any]:
    engines = [trial["engine"] for trial in trials]
    drafts = sum(engine["drafts"] for engine in engines)
    positions = max((len(engine["acceptance_per_position"]) for engine in engines), default=0)
    client = [trial["client"] for trial in trials]
    return {
        "speculative_config": arm["speculative_config"],
        "drafts": drafts,
        # Without speculation every step yields the one token that the target computes: 1 by definition.
        "acceptance_length": 1 + sum(e.get("accepted_tokens", 0) for e in engines) / drafts if drafts else 1.0,
        "acceptance_per_position": [
            sum(e["acceptance_per_position"][place] * e["drafts"] for e in engines) / drafts for place in range(positions)
        ],
        "tpot_ms": describe([c["tpot_ms"]["median"] for c in client]),
        "itl_ms": describe([1e3 * e["itl_s"]["mean"] for e in engines if e.get("itl_s")] or [0.0]),
        "ttft_ms": describe([c["ttft_ms"]["median"] for c in client]),
        "ttft_p99_ms": describe([c["ttft_ms"]["p99"] for c in client]),
        "output_tokens_per_s": describe([c["output_tokens_per_s"] for c in client]),
        "output_tokens_mean": std.fmean(c["output_tokens"]["mean"] for c in client),
        "input_tokens_mean": std.fmean(c["input_tokens"]["mean"] for c in client),
        "requests": sum(c["requests"] for c in client),
        "errors": sum(c["errors"] for c in client),
    }


def _guardrails(
    arms: dict[str, dict[str, Any]], limits: dict[str, float], speedup: float, length: float, speculates: bool
) -> list[str]:
    standing, trained = arms[STANDING], arms[TRAINED]
    red = []
    ratio = trained["ttft_p99_ms"]["median"] / standing["ttft_p99_ms"]["median"]
    if ratio > limits["max_ttft_p99_ratio"]:
        red.append(f"p99 of the time to first token is {ratio:.2f} times the standing arm's; it must stay below"
                   f" {limits['max_ttft_p99_ratio']:g}")  # fmt: skip
    for name, arm in arms.items():
        if arm["errors"] > limits["max_error_rate"] * arm["requests"]:
            red.append(f"{arm['errors']} of {arm['requests']} requests of the {name} arm failed")
    gap = abs(trained["output_tokens_mean"] / standing["output_tokens_mean"] - 1)
    if gap > limits["max_length_difference"]:
        red.append(f"the arms' outputs differ in length by {gap:.1%}, so that their TPOT is not comparable")
    if not speculates and speedup > length * (1 + limits["impossible_tolerance"]):
        red.append(f"a TPOT speed-up of {speedup:.2f} is impossible with an acceptance length of {length:.2f}")
    return red


def diagnose(
    arms: dict[str, dict[str, Any]],
    limits: dict[str, float],
    speedup: float,
    floor: float,
    convert: dict[str, Any] | None,
    train: dict[str, Any] | None,
) -> str:
    """The likely cause of a loss, in one sentence."""
    if convert and _layers_mismatch(convert):
        return (
            f"The draft was trained on layers {convert['layers_captured']}, but is served on"
            f" {convert['layers_served']} in vLLM's convention: convert it again."
        )
    rates = arms[TRAINED]["acceptance_per_position"]
    accuracy = levers.training_accuracy(train, 0)
    if rates and rates[0] < limits["near_zero_acceptance"]:
        if accuracy is not None and accuracy >= limits["healthy_accuracy"]:
            return (
                f"Train/serve mismatch: training accuracy was {accuracy:.2f}, but only {rates[0]:.2f} of first positions"
                " are accepted. Check the layers, the chat template and the target's version."
            )
        return f"The draft did not learn: only {rates[0]:.2f} of its first positions are accepted."
    if speedup < 1 + floor:
        return (
            f"The draft is too slow for what it saves: acceptance length {arms[TRAINED]['acceptance_length']:.2f}"
            f" gives a TPOT speed-up of {speedup:.2f}. Try a smaller K, a smaller draft or a lower concurrency."
        )
    return ""


def tier_reasons(
    acceptance: dict[str, Any], dataset: dict[str, Any] | None, shapes: list[dict[str, Any]], limits: dict[str, float]
) -> list[str]:
    """What keeps the result a DRAFT; empty for a VERDICT."""
    reasons = []
    modes = {name: arm["resolved"].get("cudagraph_mode") for name, arm in acceptance["arms"].items()}
    if acceptance["hardware"]["kind"] == "cpu":
        reasons.append("measured on a CPU, where there are no CUDA graphs")
    elif len(set(map(repr, modes.values()))) > 1:
        reasons.append(f"the arms resolved to different CUDA graph modes: {modes}")
    elif any(mode in (None, "NONE") for mode in modes.values()):
        reasons.append(f"CUDA graphs are off or unknown: {modes}")
    eager = [name for name, arm in acceptance["arms"].items() if arm["resolved"].get("enforce_eager")]
    if eager:
        reasons.append(f"served eagerly: {', '.join(eager)}")
    fewest = min(shape["pairs"] for shape in shapes)
    if fewest < limits["min_trials"]:
        reasons.append(f"{fewest} usable trials an arm, fewer than {limits['min_trials']:g}")
    for difference in acceptance["differences"]:
        reasons.append(f"the servers differ in {difference['field']}: {difference['values']}")
    if dataset is None:
        reasons.append("nothing proves that training never saw the prompts")
    elif dataset.get("overlap_train_eval"):
        reasons.append(f"training saw {dataset['overlap_train_eval']} of the prompts")
    return reasons


def _layers_mismatch(convert: dict[str, Any]) -> bool:
    shift = 1 if convert.get("method") == "eagle3" else 0
    return bool(convert.get("layers_captured")) and convert["layers_served"] != [
        layer + shift for layer in convert["layers_captured"]
    ]


def _mismatch(trials: list[dict[str, Any]], left: str, right: str) -> float:
    """Share of prompts whose greedy text differs between trials of two arms (or between two trials of one)."""
    first = [t["texts"] for t in trials if t["arm"] == left]
    second = [t["texts"] for t in trials if t["arm"] == right]
    if left == right:
        second = second[1:]
    compared = [(a, b) for one, other in zip(first, second) for a, b in zip(one, other) if a and b]
    return sum(a != b for a, b in compared) / len(compared) if compared else 0.0


def _figures(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
