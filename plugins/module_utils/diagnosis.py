# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a draft lost: one cause, by name and in one sentence. Pure; private to the collection."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import levers
from .layers import served_aux_layers

Diagnosis = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the phases before serving found, where there were any."""

    convert: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    draft_config: dict[str, Any] | None = None

    @property
    def longest(self) -> int | None:
        """The most tokens that the draft proposes at once, where its config bounds them: DFlash's block but its first."""
        block = (self.draft_config or {}).get("block_size")
        return block - 1 if isinstance(block, int) else None

    @property
    def layers_problem(self) -> str:
        """Why the draft is served on other layers than its features were captured at; empty if it is not, or unknown."""
        found = self.convert or {}
        captured = found.get("layers_captured")
        if not captured:
            return ""
        if self.draft_config is not None:
            return served_layers_problem(captured, self.draft_config, found["method"])
        if found["layers_served"] == served_aux_layers(captured, found["method"]):
            return ""
        return f"trained on layers {captured}, but served on {found['layers_served']} in vLLM's convention"


def served_layers_problem(captured: list[int], draft_config: dict[str, Any], method: str) -> str:
    """Why the layers that vLLM will feed a draft are not those it was trained on; empty if they are.

    The counters may not show it: on some targets neighbouring layers are nearly equal. Hence this comparison.
    """
    wanted = served_aux_layers(captured, method)
    if method == "dflash":
        place, served = "dflash_config.target_layer_ids", (draft_config.get("dflash_config") or {}).get("target_layer_ids")
    else:
        place, served = "eagle_aux_hidden_state_layer_ids", draft_config.get("eagle_aux_hidden_state_layer_ids")
    if served == wanted:
        return ""
    return (
        f"the features were captured at layers {captured}, which vLLM's {place} calls {wanted},"
        f" but the served draft's config says {served}"
    )


def diagnose(shape: dict[str, Any], limits: dict[str, float], evidence: Evidence) -> Diagnosis:
    """The likely cause of a loss at one concurrency: what is certain first, then what the figures say."""
    trained, standing = shape["arms"]["trained"], shape["arms"]["standing"]
    rates, length, speedup = trained["acceptance_per_position"], trained["tokens_per_step"], shape["speedup_tpot"]
    method = str((trained["speculative_config"] or {}).get("method", ""))
    accuracy = levers.training_accuracy(evidence.train, 0)
    problem = evidence.layers_problem
    if problem:
        return "layers", f"Wrong layers: {problem}. Convert it again."
    near_zero = bool(rates) and rates[0] < limits["near_zero_acceptance"]
    learned = accuracy is not None and accuracy >= limits["healthy_accuracy"]
    if rates and accuracy is not None and learned and rates[0] < limits["served_share_of_accuracy"] * accuracy:
        return "train_serve_mismatch", (
            f"Train/serve mismatch: training accuracy was {accuracy:.2f}, but only {rates[0]:.2f} of first positions"
            " are accepted. Compare the layers, the weights, the chat template and the target's version with training's."
        )
    if near_zero and method.startswith(("ngram", "suffix")):
        return "nothing_to_copy", (
            f"Only {rates[0]:.2f} of first positions are accepted: the answers repeat too little of what stands before"
            f" them for {method}. A trained head needs no repetition."
        )
    if near_zero:
        return "not_learned", (
            f"The draft does not predict this target: only {rates[0]:.2f} of its first positions are accepted."
            + ("" if accuracy is None else f" Training reached {accuracy:.2f}: train longer, on closer data.")
        )
    if speedup >= 1 + shape["noise_floor"]:
        if length < standing["tokens_per_step"]:
            return "fewer_accepted", (
                f"It is faster, but accepts fewer tokens a step than the standing arm ({length:.2f} against"
                f" {standing['tokens_per_step']:.2f}): its drafting is cheaper. Try a larger K."
            )
        return "guardrail", "It is faster, but breaks a guardrail of this gate: see the reasons."
    better = _better_k(shape)
    if better:
        return "wrong_k", f"Wrong K: {better} Here K = {len(rates)} gives {speedup:.2f}."
    cost = shape["step_cost"]
    words = "" if cost is None else f" A step costs {cost:.2f} times one without speculation, so that is the break-even."
    return "draft_too_slow", (
        f"The draft is too slow for what it saves: {length:.2f} tokens a step give a TPOT speed-up of"
        f" {speedup:.2f}.{words} Try a smaller K, a smaller draft or a lower concurrency."
    )


def _better_k(shape: dict[str, Any]) -> str:
    """Another K that wins, measured or by the fitted step cost; empty if none does."""
    measured = [point for point in shape["sweep"] if point["direction"] == 1]
    if measured:
        best = max(measured, key=lambda point: point["speedup"])
        return f"K = {best['k']} gives a speed-up of {best['speedup']:.2f}, measured beside the standing arm."
    lengths = shape["draft_lengths"]
    best = lengths["best"] if lengths else None
    if best and best["speedup"] > 1 + shape["noise_floor"]:
        return f"by the fitted step cost, K = {best['k']} would give a speed-up of {best['speedup']:.2f}."
    return ""


def overall(decision: str, shapes: list[dict[str, Any]]) -> Diagnosis:
    """The cause of the whole verdict: a draft that wins at one load and loses at another is in the wrong regime."""
    if decision != "do_not_ship":
        return "", ""
    lost = [shape for shape in shapes if shape["decision"] == "do_not_ship"]
    won = [shape for shape in shapes if shape["decision"] == "ship"]
    if won:
        wins, losses = (", ".join(str(shape["concurrency"]) for shape in some) for some in (won, lost))
        if all(shape["cause"] == "guardrail" for shape in lost):
            return "guardrail", f"It wins at concurrency {wins}. At {losses}: {lost[0]['diagnosis']}"
        return "wrong_regime", f"Wrong regime: it wins at concurrency {wins} and loses at {losses}. {lost[0]['diagnosis']}"
    return lost[0]["cause"], lost[0]["diagnosis"]
