# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Ansible itself must not run: a template in a value, from a survey's answer to a play that reads the verdict."""

from __future__ import annotations

import json

import pytest
import small_target
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils.report import inventory_yaml

from .conftest import BIN, run

#: a survey's answer reaches a play like this: tagged as no template
TEMPLATE = "{{ lookup('pipe', 'touch hacked') }}{% set x = 1 %}{# gone #}"
NAME = f'it\'s a {TEMPLATE.replace("/", "")} "folder" $(touch hacked)'


class Unsafe(str):
    """A text that Ansible is not to take for a template."""


yaml.SafeDumper.add_representer(Unsafe, lambda dumper, value: dumper.represent_scalar("!unsafe", str(value)))


@pytest.fixture
def hostile(installed, tmp_path):
    """A target in a folder whose name is a template, and the settings that say so."""
    target = tmp_path / NAME
    small_target.write_target(target)
    settings = {
        "target": Unsafe(target), "spec_work_dir": Unsafe(tmp_path / f"work {TEMPLATE}"), "experiment": "hostile",
        "spec_sources": [{"path": Unsafe(tmp_path / f"{TEMPLATE}.json")}], "chat_template": "qwen",
        "spec_job_environment": {"NOTE": Unsafe(TEMPLATE)}, "spec_server_environment": {"NOTE2": Unsafe(TEMPLATE)},
        "spec_slurm": {"environment": {"NOTE3": Unsafe(TEMPLATE)}, "container": {"kind": "apptainer", "image": Unsafe(TEMPLATE)}},
        "spec_server_arguments": [Unsafe(f"--served-model-name={TEMPLATE}")],
    }  # fmt: skip
    small_target.write_conversations(tmp_path / f"{TEMPLATE}.json")
    (tmp_path / "answers.yml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.parametrize("version", ["pinned", "oldest"])
def test_template_in_a_value_stays_a_text_on_its_way_into_the_bundle(installed, hostile, version, request):
    ansible = BIN if version == "pinned" else request.getfixturevalue("oldest")
    installed.play("train_draft", "--tags", "scaffold", "-e", f"@{hostile / 'answers.yml'}", ansible=ansible)
    bundle = hostile / f"work {TEMPLATE}/hostile/spec-decode"
    stated = json.loads((bundle / "experiment.json").read_text())
    assert stated["target"]["path"] == str(hostile / NAME)
    assert stated["dataset"]["sources"] == [{"path": str(hostile / f"{TEMPLATE}.json")}]
    assert json.loads((bundle / "configs/arms.json").read_text())["server_arguments"] == [f"--served-model-name={TEMPLATE}"]
    seen = run("bash", "-c", "set -e; . ./recipe.env; env -0", cwd=bundle, env={"PATH": "/usr/bin:/bin"})
    environment = dict(item.split("=", 1) for item in seen.stdout.split("\0") if item)
    assert environment["TARGET_MODEL_PATH"] == str(hostile / NAME)
    assert environment["NOTE"] == environment["NOTE2"] == TEMPLATE
    assert not [*hostile.rglob("hacked"), *installed.home.rglob("hacked")]


def test_template_in_a_verdict_stays_a_text_in_the_inventory(installed, tmp_path):
    fact = {"decision": "ship", "tier": "VERDICT", "context": {"hardware": TEMPLATE}, "speculative_config": {"model": NAME}}
    folder = tmp_path / "host_vars/localhost"
    folder.mkdir(parents=True)
    (folder / "verdicts.yml").write_text(inventory_yaml({"spec_decode_verdicts": {"a": fact}}))
    (tmp_path / "hosts.yml").write_text((installed.inventory / "hosts.yml").read_text())
    content = "{{ spec_decode_verdicts.a.context.hardware ~ '|' ~ spec_decode_verdicts.a.speculative_config.model }}"
    task = {"ansible.builtin.copy": {"content": content, "dest": str(tmp_path / "read"), "mode": "0644"}}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}]))
    run(BIN / "ansible-playbook", "-i", tmp_path / "hosts.yml", tmp_path / "play.yml", env=installed.environment, cwd=tmp_path)
    assert (tmp_path / "read").read_text() == f"{TEMPLATE}|{NAME}"
    assert not list(tmp_path.rglob("hacked"))
