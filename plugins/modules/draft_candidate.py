#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: draft_candidate
short_description: Look at a draft that exists already before it is measured
version_added: "0.1.0"
description:
  - Reads the target, the candidate's own files and the prompts, and refuses what cannot be measured.
  - A candidate is any speculative config, a public draft, or V(mtp) and V(ngram), which need no draft.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
extends_documentation_fragment:
  - inference.spec_decode.attributes.reads_only
options:
  target:
    description: Folder of the target's checkpoint as it is served; it may be quantised.
    type: path
    required: true
  speculative_config:
    description: The candidate as vLLM's C(--speculative-config) has it, with C(method) and C(num_speculative_tokens).
    type: dict
    required: true
  prompts:
    description: JSON lines with conversations.
    type: path
    required: true
  count:
    description: How many prompts are asked for.
    type: int
    default: 1
"""

EXAMPLES = r"""
- name: Look at prompt lookup as a candidate
  inference.spec_decode.draft_candidate:
    target: /models/base
    speculative_config:
      method: ngram
      num_speculative_tokens: 4
      prompt_lookup_max: 4
    prompts: /data/prompts.jsonl
    count: 64
  register: found
"""

RETURN = r"""
candidate:
  description: Facts of the target under C(target) and C(slug), of the candidate under C(candidate).
  returned: always
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils.candidate import inspect
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "target": {"type": "path", "required": True},
            "speculative_config": {"type": "dict", "required": True},
            "prompts": {"type": "path", "required": True},
            "count": {"type": "int", "default": 1},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        found = inspect(params["target"], params["speculative_config"], params["prompts"], params["count"])
        module.exit_json(changed=False, candidate=found)
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
