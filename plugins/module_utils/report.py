# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A verdict as people read it: table rows, one-line contexts, and the fact for the inventory. Pure; private."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from . import runbook

Row = dict[str, str]


def verdict_fact(verdict: dict[str, Any], experiment: dict[str, Any]) -> dict[str, Any]:
    """What the inventory keeps of a verdict: enough to act on, with what it holds for."""
    trained = verdict["arms"]["trained"]
    return {
        "decision": verdict["decision"],
        "cause": verdict["cause"],
        "tier": verdict["tier"],
        "tier_reasons": verdict["tier_reasons"],
        "acceptance_length": round(trained["acceptance_length"], 3),
        "speedup_tpot": round(verdict["speedup_tpot"], 3),
        "tpot_ms": {name: round(arm["tpot_ms"]["median"], 3) for name, arm in verdict["arms"].items()},
        "speculative_config": trained["speculative_config"],
        "target": experiment["target"]["path"],
        "method": experiment["method"],
        "holds_for": verdict["expiry"]["holds_for"],
        "context": verdict["context"]["trained"],
        "measured_at": verdict["measured_at"],
        "report": f"{experiment['bundle']}/report.html",
    }


def inventory_yaml(variables: dict[str, Any]) -> str:
    """Variables as YAML for an inventory. A text that Ansible would take for a template is marked as none.

    What stands in a verdict was partly told by servers, and names folders: no play that reads it may run it.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Knows Ansible's tag."""

    def text(dumper: Any, value: str) -> Any:
        template = any(mark in value for mark in ("{{", "{%", "{#"))
        return dumper.represent_scalar("!unsafe" if template else "tag:yaml.org,2002:str", value)

    Dumper.add_representer(str, text)
    # By way of JSON: inside Ansible these are its own kinds of list and text, which YAML's serializer refuses.
    return str(yaml.dump(json.loads(json.dumps(variables)), Dumper=Dumper, sort_keys=True, indent=4, allow_unicode=True))


def arm_rows(verdict: dict[str, Any]) -> list[Row]:
    """One row for each arm at each concurrency, and two for each further K that was measured there.

    Its speed-up is over standing trials of its own: without these beside it, the two columns would not agree.
    """
    rows = []
    for shape in verdict["shapes"]:
        rows += [_row(shape["concurrency"], name, shape, shape["speedup_tpot"]) for name in shape["arms"]]
        for point in shape["sweep"]:
            names = sorted(point["arms"], key=lambda name: name != point["arm"])
            swept, beside = (_row(shape["concurrency"], name, point, point["speedup"]) for name in names)
            rows += [swept, {**beside, "arm": "beside it"}]
    return rows


def _row(concurrency: int, name: str, measured: dict[str, Any], speedup: float) -> Row:
    arm, context = measured["arms"][name], measured["context"][name]
    tpot, percent = arm["tpot_ms"], context["grounding"]["percent_of_sol"]
    return {
        "sol": f"{percent:.1f}" if percent is not None else "–",
        "concurrency": str(concurrency),
        "arm": name,
        "speculation": speculation(arm["speculative_config"]),
        "acceptance_length": _accepted(arm) if arm["drafts"] else "–",
        "per_position": " ".join(f"{rate:.2f}" for rate in arm["acceptance_per_position"]) or "–",
        "tpot": f"{tpot['mean']:.2f} ± {tpot['std']:.2f}",
        # The median of its pairs' ratios: of a baseline there is none.
        "speedup": "–" if name == context["grounding"]["baseline"] else f"{speedup:.2f}",
        "ttft": f"{arm['ttft_ms']['median']:.1f}",
        "throughput": f"{arm['output_tokens_per_s']['median']:.0f}",
        "trials": str(len(tpot["trials"])),
    }


def _accepted(arm: dict[str, Any]) -> str:
    """The acceptance length, and the tokens a step where some steps have no draft."""
    length, per_step = arm["acceptance_length"], arm["tokens_per_step"]
    return f"{length:.2f}" if per_step == length else f"{length:.2f} ({per_step:.2f} a step)"


def speculation(config: dict[str, Any] | None) -> str:
    """A speculative config in two words."""
    if not config:
        return "none"
    return f"{config.get('method', 'unknown')} K={config.get('num_speculative_tokens', '?')}"


def context_line(context: dict[str, Any]) -> str:
    """A whole descriptor as one sentence."""
    identity, parallel, serving = context["identity"], context["parallelism"], context["serving"]
    load, stack, ground = context["workload"], context["stack"], context["grounding"]
    return (
        f"{identity['model']} ({identity['dtype']}, quantisation {identity['quantization'] or 'none'}, KV cache"
        f" {identity['kv_cache_dtype']}) on {identity['hardware_count']} × {identity['hardware']};"
        f" TP {parallel['tensor']}, DP {parallel['data']}, PP {parallel['pipeline']}, EP {parallel['expert']};"
        f" cudagraph_mode {serving['cudagraph_mode']}, eager {serving['enforce_eager']},"
        f" max-num-seqs {serving['max_num_seqs']}, batched tokens {serving['max_num_batched_tokens']},"
        f" max length {serving['max_model_len']}, memory {serving['gpu_memory_utilization']},"
        f" async scheduling {serving['async_scheduling']}, prefix caching {serving['prefix_caching']};"
        f" {load['prompts']} prompts, {load['input_tokens_mean']} tokens in and {load['output_tokens_mean']} out on average,"
        f" concurrency {load['concurrency']}, temperature {load['temperature']},"
        f" {'warm' if context['regime']['warm'] else 'cold'}; {stack['engine']} {stack['version']},"
        f" {stack['client']}{', image ' + stack['image'] if stack['image'] else ''}; {ground['trials']} trials on"
        f" {ground['same_node']}, TPOT {ground['tpot_ms_mean']:.2f} ± {ground['tpot_ms_std']:.2f} ms (mean ± std of the"
        f" trials' medians), baseline {ground['baseline']}, {_sol(ground)}, rigor {ground['rigor']}"
    )


def _sol(ground: dict[str, Any]) -> str:
    if ground["percent_of_sol"] is None:
        return f"%SoL unknown (ceiling: {ground['ceiling']})"
    return f"{ground['percent_of_sol']:.1f} %SoL of {ground['ceiling']}"


def verdict_table(verdict: dict[str, Any]) -> list[str]:
    """The end of a play: the arms, the decision and what comes next, in lines for a terminal."""
    header: Row = {
        "arm": "arm", "speculation": "draft", "concurrency": "conc.", "acceptance_length": "accepted",
        "tpot": "TPOT ms", "speedup": "speed-up", "ttft": "TTFT ms",
    }  # fmt: skip
    rows = [header, *arm_rows(verdict)]
    widths = {key: max(len(row[key]) for row in rows) for key in header}
    lines = ["  ".join(row[key].ljust(widths[key]) for key in header).rstrip() for row in rows]
    rates = verdict["arms"]["trained"]["acceptance_per_position"]
    lines += [
        "",
        f"accepted by position: {' '.join(f'{rate:.2f}' for rate in rates)}",
        f"TPOT speed-up {verdict['speedup_tpot']:.2f}, greedy outputs {'equal' if verdict['greedy_outputs_equal'] else 'differ'}",
        f"{verdict['tier']}: {verdict['decision']}",
    ]
    said = [
        *(f"  because {reason}" for reason in verdict["reasons"]),
        *([f"  {verdict['diagnosis']}"] if verdict["diagnosis"] else []),
        *(f"  a DRAFT since {reason}" for reason in verdict["tier_reasons"]),
        *([f"  {runbook.more(runbook.DRAFT_TIER)}"] if verdict["tier_reasons"] else []),
        *(f"next lever: {lever['lever']}: {lever['expected']}" for lever in verdict["next_levers"][:1]),
        f"context: {context_line(verdict['context']['trained'])}",
    ]
    return [*lines, *(line for text in said for line in _wrapped(text))]


def _wrapped(text: str) -> list[str]:
    """One sentence as lines of a terminal of 80 columns; a callback indents them."""
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(text, 72, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
