#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: slurm_job
short_description: Submit a job exactly once, find it again, wait for it
version_added: "0.1.0"
description:
  - Brings a batch job to the state "active or complete", as a Slurm job or as a detached process of the managed host.
  - A job is known by O(experiment), O(name) and a fingerprint over its script, O(arguments), O(environment),
    O(inputs) and the jobs that it O(needs). The C(#SBATCH) lines of the script and the options for C(sbatch) say where
    it runs, not what it is, and are no part of the fingerprint.
  - Running the task again attaches to the active job, does nothing for a complete one, and submits only where nothing is
    found or the work changed. A scheduler that does not answer is never taken for "no job".
  - Preemption and requeue are normal states of a living job, not failures.
  - With O(executor=slurm) the attempt is recorded before C(sbatch) is called and carries a key in its job name, so that a
    job whose reply was lost is found again by its name. Needs Slurm 22.05 or newer; accounting is used where there is any.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  state:
    description:
      - V(present) submits the job if it is not active or complete.
      - V(absent) cancels it if it is active. Without O(name), all jobs of the experiment. A task that waits for such a job
        fails, and the next run submits it anew.
      - V(query) only looks it up. Without O(name), all jobs of the experiment in one call.
    type: str
    choices: [present, absent, query]
    default: present
  name:
    description: Name of the job within its experiment. Lower-case letters, digits and hyphens.
    type: str
  experiment:
    description:
      - The experiment that the job belongs to. Only jobs that carry its mark are ever touched. Required without O(jobs).
    type: str
  directory:
    description:
      - Folder that holds the experiment's job records and logs, on a file system that the jobs see. Required without O(jobs).
    type: path
  script:
    description: Path of the batch script on the managed host.
    type: path
  content:
    description: Text of the batch script, instead of O(script). It is kept beside the job's record once the job is submitted.
    type: str
  arguments:
    description: Arguments of the script. They reach it as they are, without a shell in between.
    type: list
    elements: str
    default: []
  environment:
    description:
      - Environment variables of the job, part of its fingerprint. Only their checksums are recorded.
      - The values of those whose names look like a secret's, such as C(HF_TOKEN), are shown nowhere. A job inherits the
        environment of the task as well, of which nothing is recorded.
    type: dict
    default: {}
  inputs:
    description: Files whose contents the job depends on; a changed one makes it another job.
    type: list
    elements: path
    default: []
  needs:
    description:
      - Names of jobs of the same experiment that write what this one reads. They take part in the fingerprint by their own
        fingerprints, so that a job can be submitted before its inputs exist.
      - With O(executor=slurm) a job whose needs are still active waits for them in Slurm, and is cancelled by Slurm if one
        of them fails. With O(executor=local) they must be complete.
    type: list
    elements: str
    default: []
  after:
    description:
      - Names of jobs of the same experiment that must succeed before this Slurm job starts, though it reads nothing of
        theirs. No part of the fingerprint.
    type: list
    elements: str
    default: []
  verify:
    description:
      - Command that a Slurm job runs after its script succeeded, as a list, for example a gate. If it fails, the job fails,
        and what needs the job does not start. It judges the work and is no part of it.
    type: list
    elements: str
    default: []
  result:
    description:
      - File that the job writes last. The job counts as complete when this file says C(status=complete)
        with the job's own fingerprint.
    type: path
  chdir:
    description: Working folder of the job. The folder of its record if not given.
    type: path
  executor:
    description:
      - Where jobs run. V(local) runs them as detached processes of the managed host, V(slurm) as Slurm jobs.
      - The options that describe a Slurm job are ignored by V(local), but for O(time), which it keeps.
    type: str
    choices: [local, slurm]
    default: local
  attempts:
    description:
      - How often the job may be submitted before its failure is reported. Once reported, running the task
        again starts a new count.
    type: int
    default: 3
  retry_on:
    description: End states after which the job is submitted again.
    type: list
    elements: str
    choices: [FAILED, TIMEOUT, CANCELLED, NODE_FAIL, OUT_OF_MEMORY, LOST]
    default: [FAILED, TIMEOUT, NODE_FAIL, LOST]
  on_change:
    description: What to do when another version of the job is still active.
    type: str
    choices: [fail, replace]
    default: fail
  time:
    description: Time limit, as C(MINUTES), C(HH:MM:SS) or C(D-HH:MM:SS). Unlimited for O(executor=local) if not given.
    type: str
  partition:
    description: Slurm partition.
    type: str
  account:
    description: Slurm account.
    type: str
  qos:
    description: Slurm quality of service.
    type: str
  nodes:
    description: Number of nodes.
    type: int
  gpus:
    description: Number of GPUs of the job (C(--gpus)).
    type: str
  gres:
    description: Generic resources a node (C(--gres)), for example V(gpu:8).
    type: str
  dependency:
    description:
      - Slurm dependency, for example V(afterok:123), beside those that O(needs) makes. A job whose dependency can no longer
        be satisfied is cancelled by Slurm.
    type: str
  array:
    description: Slurm job array, for example V(0-7). It is one job here; its state is that of its worst task.
    type: str
  nodelist:
    description: Nodes that the job must run on.
    type: str
  exclude:
    description: Nodes that the job must not run on.
    type: str
  requeue:
    description: Whether Slurm may requeue the job after preemption or a node failure.
    type: bool
    default: true
  signal:
    description: Signal to send before the time limit, for example V(B:USR1@120).
    type: str
  comment:
    description: Text to stand in the job's comment beside its mark, 1000 characters at most.
    type: str
  cluster:
    description: Slurm cluster, where several are known.
    type: str
  options:
    description:
      - More C(sbatch) options by their long names without dashes, such as C(mem) or C(constraint). V(true) gives the option
        without a value.
      - They and the options above win over the script's C(#SBATCH) lines.
    type: dict
    default: {}
  serving_partitions:
    description: Slurm partitions that serve. A job for one of them is refused.
    type: list
    elements: str
    default: []
  serving_nodes:
    description:
      - Slurm nodes that serve, also as host lists such as V(gpu[1-4]). A job that asks for one is refused, any other is kept
        off them with C(--exclude).
    type: list
    elements: str
    default: []
  allowed_partitions:
    description: Slurm partitions that jobs may use. Every one that does not serve if empty.
    type: list
    elements: str
    default: []
  absence_limit:
    description:
      - How long a submitted job may be unknown to Slurm, as it is around a requeue or a restart of the controller, before
        it counts as lost, in seconds.
    type: int
    default: 300
  jobs:
    description:
      - With O(state=query), jobs of several experiments to look up in one call, each with C(experiment), C(name) and
        C(directory). O(experiment) and O(directory) are not needed then.
    type: list
    elements: dict
  wait:
    description:
      - Whether to wait until the job ends, submitting it again while attempts are left. The wait survives a lost connection
        and a scheduler that does not answer; both are tried again for O(answer_timeout) seconds.
    type: bool
    default: true
  poll_interval:
    description: Longest pause between two looks at a job that is waited for, in seconds.
    type: int
    default: 5
  wait_timeout:
    description: How long to wait, in seconds. The job goes on after that. Without limit if V(0).
    type: int
    default: 0
  answer_timeout:
    description: How long to ask again when the scheduler or the host does not answer, in seconds.
    type: int
    default: 600
attributes:
  check_mode:
    description: Looks the job up for real and submits nothing.
    support: full
  diff_mode:
    description: Shows the script and the options of the last submission and of the one that is, or would be, made.
    support: full
"""

EXAMPLES = r"""
- name: Train the draft, wherever this play left off
  inference.spec_decode.slurm_job:
    experiment: tiny-chat-eagle3
    name: train
    directory: /work/tiny-chat-eagle3/spec-decode/jobs
    script: /work/tiny-chat-eagle3/spec-decode/slurm/train.sbatch
    inputs:
      - /work/tiny-chat-eagle3/spec-decode/configs/tiny-chat-train.yaml
    needs:
      - capture
    result: /work/tiny-chat-eagle3/spec-decode/results/train.json
    executor: slurm
    partition: train
    gres: gpu:8
    time: "12:00:00"

- name: Run a small job on this machine
  inference.spec_decode.slurm_job:
    experiment: tiny-chat-eagle3
    name: hello
    directory: /tmp/spec-decode-jobs
    executor: local
    content: |
      #!/bin/bash
      echo hello

- name: Leave a job to itself
  inference.spec_decode.slurm_job:
    experiment: tiny-chat-eagle3
    name: sweep
    directory: /work/tiny-chat-eagle3/spec-decode/jobs
    executor: slurm
    array: 0-7
    content: |
      #!/bin/bash
      #SBATCH --partition=train --gres=gpu:1
      srun ./sweep "$SLURM_ARRAY_TASK_ID"
    wait: false

- name: Look at all jobs of the experiment
  inference.spec_decode.slurm_job:
    experiment: tiny-chat-eagle3
    directory: /tmp/spec-decode-jobs
    executor: local
    state: query

- name: Cancel whatever of the experiment is active
  inference.spec_decode.slurm_job:
    experiment: tiny-chat-eagle3
    directory: /tmp/spec-decode-jobs
    executor: local
    state: absent
"""

RETURN = r"""
job:
  description: What is known of the job.
  returned: when O(name) is given
  type: dict
  contains:
    name: {description: Name of the job., type: str, returned: always}
    experiment: {description: Its experiment., type: str, returned: always}
    job_id: {description: Slurm's job id or the id of the first process., type: str, returned: always}
    state: {description: State of the last attempt., type: str, returned: always, sample: RUNNING}
    alive: {description: Whether the job is pending or running or will be again., type: bool, returned: always}
    removed: {description: Whether V(absent) put an end to the last attempt., type: bool, returned: always}
    reason: {description: Slurm's reason or how the job ended., type: str, returned: always}
    exit_code: {description: Exit code of an ended job., type: int, returned: always}
    signal: {description: Signal that ended the job., type: int, returned: always}
    restarts: {description: How often the scheduler requeued it., type: int, returned: always}
    nodes: {description: Nodes it runs on., type: str, returned: always}
    elapsed_s: {description: Seconds since it started., type: float, returned: always}
    attempts: {description: Number of submissions., type: int, returned: always}
    fingerprint: {description: Identity of the work., type: str, returned: always}
    log: {description: 'File that takes its output, standard error too.', type: str, returned: always}
    log_tail: {description: Last lines of the log of a job that failed., type: list, elements: str, returned: always}
    progress: {description: What the job itself says of its progress., type: dict, returned: always}
jobs:
  description: The same of every job of the experiment, or of those in O(jobs).
  returned: when O(name) is not given
  type: list
  elements: dict
action:
  description: What the task did, one of submit, resubmit, replace, attach, nothing.
  returned: for O(state=present)
  type: str
  sample: attach
submitted:
  description: Whether the job was submitted by this task. If not, the task attached to it or found it complete.
  returned: for O(state=present)
  type: bool
unanswered:
  description: Whether the task failed because the scheduler did not answer. Nothing was submitted then, or it will be found.
  returned: on failure
  type: bool
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils import jobs
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError, Unanswered
from ansible_collections.inference.spec_decode.plugins.module_utils.executors import (
    EXECUTORS,
    executor_named,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_executor import Settings
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_policy import Serving
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_time import seconds
from ansible_collections.inference.spec_decode.plugins.module_utils.user_input import secrets_in, variables

SLURM_OPTIONS = (
    "partition", "account", "qos", "time", "nodes", "gpus", "gres", "dependency", "array", "nodelist",
    "exclude", "requeue", "signal", "comment", "cluster",
)  # fmt: skip


def job_spec(params: dict) -> jobs.JobSpec:
    """The job that the task's parameters describe."""
    return jobs.JobSpec(
        experiment=params["experiment"],
        name=params["name"],
        script=params["script"] if params["content"] is None else os.path.join(params["directory"], params["name"], "script.sh"),
        content=params["content"],
        directory=params["directory"],
        arguments=tuple(params["arguments"]),
        environment=tuple(variables(params["environment"], "environment", stated=False).items()),
        inputs=tuple(params["inputs"]),
        needs=tuple(params["needs"]),
        after=tuple(params["after"]),
        verify=tuple(params["verify"]),
        result=params["result"] or "",
        chdir=params["chdir"] or "",
        time_limit_s=seconds(params["time"]) if params["time"] else 0,
        options=tuple([(key, params[key]) for key in SLURM_OPTIONS if params[key] is not None] + [*params["options"].items()]),
    )


def diff(outcome: jobs.Outcome) -> list[dict]:
    """Script and options, before and after."""
    before, after = outcome.before_shown, outcome.after_shown
    found = []
    for what in ("options", "arguments", "script"):
        texts = [
            value if isinstance(value, str) else json.dumps(value, indent=2, sort_keys=True) + "\n"
            for value in (before.get(what, ""), after.get(what, ""))
        ]
        if texts[0] != texts[1]:
            found.append({"before_header": what, "after_header": what, "before": texts[0], "after": texts[1]})
    return found


def settings(params: dict) -> Settings:
    """What the task says of its Slurm site."""
    return Settings(
        cluster=params["cluster"] or "",
        serving=Serving(
            partitions=tuple(params["serving_partitions"]),
            nodes=tuple(params["serving_nodes"]),
            allowed_partitions=tuple(params["allowed_partitions"]),
        ),
        absence_limit_s=params["absence_limit"],
    )


def query(params: dict, executor: jobs.Executor) -> dict:
    """Look up one job, all jobs of an experiment, or the listed jobs, with one question to the scheduler."""
    listed = params["jobs"] or [
        {"experiment": params["experiment"], "directory": params["directory"], "name": name}
        for name in ([params["name"]] if params["name"] else jobs.known_jobs(params["directory"]))
    ]
    specs = [jobs.JobSpec(job["experiment"], job["name"], "", job["directory"]) for job in listed]
    found = [jobs.describe(spec, outcome) for spec, outcome in zip(specs, jobs.query_all(specs, executor))]
    return {"changed": False, "job": found[0]} if params["name"] else {"changed": False, "jobs": found}


def remove(params: dict, executor: jobs.Executor, policy: jobs.Policy) -> dict:
    """Cancel one job, or all jobs of an experiment: one that cannot be cancelled keeps none of the others running."""
    found, failures, changed = [], [], False
    for name in [params["name"]] if params["name"] else jobs.known_jobs(params["directory"]):
        spec = jobs.JobSpec(params["experiment"], name, "", params["directory"])
        try:
            outcome = jobs.remove(spec, executor, policy)
        except SpecDecodeError as error:
            failures.append(error)
            continue
        changed = changed or outcome.changed
        found.append(jobs.describe(spec, outcome))
    if failures:
        kind = Unanswered if all(isinstance(error, Unanswered) for error in failures) else SpecDecodeError
        raise kind(" ".join(map(str, failures)))
    return {"changed": changed, "job": found[0]} if params["name"] else {"changed": changed, "jobs": found}


def run(module: AnsibleModule) -> dict:
    """Do what the task asks and return its facts."""
    params = module.params
    executor = executor_named(params["executor"], settings(params))
    policy = jobs.Policy(
        attempts=params["attempts"],
        retry_on=frozenset(jobs.State(state) for state in params["retry_on"]),
        replace=params["on_change"] == "replace",
        check_mode=module.check_mode,
    )
    if params["state"] == "query":
        return query(params, executor)
    if params["state"] == "absent":
        return remove(params, executor, policy)
    spec = job_spec(params)
    outcome = jobs.ensure(spec, executor, policy)
    return {
        "changed": outcome.changed,
        "action": outcome.action.value,
        "submitted": outcome.changed and not module.check_mode,
        "msg": outcome.message,
        "job": jobs.describe(spec, outcome),
        "diff": diff(outcome) if module._diff and outcome.changed else [],
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent", "query"], "default": "present"},
            "name": {"type": "str"},
            "experiment": {"type": "str"},
            "directory": {"type": "path"},
            "script": {"type": "path"},
            "content": {"type": "str"},
            "arguments": {"type": "list", "elements": "str", "default": []},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "inputs": {"type": "list", "elements": "path", "default": []},
            "needs": {"type": "list", "elements": "str", "default": []},
            "after": {"type": "list", "elements": "str", "default": []},
            "verify": {"type": "list", "elements": "str", "default": []},
            "result": {"type": "path"},
            "chdir": {"type": "path"},
            "executor": {"type": "str", "choices": list(EXECUTORS), "default": "local"},
            "attempts": {"type": "int", "default": 3},
            "retry_on": {
                "type": "list",
                "elements": "str",
                "choices": ["FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "LOST"],
                "default": ["FAILED", "TIMEOUT", "NODE_FAIL", "LOST"],
            },
            "on_change": {"type": "str", "choices": ["fail", "replace"], "default": "fail"},
            "time": {"type": "str"},
            "partition": {"type": "str"},
            "account": {"type": "str"},
            "qos": {"type": "str"},
            "nodes": {"type": "int"},
            "gpus": {"type": "str"},
            "gres": {"type": "str"},
            "dependency": {"type": "str"},
            "array": {"type": "str"},
            "nodelist": {"type": "str"},
            "exclude": {"type": "str"},
            "requeue": {"type": "bool", "default": True},
            "signal": {"type": "str"},
            "comment": {"type": "str"},
            "cluster": {"type": "str"},
            "options": {"type": "dict", "default": {}},
            "serving_partitions": {"type": "list", "elements": "str", "default": []},
            "serving_nodes": {"type": "list", "elements": "str", "default": []},
            "allowed_partitions": {"type": "list", "elements": "str", "default": []},
            "absence_limit": {"type": "int", "default": 300},
            "jobs": {"type": "list", "elements": "dict"},
            "wait": {"type": "bool", "default": True},
            "poll_interval": {"type": "int", "default": 5},
            "wait_timeout": {"type": "int", "default": 0},
            "answer_timeout": {"type": "int", "default": 600},
        },
        required_one_of=[("experiment", "jobs")],
        required_by={"experiment": ["directory"]},
        required_if=[
            ("state", "absent", ["experiment"]),
            ("state", "present", ["experiment"]),
            ("state", "present", ["name"]),
            ("state", "present", ["script", "content"], True),
        ],
        mutually_exclusive=[("script", "content"), ("name", "jobs"), ("experiment", "jobs")],
        supports_check_mode=True,
    )
    # The system's log gets none of the environment. In what is returned a secret is masked and all else is shown, for to mask
    # each value of the environment would mask every 0 and 1.
    module.no_log_values = secrets_in(module.params["environment"])
    try:
        module.exit_json(**run(module))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error), unanswered=isinstance(error, Unanswered))


if __name__ == "__main__":
    main()
