# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The workflow as a graph: whatever ends badly is torn down, and nothing is promoted without a person."""

from __future__ import annotations

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import awx


@pytest.fixture(params=[1, 4])
def edges(request):
    nodes = awx.workflow_nodes("p", "Default", request.param)
    return {
        node["identifier"]: {kind: [to["identifier"] for to in targets] for kind, targets in node["related"].items()}
        for node in nodes
    }


def walk(edges, outcomes):
    """The nodes that run; ``outcomes`` names those that fail."""
    ran, waiting = [], ["preflight"]
    while waiting:
        name = waiting.pop(0)
        if name in ran:
            continue
        ran.append(name)
        kind = "failure_nodes" if name in outcomes else "success_nodes"
        waiting += edges[name].get(kind, []) + edges[name].get("always_nodes", [])
    return ran


def test_all_well(edges):
    ran = walk(edges, ())
    assert ran == list(edges) and ran[-3:] == ["approval", "promote", "teardown"]


def test_every_failure_after_preflight_ends_in_teardown_without_promotion(edges):
    for name in edges:
        if name in ("preflight", "teardown") or (name.startswith("wait") and "always_nodes" in edges[name]):
            continue
        ran = walk(edges, (name,))
        assert ran[-1] == "teardown", name
        assert "promote" not in ran or name == "promote", name
    assert walk(edges, ("preflight",)) == ["preflight"]


def test_killed_wait_is_followed_by_another_and_tears_nothing_down():
    edges = {n["identifier"]: n for n in awx.workflow_nodes("p", "Default", 3)}
    assert edges["wait 1"]["related"] == {"always_nodes": [{"identifier": "wait 2"}]}
    assert edges["wait 1"]["extra_data"] == {} and edges["wait 2"]["extra_data"] == {"spec_job_attempts": 0}


def test_every_phase_is_run_once_by_the_workflow():
    templates = {item["name"]: item for item in awx.job_templates({"spec_seed": 1}, 60)}
    assert templates["submit train"]["extra_vars"]["spec_train_wait"] is False
    assert templates["wait"]["extra_vars"]["spec_train_wait_timeout"] == 60
    assert all(item["extra_vars"]["spec_seed"] == 1 for item in templates.values() if "train_draft" in item["playbook"])
    assert templates["teardown"]["extra_vars"] == {}
    named = {node["unified_job_template"]["name"] for node in awx.workflow_nodes("p", "Default", 2)} - {"p approval"}
    assert named == {f"p {name}" for name in templates}
