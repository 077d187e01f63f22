# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ``squeue`` and ``sacct`` print, read into rows. Pure; private to the collection.

Text, not JSON: ``squeue --json`` ignores its own filters, answers "no jobs" with status 0 when the controller is down, and
calls its fields otherwise in every second release. The fields asked for here exist since 22.05.
"""

from __future__ import annotations

import dataclasses
import re

from .errors import SpecDecodeError
from .jobs import ALIVE, Sighting, State
from .slurm_time import seconds

#: asked for with a separator of one's own, these columns are never cut off
SQUEUE_FIELDS = (
    "JobArrayID", "Name", "UserID", "State", "exit_code", "RestartCnt", "TimeUsed", "NodeList", "Reason", "SubmitTime",
    "StartTime", "Comment",
)  # fmt: skip
SACCT_FIELDS = ("JobID", "JobName", "UID", "State", "ExitCode", "ElapsedRaw", "NodeList", "Reason", "Submit", "Start")
SEPARATOR = "|"

#: why Slurm cancels a job whose dependency failed (with --kill-on-invalid-dep=yes)
NEVER_SATISFIED = "DependencyNeverSatisfied"

_STATES = {
    "PENDING": State.PENDING,
    "CONFIGURING": State.PENDING,
    "RESV_DEL_HOLD": State.PENDING,
    "REQUEUE_FED": State.PENDING,
    "REQUEUE_HOLD": State.REQUEUED,
    "SPECIAL_EXIT": State.REQUEUED,
    "REQUEUED": State.REQUEUED,
    "RUNNING": State.RUNNING,
    "COMPLETING": State.RUNNING,
    "EXPEDITING": State.PENDING,
    "LAUNCH_FAILED": State.REQUEUED,
    "POWER_UP_NODE": State.PENDING,
    "RECONFIG_FAIL": State.NODE_FAIL,
    "RESIZING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "STOPPED": State.RUNNING,
    "SUSPENDED": State.RUNNING,
    "PREEMPTED": State.PREEMPTED,
    "COMPLETED": State.COMPLETED,
    "FAILED": State.FAILED,
    "TIMEOUT": State.TIMEOUT,
    "DEADLINE": State.TIMEOUT,
    "CANCELLED": State.CANCELLED,
    "NODE_FAIL": State.NODE_FAIL,
    "BOOT_FAIL": State.NODE_FAIL,
    "OUT_OF_MEMORY": State.OUT_OF_MEMORY,
}
_NOWHERE = ("", "None assigned", "(null)", "N/A", "n/a")
_NO_REASON = ("", "None", "(null)", "NonZeroExitCode", "RaisedSignal:0(Unknown)")


@dataclasses.dataclass(frozen=True)
class Row:
    """One job, or one task of an array, as one of Slurm's commands told it."""

    job_id: str
    name: str
    uid: int
    state: State
    exit_code: int = 0
    signal: int = 0
    restarts: int = 0
    elapsed_s: float = 0.0
    nodes: str = ""
    reason: str = ""
    submitted: str = ""
    started: bool = False
    comment: str = ""
    #: the id with that of the task, where the job is an array
    task: str = ""

    def sighting(self) -> Sighting:
        """The row in the words that all executors use."""
        state = self.state
        if state is State.PENDING and self.restarts:
            state = State.REQUEUED
        code, number = self.exit_code, self.signal
        if code > 128 and not number:  # the wrapper, a shell, says so of a script that a signal ended
            code, number = 0, code - 128
        said = state is State.COMPLETED or (state is not State.CANCELLED and code != 0)
        return Sighting(
            state,
            job_id=self.job_id,
            reason=self.reason,
            exit_code=code if said and state not in ALIVE and not number else None,
            signal=number or None,
            restarts=self.restarts,
            nodes=self.nodes,
            elapsed_s=self.elapsed_s,
            never_ran=state is State.CANCELLED and self.reason == NEVER_SATISFIED,
        )

    @property
    def refused(self) -> bool:
        """Whether this is what a refused ``sbatch`` left behind: no job ever was."""
        return self.state is State.FAILED and not self.nodes and self.reason == "BadConstraints"


def parse_squeue(text: str) -> list[Row]:
    """The answer to ``squeue --noheader --Format`` with :data:`SQUEUE_FIELDS`, each followed by the separator."""
    rows = []
    for line in _lines(text):
        fields = line.rstrip(SEPARATOR).split(SEPARATOR, len(SQUEUE_FIELDS) - 1)
        if len(fields) != len(SQUEUE_FIELDS):
            raise _unexpected("squeue", line)
        job, name, uid, state, status, restarts, used, nodes, reason, submitted, started, comment = fields
        code, number = _status("squeue", status)
        rows.append(
            Row(
                job_id=_base_id(job),
                name=name,
                uid=int(uid),
                state=_state("squeue", state),
                exit_code=code,
                signal=number,
                restarts=int(restarts) if restarts.isdigit() else 0,
                elapsed_s=_elapsed(used),
                nodes="" if nodes in _NOWHERE else nodes,
                reason=_reason(reason),
                submitted=submitted,
                started=started[:1].isdigit() and state not in ("PENDING", "CONFIGURING"),
                comment=comment if comment != "(null)" else "",
            )
        )
    return rows


def parse_sacct(text: str) -> list[Row]:
    """The answer to ``sacct --noheader --parsable2 --allocations --duplicates`` with :data:`SACCT_FIELDS`."""
    rows = []
    for line in _lines(text):
        fields = line.split(SEPARATOR)
        if len(fields) != len(SACCT_FIELDS):
            raise _unexpected("sacct", line)
        job, name, uid, state, status, elapsed, nodes, reason, submitted, started = fields
        code, number = _status("sacct", status)
        rows.append(
            Row(
                job_id=_base_id(job),
                name=name,
                uid=int(uid),
                state=_state("sacct", state),
                exit_code=code,
                signal=number,
                elapsed_s=float(elapsed or 0),
                nodes="" if nodes in _NOWHERE else nodes,
                reason=_reason(reason),
                submitted=submitted,
                started=started[:1].isdigit(),
                task=job,
            )
        )
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """Of several records of one job, or of one task of an array, as a requeue leaves them, the last."""
    latest: dict[str, str] = {}
    for row in rows:
        latest[row.task] = max(row.submitted, latest.get(row.task, ""))
    return [row for row in rows if row.submitted == latest[row.task]]


def fold(rows: list[Row]) -> Row:
    """The rows of one job as one: a job array is alive while a task is, and as bad as its worst task."""
    order = (
        State.RUNNING, State.PENDING, State.REQUEUED, State.PREEMPTED, State.NODE_FAIL, State.OUT_OF_MEMORY, State.TIMEOUT,
        State.FAILED, State.CANCELLED, State.COMPLETED,
    )  # fmt: skip
    first = min(rows, key=lambda row: order.index(row.state))
    return dataclasses.replace(
        first,
        restarts=max(row.restarts for row in rows),
        elapsed_s=max(row.elapsed_s for row in rows),
        nodes=",".join(dict.fromkeys(row.nodes for row in rows if row.nodes)),
    )


def _lines(text: str) -> list[str]:
    # With several clusters the name of each stands before its jobs, even without a header.
    return [line for line in text.splitlines() if line.strip() and not line.startswith("CLUSTER: ")]


def _base_id(job: str) -> str:
    return re.split(r"[_+.]", job, maxsplit=1)[0]


def _state(command: str, text: str) -> State:
    word = text.split()[0] if text.split() else ""  # "CANCELLED by 1000"
    if word not in _STATES:
        raise SpecDecodeError(f"{command} names a job state {text!r} that is not known.", "Report it with Slurm's version.")
    return _STATES[word]


def _status(command: str, text: str) -> tuple[int, int]:
    """Exit code and signal: as ``3:0``, which ``squeue`` of 22.05 gives as the number that the kernel packs both into."""
    if re.fullmatch(r"\d+:\d+", text):
        code, number = text.split(":")
        return int(code), int(number)
    if command == "squeue" and text.isdigit():
        return int(text) >> 8, int(text) & 0x7F
    raise _unexpected(command, text)


def _elapsed(text: str) -> float:
    return float(seconds(text)) if text[:1].isdigit() else 0.0


def _reason(text: str) -> str:
    return "" if text in _NO_REASON else text


def _unexpected(command: str, line: str) -> SpecDecodeError:
    return SpecDecodeError(
        f"{command} answered in another form than it was asked for: {line[:200]!r}.",
        "Check that nothing wraps the command on this machine; report it with Slurm's version.",
    )
