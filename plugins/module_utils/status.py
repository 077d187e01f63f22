# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where experiments stand, read from their bundles; and the same as lines for a terminal. Private to the collection."""

from __future__ import annotations

import datetime
import os
from typing import Any

from .checkpoint import read_target
from .errors import SpecDecodeError
from .files import read_json_object, sha256_file
from .jobs import ALIVE, ENDED_BADLY, NAME_PATTERN
from .phases import RESULTS
from .verdict import stale
from .waiting import clock, progress_line, progress_mark

BUNDLE = "spec-decode"
LIVE_STATES = frozenset(state.value for state in ALIVE)
BAD_STATES = frozenset(state.value for state in ENDED_BADLY)


def experiments(work_dir: str, name: str = "") -> list[dict[str, Any]]:
    """All experiments of a work folder, or the one called ``name``, sorted by name."""
    if name and not NAME_PATTERN.match(name):
        raise SpecDecodeError(f"{name!r} is no name of an experiment.", "Give the one that its play stated back.")
    names = [name] if name else sorted(os.listdir(work_dir)) if os.path.isdir(work_dir) else []
    bundles = {each: os.path.join(work_dir, each, BUNDLE) for each in names}
    found = {each: path for each, path in bundles.items() if os.path.isfile(os.path.join(path, "experiment.json"))}
    if name and not found:
        raise SpecDecodeError(f"There is no experiment {name} in {work_dir}.", "Check experiment and spec_work_dir.")
    return [_described(each, path) for each, path in found.items()]


def _described(name: str, bundle: str) -> dict[str, Any]:
    """One experiment. A file that cannot be read is said, and does not hide the others."""
    found: dict[str, Any] = {"name": name, "bundle": bundle, "phases": {}, "verdict": {}, "problems": []}
    try:
        stated = read_json_object(os.path.join(bundle, "experiment.json"), "experiment")
        found.update(method=stated.get("method", ""), target=stated.get("target", {}).get("path", ""))
        for phase, result in RESULTS.items():
            path = os.path.join(bundle, "results", f"{result}.json")
            if os.path.isfile(path):
                facts = read_json_object(path, f"{phase} result")
                found["phases"][phase] = {key: facts.get(key) for key in ("status", "finished_at", "duration_s")}
        path = os.path.join(bundle, "results", "verdict.json")
        if os.path.isfile(path):
            found["verdict"] = _judged(read_json_object(path, "verdict"), bundle, str(found["target"]))
    except SpecDecodeError as error:
        found["problems"].append(str(error))
    return found


def _judged(judged: dict[str, Any], bundle: str, target: str) -> dict[str, Any]:
    """A verdict's headline, with why it no longer holds as far as the files at hand tell."""
    holds = {name: then for name, then in judged["expiry"]["holds_for"].items() if name in _READERS}
    facts = {name: _READERS[name](bundle, target) for name in holds}
    return {
        "decision": judged["decision"],
        "tier": judged["tier"],
        "speedup_tpot": judged["speedup_tpot"],
        "acceptance_length": judged["arms"]["trained"]["acceptance_length"],
        "measured_at": judged["measured_at"],
        "stale": stale({"expiry": {"holds_for": holds}}, facts),
    }


def _target_now(_bundle: str, target: str) -> str | None:
    try:
        return read_target(target).sha
    except SpecDecodeError:
        return None  # it moved, or is no longer whole: nothing tells


def _draft_now(bundle: str, _target: str) -> str | None:
    path = os.path.join(bundle, "results", "draft.json")
    return read_json_object(path, "draft").get("sha") if os.path.isfile(path) else None


def _prompts_now(bundle: str, _target: str) -> str | None:
    path = os.path.join(bundle, "data", "eval.jsonl")
    return sha256_file(path) if os.path.isfile(path) else None


#: what a verdict holds for and the files at hand tell; the hardware and the engine only a server tells
_READERS = {"target_sha": _target_now, "draft_sha": _draft_now, "prompts_sha256": _prompts_now}


def status_lines(found: list[dict[str, Any]], jobs: list[list[dict[str, Any]]]) -> list[str]:
    """Each experiment's phases, what runs and what comes next; ``jobs`` holds each one's jobs as now looked up."""
    if not found:
        return ["There is no experiment here yet."]
    lines = []
    for experiment, current in zip(found, jobs):
        by_name = {job["name"]: job for job in current}
        lines.append(f"{experiment['name']}: {experiment.get('method', '')} draft for {experiment.get('target', '')}")
        lines += [f"  {phase:<10}{_phase_words(phase, experiment, by_name)}" for phase in RESULTS]
        lines += [f"  jobs of its own: {progress_line(job)}" for name, job in by_name.items() if name not in RESULTS]
        lines += [f"  {problem}" for problem in experiment["problems"]]
        lines += [f"  {_verdict_words(experiment['verdict'])}", f"  next: {_next(experiment, by_name)}"]
    return lines


def _phase_words(phase: str, experiment: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> str:
    job, done = jobs.get(phase), experiment["phases"].get(phase)
    if job and job["state"] in LIVE_STATES:
        return progress_mark(job).partition(" ")[2] + _time_words(job)
    if job and job["state"] in BAD_STATES:
        return f"{job['state']}{': ' + job['reason'] if job['reason'] else ''}, see {job['log']}"
    if done:
        return f"done {done['finished_at']}, in {clock(done['duration_s'] or 0)}"
    return "not started"


def _time_words(job: dict[str, Any]) -> str:
    elapsed, progress = job.get("elapsed_s"), job.get("progress") or {}
    done, total = progress.get("done") or 0, progress.get("total") or 0
    if not elapsed:
        return ""
    left = f", ~{clock(elapsed * (total - done) / done)} left" if 0 < done <= total else ""
    return f" · {clock(elapsed)} so far{left}"


def _verdict_words(verdict: dict[str, Any]) -> str:
    if not verdict:
        return "no verdict yet"
    return f"{verdict['tier']}: {verdict['decision']}, measured {verdict['measured_at']}{_stale_words(verdict)}"


def _stale_words(verdict: dict[str, Any]) -> str:
    return f", STALE: {'; '.join(verdict['stale'])}" if verdict["stale"] else ""


def _next(experiment: dict[str, Any], jobs: dict[str, dict[str, Any]]) -> str:
    alive = [name for name, job in jobs.items() if job["state"] in LIVE_STATES]
    if alive:
        return f"wait for {', '.join(alive)}; running the playbook again attaches to it"
    bad = [name for name, job in jobs.items() if job["state"] in BAD_STATES]
    if bad:
        return f"mend {', '.join(bad)} and run the playbook again"
    missing = [phase for phase in RESULTS if phase not in experiment["phases"]]
    if missing:
        return f"run the playbook: {missing[0]} comes next"
    if not experiment["verdict"]:
        return "run the playbook: the measurement is to be judged"
    if experiment["verdict"]["stale"]:
        return "measure again: run the playbook"
    return f"read {experiment['bundle']}/report.md"


def verdict_lines(found: list[dict[str, Any]], now: str) -> list[str]:
    """One line for each experiment: decision, tier, figures and age at the time ``now`` (ISO 8601)."""
    header = ("experiment", "decision", "tier", "TPOT speed-up", "accepted", "age")
    rows = [_verdict_row(experiment, now) for experiment in found]
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]
    for experiment in found:
        reasons = [*experiment["problems"], *experiment["verdict"].get("stale", [])]
        lines += [f"{experiment['name']}: {reason}" for reason in reasons]
    return lines if found else ["There is no experiment here yet."]


def _verdict_row(experiment: dict[str, Any], now: str) -> tuple[str, ...]:
    verdict = experiment["verdict"]
    if not verdict:
        return (experiment["name"], "–", "–", "–", "–", "–")
    days = (datetime.datetime.fromisoformat(now) - datetime.datetime.fromisoformat(verdict["measured_at"])).days
    return (
        experiment["name"],
        verdict["decision"],
        verdict["tier"] + (" (stale)" if verdict["stale"] else ""),
        f"{verdict['speedup_tpot']:.2f}",
        f"{verdict['acceptance_length']:.2f}",
        f"{days} d",
    )
