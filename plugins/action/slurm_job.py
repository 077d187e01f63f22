# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wait loop of ``slurm_job`` on the controller: one short module call a poll, a progress line a change."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ansible import constants
from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.inference.spec_decode.plugins.module_utils import runbook
from ansible_collections.inference.spec_decode.plugins.module_utils.waiting import Backoff, Board, progress_line, progress_mark

display = Display()

#: what makes one poll serve several jobs: the same host, the same scheduler
SAME = ("executor", "cluster", "absence_limit", "answer_timeout")


class ActionModule(ActionBase):
    """Submit, then look again and again; a lost connection costs a poll, never the job."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        several = len((task_vars or {}).get("ansible_play_hosts_all", [])) > 1
        self._host = f"{task_vars['inventory_hostname']}: " if task_vars and several else ""
        wait = self._flag(arguments.get("wait", True))
        waits = arguments.get("state", "present") == "present" and wait and not self._task.check_mode
        result = self._ask(arguments, task_vars)
        if not waits or result.get("failed") or not result.get("job"):
            return result
        return self._wait(arguments, result, task_vars)

    def _wait(self, arguments: dict[str, Any], result: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        changed, submitted = bool(result.get("changed")), bool(result.get("submitted"))
        started = time.monotonic()
        limit = float(arguments.get("wait_timeout", 0) or 0)
        pause = Backoff(longest=float(arguments.get("poll_interval", 5)))
        shown = ""
        while True:
            job = result["job"]
            if progress_mark(job) != shown:
                shown = progress_mark(job)
                display.display(f"  {self._host}{progress_line(job)}")
            if job["state"] == "COMPLETED":
                break
            if not job["alive"] and job["removed"]:
                return {
                    **result,
                    "failed": True,
                    "changed": changed,
                    "msg": f"Job {job['name']!r} was cancelled by the teardown. Run the playbook again to start it anew.",
                }
            if not job["alive"]:
                again = self._ask(arguments, task_vars)
                if again.get("failed"):
                    return {**again, "changed": changed, "job": job}
                changed = changed or bool(again.get("changed"))
                submitted = submitted or bool(again.get("submitted"))
                result = again
                continue
            if limit and time.monotonic() - started > limit:
                hint = f" {runbook.more(runbook.PENDING)}" if job["state"] == "PENDING" else ""
                return {
                    **result,
                    "failed": True,
                    "changed": changed,
                    "msg": f"Job {job['name']!r} is still {job['state']} after {limit:.0f} s; it goes on. Run the"
                    f" playbook again to wait for it.{hint}",
                }
            time.sleep(pause.next())
            result = self._look(arguments, task_vars)
            if result.get("failed"):
                return {**result, "changed": changed}
        return (
            {**result, "changed": changed, "submitted": submitted, "action": "submit" if submitted else "attach"}
            if (submitted or changed)
            else result
        )

    def _look(self, arguments: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        """What became of the job: one query a poll for all jobs of the play that are waited for on the same host."""
        question = {key: arguments[key] for key in ("experiment", "name", "directory")}
        same = {key: arguments[key] for key in SAME if key in arguments}
        # Hosts of other names may be one machine: that of the play, or one address.
        address = "" if self._connection.transport == "local" else self._play_context.remote_addr
        connection = [self._connection.transport, address, self._play_context.remote_user, self._task.become]
        board = Board(constants.DEFAULT_LOCAL_TMP, [connection, same])

        def ask(questions: list[dict[str, Any]]) -> dict[str, Any]:
            return self._ask({**same, "state": "query", "jobs": questions}, task_vars)

        result = board.look(question, ask, float(arguments.get("poll_interval", 5)))
        return result if result.get("failed") else {"changed": False, "job": result["job"]}

    def _ask(self, arguments: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        """One module call; a connection that is lost and a scheduler that is silent are asked again for a while."""
        deadline = time.monotonic() + float(arguments.get("answer_timeout", 600))
        pause = Backoff(longest=30.0)
        while True:
            try:
                result = self._execute_module(
                    module_name="inference.spec_decode.slurm_job", module_args=arguments, task_vars=task_vars
                )
            except AnsibleConnectionFailure as error:
                if time.monotonic() > deadline:
                    raise
                display.display(f"  {self._host}the connection is lost, trying again: {error.message}")
                self._forget_connection()
            else:
                jobs = result.get("jobs") or [result.get("job") or {}]
                silent = result.get("unanswered") or any(job.get("state") == "UNKNOWN" for job in jobs)
                if not silent or time.monotonic() > deadline:
                    return result
                reason = result.get("msg") or next(job["reason"] for job in jobs if job.get("state") == "UNKNOWN")
                display.display(f"  {self._host}no answer, asking again: {reason}")
            time.sleep(pause.next())

    def _forget_connection(self) -> None:
        """What is left of a lost connection, such as a control socket or a temporary folder that a reboot removed."""
        with contextlib.suppress(AnsibleError):
            self._connection.reset()
        self._connection._shell.tmpdir = None

    @staticmethod
    def _flag(value: Any) -> bool:
        return value if isinstance(value, bool) else str(value).lower() in ("1", "true", "yes", "on")
