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
  - Takes snapshots of vLLM servers' C(/metrics), and computes from two of them what happened in between. Or takes both
    from a Prometheus server that scraped them, for a range in its past.
  - Sums are divided by sums, over all engines and endpoints. The acceptance length counts the bonus token.
  - A restart in the window, a failed scrape, missing counters, engines that appeared or vanished, no drafts, another
    model's traffic, and more requests than were driven are errors, never zeros.
  - Reads the metric names of vLLM 0.8 and later.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
extends_documentation_fragment:
  - inference.spec_decode.attributes.reads_only
options:
  urls:
    description: Addresses of the servers, with or without C(/metrics). Each is scraped now.
    type: list
    elements: str
  before:
    description: Snapshots from the start of the window, as this module returned them. Without, only snapshots are taken.
    type: list
    elements: dict
  after:
    description: Snapshots from the end of the window, instead of scraping O(urls) now.
    type: list
    elements: dict
  prometheus_url:
    description: Address of a Prometheus server, which gives the snapshots of O(start) and O(end) instead of O(urls).
    type: str
  start:
    description: Start of the range, as seconds since the epoch or a date such as V(2026-01-31T12:00:00Z).
    type: str
  end:
    description: End of the range, likewise.
    type: str
  selector:
    description:
      - Which of the Prometheus server's targets are meant, in its notation, such as V(job="vllm",namespace="canary").
      - Only labels of targets; the model goes to O(model_name).
    type: str
    default: ""
  model_name:
    description: The model that was driven. May be left out where a server serves one only.
    type: str
    default: ""
  driven:
    description:
      - How many requests were sent to all servers in the window. More than that is foreign traffic, and so is a request
        that is running or waiting at either end of the window.
    type: int
  speculative:
    description: Whether drafts are expected. If V(false), acceptance figures may be missing.
    type: bool
    default: true
  num_speculative_tokens:
    description: Draft tokens a draft, for vLLM before 0.9, which does not count drafts. Not used otherwise.
    type: int
  bearer_token:
    description: Token for servers that ask for one. Never shown.
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
  register: measured

- name: Compute it for half an hour in the past of a Prometheus server
  inference.spec_decode.prom_acceptance:
    prometheus_url: https://prometheus.example.org
    bearer_token: "{{ lookup('ansible.builtin.env', 'PROMETHEUS_TOKEN') }}"
    selector: job="vllm",namespace="canary"
    start: "2026-01-31T12:00:00Z"
    end: "2026-01-31T12:30:00Z"
    model_name: tiny-chat
"""

RETURN = r"""
snapshots:
  description: One snapshot an address, to be stored or given as O(before) later.
  returned: always
  type: list
  elements: dict
engines:
  description: Figures of each engine, with its RV(engines[].url) and RV(engines[].engine); otherwise like RV(acceptance).
  returned: when there is a window
  type: list
  elements: dict
  contains:
    url: {description: The engine's endpoint., type: str, returned: always}
    engine: {description: The engine's number., type: str, returned: always}
windows:
  description: Figures of each endpoint; otherwise like RV(acceptance).
  returned: when there is a window
  type: list
  elements: dict
acceptance:
  description: Figures over all engines of all endpoints.
  returned: when there is a window
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
    drafts: {description: Drafts that were verified., type: float, returned: always}
    draft_tokens: {description: Tokens in these drafts., type: float, returned: always}
    accepted_tokens: {description: Accepted tokens of these., type: float, returned: always}
    accepted_per_position: {description: Accepted tokens by position., type: list, elements: float, returned: always}
    requests: {description: Requests that ended in the window., type: float, returned: always}
    prompt_tokens: {description: Tokens of prompts., type: float, returned: always}
    generation_tokens: {description: Generated tokens., type: float, returned: always}
    tpot_s: {description: "Time per output token: count, mean, p50, p90 and p99.", type: dict, returned: vLLM 0.11 and later}
    tpot_of_sums_s: {description: Decode time over decoded tokens of all requests., type: float, returned: always}
    itl_s: {description: Time between engine outputs; no time per token under speculation., type: dict, returned: if exported}
    ttft_s: {description: Time to the first token., type: dict, returned: if exported}
    e2e_s: {description: Time of whole requests., type: dict, returned: if exported}
    engines: {description: Number of engines., type: int, returned: always}
    seconds: {description: Length of the window., type: float, returned: always}
    restart_evidence: {description: What a restart would have shown in., type: str, returned: always}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import prometheus, vllm_metrics
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def run(params: dict) -> dict:
    """Snapshots and, with an earlier set of them, the window's figures."""
    before, after = snapshots(params)
    result: dict = {"changed": False, "snapshots": [snapshot.as_dict() for snapshot in after]}
    if not before:
        return result
    found = vllm_metrics.compare(
        before,
        after,
        model_name=params["model_name"],
        driven=params["driven"],
        speculative=params["speculative"],
        num_speculative_tokens=params["num_speculative_tokens"],
    )
    return {**result, "engines": found["engines"], "windows": found["windows"], "acceptance": found["total"]}


def snapshots(params: dict) -> tuple[list[vllm_metrics.Snapshot], list[vllm_metrics.Snapshot]]:
    """Those from before the window (none, if it only begins) and those from after it."""
    access = vllm_metrics.Access(
        params["bearer_token"] or "", params["ca_path"] or "", params["validate_certs"], params["timeout"]
    )
    if params["prometheus_url"]:
        return prometheus.window_snapshots(params["prometheus_url"], params["start"], params["end"], params["selector"], access)
    stored = [[vllm_metrics.Snapshot.from_dict(item) for item in params[name] or []] for name in ("before", "after")]
    return stored[0], stored[1] or [vllm_metrics.scrape(url, access) for url in params["urls"] or []]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "urls": {"type": "list", "elements": "str"},
            "before": {"type": "list", "elements": "dict"},
            "after": {"type": "list", "elements": "dict"},
            "prometheus_url": {"type": "str"},
            "start": {"type": "str"},
            "end": {"type": "str"},
            "selector": {"type": "str", "default": ""},
            "model_name": {"type": "str", "default": ""},
            "driven": {"type": "int"},
            "speculative": {"type": "bool", "default": True},
            "num_speculative_tokens": {"type": "int", "no_log": False},
            "bearer_token": {"type": "str", "no_log": True},
            "ca_path": {"type": "path"},
            "validate_certs": {"type": "bool", "default": True},
            "timeout": {"type": "int", "default": 10},
        },
        required_one_of=[("urls", "after", "prometheus_url")],
        mutually_exclusive=[("urls", "after", "prometheus_url"), ("before", "prometheus_url")],
        required_by={"prometheus_url": ("start", "end")},
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module.params))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
