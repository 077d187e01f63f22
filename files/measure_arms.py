#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Serve the arms of a plan on this machine, and measure them side by side.

Trials are taken in ABBA order, so that a drift of the machine touches both arms alike. Where both servers fit, they
stay up and take turns; otherwise one is stopped before the other starts. The servers end with this program, however it
ends. Pairs of trials that are whole survive a kill, and a finished measurement that is asked for one more K or
concurrency: what is missing is measured, each pair of it with a standing trial of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import sys
from typing import Any

import dflash_vllm_eval as client
from arm_servers import Fleet, RunningServer, Server, free_port
from spec_decode import dcgm, resolved
from spec_decode.arms import (
    Arm,
    Step,
    arms,
    complete,
    key_of,
    memory_is_given,
    most_prompts,
    prompts_wanted,
    remaining,
    resident,
    schedule,
    warming,
)
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, read_json_or_none, sha256_file, sha256_folder, sha256_value, write_json
from spec_decode.hardware import describe_hardware
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress
from spec_decode.prompts import read_prompts
from spec_decode.vllm_metrics import Access

#: how often a trial that turned out void is measured again before it stays void
REPEATS = 2
#: parts of the plan whose change leaves the trials valid that were taken before
HARMLESS = ("ports", "startup_timeout_s", "concurrencies", "sweep_num_speculative_tokens")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, help="JSON: target, server, arms, prompts, trials, concurrencies")
    parser.add_argument("--draft", default="", help="JSON of the staged draft, whose folder replaces {draft} in the arms")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def servers(plan: dict[str, Any], made: dict[str, Arm], logs: str, access: Access) -> dict[str, Server | RunningServer]:
    """The arms' servers, not started yet. They differ in the speculative config and in nothing else."""
    os.makedirs(logs, exist_ok=True)
    found: dict[str, Server | RunningServer] = {}
    for arm in made.values():
        if arm.url:
            found[arm.name] = RunningServer(arm.name, arm.url, arm.log, access)
            continue
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", plan["target"]["path"],
                   "--served-model-name", plan["model"], "--host", "127.0.0.1", *plan["server_arguments"]]  # fmt: skip
        if arm.speculative_config is not None:
            command += ["--speculative-config", json.dumps(arm.speculative_config, sort_keys=True)]
        log = os.path.join(logs, f"server-{arm.name}.log")
        found[arm.name] = Server(arm.name, command, plan["server_environment"], arm.port or free_port(), log)
    return found


class Measurement:
    """What was taken so far, on disk after every whole pair."""

    def __init__(self, out: str, identity: str) -> None:
        self._path, self._identity = f"{out}.partial", identity
        self.trials: list[dict[str, Any]] = []
        #: by arm: its flat configuration, where that was read, and how its server started
        self.seen: dict[str, dict[str, Any]] = {}
        for path, kind in ((self._path, "partial measurement"), (out, "measurement")):
            known = read_json_or_none(path, kind) or {}
            if known.get("identity") == identity:
                # What no repetition could mend then is tried again now.
                self.trials = [trial for trial in known["trials"] if not trial["void"]]
                self.seen = known["seen"]
                break

    def save(self) -> None:
        write_json(self._path, self.document)

    def discard(self) -> None:
        if os.path.exists(self._path):
            os.unlink(self._path)

    @property
    def document(self) -> dict[str, Any]:
        """All of it, for the next start."""
        return {"identity": self._identity, "seen": self.seen, "trials": self.trials}


class Session:
    """Takes the steps one by one, with the servers that each needs."""

    def __init__(self, plan: dict[str, Any], made: dict[str, Arm], fleet: Fleet, access: Access, progress: Progress) -> None:
        self._plan, self._arms, self._fleet, self._access, self._progress = plan, made, fleet, access, progress
        prompts = read_prompts(plan["prompts"]["path"], plan["prompts"]["count"], most=most_prompts(plan))
        self._load = client.Load(
            model=plan["model"],
            prompts=prompts,
            concurrency=1,
            max_tokens=plan["max_tokens"],
            temperature=plan["temperature"],
            seed=plan["seed"],
        )
        self._warm: set[tuple[str, int]] = set()

    def take(self, steps: list[Step], known: Measurement) -> None:
        for number, step in enumerate(steps, 1):
            for name in self._fleet.need(step.up):
                self._warm = {(arm, concurrency) for arm, concurrency in self._warm if arm != name}
                known.seen[name] = self._look_at(name, known.seen.get(name, {}))
            self._warm_up(step)
            trial = self._trial(step)
            known.trials.append({**step.named, **trial})
            self._progress.update(
                f"concurrency {step.concurrency} · trial {number}/{len(steps)} · {step.arm}"
                f" TPOT {trial['client']['tpot_ms']['median']:.2f} ms",
                number,
                len(steps),
            )
            if number == len(steps) or steps[number].group != step.group:
                known.save()

    def _look_at(self, name: str, before: dict[str, Any]) -> dict[str, Any]:
        server = self._fleet.servers[name]
        found = resolved.of_running(server.url, self._access, server.log)
        if found.problem:
            print(f"{found.problem}: the {name} arm's configuration was read from {found.source} instead", flush=True)
        if wrong := resolved.contradiction(found.config, self._arms[name].speculative_config):
            raise SpecDecodeError(
                f"The {name} arm's server at {server.url} is not what the plan says: {wrong}.",
                "Mend the arm's speculative_config or its url in the plan.",
            )
        first = before or {"config": found.config, "resolved_from": found.source}
        starts = {"first start": first["config"], "this start": found.config}
        sources = {"first start": first["resolved_from"], "this start": found.source}
        changed = resolved.differences(resolved.comparable(starts, sources))
        known = {each["field"]: each for each in [*changed, *before.get("changed", [])]}
        return {
            **first,
            "problem": found.problem,
            "changed": list(known.values()),
            "starts_s": [*before.get("starts_s", []), *server.startup_s[-1:]],
        }

    def _warm_up(self, step: Step) -> None:
        """Requests that are not counted, on each start and at each concurrency."""
        if (step.arm, step.concurrency) in self._warm:
            return
        self._progress.update(f"warming the {step.arm} arm up at concurrency {step.concurrency}")
        prompts = self._load.prompts[: warming(self._plan, step.concurrency)]
        load = dataclasses.replace(self._load, prompts=prompts, concurrency=step.concurrency)
        client.run_loop(client.drive(self._fleet.servers[step.arm].url, load, self._access))
        self._warm.add((step.arm, step.concurrency))

    def _trial(self, step: Step) -> dict[str, Any]:
        server = self._fleet.servers[step.arm]
        for _attempt in range(1 + REPEATS):
            server.check_alive()
            with dcgm.watching(self._plan["device_metrics"]) as device:
                trial = client.run_trial(
                    server.url,
                    dataclasses.replace(
                        self._load,
                        prompts=self._load.prompts[: prompts_wanted(self._plan, step.concurrency)],
                        concurrency=step.concurrency,
                    ),
                    speculative=self._arms[step.arm].speculative_config is not None,
                    access=self._access,
                    num_speculative_tokens=self._arms[step.arm].num_speculative_tokens,
                )
            if trial["engine"].get("drafts") and self._arms[step.arm].speculative_config is None:
                raise SpecDecodeError(
                    f"The {step.arm} arm's server at {server.url} drafted, though the plan names no speculative_config for it.",
                    "Mend the arm's speculative_config or its url in the plan.",
                )
            trial["device"] = device.means
            del trial["snapshots"]
            if not trial["void"]:
                break
            print(f"void trial of the {step.arm} arm: {trial['void']}", flush=True)
        return trial


def main() -> None:
    options = arguments()
    result = PhaseResult("acceptance", options.out)
    progress = Progress()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the servers are stopped
    plan = complete(read_json_object(options.plan, "measurement plan"))
    draft = read_json_object(options.draft, "staged draft") if options.draft else {}
    made = arms(plan, draft)
    hardware = describe_hardware()
    stay = resident(plan, hardware["kind"])
    plan["prompts"]["sha256"] = sha256_file(plan["prompts"]["path"])
    access = Access(os.environ.get("VLLM_API_KEY", ""), plan.get("ca_path", ""))
    # Trials of another plan, another draft, another machine, another vLLM or another client are not this measurement's.
    shaping = {name: value for name, value in plan.items() if name not in HARMLESS}
    versions = [engine_version(), sha256_file(client.__file__)]
    logs = os.path.join(os.path.dirname(os.path.abspath(options.plan)), "..", "jobs", "servers")
    together = memory_is_given(plan["server_arguments"])
    with Fleet(servers(plan, made, logs, access), plan["startup_timeout_s"], progress, together) as fleet:
        weights = drafts_served(made)
        identity = sha256_value([shaping, draft, platform.node(), hardware, versions, fleet.running_since(), weights])
        known = Measurement(options.out, identity)
        steps = schedule(plan, made, stay)
        missing, known.trials = remaining(steps, known.trials)
        if missing:
            Session(plan, made, fleet, access, progress).take(missing, known)
        result.complete(
            {
                "plan": plan,
                "draft": draft,
                **findings(made, known.seen, fleet, weights),
                "design": {
                    "order": "ABBA",
                    "resident": stay,
                    "aa_trials": plan["aa_trials"],
                    "sweep": [arm.num_speculative_tokens for arm in made.values() if arm.sweep],
                },
                # Where the servers run; a plan whose arms run elsewhere says where that is.
                "node": plan.get("served_on", {}).get("node", platform.node()),
                "hardware": plan.get("served_on", {}).get("hardware", hardware),
                "client_node": platform.node(),
                **known.document,
                "trials": in_order(steps, known.trials),
            }
        )
    known.discard()


def engine_version() -> str:
    """The vLLM that is installed here; empty where the arms run elsewhere, and none is."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def drafts_served(made: dict[str, Arm]) -> dict[str, str]:
    """The checksum of each arm's draft, where it is a folder here: its weights may have changed under the same path."""
    folders = {name: (arm.speculative_config or {}).get("model") or "" for name, arm in made.items()}
    known = {folder: sha256_folder(folder)[:16] for folder in set(folders.values()) if os.path.isdir(folder)}
    return {name: known[folder] for name, folder in folders.items() if folder in known}


def findings(made: dict[str, Arm], seen: dict[str, dict[str, Any]], fleet: Fleet, weights: dict[str, str]) -> dict[str, Any]:
    """The arms as they were served, and where their configurations differ."""
    sources = {name: seen[name]["resolved_from"] for name in made}
    compared = resolved.comparable({name: seen[name]["config"] for name in made}, sources)
    baseline, *others = made
    between = {name: {each: compared[each] for each in (baseline, name)} for name in others}
    plain = {name: compared[name] for name, arm in made.items() if not arm.sweep}
    restarts = {name: resolved.of_starts(name, seen[name]["changed"]) for name in made}
    return {
        "arms": {
            name: {
                "speculative_config": arm.speculative_config,
                "num_speculative_tokens": arm.num_speculative_tokens,
                "draft_sha": weights.get(name),
                "sweep": arm.sweep,
                "url": fleet.servers[name].url,
                "command": fleet.servers[name].command,
                "startup_s": next(reversed(seen[name]["starts_s"]), None),
                "starts_s": seen[name]["starts_s"],
                "resolved": resolved.essentials(seen[name]["config"]),
                "resolved_from": seen[name]["resolved_from"],
                "problem": seen[name]["problem"],
                "differences": [*resolved.differences(between[name]), *restarts[name]] if arm.sweep else [],
            }
            for name, arm in made.items()
        },
        "differences": [*resolved.differences(plain), *(each for name in plain for each in restarts[name])],
        "speculative_differences": resolved.speculative_differences(plain),
    }


def in_order(steps: list[Step], trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials as the design orders them, each with its place."""
    places = {step.key: place for place, step in enumerate(steps, 1)}
    placed = [{**trial, "position": places[key_of(trial)]} for trial in trials]
    return sorted(placed, key=lambda trial: trial["position"])


if __name__ == "__main__":
    run(main)
