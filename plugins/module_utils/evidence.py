# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Collects what a gate judges: the documents that were given, and what they point to. Private to the collection.

Gates are pure; whatever is read from a disk for them is read here.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from typing import Any

from .canary_measuring import staged_below
from .checkpoint import read_target
from .engines import engine_facts
from .errors import SpecDecodeError
from .files import read_json_object, read_json_or_none, read_text_or_none, sha256_file, sha256_folder
from .hardware import describe_hardware

Documents = dict[str, Any]
#: documents that a first run does not have yet
OPTIONAL = ("levers", "target_config", "experiment", "draft", "measurement")
#: a plot needs no more points of a training curve
CURVE_POINTS = 200
#: a device metric of the DCGM exporter
DCGM = re.compile(r"^DCGM_FI_[A-Z0-9_]+\{[^}]*\} \S+", re.MULTILINE)


def gather(gate: str, given: Documents) -> Documents:
    """The documents by name: texts are paths of JSON files. ``acceptance`` and ``promotion`` need more than is named."""
    found: Documents = {}
    for name, value in given.items():
        if not isinstance(value, str):
            found[name] = value
        elif name in OPTIONAL:
            found[name] = read_json_or_none(value, name)
        else:
            found[name] = read_json_object(value, f"{name} result")
        if name == "train" and isinstance(value, str) and found[name].get("metrics_path"):
            # Node programs name paths as they saw them: below the bundle, whose results/ this file stands in.
            bundle = os.path.dirname(os.path.dirname(os.path.abspath(value)))
            found[name]["metrics_path"] = os.path.join(bundle, found[name]["metrics_path"])
    more = {"artifact": _artifact, "acceptance": _acceptance, "promotion": _promotion}.get(gate)
    return more(found) if more else found


def _artifact(found: Documents) -> Documents:
    config = _draft_config(found.get("convert", {}).get("draft_dir"))
    return {**found, "draft_config": config} if config else found


def _acceptance(found: Documents) -> Documents:
    acceptance = found.get("acceptance", {})
    served = acceptance.get("arms", {}).get("trained", {}).get("speculative_config") or {}
    folder = served.get("model")
    found = {"draft_config": _draft_config(folder), "draft_bytes": _draft_bytes(folder), **found}
    prompts = acceptance.get("plan", {}).get("prompts", {})
    if prompts.get("path") and not prompts.get("sha256") and os.path.isfile(prompts["path"]):
        plan = {**acceptance["plan"], "prompts": {**prompts, "sha256": sha256_file(prompts["path"])}}
        found["acceptance"] = {**acceptance, "plan": plan}
    train = found.get("train")
    if train and train.get("metrics_path"):
        found["train"] = {**train, "curve": training_curve(train["metrics_path"])}
    if found.get("profile"):
        window = (acceptance.get("started_at", ""), acceptance.get("finished_at", ""))
        found["profile"] = captured(found["profile"], window)
    return found


def _promotion(found: Documents) -> Documents:
    """What is served now: given facts first, the rest as this host has it."""
    given = {name: value for name, value in (found.get("facts") or {}).items() if value}
    try:
        config = found["verdict"]["arms"]["trained"]["speculative_config"] or {}
        context = found["verdict"]["context"]["trained"]
    except (KeyError, TypeError) as error:
        raise SpecDecodeError(f"The verdict lacks {error}.", "Judge the measurement again with this version.") from error
    facts: Documents = {}
    if folder := _draft_folder(found, config.get("model") or ""):
        facts["draft_sha"] = draft_sha(folder)
    standing = found["verdict"]["arms"]["standing"]["speculative_config"] or {}
    if os.path.isdir(standing.get("model") or ""):
        facts["standing_draft_sha"] = draft_sha(standing["model"])
    if os.path.isdir(context["identity"]["path"]):
        facts["target_sha"] = read_target(context["identity"]["path"], serving_copy=True).sha
    if os.path.isfile(context["workload"]["dataset"]):
        facts["prompts_sha256"] = sha256_file(context["workload"]["dataset"])
    facts["hardware"] = describe_hardware()["name"]
    python = (found.get("experiment") or {}).get("engine_python")
    if python and not given.get("vllm"):
        facts["vllm"] = engine_facts(python)["versions"]["vllm"]
    # The shas are those of the files, whatever anybody says: a promotion is about the staged artifact.
    for name in ("hardware", "vllm", "image", "target_sha"):
        facts[name] = given.get(name) or facts.get(name)
    return {**found, "facts": facts}


def _draft_folder(found: Documents, model: str) -> str:
    """Where this host has the draft that is served as ``model``; empty if nowhere.

    Pods serve a copy on a volume of their own, which names its content; what it was copied from is here.
    """
    if os.path.isdir(model):
        return model
    draft, experiment = found.get("draft") or {}, found.get("experiment") or {}
    staged = draft.get("sha") and experiment.get("slug") and model.endswith(f"/{staged_below(experiment, draft)}")
    return draft["draft_dir"] if staged and os.path.isdir(draft["draft_dir"]) else ""


def draft_sha(folder: str) -> str:
    """The checksum under which a draft is staged."""
    return sha256_folder(folder)[:16]


def _draft_config(folder: str | None) -> Documents | None:
    found = read_json_or_none(os.path.join(folder, "config.json"), "draft config") if folder else None
    return found if isinstance(found, dict) else None


def _draft_bytes(folder: str | None) -> int | None:
    """The size of a served draft's weights; ``None`` where it is not on this machine."""
    if not folder or not os.path.isdir(folder):
        return None
    sizes = [os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder) if name.endswith(".safetensors")]
    return sum(sizes) or None


def training_curve(path: str) -> list[Documents]:
    """Logged steps with loss and accuracies, thinned; empty if the file is gone."""
    rows = []
    for line in (read_text_or_none(path) or "").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # a line that was being written when its job was killed
        kept = ("step", "loss", "acc")
        rows.append({key: value for key, value in row.items() if key in kept or key.startswith("acc_")})
    stride = max(1, -(-len(rows) // CURVE_POINTS))
    return rows[::stride]


def captured(profile: Documents, window: tuple[str, str]) -> Documents:
    """Which of the named profiling files are evidence: DCGM metrics, and kernel profiles that are there and not empty."""
    dcgm, kernels = list(profile.get("dcgm") or []), list(profile.get("kernels") or [])
    for path in [*dcgm, *kernels]:
        if not os.path.isfile(path) or not os.path.getsize(path):
            raise SpecDecodeError(f"The profile {path} is missing or empty.", "Name files that exist in spec_profile, or none.")
        if path in dcgm and not DCGM.search(read_text_or_none(path) or ""):
            raise SpecDecodeError(f"{path} holds no metrics of the DCGM exporter.", "Save what its /metrics answers.")
        _check_taken_in(path, window)
    return {"dcgm": [os.path.basename(path) for path in dcgm], "kernels": [os.path.basename(path) for path in kernels]}


def _check_taken_in(path: str, window: tuple[str, str]) -> None:
    """A profile of another time is no evidence for this measurement."""
    if not all(window):
        return
    start, end = (datetime.datetime.fromisoformat(text).timestamp() for text in window)
    taken = os.path.getmtime(path)
    if not start <= taken <= end + 60:
        when = datetime.datetime.fromtimestamp(taken, datetime.timezone.utc).isoformat(timespec="seconds")
        raise SpecDecodeError(
            f"The profile {path} was written at {when}, outside the measurement from {window[0]} to {window[1]}.",
            "Capture it while the arms are measured.",
        )
