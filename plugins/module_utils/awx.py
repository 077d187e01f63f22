# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The job templates and the workflow that AWX runs an experiment with. Pure; private to the collection.

Each phase is a node of its own, so that a node that failed or was killed can be run again. The training is submitted
by one node and waited for by others: the controller may kill a job that lasts for hours, and a wait that starts again
attaches to the training that goes on.
"""

from __future__ import annotations

from typing import Any

TRAIN_DRAFT = "playbooks/train_draft.yml"
#: name of a template → playbook, first and last phase, and what it sets beyond the experiment's own settings
TEMPLATES: dict[str, dict[str, Any]] = {
    "preflight": {"playbook": TRAIN_DRAFT, "job_type": "check", "job_tags": "preflight"},
    "dataset": {"playbook": TRAIN_DRAFT, "phases": ("dataset", "dataset")},
    "capture": {"playbook": TRAIN_DRAFT, "phases": ("capture", "capture")},
    "submit train": {"playbook": TRAIN_DRAFT, "phases": ("train", "train"), "settings": {"spec_train_wait": False}},
    "wait": {"playbook": TRAIN_DRAFT, "phases": ("train", "train")},
    "convert": {"playbook": TRAIN_DRAFT, "phases": ("convert", "convert")},
    "validate": {"playbook": TRAIN_DRAFT, "phases": ("validate", "report")},
    "promote": {"playbook": "playbooks/promote_draft.yml"},
    "teardown": {"playbook": "playbooks/teardown.yml"},
}
APPROVAL = "approval"
TEARDOWN = "teardown"


def job_templates(settings: dict[str, Any], wait_s: int) -> list[dict[str, Any]]:
    """The job templates, each with the variables of its plays; ``settings`` go to all that run phases."""
    found = []
    for name, template in TEMPLATES.items():
        variables = dict(settings) if template["playbook"] == TRAIN_DRAFT else {}
        if "phases" in template:
            variables["spec_start_phase"], variables["spec_stop_phase"] = template["phases"]
        variables.update(template.get("settings", {}))
        if name == "wait":
            # It gives up in good order before the controller kills it; the next one goes on waiting.
            variables["spec_train_wait_timeout"] = wait_s
        found.append(
            {
                "name": name,
                "playbook": template["playbook"],
                "job_type": template.get("job_type", "run"),
                "job_tags": template.get("job_tags", ""),
                "extra_vars": variables,
            }
        )
    return found


def workflow_nodes(prefix: str, organization: str, waits: int) -> list[dict[str, Any]]:
    """The workflow: one phase after the other, ``waits`` waits for the training, a person's approval, teardown at every end."""
    steps = [
        ("preflight", "preflight"),
        ("dataset", "dataset"),
        ("capture", "capture"),
        ("submit train", "submit train"),
        *((f"wait {number}", "wait") for number in range(1, waits + 1)),
        ("convert", "convert"),
        ("validate", "validate"),
        (APPROVAL, APPROVAL),
        ("promote", "promote"),
    ]
    nodes = []
    for place, (identifier, template) in enumerate(steps):
        after = steps[place + 1][0] if place + 1 < len(steps) else TEARDOWN
        nodes.append(_node(identifier, template, prefix, organization, _edges(identifier, template, after, waits)))
    return [*nodes, _node(TEARDOWN, TEARDOWN, prefix, organization, {})]


def _edges(identifier: str, template: str, after: str, waits: int) -> dict[str, list[str]]:
    if identifier == "preflight":
        return {"success_nodes": [after]}  # nothing was started that could be torn down
    if template == "promote":
        return {"always_nodes": [after]}
    if template == "wait" and identifier != f"wait {waits}":
        # A wait that ran out or was killed is no failed training: the next one tells, at once where it has ended.
        return {"always_nodes": [after]}
    return {"success_nodes": [after], "failure_nodes": [TEARDOWN]}


def _node(identifier: str, template: str, prefix: str, organization: str, edges: dict[str, list[str]]) -> dict[str, Any]:
    if template == APPROVAL:
        runs = {"name": f"{prefix} approval", "type": "workflow_approval", "timeout": 0}
        runs["description"] = "Promote the draft that the verdict of this workflow says to ship?"
    else:
        runs = {"name": f"{prefix} {template}", "type": "job_template", "organization": {"name": organization}}
    related = {kind: [{"identifier": name} for name in names] for kind, names in edges.items()}
    # A later wait only looks on: what failed is reported, not started over by every wait that follows.
    data = {"spec_job_attempts": 0} if template == "wait" and identifier != "wait 1" else {}
    return {
        "identifier": identifier, "unified_job_template": runs, "related": related, "all_parents_must_converge": False,
        "extra_data": data,
    }  # fmt: skip
