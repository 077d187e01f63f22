# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A window for a measurement: nodes that Slurm gives no new jobs to for a while. Private to the collection.

What is drained stands on disk before it is drained, and in Slurm's reason while it is; only a node that carries this
very reason is ever resumed, so that an administrator's drain stays an administrator's.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from typing import Any

from .errors import SpecDecodeError
from .files import read_json_or_none, write_json
from .jobs import now
from .slurm_client import Slurm
from .slurm_policy import Serving, expand, objects

#: the one kind of job that a node may be drained for
MEASUREMENT = "validate"


def open_window(
    path: str, experiment: str, nodes: str, phase: str, reason: str, serving: Serving, slurm: Slurm, check_mode: bool = False
) -> dict[str, Any]:
    """Drain ``nodes`` for a measurement. Running jobs go on; none new starts there until the window is closed."""
    if phase != MEASUREMENT:
        raise SpecDecodeError(
            f"A node is drained for a measurement only, not for {phase!r}.", f"Open a window for {MEASUREMENT!r}, or not at all."
        )
    wanted = expand(nodes)
    serves = sorted(set(wanted) & set(expand(",".join(serving.nodes))))
    if serves or not wanted:
        raise SpecDecodeError(
            f"Node {serves[0]} serves; it is never drained." if serves else "No node was named.", "Choose other nodes."
        )
    mark = _mark(experiment)
    found = _nodes(slurm)
    for name in wanted:
        if name not in found:
            raise SpecDecodeError(f"Slurm knows no node {name!r}.", "Mend the list of nodes.")
        if _is_drained(found[name]) and mark not in found[name].get("Reason", ""):
            raise SpecDecodeError(
                f"Node {name} is drained already, by somebody else: {found[name].get('Reason', 'no reason given')}.",
                "Choose another node, or ask them.",
            )
    fresh = [name for name in wanted if not _is_drained(found[name])]
    if fresh and not check_mode:
        held = sorted({*_held(path), *wanted})
        window = {"experiment": experiment, "nodes": held, "owner": getpass.getuser(), "reason": reason, "opened_at": now()}
        write_json(path, window)
        text = f"{mark} {reason} ({window['owner']}, {window['opened_at']})"
        slurm.update(f"nodename={','.join(fresh)}", "state=drain", f"reason={text}")
    return {"changed": bool(fresh), "nodes": wanted}


def close_window(path: str, experiment: str, slurm: Slurm, check_mode: bool = False) -> dict[str, Any]:
    """Resume what the experiment drained, also in a play that was aborted; nothing else."""
    held = _held(path)
    if not held:
        return {"changed": False, "nodes": []}
    found = _nodes(slurm)
    mine = [name for name in held if _is_drained(found.get(name, {})) and _mark(experiment) in found[name].get("Reason", "")]
    if not check_mode:
        if mine:
            slurm.update(f"nodename={','.join(mine)}", "state=resume")
        os.unlink(path)
    return {"changed": bool(mine), "nodes": mine}


def _mark(experiment: str) -> str:
    return f"spec_decode:{experiment}:"


def _held(path: str) -> Sequence[str]:
    window = read_json_or_none(path, "record of the measurement window")
    return window["nodes"] if window else []


def _nodes(slurm: Slurm) -> dict[str, dict[str, str]]:
    return {entry["NodeName"]: entry for entry in objects(slurm.show("node"))}


def _is_drained(node: dict[str, str]) -> bool:
    return "DRAIN" in node.get("State", "").upper()
