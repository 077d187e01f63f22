#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: draft_plan
short_description: Derive everything about a draft from its target's own files, and check it
version_added: "0.1.0"
description:
  - Reads a target's checkpoint folder and derives the aux layers, the draft config and all else that a draft needs,
    each value with its source and rule. Explicit values win.
  - Asks the engine's Python what it has installed, and checks that target, template, data and disk fit together.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
extends_documentation_fragment:
  - inference.spec_decode.attributes.reads_only
options:
  target:
    description: Folder of the target's checkpoint.
    type: path
    required: true
  method:
    description: Kind of draft to train, V(eagle3) or V(dflash).
    type: str
    required: true
  overrides:
    description:
      - Values that win over what is derived. C(aux_layers), C(mask_token_id), C(num_speculative_tokens),
        C(embedding_key), C(lm_head_key), and C(draft), for each method fields of its draft config. Empty values are
        ignored.
    type: dict
    default: {}
  engine_python:
    description: Python interpreter that has vLLM and SpecForge.
    type: path
    required: true
  chat_template:
    description:
      - Name of the chat template in SpecForge's registry.
      - If empty, the one of the target's family whose markers the target's own template writes; an error where that is
        not certain.
    type: str
    default: ""
  chat_template_file:
    description: JSON file with the fields of a chat template that SpecForge does not know.
    type: str
    default: ""
  work_dir:
    description: Folder that will hold the experiment.
    type: path
    required: true
  sources:
    description: Data sources, each with C(path), C(layout) and C(weight).
    type: list
    elements: dict
    default: []
  rows:
    description: Number of training rows, for the estimate of disk space.
    type: int
    default: 0
  max_length:
    description: Longest row in tokens, for the estimate of disk space.
    type: int
    default: 2048
  temperature:
    description: Temperature of the evaluation.
    type: float
    default: 0.0
  trainer_interface:
    description: SpecForge's interface. V(auto) takes that of the installed one.
    type: str
    choices: [auto, cli, scripts]
    default: auto
  capture_backend:
    description: What captures the features.
    type: str
    choices: [transformers, sglang]
    default: transformers
  specforge_source:
    description: Checkout of SpecForge that holds its scripts.
    type: str
    default: ""
  executor:
    description: Where jobs run. With V(slurm) the cluster's nodes and the work folder's file system are checked too.
    type: str
    default: local
  slurm:
    description: Settings of every phase's launcher, of which C(partition) and C(nodes) are looked at.
    type: dict
    default: {}
  slurm_phases:
    description: Settings of single phases that differ.
    type: dict
    default: {}
  slurm_cluster:
    description: Slurm cluster, where several are known.
    type: str
    default: ""
  confirm_target_architecture:
    description: Whether you have seen the serving image load an EAGLE3 draft for this target, whatever vLLM declares.
    type: bool
    default: false
  confirm_shared_work_dir:
    description: Whether you know that all nodes mount the work folder, whatever its file system looks like.
    type: bool
    default: false
  confirmed_versions:
    description: Versions outside the known-good ranges that you have tried, by package.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Derive an EAGLE3 draft
  inference.spec_decode.draft_plan:
    target: /models/base
    method: eagle3
    engine_python: /opt/engine/bin/python
    chat_template: qwen
    work_dir: /work
  register: plan
"""

RETURN = r"""
plan:
  description: Derived values, draft configs by method, and the derivation of each.
  returned: always
  type: dict
engine:
  description: Versions and chat templates that the engine's Python has.
  returned: always
  type: dict
checks:
  description: What was checked, each with C(name), C(ok), C(reason) and C(remedy).
  returned: always
  type: list
  elements: dict
table:
  description: The checks as lines of a terminal of 80 columns.
  returned: always
  type: list
  elements: str
"""

import dataclasses

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import chat_templates, derive, preflight
from ansible_collections.inference.spec_decode.plugins.module_utils.engines import engine_facts
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.user_input import secrets_in


def run(params: dict) -> dict:
    """The plan and its checks."""
    if not params["target"]:
        raise SpecDecodeError("No target is given.", "Give the folder of a Hugging Face checkpoint with -e target=.")
    plan = derive.plan(params["target"], params["method"], params["overrides"])
    engine = engine_facts(params["engine_python"], params["target"])
    template = chat_templates.planned(plan, params["chat_template"], params["chat_template_file"], engine["templates"])
    plan["values"]["chat_template"], plan["derivation"]["chat_template"] = template["value"], template
    asked = {field.name: params[field.name] for field in dataclasses.fields(preflight.Asked)}
    checks = preflight.checks(plan, engine, **{**asked, "chat_template": template["value"]})
    return {"changed": False, "plan": plan, "engine": engine, "checks": checks, "table": preflight.table(checks)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "target": {"type": "path", "required": True},
            "method": {"type": "str", "required": True},
            "overrides": {"type": "dict", "default": {}},
            "engine_python": {"type": "path", "required": True},
            "chat_template": {"type": "str", "default": ""},
            "chat_template_file": {"type": "str", "default": ""},
            "work_dir": {"type": "path", "required": True},
            "sources": {"type": "list", "elements": "dict", "default": []},
            "rows": {"type": "int", "default": 0},
            "max_length": {"type": "int", "default": 2048},
            "temperature": {"type": "float", "default": 0.0},
            "trainer_interface": {"type": "str", "choices": ["auto", "cli", "scripts"], "default": "auto"},
            "capture_backend": {"type": "str", "choices": ["transformers", "sglang"], "default": "transformers"},
            "specforge_source": {"type": "str", "default": ""},
            "executor": {"type": "str", "default": "local"},
            "slurm": {"type": "dict", "default": {}, "no_log": True},
            "slurm_phases": {"type": "dict", "default": {}, "no_log": True},
            "slurm_cluster": {"type": "str", "default": ""},
            "confirm_target_architecture": {"type": "bool", "default": False},
            "confirm_shared_work_dir": {"type": "bool", "default": False},
            "confirmed_versions": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    # As in slurm_job: the launchers' settings may hold a secret, though only to be refused later.
    module.no_log_values = secrets_in([module.params["slurm"], module.params["slurm_phases"]])
    try:
        module.exit_json(**run(module.params))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
