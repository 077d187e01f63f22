# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a wait for jobs shows, how long it pauses between two looks, and how many waits share a look. Private."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

from .files import read_json, read_json_or_none, sha256_value, write_json


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
    """One job as one line: ``train RUNNING 01:12:33 on gpu[3-4] · step 1200/10000 · acc_0 0.61``."""
    elapsed = job.get("elapsed_s")
    if elapsed is None or (elapsed == 0 and job["state"] != "RUNNING"):
        return _line(job, "")
    return _line(job, f" {clock(elapsed)}")


def progress_mark(job: dict[str, Any]) -> str:
    """What makes a new line worth showing: the job got on. That time passes does not."""
    return _line(job, "")


def _line(job: dict[str, Any], elapsed: str) -> str:
    parts = [f"{job['name']} {job['state']}{elapsed}"]
    if job.get("nodes"):
        parts[0] += f" on {job['nodes']}"
    if job.get("restarts"):
        parts[0] += f", restart {job['restarts']}"
    text = (job.get("progress") or {}).get("text")
    if job["state"] in ("PENDING", "REQUEUED", "PREEMPTED"):
        if job.get("reason"):
            parts.append(job["reason"])
    elif text:
        parts.append(text)
    return " · ".join(parts)


class Board:
    """Where the processes of one play that wait for jobs on one host share their questions and answers.

    Ansible gives each host of a play a process of its own. The first whose answer has grown old asks for all jobs on the
    board at once; the others read what it found. ``folder`` is the play's own and goes with it.
    """

    def __init__(self, folder: str, same: Any) -> None:
        self._folder = os.path.join(folder, f"spec_decode-{sha256_value(same)[:16]}")

    def look(
        self, question: dict[str, Any], ask: Callable[[list[dict[str, Any]]], dict[str, Any]], max_age_s: float
    ) -> dict[str, Any]:
        """The answer to ``question``: ``{job: …}``, or what a failed ``ask`` returned."""
        os.makedirs(self._folder, exist_ok=True)
        own = os.path.join(self._folder, sha256_value(question)[:16])
        begun = time.time()
        write_json(own + ".question", {"question": question, "at": begun})
        with open(os.path.join(self._folder, "lock"), "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = read_json_or_none(own + ".answer")
            # An answer that another process got while this one paused or stood at the lock is as good as one's own.
            if known is None or known["used"] or known["at"] < begun - max_age_s:
                write_json(own + ".question", {"question": question, "at": time.time()})
                questions = self._questions(max_age_s)
                result = ask([each["question"] for each in questions])
                if result.get("failed"):
                    return result
                for each, job in zip(questions, result["jobs"]):
                    path = os.path.join(self._folder, sha256_value(each["question"])[:16] + ".answer")
                    write_json(path, {"job": job, "at": time.time(), "used": False})
                known = read_json(own + ".answer")
            write_json(own + ".answer", {**known, "used": True})
            return {"job": known["job"]}

    def _questions(self, max_age_s: float) -> list[dict[str, Any]]:
        """What is being waited for: a question that was not put again for a while is nobody's any more."""
        names = sorted(name for name in os.listdir(self._folder) if name.endswith(".question"))
        found = [read_json(os.path.join(self._folder, name)) for name in names]
        return [each for each in found if each["at"] > time.time() - 3 * max_age_s - 60]
