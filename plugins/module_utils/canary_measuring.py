# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How arms on Kubernetes are measured, and one result from several sessions. Pure; private to the collection."""

from __future__ import annotations

import itertools
import posixpath
from typing import Any

from . import arms as planned
from . import resolved
from .canary_objects import COMPONENT
from .errors import SpecDecodeError
from .files import sha256_value

Object = dict[str, Any]


def canary_arms(experiment: Object, draft: Object, canary: Object) -> list[Object]:
    """The arms as they are served: the draft at its place in the pods, and one arm for each further K of the sweep."""
    plan = {**planned.OPTIONAL, **experiment["documents"]["configs/arms.json"]}
    made = planned.arms(plan, {"draft_dir": draft_place(experiment, draft, canary)})
    return [{"name": arm.name, "speculative_config": arm.speculative_config, "sweep": arm.sweep} for arm in made.values()]


def draft_place(experiment: Object, draft: Object, canary: Object) -> str:
    """Where the pods see the draft: below its checksum, on the serving volume."""
    return f"{canary['drafts_path'].rstrip('/')}/{staged_below(experiment, draft)}"


def staged_below(experiment: Object, draft: Object) -> str:
    """A draft's place among all that are staged."""
    return f"{experiment['slug']}/{draft['sha']}"


def staging_sources(experiment: Object, draft: Object, canary: Object) -> list[Object]:
    """What is brought to the serving volume: the draft, if the arms need one, and the target where that is asked."""
    found, places = [], {}
    if draft["sha"]:
        place = draft_place(experiment, draft, canary)
        found.append({"source": draft["draft_dir"], "destination": place, "sha": draft["sha"]})
        places["drafts_path"] = canary["drafts_path"]
    if canary["stage_target"]:
        found.append({"source": experiment["target"]["path"], "destination": canary["target_path"], "sha": ""})
        places["target_path"] = canary["target_path"]
    for name, path in places.items():
        volume = posixpath.join("/", posixpath.normpath(canary["models"]["path"]))
        if posixpath.commonpath([volume, posixpath.join("/", posixpath.normpath(path))]) != volume:
            raise SpecDecodeError(
                f"spec_canary_{name} is {path}, which is not on the volume that is mounted at {volume}.",
                "Nothing else can be written to: mend it, or spec_canary_models.",
            )
    return found


def identity(experiment: Object, draft: Object, canary: Object) -> str:
    """Changes when, and only when, another measurement is asked for."""
    served = {key: canary[key] for key in
              ("image", "command", "server_arguments", "server_environment", "target_path", "gpus", "gpu_resource", "replicas",
               "resources", "shared_memory", "node", "node_selector")}  # fmt: skip
    return sha256_value([experiment["documents"]["configs/arms.json"], draft["sha"], served])


def sessions(arms: list[Object], plan: Object, resident: bool) -> list[Object]:
    """What is measured in one go: ``[{name, arms, pairs, purpose}]``.

    Arms that fit side by side stay up and take turns trial by trial. Others are restarted whenever the arm changes;
    ABBA order puts two trials of an arm together, so that n pairs take n + 1 starts. Each further K of a sweep is
    compared with the baseline in pairs of its own. Order and numbers are those of ``arms.schedule``.
    """
    made = {arm["name"]: planned.Arm(arm["name"], arm.get("speculative_config"), sweep=arm["sweep"]) for arm in arms}
    steps = planned.schedule({**planned.OPTIONAL, **plan, "concurrencies": [1]}, made, resident)
    # Extra trials of the baseline are taken where its server is up anyway: they make no session.
    compared = (step for step in steps if step.purpose != "noise")
    goes = itertools.groupby(compared, lambda step: (step.up, step.purpose))
    return [
        {"name": f"session-{place}", "arms": list(up), "pairs": list(dict.fromkeys(step.pair for step in go)), "purpose": purpose}
        for place, ((up, purpose), go) in enumerate(goes, 1)
    ]


def session_arms(arms: list[Object], session: Object) -> list[Object]:
    """All arms, those that this session does not measure with no replicas."""
    return [arm if arm["name"] in session["arms"] else {**arm, "replicas": 0} for arm in arms]


def urls(services: list[Object]) -> dict[str, str]:
    """Each arm's address inside the cluster."""
    return {
        item["metadata"]["labels"][COMPONENT]: f"http://{_host(item['spec']['clusterIP'])}:{item['spec']['ports'][0]['port']}"
        for item in services
    }


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def still_there(progress: Object, measurement: str, placement: Object) -> Object:
    """What earlier plays measured of the same, on the same node in the same way; nothing else counts."""
    same = progress and progress["identity"] == measurement and all(
        progress["placement"][key] == placement[key] for key in ("node", "resident")
    )  # fmt: skip
    return progress if same else {"identity": measurement, "placement": placement, "sessions": {}}


def session_plan(plan: Object, session: Object, arms: list[Object], urls: dict[str, str], target_path: str) -> Object:
    """The plan for ``measure_canary.py``: the arms of one session at their addresses."""
    missing = [name for name in session["arms"] if not urls.get(name)]
    if missing:
        raise SpecDecodeError(f"The {missing[0]} arm has no address.", "Its Service is missing: run the playbook again.")
    return {
        **plan,
        "target": {**plan["target"], "path": target_path},
        "trials": len(session["pairs"]),
        # The arms of a sweep are among the session's arms.
        "sweep_num_speculative_tokens": [],
        "resident": True,
        # The first session has the baseline, whose extra trials these are.
        "aa_trials": plan.get("aa_trials", 0) if session["name"] == "session-1" else 0,
        "arms": [{**arm, "url": urls[arm["name"]]} for arm in arms if arm["name"] in session["arms"]],
    }


def acceptance(measured: list[Object], plan: Object, draft: Object, arms: list[Object], facts: Object) -> Object:
    """One result from all sessions, as ``measure_arms.py`` writes it for arms on one machine.

    ``measured`` is ``[{session, result, pods, waited_s}]`` in the order of the sessions; ``facts`` are the placement and
    what else the cluster said.
    """
    first = measured[0]["result"]
    configs: dict[str, Object] = {}
    found: dict[str, Object] = {}
    trials: list[Object] = []
    between_starts: dict[str, list[Object]] = {}
    nodes: dict[str, set[str]] = {}
    for part in measured:
        session, result = part["session"], part["result"]
        for name in session["arms"]:
            config = result["configs"][name]
            changed = resolved.differences({"first start": configs.setdefault(name, config), "this start": config})
            between_starts.setdefault(name, []).extend(resolved.of_starts(name, changed))
            arm = found.setdefault(name, {**result["arms"][name], "starts_s": [], "pods": []})
            started = [pod for pod in part["pods"][name] if pod not in arm["pods"]]
            if started:  # not one that stayed up from the session before
                arm["starts_s"].append(part["waited_s"])
                arm["startup_s"] = part["waited_s"]
                arm["pods"] += started
            nodes.setdefault(name, set()).update(pod["node"] for pod in part["pods"][name])
        for trial in result["trials"]:
            beyond = trial["pair"] - len(session["pairs"])  # an extra trial has a number of its own after all pairs
            pair = plan["trials"] + beyond if beyond > 0 else session["pairs"][trial["pair"] - 1]
            swept = {"purpose": "sweep"} if session["purpose"] == "sweep" else {}
            trials.append({**trial, **swept, "pair": pair, "position": len(trials) + 1, "session": session["name"]})
    plain = {arm["name"]: configs[arm["name"]] for arm in arms if not arm["sweep"]}
    differences = [item for name in plain for item in between_starts[name]] + resolved.differences(plain)
    baseline = arms[0]["name"]
    for arm in arms:
        name, config = arm["name"], arm["speculative_config"]
        found[name].update(
            speculative_config=config, num_speculative_tokens=(config or {}).get("num_speculative_tokens"), sweep=arm["sweep"],
            image=facts["image"],
        )  # fmt: skip
        if arm["sweep"]:
            beside = resolved.differences({baseline: configs[baseline], name: configs[name]})
            found[name]["differences"] = between_starts[name] + beside
    places = {name: sorted(where) for name, where in nodes.items()}
    if len({tuple(where) for where in places.values()}) > 1 or any(len(where) > 1 for where in places.values()):
        differences.append({"field": "kubernetes.node", "values": places})
    return {
        **{key: value for key, value in first.items() if key not in ("configs", "seen", "arms", "trials", "differences")},
        "finished_at": measured[-1]["result"]["finished_at"],
        "duration_s": sum(part["result"]["duration_s"] for part in measured),
        "identity": facts["identity"],
        # As it was asked for, with the checksum of what was driven.
        "plan": {**plan, "prompts": {**first["plan"]["prompts"], **plan["prompts"]}},
        "draft": draft,
        "arms": found,
        "differences": differences,
        "speculative_differences": resolved.speculative_differences(plain),
        "node": " ".join(sorted({node for where in places.values() for node in where})),
        "hardware": facts["placement"]["hardware"],
        "design": {
            **first.get("design", {}),
            "order": "ABBA",
            "resident": facts["placement"]["resident"],
            "sweep": [found[arm["name"]]["num_speculative_tokens"] for arm in arms if arm["sweep"]],
        },
        "kubernetes": {key: value for key, value in facts.items() if key != "identity"},
        "trials": trials,
    }
