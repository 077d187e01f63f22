# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation's examples: all of them can be loaded, their options are right, and what needs no cluster is run."""

from __future__ import annotations

import ast
import json
import re

import jinja2
import jinja2.meta
import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from .conftest import BIN, NAMESPACE, ROOT, run

#: modules whose examples are run; those of the others need a scheduler, a cluster or a server
RUN = ("bundle", "draft_plan", "experiment_info")
#: names that Ansible itself knows
KNOWN = {"lookup", "now", "query", "item", "ansible_facts", "none", "omit"}


def python_documents(path):
    """DOCUMENTATION and EXAMPLES of a plugin, without importing it."""
    tree = ast.parse(path.read_text())
    found = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return yaml.safe_load(found["DOCUMENTATION"].value), yaml.safe_load(found["EXAMPLES"].value)


MODULES = {path.stem: python_documents(path) for path in sorted((ROOT / "plugins/modules").glob("*.py"))}
LOOKUPS = {path.stem: python_documents(path)[1] for path in sorted((ROOT / "plugins/lookup").glob("*.py"))}
FILTERS = {
    path.stem: yaml.safe_load(yaml.safe_load(path.read_text())["EXAMPLES"])
    for path in sorted((ROOT / "plugins/filter").glob("*.yml"))
}


def free_variables(task):
    """Variables that an example takes from elsewhere."""
    texts = json.dumps(task).replace('\\"', "'")
    environment = jinja2.Environment()
    environment.filters = _AnyFilter()
    return jinja2.meta.find_undeclared_variables(environment.parse(texts)) - KNOWN


class _AnyFilter(dict):
    """Names of filters do not matter to the question which variables are used."""

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return str

    def get(self, name, default=None):
        return str


def play(tasks):
    return {"hosts": "localhost", "gather_facts": False, "tasks": tasks}


def run_here(tasks, installed, folder):
    """Run the tasks with the examples' places on this machine; all must succeed."""
    places = {
        "/opt/engine/bin/python": str(ROOT / ".engine/bin/python"), "/models/base": str(installed.target),
        "/tmp/spec-decode-jobs": str(folder / "jobs"), "/work": str(folder / "work"),
    }  # fmt: skip
    text = re.sub("|".join(places), lambda found: places[found[0]], yaml.safe_dump([play(tasks)]))
    (folder / "examples.yml").write_text(text)
    printed = run(BIN / "ansible-playbook", folder / "examples.yml", env=installed.environment).stdout
    assert f"ok={len(tasks)}" in printed and "failed=0" in printed


def test_every_example_can_be_loaded(installed, tmp_path):
    examples = [tasks for _documentation, tasks in MODULES.values()] + list(LOOKUPS.values()) + list(FILTERS.values())
    assert all(isinstance(tasks, list) and tasks and all("name" in task for task in tasks) for tasks in examples)
    (tmp_path / "all.yml").write_text(yaml.safe_dump([play(tasks) for tasks in examples]))
    run(BIN / "ansible-playbook", "--syntax-check", tmp_path / "all.yml", env=installed.environment)


@pytest.mark.parametrize("name", MODULES)
def test_options_of_a_modules_examples_are_right(name):
    documentation, tasks = MODULES[name]
    used = [task[f"{NAMESPACE}.{name}"] for task in tasks if f"{NAMESPACE}.{name}" in task]
    assert used, "a module's examples show the module"
    fields = ("type", "required", "choices", "default", "elements")
    options = {
        option: {field: found[field] for field in fields if field in found} for option, found in documentation["options"].items()
    }
    fixed = {
        option: {k: v for k, v in found.items() if not (k == "default" and found.get("required"))}
        for option, found in options.items()
    }
    for arguments in used:
        plain = {option: value for option, value in arguments.items() if "{{" not in str(value)}
        lenient = {
            option: {**found, "required": found.get("required", False) and option not in arguments}
            for option, found in fixed.items()
        }
        result = ArgumentSpecValidator(lenient).validate(plain)
        assert not result.error_messages, f"{arguments}: {result.error_messages}"


def test_examples_of_filters_that_bring_their_own_values_are_run(installed, tmp_path):
    ready = [task for tasks in FILTERS.values() for task in tasks if not free_variables(task)]
    assert len(ready) > 8
    run_here(ready, installed, tmp_path)


def test_examples_of_modules_that_need_no_cluster_are_run(installed, tmp_path):
    tasks = [task for name in RUN for task in MODULES[name][1]] + LOOKUPS["bundle_programs"]
    tasks += [
        task for task in MODULES["slurm_job"][1] if task[f"{NAMESPACE}.slurm_job"].get("directory") == "/tmp/spec-decode-jobs"
    ]
    tasks += MODULES["spec_gate"][1][:1]
    run_here(tasks, installed, tmp_path)


def test_deployment_takes_a_verdict_from_the_inventory(installed, tmp_path):
    """The example of the documentation: only a VERDICT to ship switches speculation on."""
    config = {"method": "eagle3", "model": "/drafts/a", "num_speculative_tokens": 3}
    verdicts = {
        "good": {"decision": "ship", "tier": "VERDICT", "speculative_config": config},
        "early": {"decision": "ship", "tier": "DRAFT", "speculative_config": config},
    }
    (tmp_path / "host_vars/localhost").mkdir(parents=True)
    (tmp_path / "host_vars/localhost/spec_decode_verdicts.yml").write_text(yaml.safe_dump({"spec_decode_verdicts": verdicts}))
    (tmp_path / "hosts.yml").write_text((installed.inventory / "hosts.yml").read_text())
    shown = {}
    for experiment in ("good", "early", "none"):
        example = ROOT / "docs/examples/deploy_with_verdict.yml"
        shown[experiment] = run(
            BIN / "ansible-playbook", example, "-i", tmp_path / "hosts.yml", "-e", f"experiment={experiment}",
            env=installed.environment, cwd=tmp_path,
        ).stdout  # fmt: skip
    assert "--speculative-config" in shown["good"] and "/drafts/a" in shown["good"]
    assert "--speculative-config" not in shown["early"] + shown["none"]
