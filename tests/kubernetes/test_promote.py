# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A standing Deployment is given a draft, and its old config back, through the public playbooks."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from ansible_collections.inference.spec_decode.tests.support.won_experiment import SERVING, write_won
from lab import ROOT, changed, said

STANDING = ["--model=/models/base", "--max-num-seqs", "64"]


class Production:
    """A standing Deployment beside the bundle of an experiment that won."""

    def __init__(self, cluster, folder) -> None:
        self.cluster, self.folder = cluster, folder
        self.draft = folder / "drafts/sha"
        self.bundle = folder / "tiny-eagle3/spec-decode"
        self.config = write_won(self.bundle, self.draft)
        labels = {"app": "standing"}
        containers = [{"name": "vllm", "image": "vllm", "args": list(STANDING)}, {"name": "proxy", "image": "proxy"}]
        with cluster.store.lock:
            cluster.store.create("deployments", "lab", {
                "metadata": {"name": "standing"},
                "spec": {"replicas": 0, "selector": {"matchLabels": labels},
                         "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}}},
            })  # fmt: skip

    def play(self, playbook, code=0, **settings) -> str:
        variables = {
            "experiment": "tiny-eagle3", "spec_work_dir": str(self.folder), "spec_serving_facts": SERVING, "promote_apply": True,
            "promote_deployment": "standing", "promote_container": "vllm", "spec_kubernetes_namespace": "lab",
            "spec_kubernetes_connection": {"kubeconfig": str(self.cluster.kubeconfig())},
            "ansible_python_interpreter": str(ROOT / ".venv/bin/python"), **settings,
        }  # fmt: skip
        answer = subprocess.run(
            [str(ROOT / ".venv/bin/ansible-playbook"), "-i", "inventories/local", f"playbooks/{playbook}.yml",
             "-e", json.dumps(variables)],
            cwd=ROOT, env={**os.environ, "LC_ALL": "C.UTF-8"}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        text = answer.stdout + answer.stderr
        assert answer.returncode == code and "Traceback" not in text, text[-6000:]
        return text

    def arguments(self) -> list[str]:
        with self.cluster.store.lock:
            found = self.cluster.store.get("deployments", "lab", "standing")
            return found["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.fixture
def production(cluster, tmp_path):
    return Production(cluster, tmp_path)


def test_promotion_changes_one_argument_and_rollback_takes_it_back(production):
    production.play("promote_draft")
    before, option, config = production.arguments()[:-2], *production.arguments()[-2:]
    assert before == STANDING and option == "--speculative-config" and json.loads(config) == production.config
    assert changed(production.play("promote_draft")) == 0
    record = json.loads((production.bundle / "results/promotion.json").read_text())
    assert (record["state"], record["previous"], record["speculative_config"]) == ("promoted", None, production.config)
    production.play("promote_rollback")
    assert production.arguments() == STANDING
    assert changed(production.play("promote_rollback")) == 0


def test_words_of_the_command_line_are_taken_for_what_they_say(production):
    """``-e promote_apply=true`` is a text, not a boolean."""
    production.play("promote_draft", promote_apply="false")
    assert production.arguments() == STANDING
    production.play("promote_draft", promote_apply="true")
    assert json.loads(production.arguments()[-1]) == production.config
    assert "unable to convert to bool" in said(production.play("promote_draft", code=2, promote_apply="ja"))


def test_without_being_told_it_only_writes_files(production):
    production.play("promote_draft", promote_apply=False)
    assert production.arguments() == STANDING
    assert json.loads((production.bundle / "deploy/standing-speculative-config.json").read_text()) == production.config


def test_draft_that_changed_since_is_refused(production):
    (production.draft / "model.safetensors").write_bytes(b"other weights")
    assert "draft_sha was" in said(production.play("promote_draft", code=2))
    assert production.arguments() == STANDING and not (production.bundle / "deploy").exists()


def test_standing_deployment_that_is_not_what_was_compared_is_left_alone(production):
    other = [*STANDING, "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}']
    with production.cluster.store.lock:
        found = production.cluster.store.get("deployments", "lab", "standing")
        found["spec"]["template"]["spec"]["containers"][0]["args"] = other
    assert "but the verdict compared against no speculation" in said(production.play("promote_draft", code=2))
    assert production.arguments() == other and not (production.bundle / "deploy").exists()


def test_rollback_leaves_alone_what_was_changed_since(production):
    production.play("promote_draft")
    written = {path: path.read_text() for path in production.bundle.rglob("*.json")}
    other = [*STANDING, "-sc", '{"method": "ngram", "num_speculative_tokens": 2}']
    with production.cluster.store.lock:
        found = production.cluster.store.get("deployments", "lab", "standing")
        found["spec"]["template"]["spec"]["containers"][0]["args"] = other
    assert "which is neither the promoted" in said(production.play("promote_rollback", code=2))
    assert production.arguments() == other
    assert {path: path.read_text() for path in production.bundle.rglob("*.json")} == written


def test_draft_that_is_promoted_outlives_a_teardown(production):
    draft = {"method": "eagle3", "draft_dir": str(production.draft), "sha": production.draft.name}
    (production.bundle / "results/draft.json").write_text(json.dumps(draft))
    (production.bundle / "experiment.json").write_text(json.dumps({"drafts_dir": str(production.draft.parent)}))
    production.play("promote_draft")
    assert "Roll the promotion back first" in said(production.play("teardown", code=2, teardown_draft=True))
    assert production.draft.is_dir()
    production.play("promote_rollback")
    production.play("teardown", teardown_draft=True)
    assert not production.draft.exists()


def test_draft_of_another_experiment_outlives_the_teardown_of_one_that_only_measured_it(production):
    draft = {"method": "eagle3", "draft_dir": str(production.draft), "sha": production.draft.name}
    (production.bundle / "results/draft.json").write_text(json.dumps(draft))
    (production.bundle / "experiment.json").write_text("{}")
    production.play("teardown", teardown_draft=True)
    assert production.draft.is_dir()


def test_deployment_that_is_not_there(production):
    output = production.play("promote_draft", code=2, promote_deployment="elsewhere")
    assert "There is no Deployment elsewhere in namespace lab." in said(output)
