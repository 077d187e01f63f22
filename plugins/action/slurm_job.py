# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The wait loop of ``slurm_job`` on the controller: one short module call a poll, a progress line a change."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.inference.spec_decode.plugins.module_utils.waiting import Backoff, progress_line

display = Display()

#: How long a host may stay unreachable, in seconds, before the wait gives up (the job itself goes on).
UNREACHABLE_LIMIT_S = 600.0


class ActionModule(ActionBase):
    """Submit, then look again and again; a lost connection costs a poll, never the job."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        wait = self._flag(arguments.get("wait", True))
        result = self._call(arguments, task_vars)
        waits = arguments.get("state", "present") == "present" and wait and not self._task.check_mode
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
            line = progress_line(job)
            if line != shown:
                display.display(f"  {line}")
                shown = line
            if job["state"] == "COMPLETED":
                break
            if not job["alive"]:
                again = self._call(arguments, task_vars)
                if again.get("failed"):
                    return {**again, "changed": changed, "job": job}
                changed = changed or bool(again.get("changed"))
                submitted = submitted or bool(again.get("submitted"))
                result = again
                continue
            if limit and time.monotonic() - started > limit:
                return {
                    **result,
                    "failed": True,
                    "changed": changed,
                    "msg": f"Job {job['name']!r} is still {job['state']} after {limit:.0f} s; it goes on. Run the"
                    " playbook again to wait for it.",
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
        """One query; unreachable hosts and a silent scheduler are asked again for a while."""
        question = {key: arguments[key] for key in ("experiment", "name", "directory", "executor", "cluster", "result")
                    if key in arguments}  # fmt: skip
        deadline = time.monotonic() + UNREACHABLE_LIMIT_S
        pause = Backoff(longest=30.0)
        while True:
            result = self._call({**question, "state": "query"}, task_vars)
            silent = result.get("unreachable") or result.get("job", {}).get("state") == "UNKNOWN"
            if not silent or time.monotonic() > deadline:
                return result
            display.display(f"  {arguments['name']}: no answer, asking again")
            time.sleep(pause.next())

    def _call(self, arguments: dict[str, Any], task_vars: Any) -> dict[str, Any]:
        return self._execute_module(module_name="inference.spec_decode.slurm_job", module_args=arguments, task_vars=task_vars)

    @staticmethod
    def _flag(value: Any) -> bool:
        return value if isinstance(value, bool) else str(value).lower() in ("1", "true", "yes", "on")
