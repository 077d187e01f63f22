# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wait for Deployments and Jobs on the controller: short calls of ``k8s_info``, a progress line a change."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.inference.spec_decode.plugins.module_utils import runbook
from ansible_collections.inference.spec_decode.plugins.module_utils.canary_objects import LABEL
from ansible_collections.inference.spec_decode.plugins.module_utils.canary_state import (
    Look,
    look_at_deployment,
    look_at_job,
    refusal,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.waiting import Backoff

display = Display()

#: how much of a pod's log goes into a message
LOG_LINES = 12
WATCHED = {"deployments": ("apps/v1", "Deployment", look_at_deployment), "jobs": ("batch/v1", "Job", look_at_job)}


class ActionModule(ActionBase):
    """Look again and again; an API server that fails for a while costs a poll, never the canary."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            argument_spec={
                "experiment": {"type": "str", "required": True},
                "namespace": {"type": "str", "required": True},
                "deployments": {"type": "list", "elements": "str", "default": []},
                "jobs": {"type": "list", "elements": "str", "default": []},
                "pods_gone": {"type": "bool", "default": False},
                "timeout": {"type": "int", "default": 1800},
                "schedule_timeout": {"type": "int", "default": 300},
                "answer_timeout": {"type": "int", "default": 120},
                "poll_interval": {"type": "float", "default": 5},
                "connection": {"type": "dict", "default": {}},
            },
            required_one_of=[("deployments", "jobs", "pods_gone")],
        )
        if self._task.check_mode:
            return {"changed": False, "objects": {}, "waited_s": 0.0}
        self._options, self._task_vars = options, task_vars
        return self._wait_until_gone() if options["pods_gone"] else self._wait()

    def _wait_until_gone(self) -> dict[str, Any]:
        """Pods end after their owners: they get their time to."""
        started = time.monotonic()
        pause = Backoff(longest=self._options["poll_interval"])
        while pods := self._resources("v1", "Pod", [f"{LABEL}={self._options['experiment']}"]):
            if time.monotonic() - started > self._options["timeout"]:
                names = ", ".join(f"{pod['metadata']['name']} on {pod['spec'].get('nodeName') or 'no node'}" for pod in pods)
                raise AnsibleActionFail(
                    f"After {self._options['timeout']} s there are still the pods {names}."
                    " A node that does not answer keeps its pods."
                )
            time.sleep(pause.next())
        return {"changed": False, "objects": {}, "waited_s": round(time.monotonic() - started, 1)}

    def _wait(self) -> dict[str, Any]:
        options, started = self._options, time.monotonic()
        pause = Backoff(longest=options["poll_interval"])
        unscheduled: dict[str, float] = {}
        shown: dict[str, str] = {}
        while True:
            looks = self._look()
            passed = time.monotonic() - started
            for look in looks:
                if look.line and shown.get(look.name) != look.line:
                    display.display(f"  {look.name}: {look.line}")
                    shown[look.name] = look.line
                if look.failed:
                    raise AnsibleActionFail(f"{look.name}: {look.failed}{self._last_words(look)}")
                since = unscheduled.setdefault(look.name, passed) if look.unscheduled else unscheduled.pop(look.name, passed)
                if look.unscheduled and passed - since > options["schedule_timeout"]:
                    raise AnsibleActionFail(
                        f"{look.name} was given no node within {options['schedule_timeout']} s: {look.unscheduled.rstrip('.')}."
                        f" {runbook.more(runbook.CANARY)}"
                    )
            if all(look.done for look in looks):
                return {"changed": False, "objects": {look.name: look.line for look in looks}, "waited_s": round(passed, 1)}
            if passed > options["timeout"]:
                late = next(look for look in looks if not look.done)
                why = f"{late.unscheduled or late.line}{self._last_words(late)}"
                raise AnsibleActionFail(f"{late.name} is not done after {options['timeout']} s: {why}")
            time.sleep(pause.next())

    def _look(self) -> list[Look]:
        """All objects as they are now; events are asked for only where something is wrong."""
        mine = [f"{LABEL}={self._options['experiment']}"]
        pods = self._resources("v1", "Pod", mine)
        found = {
            option: self._resources(version, kind, mine)
            for option, (version, kind, _look) in WATCHED.items() if self._options[option]
        }  # fmt: skip

        def looks(events: list[dict[str, Any]]) -> list[Look]:
            return [WATCHED[option][2](name, found[option], pods, events) for option in found for name in self._options[option]]

        seen = looks([])
        if any(look.failed or look.unscheduled or look.line == "no pod yet" for look in seen):
            seen = looks(self._resources("v1", "Event", []))
        return seen

    def _last_words(self, look: Look) -> str:
        """The end of the pod's log, where it can be had: the container's before it was started again comes first."""
        for previous in (True, False) if look.pod else ():
            arguments = {
                **self._options["connection"], "namespace": self._options["namespace"], "name": look.pod, "previous": previous,
                "tail_lines": LOG_LINES,
            }  # fmt: skip
            answer = self._execute_module(module_name="kubernetes.core.k8s_log", module_args=arguments, task_vars=self._task_vars)
            lines = [line for line in answer.get("log_lines") or [] if line.strip()]
            if lines:
                return " Its log ends with:\n" + "\n".join(f"    {line}" for line in lines)
        return ""

    def _resources(self, version: str, kind: str, selectors: list[str]) -> list[dict[str, Any]]:
        """One question; it is asked again for a while where the API server fails."""
        arguments = {
            **self._options["connection"], "api_version": version, "kind": kind, "namespace": self._options["namespace"],
            "label_selectors": selectors,
        }  # fmt: skip
        deadline = time.monotonic() + self._options["answer_timeout"]
        pause = Backoff(longest=15.0)
        while True:
            answer = self._execute_module(
                module_name="kubernetes.core.k8s_info", module_args=arguments, task_vars=self._task_vars
            )
            if not answer.get("failed"):
                return list(answer["resources"])
            why = refusal(str(answer.get("msg", "")))
            if why["final"] or time.monotonic() > deadline:
                raise AnsibleActionFail(f"Cannot look at the {kind} objects of {self._options['namespace']}:"
                                        f" {why['words']}. {why['remedy']}".strip())  # fmt: skip
            display.display(f"  no answer about {kind} objects ({why['code'] or 'connection lost'}), asking again")
            time.sleep(pause.next())
