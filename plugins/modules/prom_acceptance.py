#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: prom_acceptance
short_description: Acceptance length and latency from vLLM's own counters
version_added: "0.1.0"
description:
  - Takes snapshots of vLLM servers' C(/metrics), and computes from two of them what happened in between.
  - Sums are divided by sums, over all engines and endpoints. The acceptance length counts the bonus token.
  - A restart in the window, missing counters, engines that appeared or vanished, no drafts, another model's traffic and
    more requests than were driven are errors, never zeros.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  urls:
    description: Addresses of the servers. Each is scraped now.
    type: list
    elements: str
    default: []
  before:
    description: Snapshots from the start of the window, as this module returned them. Without, only snapshots are taken.
    type: list
    elements: dict
    default: []
  after:
    description: Snapshots from the end of the window, instead of scraping O(urls) now.
    type: list
    elements: dict
    default: []
  model_name:
    description: The model that was driven. May be left out where a server serves one only.
    type: str
    default: ""
  driven:
    description: How many requests were sent to all servers in the window. More than that is foreign traffic.
    type: int
  speculative:
    description: Whether drafts are expected. If V(false), acceptance figures may be missing.
    type: bool
    default: true
  bearer_token:
    description: Token for servers that ask for one.
    type: str
  ca_path:
    description: Certificates to trust.
    type: path
  validate_certs:
    description: Whether to check the servers' certificates.
    type: bool
    default: true
  timeout:
    description: Longest time for one scrape, in seconds.
    type: int
    default: 10
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: Take the snapshot before the traffic
  inference.spec_decode.prom_acceptance:
    urls:
      - http://127.0.0.1:8000
  register: before

- name: Compute the acceptance over the window
  inference.spec_decode.prom_acceptance:
    urls:
      - http://127.0.0.1:8000
    before: "{{ before.snapshots }}"
    driven: 32
"""

RETURN = r"""
snapshots:
  description: One snapshot an address, to be stored or given as O(before) later.
  returned: always
  type: list
  elements: dict
windows:
  description: Figures of each address.
  returned: when O(before) is given
  type: list
  elements: dict
acceptance:
  description: Acceptance over all addresses.
  returned: when O(before) is given
  type: dict
  contains:
    acceptance_length: {description: 'Tokens a step, with the bonus token.', type: float, returned: always}
    acceptance_per_position: {description: Accepted share by position., type: list, elements: float, returned: always}
    conditional_acceptance:
      description: Accepted share by position, given the position before.
      type: list
      elements: float
      returned: always
    draft_acceptance_rate: {description: Accepted share of all draft tokens., type: float, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import vllm_metrics
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def run(params: dict) -> dict:
    """Snapshots and, with an earlier set of them, the window's figures."""
    after = [vllm_metrics.Snapshot.from_dict(item) for item in params["after"]] or [
        vllm_metrics.scrape(
            url,
            token=params["bearer_token"] or "",
            ca_path=params["ca_path"] or "",
            verify=params["validate_certs"],
            timeout_s=params["timeout"],
        )
        for url in params["urls"]
    ]
    result: dict = {"changed": False, "snapshots": [snapshot.as_dict() for snapshot in after]}
    if not params["before"]:
        return result
    before = [vllm_metrics.Snapshot.from_dict(item) for item in params["before"]]
    if len(before) != len(after):
        raise SpecDecodeError(
            f"There are {len(before)} snapshots from before and {len(after)} from after.", "Give the same servers."
        )
    windows = [
        vllm_metrics.window(old, new, model_name=params["model_name"], driven=params["driven"], speculative=params["speculative"])
        for old, new in zip(before, after)
    ]
    return {**result, "windows": windows, "acceptance": vllm_metrics.combine(windows)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "urls": {"type": "list", "elements": "str", "default": []},
            "before": {"type": "list", "elements": "dict", "default": []},
            "after": {"type": "list", "elements": "dict", "default": []},
            "model_name": {"type": "str", "default": ""},
            "driven": {"type": "int"},
            "speculative": {"type": "bool", "default": True},
            "bearer_token": {"type": "str", "no_log": True},
            "ca_path": {"type": "path"},
            "validate_certs": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 10},
        },
        required_one_of=[("urls", "after")],
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module.params))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
