# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Never disturb serving: what a job may ask for, judged from what Slurm says of its partitions and nodes. Pure; private.

Nothing here asks anything: the caller brings the text of ``scontrol --oneliner show`` and the qualities of service.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from .errors import SpecDecodeError

_REMEDY = "Choose another with spec_slurm; what counts as serving stands in spec_serving_partitions and spec_serving_nodes."
_QUALITY_REMEDY = "Name one that preempts nobody: spec_slurm: {qos: ...}."
_FIELD = re.compile(r"(\w+)=(.*?)(?= \w+=|$)")


@dataclasses.dataclass(frozen=True)
class Serving:
    """What a site keeps for serving, and where experiments may run (anywhere else, if that is empty)."""

    partitions: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    allowed_partitions: tuple[str, ...] = ()


def admit(
    options: dict[str, Any],
    serving: Serving,
    partitions: str,
    nodes: str,
    config: str,
    qualities: dict[str, str],
    defaults: Sequence[str] = (),
) -> dict[str, Any]:
    """Refuse a job that could disturb serving; returns the options that keep an admitted one off serving's nodes.

    ``qualities`` says whom each quality of service may preempt; ``defaults`` are those of a job that names none.
    """
    known = {entry["PartitionName"]: entry for entry in objects(partitions)}
    states = {entry["NodeName"]: entry for entry in objects(nodes)}
    chosen = [name for name in str(options.get("partition", "")).split(",") if name] or _default(known)
    protected = set(expand(",".join(serving.nodes)))
    excluded = set(expand(str(options.get("exclude", ""))))
    pinned = set(expand(str(options.get("nodelist", ""))))
    for name in chosen:
        _check_partition(name, serving, known)
        _check_preemption(name, known, config)
    for name in [str(options["qos"])] if options.get("qos") else defaults:
        _check_quality(name, qualities)
    reachable = {node for name in chosen for node in expand(known.get(name, {}).get("Nodes", ""))}
    if pinned & protected:
        raise SpecDecodeError(f"The job asks for node {_listed(pinned & protected)}, which serves.", _REMEDY)
    candidates = (pinned or reachable) - excluded - protected
    if reachable and not candidates:
        raise SpecDecodeError(
            f"Every node of partition {', '.join(chosen)} that the job could run on serves or is excluded.", _REMEDY
        )
    if options.get("exclusive", False) is not False:
        _check_exclusive(pinned - excluded, candidates, states)
    kept_off = (reachable & protected) - excluded
    return {"exclude": ",".join(sorted(excluded | kept_off))} if kept_off else {}


def objects(text: str) -> list[dict[str, str]]:
    """What ``scontrol --oneliner show`` printed: one object a line, ``Name=value`` pairs."""
    return [dict(_FIELD.findall(line.strip())) for line in text.splitlines() if "=" in line]


def expand(hosts: str) -> list[str]:
    """The names in Slurm's notation of a host list: ``gpu[1-3,07],login``."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        names += _expanded(part.strip())
    return names


def _expanded(part: str) -> list[str]:
    match = re.match(r"^([^\[]*)\[([^\]]*)\](.*)$", part)
    if not match:
        return [part] if part and part != "(null)" else []
    found = []
    for piece in match[2].split(","):
        first, _dash, last = piece.partition("-")
        numbers = range(int(first), int(last or first) + 1) if first.isdigit() else []
        middles = [str(number).zfill(len(first)) for number in numbers] or [piece]
        found += [name for middle in middles for name in _expanded(f"{match[1]}{middle}{match[3]}")]
    return found


def _default(known: dict[str, dict[str, str]]) -> list[str]:
    return [name for name, entry in known.items() if entry.get("Default") == "YES"]


def _check_partition(name: str, serving: Serving, known: dict[str, dict[str, str]]) -> None:
    if name not in known:
        raise SpecDecodeError(f"Slurm knows no partition {name!r}, only {', '.join(sorted(known))}.", "Mend spec_slurm.")
    if name in serving.partitions:
        raise SpecDecodeError(f"The partition {name!r} serves; no experiment runs there.", _REMEDY)
    if serving.allowed_partitions and name not in serving.allowed_partitions:
        raise SpecDecodeError(
            f"The partition {name!r} is not one of those that experiments may use: {', '.join(serving.allowed_partitions)}.",
            "Choose one of them with spec_slurm, or extend spec_allowed_partitions.",
        )


def _check_preemption(name: str, known: dict[str, dict[str, str]], config: str) -> None:
    """With preemption by partition, a job of a higher tier pushes those of a lower one off the nodes that they share."""
    if not re.search(r"^PreemptType\s*=\s*preempt/partition_prio", config, re.MULTILINE):
        return
    own = set(expand(known[name].get("Nodes", "")))
    tier = int(known[name].get("PriorityTier", 1))
    victims = [
        other
        for other, entry in known.items()
        if int(entry.get("PriorityTier", 1)) < tier
        and entry.get("PreemptMode", "OFF") != "OFF"
        and own & set(expand(entry.get("Nodes", "")))
    ]
    if victims:
        raise SpecDecodeError(
            f"A job in partition {name!r} (priority tier {tier}) would preempt jobs of {', '.join(victims)}.", _REMEDY
        )


def _check_quality(name: str, qualities: dict[str, str]) -> None:
    if qualities.get(name):
        raise SpecDecodeError(f"The QoS {name!r} preempts jobs of {qualities[name]}; an experiment never does.", _QUALITY_REMEDY)


def _check_exclusive(pinned: set[str], candidates: set[str], states: dict[str, dict[str, str]]) -> None:
    busy = {name for name in pinned if _is_busy(states.get(name, {}))}
    if busy:
        raise SpecDecodeError(
            f"The job asks for node {_listed(busy)} for itself alone, but others' jobs run there.",
            "Choose idle nodes, leave exclusive out, or wait.",
        )
    if states and candidates and all(_is_busy(states.get(name, {})) for name in candidates):
        raise SpecDecodeError(
            "The job asks for nodes for itself alone, but no node that it may use is idle.",
            "Leave exclusive out, or wait until one is idle.",
        )


def _is_busy(node: dict[str, str]) -> bool:
    return any(word in node.get("State", "").upper() for word in ("ALLOC", "MIX", "COMPLETING"))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
