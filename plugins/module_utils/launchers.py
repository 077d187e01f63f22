# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a phase runs: its ``#SBATCH`` lines, container, modules and environment. Private to the collection.

Directives are parsed by ``sbatch``, not by a shell, and cannot be quoted for it: a value that is no plain word is
refused. All else reaches the shell quoted, through ``slurm/site.sh``, which no job's fingerprint covers: it says where
a job runs, not what it is.
"""

from __future__ import annotations

import re
from typing import Any

from .errors import SpecDecodeError
from .slurm_time import seconds
from .user_input import arguments, text, variables

#: the launcher of each phase's job
SCRIPTS = {
    "dataset": "prepare-data", "untrained": "untrained", "capture": "capture", "train": "train", "convert": "convert",
    "validate": "eval",
}  # fmt: skip
#: settings that become a directive of the same name
DIRECTIVES = (
    "partition", "account", "qos", "time", "nodes", "gres", "mem", "constraint", "reservation", "nodelist", "exclude",
    "signal", "output", "licenses", "clusters",
)  # fmt: skip
#: settings that become a directive of another name
RENAMED = {"gpus": "gpus-per-node", "cpus": "cpus-per-task"}
#: The program takes the batch shell's place (``exec``), so that the signal before the time limit must go there (``B:``).
DEFAULTS: dict[str, Any] = {"requeue": True, "signal": "B:TERM@120", "output": "%x-%j.log", "nodes": 1}
OTHERS = ("requeue", "exclusive", "container", "modules", "activate", "environment", "nccl")
CONTAINERS = ("none", "pyxis", "apptainer")
CONTAINER_KEYS = ("kind", "image", "mounts", "arguments")
#: a word that sbatch takes as it is: no blank, quote, comment sign, backslash or control character
WORD = re.compile(r"[A-Za-z0-9_./,:@%+=()\[\]&|!*^~-]+")


def launchers(site: dict[str, Any], phases: dict[str, dict[str, Any]], experiment: str) -> dict[str, dict[str, Any]]:
    """For each phase its directives and what its shell sets up. ``phases`` overrides single settings of ``site``."""
    unknown = set(phases) - set(SCRIPTS)
    if unknown:
        raise SpecDecodeError(
            f"spec_slurm_phases names {sorted(unknown)[0]!r}, which is no phase.", f"The phases are {', '.join(SCRIPTS)}."
        )
    return {phase: _launcher(resources(site, phases, phase), f"{experiment}-{phase}", phase) for phase in SCRIPTS}


def resources(site: dict[str, Any], phases: dict[str, dict[str, Any]], phase: str) -> dict[str, Any]:
    """The settings of one phase, checked. Only training and capture use more than one node."""
    single = {} if phase in ("train", "capture") else {"nodes": 1}
    found = {**DEFAULTS, **site, **single, **(phases.get(phase) or {})}
    known = {*DIRECTIVES, *RENAMED, *OTHERS}
    for key in found:
        if key not in known:
            raise SpecDecodeError(f"spec_slurm has no setting {key!r}.", f"Its settings are {', '.join(sorted(known))}.")
    for key in ("nodes", "gpus", "cpus"):
        if key in found and (isinstance(found[key], bool) or not re.fullmatch(r"[1-9][0-9]*", str(found[key]))):
            raise SpecDecodeError(f"{key} in spec_slurm must be a whole number from 1, but is {found[key]!r}.", "Mend it.")
    if found.get("time"):
        seconds(str(found["time"]))
    return found


def _launcher(found: dict[str, Any], job: str, phase: str) -> dict[str, Any]:
    container = _container(found.get("container") or {})
    return {
        "phase": phase,
        "directives": _directives(found, job),
        "nodes": int(found["nodes"]),
        "gpus": int(found.get("gpus", 0)),
        "container": container,
        "modules": [text(name, "modules in spec_slurm") for name in found.get("modules") or []],
        "activate": text(found.get("activate") or "", "activate in spec_slurm"),
        "environment": _environment(found),
    }


def _directives(found: dict[str, Any], job: str) -> list[str]:
    values = {key: found[key] for key in DIRECTIVES if found.get(key) not in (None, "")}
    values |= {name: found[key] for key, name in RENAMED.items() if found.get(key) not in (None, "")}
    lines = [f"--job-name={job}", "--ntasks-per-node=1", "--open-mode=append"]
    lines += [f"--{name}={_word(name, value)}" for name, value in values.items()]
    lines.append("--requeue" if found["requeue"] else "--no-requeue")
    if found.get("exclusive"):
        lines.append("--exclusive")
    return lines


def _word(name: str, value: Any) -> str:
    text = str(value)
    if not WORD.fullmatch(text) or text.startswith("-"):
        raise SpecDecodeError(
            f"{name} in spec_slurm is {text!r}, which cannot stand in an #SBATCH line: sbatch takes it apart at blanks,"
            " quotes, backslashes and comment signs, and reads a leading dash as another option.",
            "Give a value without them.",
        )
    return text


def _container(given: dict[str, Any]) -> dict[str, Any]:
    unknown = set(given) - set(CONTAINER_KEYS)
    kind = str(given.get("kind", "none"))
    if unknown or kind not in CONTAINERS:
        raise SpecDecodeError(
            f"The container in spec_slurm has {'no setting ' + repr(sorted(unknown)[0]) if unknown else f'no kind {kind!r}'}.",
            f"Its settings are {', '.join(CONTAINER_KEYS)}; kind is one of {', '.join(CONTAINERS)}.",
        )
    if kind != "none" and not given.get("image"):
        raise SpecDecodeError(f"A container of kind {kind} needs an image.", "Set image in spec_slurm.container.")
    mounts = [text(mount, "mounts in spec_slurm.container") for mount in given.get("mounts") or []]
    bad = next((mount for mount in mounts if "," in mount or not mount.startswith("/")), None)
    if bad is not None:
        raise SpecDecodeError(
            f"The container mount {bad!r} must be an absolute path, or from:to, without a comma.",
            "Mend spec_slurm.container.mounts.",
        )
    return {
        "kind": kind,
        "image": text(given.get("image", ""), "image in spec_slurm.container"),
        "mounts": mounts,
        "arguments": arguments(given.get("arguments") or [], "arguments in spec_slurm.container"),
    }


def _environment(found: dict[str, Any]) -> dict[str, str]:
    """Variables of the phase's processes; NCCL's settings are given by their names without ``NCCL_``."""
    nccl = {f"NCCL_{str(key).removeprefix('NCCL_')}": value for key, value in (found.get("nccl") or {}).items()}
    return variables({**nccl, **(found.get("environment") or {})}, "environment or nccl of spec_slurm")
