#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: spec_gate
short_description: Judge a phase's evidence and say whether to go on
version_added: "0.1.0"
description:
  - Reads the result files of an experiment's phases, compares their figures with thresholds, and returns whether
    the gate is green, with the figures, the reasons and, for a red gate, the likely cause and what to do next.
  - What is missing or malformed makes a gate red. No gate is ever skipped.
  - The V(acceptance) gate returns a decision, V(ship), V(do_not_ship) or V(inconclusive), and a tier, V(DRAFT)
    or V(VERDICT), with the list of what keeps it a DRAFT.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  gate:
    description: Which gate to judge.
    type: str
    required: true
    choices: [preflight, dataset, capture, training, artifact, overfit, acceptance, promotion]
  evidence:
    description:
      - Documents by name. A text is the path of a JSON file on the managed host, a mapping is the document itself.
      - The names are V(preflight), V(dataset), V(capture), V(train), V(convert) and V(acceptance).
      - The V(acceptance) gate also takes V(ceilings) (the table of C(configs/sol-ceilings.yaml), a measured ceiling of
        one's own under C(own)), V(target_config) (the target's C(config.json), for the share of the speed of light),
        V(profile) (lists of files, C(dcgm) with what a DCGM exporter answered during the measurement and C(kernels)
        with kernel profiles) and V(levers) (what earlier runs settled). V(target_config) and V(levers) need not exist.
      - The V(promotion) gate takes V(verdict) and V(facts), what the standing deployment has now, C(hardware), C(vllm)
        and C(image), and V(experiment), the bundle's C(experiment.json), whose engine tells the C(vllm) that the facts do
        not. It also takes V(draft), the bundle's C(results/draft.json), for a draft that pods serve a copy of, and
        V(measurement), the latest measurement, which must be the one that was judged. These three need not exist. The
        checksums of the drafts, the target and the prompts are computed from their files.
    type: dict
    required: true
  thresholds:
    description: Limits that override the gate's defaults.
    type: dict
    default: {}
  result:
    description: File to write the figures to, as JSON. Nothing is written if not given.
    type: path
  enforce:
    description: Whether a red gate fails the task.
    type: bool
    default: true
attributes:
  check_mode:
    description: Evidence that does not exist yet makes the task pass without a judgement; nothing is written.
    support: full
  diff_mode:
    description: Not supported.
    support: none
"""

EXAMPLES = r"""
- name: Judge the training
  inference.spec_decode.spec_gate:
    gate: training
    evidence:
      train:
        steps: 400
        max_steps: 400
        nonfinite_steps: 0
        first: {loss: 5.0, acc_0: 0.2}
        last: {loss: 1.0, acc_0: 0.9}
    thresholds:
      min_accuracy: 0.6

- name: Judge a capture by its result file, without failing
  inference.spec_decode.spec_gate:
    gate: capture
    evidence:
      capture: /work/tiny-chat-eagle3/spec-decode/results/capture.json
    enforce: false
"""

RETURN = r"""
passed:
  description: Whether the gate is green. Not judged yet, in check mode without evidence, counts as passed.
  returned: always
  type: bool
judged:
  description: Whether there was evidence to judge.
  returned: always
  type: bool
figures:
  description: What was looked at, with its context. For the V(acceptance) gate the whole verdict.
  returned: always
  type: dict
reasons:
  description: Why, in words.
  returned: always
  type: list
  elements: str
cause:
  description: Likely cause of a red gate.
  returned: always
  type: str
remedy:
  description: What to do about a red gate.
  returned: always
  type: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import gates
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.evidence import OPTIONAL, gather
from ansible_collections.inference.spec_decode.plugins.module_utils.files import read_json_or_none, write_json


def run(module: AnsibleModule) -> dict:
    """Judge and, where asked, record the figures."""
    params = module.params
    needed = [value for name, value in params["evidence"].items() if isinstance(value, str) and name not in OPTIONAL]
    if module.check_mode and any(not os.path.exists(path) for path in needed):
        return {
            "changed": False,
            "passed": True,
            "judged": False,
            "figures": {},
            "reasons": [],
            "cause": "",
            "remedy": "",
        }
    evidence = gather(params["gate"], params["evidence"])
    found = gates.evaluate(params["gate"], evidence, params["thresholds"])
    changed = False
    if params["result"] and found.passed:
        changed = read_json_or_none(params["result"]) != found.figures
        if changed and not module.check_mode:
            write_json(params["result"], found.figures)
    facts = {
        "changed": changed, "passed": found.passed, "judged": True, "figures": found.figures, "reasons": found.reasons,
        "cause": found.cause, "remedy": found.remedy,
    }  # fmt: skip
    if not found.passed and params["enforce"]:
        module.fail_json(msg=found.message(params["gate"]), **facts)
    return facts


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "gate": {
                "type": "str",
                "required": True,
                "choices": ["preflight", "dataset", "capture", "training", "artifact", "overfit", "acceptance", "promotion"],
            },
            "evidence": {"type": "dict", "required": True},
            "thresholds": {"type": "dict", "default": {}},
            "result": {"type": "path"},
            "enforce": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
