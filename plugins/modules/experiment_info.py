#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: experiment_info
short_description: Where the experiments of a work folder stand
version_added: "0.1.0"
description:
  - Reads the bundles below a work folder and returns which phases are done and what was decided.
  - A verdict is called stale where the target, the draft or the prompts are no longer those that it was measured with.
    Hardware and engine are not looked at, since only a server tells them.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
extends_documentation_fragment:
  - inference.spec_decode.attributes.reads_only
options:
  work_dir:
    description: Folder that holds the experiments.
    type: path
    required: true
  experiment:
    description: Name of one experiment. All if empty.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Look at all experiments
  inference.spec_decode.experiment_info:
    work_dir: /work
  register: found

- name: Show the names of those that may be shipped
  ansible.builtin.debug:
    msg: "{{ found.experiments | selectattr('verdict.decision', 'defined') | map(attribute='name') }}"
"""

RETURN = r"""
experiments:
  description: The experiments, sorted by name.
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: Name of the experiment., type: str, returned: always}
    bundle: {description: Folder of its bundle., type: str, returned: always}
    method: {description: Kind of draft., type: str, returned: always}
    target: {description: Folder of its target., type: str, returned: always}
    phases:
      description: For each phase that is done, its C(status), C(finished_at) and C(duration_s).
      type: dict
      returned: always
    verdict:
      description: Decision, tier, headline figures, C(measured_at) and C(stale), the reasons why it no longer holds.
      type: dict
      returned: always
    problems: {description: Files that could not be read., type: list, elements: str, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import status
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def main() -> None:
    module = AnsibleModule(
        argument_spec={"work_dir": {"type": "path", "required": True}, "experiment": {"type": "str", "default": ""}},
        supports_check_mode=True,
    )
    try:
        module.exit_json(changed=False, experiments=status.experiments(module.params["work_dir"], module.params["experiment"]))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
