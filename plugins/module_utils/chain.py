# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A chain of jobs that needs no controller: each ends with its gate, and a red gate stops the rest. Pure; private."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import gates

#: the phases whose work a gate judges before the next may start
GATES = {"untrained": "artifact", "dataset": "dataset", "capture": "capture", "train": "training", "convert": "artifact"}


def links(experiment: dict[str, Any], phases: Sequence[str], thresholds: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases to submit, in order, each with the command that judges it inside its job."""
    wanted = [phase for phase in phases if phase in experiment["jobs"]]
    # Nobody reads what the check of an untrained draft writes, but where it fails all the rest is in vain.
    checked = ["untrained"] if wanted[:1] == ["untrained"] else []
    return [
        {
            # Ansible runs two hosts' equal includes as one, out of their order: a link is its experiment's alone.
            "experiment": experiment["name"],
            "phase": phase,
            "after": checked if number == 1 else [],
            **_judge(experiment, phase, thresholds),
        }
        for number, phase in enumerate(wanted)
    ]


def _judge(experiment: dict[str, Any], phase: str, thresholds: dict[str, Any]) -> dict[str, Any]:
    """The phase's gate, for the play where the work is done already, and as the command that the job itself ends with."""
    gate = GATES.get(phase, "")
    if not gate:
        return {"gate": "", "evidence": {}, "thresholds": {}, "verify": []}
    limits = {**({"layers": experiment["aux_layers"]} if gate == "capture" else {}), **gates.thresholds_of(thresholds, gate)}
    evidence = {"convert" if gate == "artifact" else phase: experiment["jobs"][phase]["result"]}
    verify = [
        experiment["engine_python"], f"{experiment['bundle']}/judge_gate.py", "--gate", gate,
        "--evidence", json.dumps(evidence), "--thresholds", json.dumps(limits),
    ]  # fmt: skip
    return {"gate": gate, "evidence": evidence, "thresholds": limits, "verify": verify}
