# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What to try next, ranked by what it could unlock; and what was tried and refuted. Pure; private to the collection.

With A_i the share of drafts whose position i was accepted, the acceptance length at K' <= K is
tau(K') = 1 + A_1 + … + A_K' (exact for greedy chains, approximate for DFlash). The cost of a step relative to no
speculation is r(K) = TPOT_K * tau_K / TPOT_0, about v0 + c*K, and the speed-up tau(K) / r(K). One K gives no line:
two or more measured ones do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .statistics import stands_above

#: the other way to train a head for the same target
OTHER_METHOD = {"eagle3": "dflash", "dflash": "eagle3"}
#: how far beyond the longest measured K a prediction is trusted
FURTHER = 2
#: what was tried with such an end is not proposed again under the same conditions
SPENT = ("mixed", "refuted")


def acceptance_length(rates: list[float], k: int) -> float:
    """tau(k); positions beyond the measured ones are accepted like the last one, conditionally."""
    known = list(rates[:k])
    conditional = rates[-1] / rates[-2] if len(rates) > 1 and rates[-2] else rates[-1]
    while len(known) < k:
        known.append(known[-1] * conditional)
    return 1 + sum(known)


def fit_step_cost(points: list[tuple[int, float]]) -> tuple[float, float] | None:
    """v0 and c of r(K) = v0 + c*K by least squares; ``None`` for fewer than two values of K."""
    ks = [k for k, _cost in points]
    if len(set(ks)) < 2:
        return None
    mean_k, mean_r = sum(ks) / len(ks), sum(cost for _k, cost in points) / len(points)
    slope = sum((k - mean_k) * (cost - mean_r) for k, cost in points) / sum((k - mean_k) ** 2 for k in ks)
    return mean_r - slope * mean_k, slope


def draft_lengths(measured: list[dict[str, Any]], standing_tpot_ms: float, longest_k: int | None = None) -> dict[str, Any] | None:
    """The speed-up against K: measured points and, from two of them on, the fitted curve with its best K.

    ``measured`` holds, for each K, ``k``, ``rates``, ``acceptance_length``, ``step_cost`` and ``speedup``; ``longest_k`` is
    the most that the draft can do.
    """
    usable = [point for point in measured if point["rates"]]
    if not usable:
        return None
    usable.sort(key=lambda point: point["k"])
    longest = usable[-1]
    points = [{name: point[name] for name in ("k", "acceptance_length", "step_cost", "speedup")} for point in usable]
    fitted = fit_step_cost([(point["k"], point["step_cost"]) for point in usable])
    if fitted is None:
        return {"points": points, "v0": None, "c": None, "curve": [], "best": None}
    v0, c = fitted
    curve = []
    further = longest["k"] + FURTHER
    for k in range(1, min(further, longest_k or further) + 1):
        tau, cost = acceptance_length(longest["rates"], k), v0 + c * k
        if cost > 0:
            curve.append({"k": k, "acceptance_length": tau, "step_cost": cost, "speedup": tau / cost,
                          "tpot_ms": standing_tpot_ms * cost / tau})  # fmt: skip
    best = max(curve, key=lambda point: point["speedup"]) if curve else None
    return {"points": points, "v0": v0, "c": c, "curve": curve, "best": best}


def position_gaps(rates: list[float], train: dict[str, Any] | None) -> list[dict[str, float]]:
    """Training accuracy against served acceptance, position by position, where training tells.

    Training counts a position given that those before were right: the served rate to compare it with is the
    conditional one.
    """
    gaps = []
    for place, rate in enumerate(rates):
        accuracy = training_accuracy(train, place)
        before = rates[place - 1] if place else 1.0
        if accuracy is not None:
            served = rate / before if before else 0.0
            gaps.append({"position": place + 1, "training": accuracy, "served": served, "gap": accuracy - served})
    return gaps


def frontier(
    shape: dict[str, Any],
    *,
    method: str,
    concurrencies: list[int],
    train: dict[str, Any] | None = None,
    longest_k: int | None = None,
) -> list[dict[str, Any]]:
    """Levers with expected unlock (a factor on the speed-up), cost and the gate that proves or refutes each, ranked.

    ``longest_k`` is the most tokens that the draft can propose at once, where something bounds them.
    """
    trained = shape["arms"]["trained"]
    rates, length = trained["accepted_per_step"], trained["tokens_per_step"]
    if not rates:
        return []
    levers = [
        *_draft_length(shape, rates, length, longest_k),
        *_training(shape, rates, length, method, train),
        *_draft_cost(shape, length, method),
        *_method(shape, rates, method),
        *_regime(shape, concurrencies),
    ]
    return sorted(levers, key=lambda lever: -lever["unlock"])


def _lever(name: str, lever: str, expected: str, unlock: float, cost: str, gate: str) -> dict[str, Any]:
    return {"id": name, "lever": lever, "expected": expected, "unlock": round(unlock, 3), "cost": cost, "gate": gate}


def _draft_length(shape: dict[str, Any], rates: list[float], length: float, longest_k: int | None) -> list[dict[str, Any]]:
    count = len(rates)
    gate = f"better than K = {count} beyond the noise at a concurrency that is measured, and worse at none"
    lengths = shape["draft_lengths"]
    if lengths and lengths["best"]:
        best = lengths["best"]
        if best["k"] == count:
            return []  # the fitted curve peaks where we are
        now = next(point["speedup"] for point in lengths["curve"] if point["k"] == count)
        return [
            _lever(
                f"k={best['k']}",
                f"K = {best['k']} instead of {count}",
                f"TPOT {best['tpot_ms']:.2f} ms, speed-up {best['speedup']:.2f} instead of {now:.2f}, by the fitted step cost"
                f" {lengths['v0']:.2f} + {lengths['c']:.2f} K",
                best["speedup"] / now,
                "one more measurement; no training",
                gate,
            )
        ]
    # One K measured gives no step cost: what one position more or less is worth is known, what it costs is not.
    longer, shorter = acceptance_length(rates, count + 1), acceptance_length(rates, count - 1)
    levers = []
    if longest_k is None or count < longest_k:
        levers.append(
            _lever(
                f"k={count + 1}", f"K = {count + 1} instead of {count}",
                f"acceptance length about {longer:.2f} if position {count + 1} is accepted as often as the last;"
                f" pays if it costs less than {longer / length - 1:.0%} of a step",
                longer / length, "one more measurement; no training. Two values of K give the cost of a position", gate,
            )
        )  # fmt: skip
    if count > 1:
        levers.append(
            _lever(
                f"k={count - 1}", f"K = {count - 1} instead of {count}",
                f"acceptance length {shorter:.2f}; pays if the last position costs more than {1 - shorter / length:.0%} of it",
                1.0, "one more measurement; no training. Two values of K give the cost of a position", gate,
            )
        )  # fmt: skip
    return levers


def _training(
    shape: dict[str, Any], rates: list[float], length: float, method: str, train: dict[str, Any] | None
) -> list[dict[str, Any]]:
    if method not in OTHER_METHOD:
        return []  # nothing of ours to train
    gaps = position_gaps(rates, train)
    reachable, before = 1.0, 1.0
    for gap in gaps:
        before *= max(gap["training"], gap["served"])
        reachable += before
    worst = max(gaps, key=lambda gap: gap["gap"], default=None)
    if worst and worst["gap"] > 0.05:
        return [
            _lever(
                "data", "data and training closer to what is served",
                f"position {worst['position']}: {worst['training']:.2f} in training, {worst['served']:.2f} served;"
                f" with training's accuracies served, acceptance length {reachable:.2f} instead of {length:.2f}",
                max(1.0, reachable / length), "answers of the target itself to prompts like those served, then training again",
                "acceptance by position on held-out prompts, above this run's by more than the noise floor",
            )
        ]  # fmt: skip
    perfect = 1 + len(rates)
    return [
        _lever(
            "data", "more data, longer training",
            f"at most acceptance length {perfect} instead of {length:.2f}; half of that gap is assumed",
            1 + (perfect / length - 1) / 2, "more rows in the target's own words, more steps",
            "acceptance by position on held-out prompts, above this run's by more than the noise floor",
        )
    ]  # fmt: skip


def _draft_cost(shape: dict[str, Any], length: float, method: str) -> list[dict[str, Any]]:
    cost = shape["step_cost"]
    lengths = shape["draft_lengths"]
    if cost is None or method not in OTHER_METHOD:
        return []
    floor = lengths["v0"] if lengths and lengths["v0"] else 1.0
    if cost <= floor:
        return []
    return [
        _lever(
            "draft-cost", "cheaper drafting",
            f"a step costs {cost:.2f} times one without speculation; were drafting free, {floor:.2f}, which gives a speed-up of"
            f" {length / floor:.2f}; half of that gap is assumed",
            1 + (cost / floor - 1) / 2, "a smaller draft vocabulary or fewer draft layers, then training again",
            "TPOT below this run's at the same acceptance length",
        )
    ]  # fmt: skip


def _method(shape: dict[str, Any], rates: list[float], method: str) -> list[dict[str, Any]]:
    other = OTHER_METHOD.get(method, "eagle3")
    if method in OTHER_METHOD:
        why = (
            "drafts a whole block in one pass, so that a longer K costs little"
            if other == "dflash"
            else "conditions each position on the one before, so that later positions are accepted more often"
        )
        return [
            _lever(
                f"method={other}", f"{other} instead of {method}", f"{other} {why}", 1.0 + 0.1 * rates[-1],
                "one more training on its own features", f"an experiment with method={other}, judged by this same gate",
            )
        ]  # fmt: skip
    return [
        _lever(
            "method=eagle3", f"a trained head instead of {method}",
            "a head trained on the target's own hidden states is usually accepted far more often", 1.2,
            "one training", "an experiment with method=eagle3, judged by this same gate",
        )
    ]  # fmt: skip


def _regime(shape: dict[str, Any], concurrencies: list[int]) -> list[dict[str, Any]]:
    most = int(shape["context"]["trained"]["serving"]["max_num_seqs"])
    other = min(most, 8 * shape["concurrency"]) if shape["decision"] == "ship" else max(1, shape["concurrency"] // 8)
    if other in concurrencies:
        return []
    words = (
        "speculation pays while steps are bound by memory; how far up that holds is not measured"
        if shape["decision"] == "ship"
        else "fewer requests in flight leave more idle compute for verification"
    )
    return [
        _lever(
            f"concurrency={other}", f"concurrency {other} as well", words, 1.0, "one more measurement; no training",
            f"this gate at concurrency {other}",
        )
    ]  # fmt: skip


def training_accuracy(train: dict[str, Any] | None, position: int) -> float | None:
    """Training accuracy at a position: of EAGLE3 by position, of DFlash over the block."""
    last = (train or {}).get("last", {})
    accuracies = last.get("accs") or []
    if position < len(accuracies):
        return float(accuracies[position])
    return float(last["acc"]) if "acc" in last else None


def settle(previous: dict[str, Any] | None, verdict: dict[str, Any]) -> dict[str, Any]:
    """The ledger after a verdict: every lever ever named, open, proved, mixed or refuted, with the reason.

    What an earlier run proposed and this one measured is settled here; what it refuted stays refuted, with the
    conditions that it was refuted under, and is not proposed again while they hold.
    """
    measurement = verdict["measurement"]
    old = {entry["id"]: entry for entry in (previous or {}).get("levers", [])}
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in old.items():
        if entry["status"] != "open" and entry["holds_for"] != _conditions(verdict, name):
            entry = {**entry, "status": "open", "reason": f"settled for other conditions before: {entry['reason']}"}
        if entry["status"] == "open" and entry["measurement"] != measurement:
            entry = _settled(entry, verdict)
        entries[name] = entry
    for lever in verdict["frontier"]:
        known = entries.get(lever["id"])
        if known and known["status"] in SPENT:
            continue
        entries[lever["id"]] = {
            **lever, "status": "open", "reason": "", "measurement": measurement,
            "holds_for": _conditions(verdict, lever["id"]), "then": _then(verdict),
        }  # fmt: skip
    for entry in _settled_by_sweep(verdict):
        entries[entry["id"]] = entry
    kept = [entry for entry in entries.values() if not _past_a_worse_k(entry, entries.values())]
    order = {"open": 0, "proved": 1, "mixed": 2, "refuted": 3}
    levers = sorted(kept, key=lambda entry: (order[entry["status"]], -entry["unlock"], entry["id"]))
    return {"measurement": measurement, "levers": levers}


def _past_a_worse_k(entry: dict[str, Any], entries: Iterable[dict[str, Any]]) -> bool:
    """Whether an open lever leads to a K beyond one that was worse already, at some concurrency, than where it came from."""
    if entry["status"] != "open" or not entry["id"].startswith("k="):
        return False
    k = int(entry["id"][2:])
    worse = [
        (int(other["id"][2:]), other["then"]["k"]) for other in entries if other["status"] in SPENT and other.get("worse_at")
    ]  # fmt: skip
    return any(k != start and 0 < (reached - start) / (k - start) <= 1 for reached, start in worse)


def _conditions(verdict: dict[str, Any], lever: str) -> dict[str, Any]:
    holds = verdict["expiry"]["holds_for"]
    names = ["target_sha", "hardware"] + (["draft_sha"] if lever.startswith("k=") else [])
    return {name: holds[name] for name in names}


def _then(verdict: dict[str, Any]) -> dict[str, Any]:
    """What a later run compares itself with."""
    trained = verdict["shapes"][0]["arms"]["trained"]
    return {
        "k": len(trained["acceptance_per_position"]),
        "acceptance_length": trained["acceptance_length"],
        "served": [_served(shape) for shape in verdict["shapes"]],
        "draft_sha": verdict["expiry"]["holds_for"]["draft_sha"],
    }


def _served(shape: dict[str, Any]) -> dict[str, Any]:
    """The draft's own K at one concurrency, over the standing arm beside it."""
    return {
        "concurrency": shape["concurrency"], "speedup": shape["speedup_tpot"], "speedup_pairs": shape["speedup_pairs"],
        "tpot_ms": shape["arms"]["trained"]["tpot_ms"]["median"],
    }  # fmt: skip


def _swept(shape: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A further K at one concurrency, likewise."""
    return {
        "concurrency": shape["concurrency"], "speedup": point["speedup"], "speedup_pairs": point["speedup_pairs"],
        "tpot_ms": point["tpot_ms"]["median"],
    }  # fmt: skip


def _settled(entry: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """An open lever of an earlier run, judged by this one where this one is its test."""
    now, then, name = _then(verdict), entry["then"], entry["id"]
    kind, _equals, value = name.partition("=")
    at = [shape for shape in verdict["shapes"] if kind == "concurrency" and str(shape["concurrency"]) == value]
    if kind == "k" and str(now["k"]) == value and now["draft_sha"] == then["draft_sha"]:
        before = {point["concurrency"]: point for point in then.get("served", [])}
        beside = [(point, before[point["concurrency"]]) for point in now["served"] if point["concurrency"] in before]
        if not beside:
            return entry  # no load was measured with both
        found = _compared(f"K = {now['k']} now and {then['k']} before", beside)
    elif at:
        decision = at[0]["decision"]
        found = {
            "status": "proved" if decision == "ship" else "refuted",
            "reason": f"{decision.replace('_', ' ')} at {kind} {value}, speed-up {at[0]['speedup_tpot']:.2f}",
        }
    elif name == "data" and now["draft_sha"] != then["draft_sha"] and now["k"] == then["k"]:
        gain = now["acceptance_length"] / then["acceptance_length"]
        found = {
            "status": "proved" if gain > 1 + verdict["shapes"][0]["noise_floor"] else "refuted",
            "reason": f"acceptance length {now['acceptance_length']:.2f} after training anew,"
            f" {then['acceptance_length']:.2f} before",
        }
    else:
        return entry
    return {**entry, **found, "measurement": verdict["measurement"], "holds_for": _conditions(verdict, name)}


def _settled_by_sweep(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """Each K of this session's sweep against the K that was served."""
    found = []
    head = verdict["shapes"][0]
    count = len(head["arms"]["trained"]["acceptance_per_position"])
    for point in head["sweep"]:
        k = point["k"]
        beside = [
            (_swept(shape, other), _served(shape)) for shape in verdict["shapes"] for other in shape["sweep"] if other["k"] == k
        ]  # fmt: skip
        found.append(
            {
                "id": f"k={k}",
                "lever": f"K = {k} instead of {count}",
                "expected": f"speed-up {point['speedup']:.2f} instead of {head['speedup_tpot']:.2f}, measured",
                "unlock": round(point["speedup"] / head["speedup_tpot"], 3),
                "cost": f"set num_speculative_tokens={k}",
                "gate": "this run's sweep",
                **_compared(f"K = {k} and {count}", beside),
                "measurement": verdict["measurement"],
                "holds_for": _conditions(verdict, f"k={k}"),
                "then": _then(verdict),
            }
        )
    return found


def _compared(which: str, beside: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """A K against another one, at every concurrency that both were measured at.

    Proved is a K that is better somewhere and worse nowhere, refuted one that is better nowhere, and mixed the rest:
    which K is right then depends on the load.
    """
    directions = [_direction(point, other) for point, other in beside]
    words = {1: "better", 0: "no difference shown", -1: "worse"}
    return {
        "status": "refuted" if 1 not in directions else "mixed" if -1 in directions else "proved",
        "worse_at": [point["concurrency"] for (point, _other), direction in zip(beside, directions) if direction < 0],
        "reason": f"{which}, each over the standing arm beside it: "
        + "; ".join(
            f"{words[direction]} at concurrency {point['concurrency']},"
            f" speed-up {point['speedup']:.2f} and {other['speedup']:.2f},"
            f" TPOT {point['tpot_ms']:.2f} and {other['tpot_ms']:.2f} ms"
            for (point, other), direction in zip(beside, directions)
        ),
    }


def _direction(point: dict[str, Any], other: dict[str, Any]) -> int:
    """1 if this K is better than the other one beyond chance, -1 if worse, 0 if nobody can tell.

    The two were measured one after the other. Their speed-ups, each over standing trials of its own, allow for a
    machine whose pace changed in between, but only as far as it changed alike for both arms. So TPOT must agree.
    """
    here, there = point["speedup_pairs"], other["speedup_pairs"]
    gain = other["tpot_ms"] - point["tpot_ms"]
    return int(gain > 0 and stands_above(here, there)) - int(gain < 0 and stands_above(there, here))
