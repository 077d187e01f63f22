#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: canary_wait
short_description: Wait for an experiment's Deployments and Jobs on Kubernetes, and say why one will not come
version_added: "0.1.0"
description:
  - Looks at the objects with short calls of M(kubernetes.core.k8s_info) until all Deployments are available and all Jobs are
    complete, with a line whenever something changes.
  - What waiting does not mend fails at once, with the cluster's own words - a failed Job, an image that cannot be pulled, a
    container that ends, a refused quota, an evicted pod, an object that another one deleted.
  - A pod that gets no node is waited for as long as O(schedule_timeout) says.
  - An API server that does not answer, or answers with an error of its own, is asked again for a while.
  - Runs on the controller; nothing is changed.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  experiment:
    description: The experiment, whose label the objects carry.
    type: str
    required: true
  namespace:
    description: Their namespace.
    type: str
    required: true
  deployments:
    description: Names of Deployments that shall be available, or gone down to zero where they have no replicas.
    type: list
    elements: str
    default: []
  jobs:
    description: Names of Jobs that shall be complete.
    type: list
    elements: str
    default: []
  pods_gone:
    description: Wait until no pod of the experiment is left, and for nothing else.
    type: bool
    default: false
  timeout:
    description: Longest wait, in seconds.
    type: int
    default: 1800
  schedule_timeout:
    description: Longest wait for a node, in seconds.
    type: int
    default: 300
  answer_timeout:
    description: How long an API server that fails is asked again, in seconds.
    type: int
    default: 120
  poll_interval:
    description: Longest pause between two looks, in seconds.
    type: float
    default: 5
  connection:
    description: Options of M(kubernetes.core.k8s_info) that say how to reach the cluster, such as C(kubeconfig) and C(context).
    type: dict
    default: {}
attributes:
  action:
    description: Runs on the controller.
    support: full
  check_mode:
    description: Returns at once.
    support: full
  diff_mode:
    description: Nothing is changed.
    support: none
"""

EXAMPLES = r"""
- name: Wait for both arms
  inference.spec_decode.canary_wait:
    experiment: tiny-chat-eagle3
    namespace: lab
    deployments:
      - tiny-chat-eagle3-standing
      - tiny-chat-eagle3-trained
    connection:
      kubeconfig: ~/.kube/config
"""

RETURN = r"""
objects:
  description: The last line about each object, by name.
  returned: success
  type: dict
waited_s:
  description: How long it took, in seconds.
  returned: success
  type: float
"""
