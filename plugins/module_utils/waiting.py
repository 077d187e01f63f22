# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a wait for a job shows, and how long it pauses between two looks. Private to the collection."""

from __future__ import annotations

from typing import Any


class Backoff:
    """Pauses that grow from half a second to ``longest`` seconds."""

    def __init__(self, longest: float, first: float = 0.5, factor: float = 1.5) -> None:
        self._longest, self._pause, self._factor = longest, min(first, longest), factor

    def next(self) -> float:
        """The pause to make now, in seconds."""
        pause = self._pause
        self._pause = min(self._longest, self._pause * self._factor)
        return pause


def clock(seconds: float) -> str:
    """``HH:MM:SS``."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def progress_line(job: dict[str, Any]) -> str:
    """One job as one line: ``train RUNNING on gpu[3-4] · step 1200/10000 · acc_0 0.61``.

    Without progress of its own the elapsed time stands in; with it the line changes when the job gets on.
    """
    parts = [f"{job['name']} {job['state']}"]
    if job.get("nodes"):
        parts[0] += f" on {job['nodes']}"
    text = (job.get("progress") or {}).get("text")
    if job["state"] in ("PENDING", "REQUEUED", "PREEMPTED") and job.get("reason"):
        parts.append(job["reason"])
    elif text:
        parts.append(text)
    return " · ".join(parts)
