# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The workflow for AWX: against awx.awx's own argument specs, and against a double of the API. Nothing is run by it."""

from __future__ import annotations

import json
import pathlib

import pytest
import yaml

from .awx_double import controller
from .conftest import ROOT

PROJECT = "https://git.example.org/inference.spec_decode.git"


@pytest.fixture(scope="module")
def configured(installed):
    """The controller's store after the play, and what the play printed when it ran again."""
    with controller() as (address, store):
        environment = dict(installed.environment)
        installed.environment.update(
            CONTROLLER_HOST=address, CONTROLLER_OAUTH_TOKEN="secret-token", CONTROLLER_VERIFY_SSL="false"
        )
        try:
            settings = {
                "awx_project_url": PROJECT, "awx_image": "registry.example.org/spec-decode-ee:0.1.0",
                "awx_further_credentials": {"validate": ["spec-decode kubernetes"]},
            }  # fmt: skip
            installed.play("awx_configure", "--check", **settings)
            assert {method for method, _path in store.requests} <= {"GET"}, "--check must make nothing"
            first = installed.play("awx_configure", "-vvv", **settings)
            again = installed.play("awx_configure", **settings)
        finally:
            installed.environment = environment
        yield store, first, again


def test_second_run_changes_nothing_and_no_run_shows_the_token(configured):
    _store, first, again = configured
    assert "changed=0" in again, again
    assert "secret-token" not in first + again


def test_every_object_is_there(configured):
    store, _first, _again = configured
    assert store.named("projects")["spec-decode"]["scm_url"] == PROJECT
    assert set(store.named("inventories")) == {"spec-decode local", "spec-decode slurm", "spec-decode slurm_on_k8s"}
    assert store.named("credentials")["spec-decode login node"].get("inputs", {}) == {}
    templates = store.named("job_templates")
    assert {f"spec-decode {name}" for name in ("preflight", "capture", "submit train", "wait", "teardown")} <= set(templates)
    for template in templates.values():
        assert (ROOT / template["playbook"]).is_file(), "the project must hold the playbook"
        assert template["ask_variables_on_launch"], "the workflow's variables reach only templates that ask for them"


def test_templates_have_the_credentials_that_they_are_given(configured):
    store, _first, _again = configured
    names = {item["id"]: item["name"] for item in store.named("credentials").values()}
    found = {
        name: {names[item["id"]] for item in store.links["job_templates", template["id"], "credentials"]}
        for name, template in store.named("job_templates").items()
    }
    assert found.pop("spec-decode validate") == {"spec-decode login node", "spec-decode kubernetes"}
    assert found and all(credentials == {"spec-decode login node"} for credentials in found.values())


def test_survey_asks_for_what_the_plays_take(configured):
    store, _first, _again = configured
    (survey,) = store.surveys.values()
    asked = {question["variable"] for question in survey["spec"]}
    settings = set(yaml.safe_load((ROOT / "playbooks/group_vars/all.yml").read_text()))
    variables = json.loads(store.named("job_templates")["spec-decode dataset"]["extra_vars"])
    used = {name for name in asked if name in settings or any(name in json.dumps(value) for value in variables.values())}
    assert used == asked and {"target", "method", "chat_template", "num_speculative_tokens"} <= asked
    assert set(variables) <= settings


def test_edges_of_the_workflow(configured):
    store, _first, _again = configured
    nodes = {node["id"]: node["identifier"] for node in store.objects["workflow_job_template_nodes"]}
    edges = {
        (nodes[number], kind): [nodes[item["id"]] for item in items]
        for (endpoint, number, kind), items in store.links.items()
        if endpoint == "workflow_job_template_nodes"
    }
    assert edges["approval", "success_nodes"] == ["promote"] and edges["approval", "failure_nodes"] == ["teardown"]
    assert edges["wait 1", "always_nodes"] == ["wait 2"] and edges["wait 4", "success_nodes"] == ["convert"]


def test_survey_answers_become_settings(installed, tmp_path):
    """The templates in the job templates' variables are Ansible's to fill in, in the controller's plays."""
    variables = yaml.load(pathlib.Path(ROOT / "roles/awx/vars/main.yml").read_text(), Loader=_Unsafe)["awx_settings"]
    answers = {"spec_awx_source": "/data/a b's.json", "spec_awx_layout": "auto", "spec_awx_min_accuracy": 0.25}
    data = tmp_path / "a b's.json"
    data.write_text((installed.home / "conversations.json").read_text())
    answers["spec_awx_source"] = str(data)
    settings = {"target": str(installed.target), "spec_work_dir": str(tmp_path / "work"), **variables, **answers}
    installed.play("train_draft", "--tags", "scaffold", **settings)
    stated = json.loads((tmp_path / "work/tiny-eagle3/spec-decode/configs/dataset.json").read_text())
    assert stated["sources"] == [{"path": str(data), "layout": "auto"}]


class _Unsafe(yaml.SafeLoader):
    """Reads Ansible's tag for a text that is no template yet."""


_Unsafe.add_constructor("!unsafe", lambda loader, node: loader.construct_scalar(node))
