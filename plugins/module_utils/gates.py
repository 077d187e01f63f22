# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gates between phases: figures judged against thresholds. Fail closed; private to the collection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from . import diagnosis, runbook, verdict
from .errors import SpecDecodeError
from .layers import served_aux_layers

Evidence = dict[str, Any]
Thresholds = dict[str, Any]


@dataclasses.dataclass
class GateResult:
    """Whether a gate is green, the figures it looked at, and for a red one why and what to do."""

    passed: bool
    figures: dict[str, Any]
    reasons: list[str]
    cause: str = ""
    remedy: str = ""

    def message(self, gate: str) -> str:
        """A red gate as one text for a person."""
        return (
            f"The {gate} gate is red: {'; '.join(self.reasons)}. Likely cause: {self.cause} Next: {self.remedy}"
            f" {runbook.more(gate)}"
        )


def evaluate(gate: str, evidence: Evidence, thresholds: Thresholds | None = None) -> GateResult:
    """Judge ``evidence`` (documents by name). A document or figure that is missing is a red gate, not an error."""
    if gate not in GATES:
        raise SpecDecodeError(f"There is no gate {gate!r}.", f"Choose one of {', '.join(sorted(GATES))}.")
    try:
        return GATES[gate](evidence, limits(gate, thresholds or {}))
    except (KeyError, TypeError, IndexError) as error:
        return GateResult(
            False,
            {},
            [f"the evidence lacks {error}" if isinstance(error, KeyError) else f"the evidence is malformed ({error})"],
            "The phase did not finish, or another version wrote its result.",
            "Run the phase again.",
        )


def thresholds_of(given: dict[str, Any], gate: str) -> Thresholds:
    """One gate's share of ``spec_thresholds``, all of which must hold: no phase runs with a name that nothing reads."""
    for name, values in given.items():
        if name not in GATES:
            raise SpecDecodeError(f"spec_thresholds has {name!r}, which is no gate.", f"The gates: {', '.join(sorted(GATES))}.")
        if not isinstance(values or {}, dict):
            raise SpecDecodeError(f"spec_thresholds.{name} is {values!r}, but must hold thresholds by name.")
        limits(name, values or {})
    return given.get(gate) or {}


def limits(gate: str, thresholds: Thresholds) -> Thresholds:
    """A gate's limits: its defaults, and over them what is given, which must be numbers of its own."""
    found: Thresholds = dict(LIMITS[gate])
    for name, value in thresholds.items():
        if name in EXPECTED.get(gate, ()):
            found[name] = value
            continue
        if name not in LIMITS[gate]:
            known = ", ".join(sorted(LIMITS[gate])) or "none"
            raise SpecDecodeError(
                f"spec_thresholds.{gate} has {name!r}, which the {gate} gate does not know.", f"Its thresholds: {known}."
            )
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            raise SpecDecodeError(f"spec_thresholds.{gate}.{name} is {value!r}, but must be a number.") from None
    return found


def preflight(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """Every check must be green."""
    checks = evidence["preflight"]["checks"]
    red = [check for check in checks if not check["ok"]]
    return GateResult(
        not red and bool(checks),
        {"checks": len(checks), "red": len(red)},
        [f"{check['name']}: {check['reason']}" for check in red] or ([] if checks else ["nothing was checked"]),
        "The target, the engines or the machine do not fit what is asked.",
        " ".join(check["remedy"] for check in red if check["remedy"]),
    )


def dataset(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """The expected count; every row renders; the loss mask covers assistant tokens only and is never empty."""
    found = evidence["dataset"]
    rows = found["counts"]["train"] + found["counts"]["eval"]
    allowed = thresholds["max_mask_outside_fraction"] * rows
    reasons = [
        f"{found['counts'][part]} {part} rows instead of {found['expected'][part]}"
        for part in ("train", "eval")
        if found["counts"][part] != found["expected"][part]
    ]
    for name, words in (
        ("rows_failed", "rows do not render through the chat template"),
        ("empty_masks", "rows have an empty loss mask"),
        ("overlap_train_eval", "eval prompts are in the training data too"),
    ):
        if found[name]:
            reasons.append(f"{found[name]} {words}")
    if found["mask_outside_assistant"] > allowed:
        reasons.append(f"in {found['mask_outside_assistant']} rows the loss mask is not just the assistant's words")
    if not found["supervised_span"].strip():
        reasons.append("the loss mask covers no text at all: training loss would stay zero")
    return GateResult(
        not reasons,
        {
            "rows": found["counts"],
            "tokens": found["tokens"],
            "supervised_share": round(found["supervised_tokens"] / max(1, found["tokens"]), 3),
            "supervised_span": found["supervised_span"],
        },
        reasons,
        "the chat template does not match the target's own, or the data are not conversations.",
        "Compare the supervised span with the conversation; choose another chat_template or mend the data.",
    )


def capture(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """Every sample has its file with the derived layers, all finite, and the probe reproduces the target."""
    found, probe = evidence["capture"], evidence["capture"]["probe"]
    tolerance = probe["tolerance"]
    reasons = []
    if found["samples"]["written"] != found["samples"]["expected"]:
        reasons.append(f"{found['samples']['written']} of {found['samples']['expected']} samples are captured and whole")
    wanted = thresholds.get("layers", found["layers"])
    if found["layers"] != wanted:
        reasons.append(f"captured at layers {found['layers']} instead of {wanted}")
    if found["nonfinite"]:
        reasons.append(f"{found['nonfinite']} samples hold NaN or infinite values")
    if found["shape_errors"]:
        reasons.append(f"{len(found['shape_errors'])} samples have another shape, the first {found['shape_errors'][0]}")
    if not probe["samples"]:
        reasons.append("the capture probe looked at no sample")
    head = probe["lm_head_argmax_agreement"]
    if head is not None and head < thresholds["min_head_agreement"]:
        reasons.append(f"the LM head on the captured last state names the target's next token in {head:.1%} of positions")
    named = probe.get("next_token_agreement")
    if named is not None and named < thresholds["min_next_token_agreement"]:
        reasons.append(f"the LM head on the captured last state names the text's next token in only {named:.1%} of positions")
    if probe["aux_max_abs_diff"] is not None and probe["aux_max_abs_diff"] > tolerance:
        reasons.append(f"captured aux states differ from the target's own by {probe['aux_max_abs_diff']:.3f}, relative")
    return GateResult(
        not reasons,
        {
            "samples": found["samples"],
            "layers": found["layers"],
            "tokens": found["tokens"],
            "gigabytes": round(found["bytes"] / 1e9, 3),
            "probe": probe,
            "tokens_per_s": found["throughput"]["tokens_per_s"],
        },
        reasons,
        "files were lost or damaged, or the hooks sit on other modules than the layers.",
        "Run again: what is missing is captured anew. If the probe stays red, use the SGLang capture backend.",
    )


def training(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """The loss fell, the first position's accuracy is not degenerate, nothing was NaN."""
    found = evidence["train"]
    first, last = found["first"], found["last"]
    least = thresholds["min_accuracy"]
    accuracy = last.get("acc_0", last.get("acc"))
    reasons = []
    if found["steps"] < found["max_steps"]:
        reasons.append(f"training stopped at step {found['steps']} of {found['max_steps']}")
    if found["nonfinite_steps"]:
        reasons.append(f"{found['nonfinite_steps']} logged steps hold NaN or infinite values")
    if not (math.isfinite(last["loss"]) and 0 < last["loss"] < first["loss"]):
        reasons.append(f"the loss did not fall: {first['loss']:.3f} at first, {last['loss']:.3f} at last")
    if accuracy is None or accuracy < least:
        shown = "unknown" if accuracy is None else f"{accuracy:.2f}"
        reasons.append(f"the accuracy at the first position is {shown}, below {least:g}")
    return GateResult(
        not reasons,
        {
            "steps": found["steps"],
            "loss": [first["loss"], last["loss"]],
            "accuracy": accuracy,
            "accs": last.get("accs", []),
        },
        reasons,
        "an empty or misplaced loss mask, too few steps, or features that do not belong to this target.",
        "See the supervised span of the dataset gate and the curve in train/*/metrics.jsonl; healthy runs reach 0.6 and up.",
    )


def artifact(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """Every tensor as the loader wants it, the layers in the right convention, and vLLM loads it."""
    found = evidence["convert"]
    reasons = list(found["problems"])
    if not found["loads"] and not found["problems"]:
        reasons.append("nothing tried to load the draft")
    if found["layers_served"] != served_aux_layers(found["layers_captured"], found["method"]):
        reasons.append(
            f"trained on layers {found['layers_captured']}, but served on {found['layers_served']} in vLLM's convention"
        )
    if "draft_config" in evidence:
        # What vLLM will read is the folder's own config, and what was captured is what the capture says.
        captured = evidence["capture"]["layers"] if "capture" in evidence else found["layers_captured"]
        problem = diagnosis.served_layers_problem(captured, evidence["draft_config"], found["method"])
        reasons += [problem] if problem else []
    return GateResult(
        not reasons,
        {
            "draft_dir": found["draft_dir"],
            "sha": found["sha"],
            "tensors": len(found["tensors"]),
            "parameters": found["parameters"],
            "layers_captured": found["layers_captured"],
            "layers_served": found["layers_served"],
        },
        reasons,
        "the export and the serving vLLM do not belong together.",
        "See the convert job's log; check the draft config and vLLM's version.",
    )


def overfit(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """A draft that learned its one sample by heart has it accepted nearly in full; which half fails names the fault."""
    last = evidence["train"]["last"]
    accuracies = last.get("accs") or [last["acc"]]
    engines = [trial["engine"] for trial in evidence["acceptance"]["trials"] if trial["arm"] == "trained" and not trial["void"]]
    drafted = sum(engine["draft_tokens"] for engine in engines)
    share = sum(engine["accepted_tokens"] for engine in engines) / drafted if drafted else 0.0
    learned = min(accuracies) >= thresholds["min_accuracy"]
    accepted = share >= thresholds["min_accepted_share"]
    if learned:
        cause = "the draft is served otherwise than it was trained: layers, chat template, vocabulary mapping or conversion."
        remedy = "Compare layers_captured and layers_served in results/convert.json, and the prompt with the training row."
        reasons = [
            f"the draft knows its one sample (accuracy {min(accuracies):.2f}), but the server accepts only {share:.0%} of it"
        ]
    else:
        cause = "the training itself: too few steps, a wrong learning rate, or features that are not the target's."
        remedy = "Raise spec_overfit_steps or the learning rate in spec_overfit_training; look at train's metrics."
        reasons = [f"the draft did not learn its one sample: accuracy {min(accuracies):.2f}, and the server accepts {share:.0%}"]
    words = f"accuracy {min(accuracies):.2f} in training on one sample, {share:.0%} of the drafted tokens accepted in serving it"
    return GateResult(
        learned and accepted,
        {"accuracies": accuracies, "accepted_share": share, "drafted_tokens": drafted, "words": words},
        [] if learned and accepted else reasons,
        cause,
        remedy,
    )


def acceptance(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """A verdict was reached from whole evidence. Its decision, ship or not, is a figure, not the gate's colour."""
    names = ("convert", "train", "dataset", "draft_config", "draft_bytes", "ceilings", "target_config", "profile")
    documents = {name: evidence.get(name) for name in names}
    judged = verdict.judge(evidence["acceptance"], thresholds, ledger=evidence.get("levers"), **documents)
    return GateResult(True, judged, judged["reasons"])


def promotion(evidence: Evidence, thresholds: Thresholds) -> GateResult:
    """A fresh VERDICT that says ship, and that is about the very artifact that is staged."""
    judged, facts = evidence["verdict"], evidence["facts"]
    reasons = []
    if judged["decision"] != "ship":
        reasons.append(f"the decision is {judged['decision'].replace('_', ' ')}, not ship")
    if judged["tier"] != "VERDICT":
        reasons.append(f"it is a {judged['tier']}, not a VERDICT: {'; '.join(judged['tier_reasons'])}")
    latest = evidence.get("measurement")
    if latest and verdict.measurement_of(latest) != judged["measurement"]:
        reasons.append("what was measured last is not what it judged")
    reasons += verdict.stale(judged, facts)
    return GateResult(
        not reasons,
        {
            "speculative_config": judged["arms"][verdict.TRAINED]["speculative_config"],
            "previous": judged["arms"][verdict.STANDING]["speculative_config"],
            "measurement": judged["measurement"],
            "measured_at": judged["measured_at"],
            "holds_for": judged["expiry"]["holds_for"],
        },
        reasons,
        "the draft has not earned it, or something changed since it was measured.",
        "Keep the standing configuration; measure again with playbooks/train_draft.yml or validate_draft.yml.",
    )


#: by gate, its thresholds with their defaults
LIMITS: dict[str, dict[str, float]] = {
    "preflight": {},
    "dataset": {"max_mask_outside_fraction": 0.0},
    "capture": {"min_head_agreement": 0.999, "min_next_token_agreement": 0.2},
    "training": {"min_accuracy": 0.5},
    "artifact": {},
    "overfit": {"min_accuracy": 0.95, "min_accepted_share": 0.85},
    "acceptance": verdict.LIMITS,
    "promotion": {},
}
#: what a phase hands its gate beside them: no numbers, and none of the user's
EXPECTED = {"capture": ("layers",)}
GATES: dict[str, Callable[[Evidence, Thresholds], GateResult]] = {
    "preflight": preflight,
    "dataset": dataset,
    "capture": capture,
    "training": training,
    "artifact": artifact,
    "overfit": overfit,
    "acceptance": acceptance,
    "promotion": promotion,
}
