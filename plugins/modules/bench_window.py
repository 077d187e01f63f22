#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bench_window
short_description: Drain Slurm nodes for a measurement, and always resume them
version_added: "0.1.0"
description:
  - Opens a window in which Slurm starts no new jobs on some nodes, so that a measurement there is not disturbed, and closes
    it again. Jobs that run when it opens go on.
  - What is drained is recorded on disk first, and marked in Slurm's reason with the experiment, the owner and the time.
    Closing resumes exactly the nodes that carry this mark, so it also tidies up after a play that was aborted.
  - Draining a node needs an operator's rights in Slurm.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  state:
    description: V(open) drains the nodes, V(closed) resumes what the experiment drained.
    type: str
    choices: [open, closed]
    default: open
  experiment:
    description: The experiment that is measured.
    type: str
    required: true
  directory:
    description: Folder of the experiment's job records; the window is recorded there.
    type: path
    required: true
  nodes:
    description: Nodes to drain, as a host list such as V(gpu[3-4]).
    type: str
  phase:
    description: What the nodes are needed for. Anything but a measurement, V(validate), is refused.
    type: str
    default: validate
  reason:
    description: Why, in words, for those who see the drained node.
    type: str
    default: a measurement
  serving_nodes:
    description: Nodes that serve. They are never drained.
    type: list
    elements: str
    default: []
  cluster:
    description: Slurm cluster, where several are known.
    type: str
attributes:
  check_mode:
    description: Looks at the nodes for real and changes nothing.
    support: full
  diff_mode:
    description: Not supported.
    support: none
"""

EXAMPLES = r"""
- name: Keep new jobs off the node that is measured
  inference.spec_decode.bench_window:
    experiment: tiny-chat-eagle3
    directory: /work/tiny-chat-eagle3/spec-decode/jobs
    nodes: gpu3
    reason: TPOT of both arms, about ten minutes

- name: Give it back
  inference.spec_decode.bench_window:
    experiment: tiny-chat-eagle3
    directory: /work/tiny-chat-eagle3/spec-decode/jobs
    state: closed
"""

RETURN = r"""
nodes:
  description: Nodes of the window, or those that were resumed.
  returned: always
  type: list
  elements: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import bench_window
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_client import Slurm
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_policy import Serving


def run(module: AnsibleModule) -> dict:
    """Open or close the window."""
    params = module.params
    path = os.path.join(params["directory"], "bench_window.json")
    slurm = Slurm(params["cluster"] or "")
    if params["state"] == "closed":
        return bench_window.close_window(path, params["experiment"], slurm, module.check_mode)
    return bench_window.open_window(
        path, params["experiment"], params["nodes"], params["phase"], params["reason"],
        Serving(nodes=tuple(params["serving_nodes"])), slurm, module.check_mode,
    )  # fmt: skip


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["open", "closed"], "default": "open"},
            "experiment": {"type": "str", "required": True},
            "directory": {"type": "path", "required": True},
            "nodes": {"type": "str"},
            "phase": {"type": "str", "default": "validate"},
            "reason": {"type": "str", "default": "a measurement"},
            "serving_nodes": {"type": "list", "elements": "str", "default": []},
            "cluster": {"type": "str"},
        },
        required_if=[("state", "open", ["nodes"])],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
