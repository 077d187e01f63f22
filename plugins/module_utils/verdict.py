# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From measured trials to "ship", "do not ship" or "inconclusive". Pure; private to the collection.

Ship only when acceptance length and median TPOT both win, by more than the session's own noise, every pair
agreeing. A DRAFT says what it would be; a VERDICT also satisfies every condition of a fair serving comparison.
"""

from __future__ import annotations

import itertools
import statistics as std
from typing import Any

from . import context, diagnosis, levers, sol
from .errors import SpecDecodeError
from .files import sha256_value
from .hardware import plain_name
from .statistics import Comparison, Trial, compare, describe
from .vllm_metrics import on_this_machine

STANDING, TRAINED = "standing", "trained"
LIMITS: dict[str, float] = {
    "min_trials": 3,
    "min_acceptance_length": 1.0,
    "max_ttft_p99_ratio": 1.5,
    "max_error_rate": 0.0,
    "max_length_difference": 0.05,
    # Verifying several tokens at once rounds differently than one: some greedy texts differ without any fault.
    "max_text_mismatch": 0.25,
    "near_zero_acceptance": 0.15,
    "healthy_accuracy": 0.5,
    "served_share_of_accuracy": 0.6,
    "impossible_tolerance": 0.05,
    # Of the requests asked for in flight, the share that was there on average: fewer is another load than the one named.
    "min_share_in_flight": 0.8,
}
#: methods that look for what to draft in the text itself
LOOKUP = ("ngram", "ngram_gpu", "suffix")
#: purposes of trials that compare the standing arm with the trained one, and that only tell the noise
COMPARED = ("compare", "noise")


def judge(
    acceptance: dict[str, Any],
    thresholds: dict[str, float] | None = None,
    *,
    convert: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    draft_config: dict[str, Any] | None = None,
    draft_bytes: int | None = None,
    ceilings: dict[str, Any] | None = None,
    target_config: dict[str, Any] | None = None,
    profile: dict[str, Any] | None = None,
    ledger: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The verdict on one measurement, with every figure it rests on.

    ``acceptance`` is what ``measure_arms.py`` wrote. The other phases' results, where given, let a loss be
    diagnosed (training accuracy, layers captured) and prove that the prompts were held out; ``draft_config`` is what
    vLLM read of the served draft, ``draft_bytes`` the size of its weights. ``ceilings`` and ``target_config`` give
    %SoL, ``profile`` says what else was captured, ``ledger`` what earlier runs settled.
    """
    limits = {**LIMITS, **(thresholds or {})}
    _check_arms(acceptance)
    evidence = diagnosis.Evidence(convert, train, draft_config)
    grounding = _Grounding(acceptance, ceilings or {}, target_config, profile, draft_bytes or _stored_bytes(convert))
    concurrencies = list(acceptance["plan"]["concurrencies"])
    shapes = [_shape(acceptance, concurrency, limits, evidence, grounding) for concurrency in concurrencies]
    head = shapes[0]
    reasons = tier_reasons(acceptance, dataset, shapes, limits)
    decisions = {shape["decision"] for shape in shapes}
    # A draft that wins at one load and loses at another is not one to ship for both.
    decision = head["decision"] if len(decisions) == 1 else "do_not_ship" if "do_not_ship" in decisions else "inconclusive"
    cause, words = diagnosis.overall(decision, shapes)
    method = _method(acceptance["arms"][TRAINED])
    found = {
        "decision": decision,
        "tier": "DRAFT" if reasons else "VERDICT",
        "tier_reasons": reasons,
        "reasons": [reason for shape in shapes for reason in shape["reasons"]],
        "cause": cause,
        "diagnosis": words,
        "method": method,
        "prompts_held_out": _held_out(dataset, method),
        "arms": head["arms"],
        "speedup_tpot": head["speedup_tpot"],
        "greedy_outputs_equal": all(shape["texts_equal"] for shape in shapes),
        "shapes": shapes,
        "context": head["context"],
        # A measurement that was gone on with later, or only written anew, is as old as its last trial.
        "measured_at": max(t.get("started_at", "") for t in acceptance["trials"]) or acceptance["finished_at"],
        "measurement": measurement_of(acceptance),
        "training": _training(head, train),
        "expiry": expiry(acceptance),
    }
    frontier = levers.frontier(head, method=method, concurrencies=concurrencies, train=train, longest_k=evidence.longest)
    settled = levers.settle(ledger, {**found, "frontier": frontier})
    found["levers"] = settled
    found["next_levers"] = [lever for lever in settled["levers"] if lever["status"] == "open"]
    context.check_numbers(found)
    return found


def measurement_of(acceptance: dict[str, Any]) -> str:
    """What tells one measurement from another: its trials."""
    return sha256_value(acceptance["trials"])[:16]


def expiry(acceptance: dict[str, Any]) -> dict[str, Any]:
    """What a verdict on this measurement holds for. A changed one makes it stale."""
    standing = acceptance["arms"][STANDING]
    return {
        "holds_for": {
            "draft_sha": acceptance["draft"].get("sha"),
            "standing_draft_sha": standing.get("draft_sha"),
            "target_sha": acceptance["plan"]["target"].get("sha"),
            "hardware": acceptance["hardware"]["name"],
            "vllm": standing["resolved"]["version"],
            "image": context.image_of(acceptance, STANDING),
            "prompts_sha256": acceptance["plan"]["prompts"].get("sha256"),
        },
        "rule": "stale as soon as any of these differs from what is served",
    }


def stale(verdict: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Why a verdict no longer holds, given what is served now; empty while it does.

    ``facts`` holds today's values by the names in ``expiry.holds_for``. A fact that the verdict depends on and that
    is not given is a reason too; one that the verdict never knew (such as the image, outside containers) is not.
    """
    reasons = []
    for name, then in verdict["expiry"]["holds_for"].items():
        if then is None:
            continue
        if facts.get(name) is None:
            reasons.append(f"nothing tells what {name} is now; it was {then}")
        elif _plain(name, facts[name]) != _plain(name, then):
            reasons.append(f"{name} was {then} and is {facts[name]} now")
    return reasons


def _plain(name: str, value: Any) -> Any:
    # 0.32.0+cpu and 0.32.0 are one version, built for different platforms; the hardware is compared by itself.
    if name == "vllm":
        return str(value).partition("+")[0]
    return plain_name(str(value)) if name == "hardware" else value


def _check_arms(acceptance: dict[str, Any]) -> None:
    missing = [name for name in (STANDING, TRAINED) if name not in acceptance["arms"]]
    if missing:
        raise SpecDecodeError(
            f"The measurement has no {missing[0]} arm, only {', '.join(acceptance['arms'])}.",
            "Measure the standing configuration and the draft side by side.",
        )


def _stored_bytes(convert: dict[str, Any] | None) -> int | None:
    """A trained draft's size where its files are elsewhere: it is stored in bfloat16, two bytes a parameter."""
    return 2 * convert["parameters"] if convert and convert.get("parameters") else None


class _Grounding:
    """What every number of one measurement is grounded in: ceilings, traffic and the evidence captured."""

    def __init__(
        self,
        acceptance: dict[str, Any],
        ceilings: dict[str, Any],
        target_config: dict[str, Any] | None,
        profile: dict[str, Any] | None,
        draft_bytes: int | None,
    ) -> None:
        self._acceptance, self._config = acceptance, target_config
        self._ceiling = sol.ceiling_for(acceptance["hardware"]["name"], ceilings, ceilings.get("own"))
        watched = [bool(trial.get("device")) for trial in acceptance["trials"] if not trial["void"]]
        self.rigor, self.rests = sol.rigor(profile, bool(watched) and all(watched))
        self._draft_bytes = draft_bytes

    def of(self, name: str, arm: dict[str, Any], concurrency: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The grounding fields of an arm's context, and its %SoL with all parts."""
        resolved = self._acceptance["arms"][name]["resolved"]
        if self._ceiling is None:
            return {"percent_of_sol": None, "ceiling": sol.NO_CEILING, "rigor": self.rigor}, None
        key, peaks = self._ceiling
        parts = sol.traffic(
            self._acceptance["plan"]["target"], self._config, resolved, arm["speculative_config"], self._draft_bytes
        )
        share = sol.share(arm, resolved, concurrency, parts, float(peaks["memory_bandwidth_bytes_per_s"]))
        percent = round(share["percent"], 2) if share else None
        if share:
            share = {**share, "ceiling": key, "source": peaks["source"]}
        return {"percent_of_sol": percent, "ceiling": key, "rigor": self.rigor}, share


def _shape(
    acceptance: dict[str, Any],
    concurrency: int,
    limits: dict[str, float],
    evidence: diagnosis.Evidence,
    grounding: _Grounding,
) -> dict[str, Any]:
    """The comparison at one concurrency, with its own exact context."""
    trials = [trial for trial in acceptance["trials"] if trial["concurrency"] == concurrency]
    void = [f"trial {t['pair']} of the {t['arm']} arm is void: {t['void']}" for t in trials if t["void"]]
    usable = [t for t in trials if not t["void"] and t.get("purpose", "compare") in COMPARED]
    paired = _paired(usable, TRAINED)
    if not paired[TRAINED]:
        raise SpecDecodeError(
            f"No pair of trials at concurrency {concurrency} can be used. {' '.join(void)}",
            "Measure again on a quiet machine.",
        )
    arms = {name: _arm(paired[name], acceptance["arms"][name]) for name in (STANDING, TRAINED)}
    tpot = _compare(usable, TRAINED, lambda trial: trial["client"]["tpot_ms"]["median"])
    speculates = arms[STANDING]["drafts"] > 0
    cost = None if speculates else _step_cost(arms)
    methods = {name: _method(acceptance["arms"][name]) for name in arms}
    accepted = _compare(usable, TRAINED, lambda trial: 1 / _tokens_per_step([trial["engine"]], methods[trial["arm"]]))
    wins, losses, notes = _outcome(concurrency, arms, tpot, accepted, cost, limits)
    red = _guardrails(arms, limits, tpot.median, speculates, acceptance["plan"]["temperature"], trials)
    ratio = arms[TRAINED]["ttft_p99_ms"]["median"] / arms[STANDING]["ttft_p99_ms"]["median"]
    if ratio > limits["max_ttft_p99_ratio"]:
        losses.append(f"p99 of the time to first token is {ratio:.2f} times the standing arm's; it must stay below"
                      f" {limits['max_ttft_p99_ratio']:g}")  # fmt: skip
    if evidence.layers_problem:
        losses.append("the draft is served on other layers than it was trained on")
    decision = "do_not_ship" if losses else "ship" if len(wins) == 2 and not red else "inconclusive"
    contexts, shares = _grounded(acceptance, arms, concurrency, grounding)
    sweep = _sweep(acceptance, trials, concurrency, grounding)
    found = {
        "concurrency": concurrency,
        "decision": decision,
        "reasons": [*losses, *red, *notes, *wins, *void, *(word for point in sweep for word in point["differences"])],
        "arms": arms,
        "pairs": len(paired[TRAINED]),
        "noise_trials": sum(t.get("purpose") == "noise" for t in usable),
        "speedup_tpot": tpot.median,
        "speedup_pairs": tpot.ratios,
        "noise_floor": tpot.floor,
        "p_value": tpot.p_value,
        "interval": tpot.interval,
        "step_cost": cost,
        "break_even_acceptance_length": cost,
        "texts_equal": _mismatch(trials, STANDING, TRAINED) == 0,
        "text_mismatch": {
            "across_arms": _mismatch(trials, STANDING, TRAINED),
            "within_standing": _mismatch(trials, STANDING, STANDING),
            "within_trained": _mismatch(trials, TRAINED, TRAINED),
        },
        "speed_of_light": shares,
        "rigor": grounding.rests,
        "sweep": sweep,
        "draft_lengths": _draft_lengths(arms, tpot.median, cost, sweep, evidence.longest),
        "context": contexts,
    }
    found["cause"], found["diagnosis"] = diagnosis.diagnose(found, limits, evidence) if decision == "do_not_ship" else ("", "")
    return found


def _grounded(
    acceptance: dict[str, Any], arms: dict[str, dict[str, Any]], concurrency: int, grounding: _Grounding
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arms' contexts, refused unless they may be compared, and their %SoL with all parts; both by arm."""
    grounds = {name: grounding.of(name, figures, concurrency) for name, figures in arms.items()}
    contexts = {name: context.descriptor(acceptance, name, arms[name], concurrency, grounds[name][0]) for name in arms}
    context.check_comparable(contexts)
    return {name: each.as_dict() for name, each in contexts.items()}, {name: share for name, (_fields, share) in grounds.items()}


def _outcome(
    concurrency: int,
    arms: dict[str, dict[str, Any]],
    tpot: Comparison,
    accepted: Comparison,
    cost: float | None,
    limits: dict[str, float],
) -> tuple[list[str], list[str], list[str]]:
    """What wins, what loses and what nobody can tell, of TPOT and acceptance length."""
    length, base = arms[TRAINED]["tokens_per_step"], arms[STANDING]["tokens_per_step"]
    # Prompt lookup drafts on some steps only: what it accepts of a draft is not what it yields a step.
    what = "tokens a step" if any(looks_up(_method(arm)) for arm in arms.values()) else "acceptance length"
    rates = arms[TRAINED]["acceptance_per_position"]
    lists: dict[int, list[str]] = {1: [], -1: [], 0: []}
    test = (
        f", p = {tpot.p_value:.3f} for a win, 95 % interval {_figures(tpot.interval)}" if tpot.p_value and tpot.interval else ""
    )
    lists[tpot.direction].append(
        f"TPOT speed-up {tpot.median:.2f} at concurrency {concurrency}, pairs {_figures(tpot.ratios)},"
        f" noise floor {tpot.floor:.1%} of this session{test}"
    )
    if cost is None:
        # Both arms speculate: acceptance length is compared like TPOT, pair by pair.
        lists[accepted.direction].append(
            f"{what} {length:.2f} against the standing arm's {base:.2f}, noise floor {accepted.floor:.1%}"
        )
    else:
        # Without speculation it is 1 by definition, which any draft exceeds: it must exceed what a step costs.
        needed = max(cost * (1 + tpot.floor), limits["min_acceptance_length"])
        hopeless = bool(rates) and rates[0] < limits["near_zero_acceptance"]
        # Below break-even and slower are one thing, measured once: the pairs decide it, not two medians.
        direction = 1 if length > needed else -1 if hopeless or tpot.direction == -1 else 0
        lists[direction].append(
            f"{what} {length:.2f} against a break-even of {cost:.2f} at the measured step cost"
            + (f"; only {rates[0]:.2f} of first positions are accepted" if hopeless else "")
        )
    return lists[1], lists[-1], lists[0]


def _paired(trials: list[dict[str, Any]], tested: str) -> dict[str, list[dict[str, Any]]]:
    by = {name: {t["pair"]: t for t in trials if t["arm"] == name} for name in (STANDING, tested)}
    pairs = sorted(set(by[STANDING]) & set(by[tested]))
    return {name: [by[name][pair] for pair in pairs] for name in (STANDING, tested)}


def _compare(trials: list[dict[str, Any]], tested: str, figure: Any) -> Comparison:
    return compare([Trial(t["arm"], t["pair"], figure(t)) for t in trials if t["arm"] in (STANDING, tested)], STANDING, tested)


def _step_cost(arms: dict[str, dict[str, Any]], tested: str = TRAINED) -> float:
    """What a speculative step costs relative to one without: TPOT ratio times tokens a step. Also the break-even."""
    return float(arms[tested]["tpot_ms"]["median"] * arms[tested]["tokens_per_step"] / arms[STANDING]["tpot_ms"]["median"])


def _sweep(
    acceptance: dict[str, Any], trials: list[dict[str, Any]], concurrency: int, grounding: _Grounding
) -> list[dict[str, Any]]:
    """Every further K that was measured, against the standing trials of its own pairs, with contexts of its own."""
    found = []
    for name, arm in acceptance["arms"].items():
        if name in (STANDING, TRAINED):
            continue
        usable = [t for t in trials if not t["void"] and t.get("purpose") == "sweep"]
        paired = _paired(usable, name)
        if not paired[name]:
            continue
        arms = {each: _arm(paired[each], acceptance["arms"][each]) for each in (STANDING, name)}
        pairs = {trial["pair"] for trial in paired[name]}
        tpot = _compare([t for t in usable if t["pair"] in pairs], name, lambda trial: trial["client"]["tpot_ms"]["median"])
        contexts, shares = _grounded(acceptance, arms, concurrency, grounding)
        found.append(
            {
                "arm": name,
                "k": int(arm["num_speculative_tokens"]),
                "rates": arms[name]["accepted_per_step"],
                "acceptance_length": arms[name]["tokens_per_step"],
                "tpot_ms": arms[name]["tpot_ms"],
                "step_cost": _step_cost(arms, name),
                "speedup": tpot.median,
                "speedup_pairs": tpot.ratios,
                "noise_floor": tpot.floor,
                "direction": tpot.direction,
                "differences": [
                    f"the {name} arm's server differs from the standing one in {each['field']}: {each['values']}"
                    for each in arm.get("differences", [])
                    if not each["follows_from_speculation"]
                ],
                # The standing arm's figures are those of these pairs, which are not those of the comparison above.
                "arms": arms,
                "speed_of_light": shares,
                "context": contexts,
            }
        )
    return sorted(found, key=lambda point: point["k"])


def _draft_lengths(
    arms: dict[str, dict[str, Any]], speedup: float, cost: float | None, sweep: list[dict[str, Any]], longest: int | None
) -> dict[str, Any] | None:
    if cost is None:
        return None  # against a standing arm that speculates itself, a step's cost has no common unit
    trained = arms[TRAINED]
    own = {
        "k": len(trained["acceptance_per_position"]), "rates": trained["accepted_per_step"],
        "acceptance_length": trained["tokens_per_step"], "step_cost": cost, "speedup": speedup,
    }  # fmt: skip
    return levers.draft_lengths([own, *sweep], arms[STANDING]["tpot_ms"]["median"], longest)


def _method(arm: dict[str, Any]) -> str:
    return str((arm["speculative_config"] or {}).get("method", "none"))


def looks_up(method: str) -> bool:
    """Whether a method finds its drafts in the text itself, and drafts nothing where it finds none."""
    return method in LOOKUP


def _steps(engines: list[dict[str, Any]], method: str) -> float:
    """How many steps gave the requests their tokens after the first.

    A draft head drafts on each of them. Of prompt lookup vLLM counts only the drafts that were made; the steps are the
    observations of its inter-token latency, one for each output after a request's first, whatever it held.
    """
    drafts = float(sum(engine["drafts"] for engine in engines))
    if looks_up(method) and all(engine.get("itl_s") for engine in engines):
        return max(drafts, float(sum(engine["itl_s"]["count"] for engine in engines)))
    return drafts


def _tokens_per_step(engines: list[dict[str, Any]], method: str) -> float:
    """Ratio of sums. Without speculation every step yields the one token that the target computes: 1 by definition."""
    steps = _steps(engines, method)
    return 1 + sum(engine.get("accepted_tokens", 0) for engine in engines) / steps if steps else 1.0


def _arm(trials: list[dict[str, Any]], arm: dict[str, Any]) -> dict[str, Any]:
    engines = [trial["engine"] for trial in trials]
    drafts = sum(engine["drafts"] for engine in engines)
    steps = _steps(engines, _method(arm))
    positions = range(max((len(engine["acceptance_per_position"]) for engine in engines), default=0))
    accepted = [sum(e["acceptance_per_position"][place] * e["drafts"] for e in engines) for place in positions]
    client = [trial["client"] for trial in trials]
    return {
        "speculative_config": arm["speculative_config"],
        "drafts": drafts,
        "acceptance_length": 1 + sum(e.get("accepted_tokens", 0) for e in engines) / drafts if drafts else 1.0,
        "acceptance_per_position": [count / drafts for count in accepted],
        "tokens_per_step": _tokens_per_step(engines, _method(arm)),
        "accepted_per_step": [count / steps for count in accepted],
        "tpot_ms": describe([c["tpot_ms"]["median"] for c in client]),
        "itl_ms": describe([1e3 * e["itl_s"]["mean"] for e in engines if e.get("itl_s")] or [0.0]),
        "ttft_ms": describe([c["ttft_ms"]["median"] for c in client]),
        "ttft_p99_ms": describe([c["ttft_ms"]["p99"] for c in client]),
        "output_tokens_per_s": describe([c["output_tokens_per_s"] for c in client]),
        "output_tokens_mean": std.fmean(c["output_tokens"]["mean"] for c in client),
        "input_tokens_mean": std.fmean(c["input_tokens"]["mean"] for c in client),
        "in_flight": std.fmean(c["in_flight"] for c in client),
        "device": _device_means([trial.get("device") or {} for trial in trials]),
        "prompts": client[0]["requests"],
        "requests": sum(c["requests"] for c in client),
        "errors": sum(c["errors"] for c in client),
    }


def _device_means(trials: list[dict[str, float]]) -> dict[str, float]:
    """Means over the trials of the device counters that all of them have."""
    names = set(trials[0]).intersection(*trials[1:])
    return {name: std.fmean(trial[name] for trial in trials) for name in sorted(names)}


def _guardrails(
    arms: dict[str, dict[str, Any]],
    limits: dict[str, float],
    speedup: float,
    speculates: bool,
    temperature: float,
    trials: list[dict[str, Any]],
) -> list[str]:
    """What is wrong with a measurement that would otherwise be believed."""
    standing, trained = arms[STANDING], arms[TRAINED]
    red = []
    for name, arm in arms.items():
        if arm["errors"] > limits["max_error_rate"] * arm["requests"]:
            red.append(f"{arm['errors']} of {arm['requests']} requests of the {name} arm failed")
    gap = abs(trained["output_tokens_mean"] / standing["output_tokens_mean"] - 1)
    if gap > limits["max_length_difference"]:
        red.append(f"the arms' outputs differ in length by {gap:.1%}, so that their TPOT is not comparable")
    if temperature == 0:
        across = _mismatch(trials, STANDING, TRAINED)
        within = max(_mismatch(trials, name, name) for name in arms)
        if across > within + limits["max_text_mismatch"]:
            red.append(f"{across:.0%} of greedy answers differ between the arms, {within:.0%} within one; speculation must not"
                       " change them")  # fmt: skip
    length = trained["tokens_per_step"]
    if not speculates and speedup > length * (1 + limits["impossible_tolerance"]):
        red.append(f"a TPOT speed-up of {speedup:.2f} is impossible with {length:.2f} tokens a step")
    rates = trained["acceptance_per_position"]
    rising = any(after > before + 1e-6 for before, after in itertools.pairwise(rates))
    if rising or trained["acceptance_length"] > 1 + len(rates) + 1e-6:
        red.append(f"acceptance by position {_figures(rates)} is impossible: a position counts only after those before it")
    return red


def tier_reasons(
    acceptance: dict[str, Any], dataset: dict[str, Any] | None, shapes: list[dict[str, Any]], limits: dict[str, float]
) -> list[str]:
    """What keeps the result a DRAFT; empty for a VERDICT."""
    reasons = []
    compared = {name: acceptance["arms"][name] for name in (STANDING, TRAINED)}
    modes = {name: arm["resolved"].get("cudagraph_mode") for name, arm in compared.items()}
    if acceptance["hardware"]["kind"] == "cpu":
        reasons.append("measured on a CPU, where there are no CUDA graphs")
    elif len(set(map(repr, modes.values()))) > 1:
        reasons.append(f"the arms resolved to different CUDA graph modes: {modes}")
    elif any(mode in (None, "NONE") for mode in modes.values()):
        reasons.append(f"CUDA graphs are off or unknown: {modes}")
    eager = [name for name, arm in compared.items() if arm["resolved"].get("enforce_eager")]
    if eager:
        reasons.append(f"served eagerly: {', '.join(eager)}")
    fewest = min(shape["pairs"] for shape in shapes)
    if fewest < limits["min_trials"]:
        reasons.append(f"{fewest} usable trials an arm, fewer than {limits['min_trials']:g}")
    for shape in shapes:
        held = min(arm["in_flight"] for arm in shape["arms"].values())
        if held < limits["min_share_in_flight"] * shape["concurrency"]:
            reasons.append(f"concurrency {shape['concurrency']} was not held: {held:.1f} requests were in flight on average;"
                           f" measure with more prompts (spec_prompts, spec_eval_rows)")  # fmt: skip
    for difference in acceptance["differences"]:
        if not difference.get("follows_from_speculation"):
            reasons.append(f"the servers differ in {difference['field']}: {difference['values']}")
    reasons += _whereabouts(acceptance, compared)
    method = _method(acceptance["arms"][TRAINED])
    if dataset is None and not has_no_draft(method):
        reasons.append("nothing proves that training never saw the prompts")
    elif dataset is not None and dataset["overlap_train_eval"]:
        reasons.append(f"training saw {dataset['overlap_train_eval']} of the prompts")
    return reasons


def _whereabouts(acceptance: dict[str, Any], compared: dict[str, dict[str, Any]]) -> list[str]:
    """Why node and hardware of servers that run elsewhere are not known; a cluster tells, or the plan."""
    if "kubernetes" in acceptance or acceptance["plan"].get("served_on"):
        return []
    elsewhere = [arm["url"] for arm in compared.values() if arm.get("url") and not on_this_machine(arm["url"])]
    if not elsewhere:
        return []
    return [
        f"arms are served elsewhere ({', '.join(elsewhere)}), and nothing tells that it is one node, nor its hardware:"
        " name served_on in the plan"
    ]


def has_no_draft(method: str) -> bool:
    """Whether a method needs no draft: prompt lookup, or layers that are part of the target (``mtp`` by any of its names).

    Nothing is trained for it, so that every prompt is held out.
    """
    return looks_up(method) or method == "mtp" or method.endswith("_mtp")


def _held_out(dataset: dict[str, Any] | None, method: str) -> str:
    """How it is known that training never saw the prompts."""
    if dataset is not None:
        return f"as stated: {dataset['stated']}" if dataset.get("stated") else "compared with the training data"
    return "nothing was trained" if has_no_draft(method) else "not known"


def _training(shape: dict[str, Any], train: dict[str, Any] | None) -> dict[str, Any]:
    """What the report sets beside the served figures: the curve, and accuracy against acceptance."""
    rates = shape["arms"][TRAINED]["acceptance_per_position"]
    return {"gaps": levers.position_gaps(rates, train), "curve": (train or {}).get("curve", [])}


def _mismatch(trials: list[dict[str, Any]], left: str, right: str) -> float:
    """Share of prompts whose greedy text differs between trials of two arms (or between two trials of one)."""
    first = [t["texts"] for t in trials if t["arm"] == left]
    second = [t["texts"] for t in trials if t["arm"] == right]
    if left == right:
        second = second[1:]
    compared = [(a, b) for one, other in zip(first, second) for a, b in zip(one, other) if a and b]
    return sum(a != b for a, b in compared) / len(compared) if compared else 0.0


def _figures(values: list[float] | None) -> str:
    return " ".join(f"{value:.2f}" for value in values or [])
