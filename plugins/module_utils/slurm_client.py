# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's commands: each call with a time limit, each answer told from silence. Private to the collection."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping

from .errors import SpecDecodeError, Unanswered
from .slurm_rows import SACCT_FIELDS, SEPARATOR, SQUEUE_FIELDS, Row, parse_sacct, parse_squeue

#: a command that has not answered by then will not: Slurm's own limit for a message is some ten seconds
CALL_LIMIT_S = 45.0
#: names in one call: well below what a command line takes
NAMES_PER_CALL = 1000
#: what sbatch says of a job that was refused for good, and surely was not queued
_REFUSED = re.compile(
    r"Batch job submission failed: (?!.*(?:Socket timed out|Unable to contact|Connection|Zero Bytes|authentication|munge"
    r"|temporarily|Transport|communication|not responding|Unexpected message|timed out|No error))"
    r"|unrecognized option|[Ii]nvalid (?:option|argument|.* specification)|requires an argument|does not look like a batch script"
    r"|Unable to open file|[Ii]nvalid --|not a valid",
    re.DOTALL,
)
#: a user's own variables that would answer another question than ours, or submit another job: filters of squeue and sacct,
#: another cluster, an array
_MISLEADING = re.compile(r"(SQUEUE|SACCT|SCANCEL|SINFO)_\w+|(SLURM|SBATCH)_CLUSTERS|SBATCH_(ARRAY_INX|WAIT)")
_NO_ACCOUNTING_AT_ALL = "You are not running a supported accounting_storage plugin"
_NO_ACCOUNTING = "accounting storage is disabled"
_MESSAGE_TIMEOUT = re.compile(r"^MessageTimeout\s*=\s*(\d+)", re.MULTILINE)


class Slurm:
    """The commands of one cluster; counts its calls, so that a test can."""

    def __init__(self, cluster: str = "", limit_s: float = CALL_LIMIT_S) -> None:
        self.cluster, self.limit_s, self.calls = cluster, limit_s, 0

    def queue(self, names: Iterable[str], uid: int) -> list[Row]:
        """All jobs of ``uid`` with one of these names that the controller still knows, ended ones too."""
        fields = ",".join(f"{field}:{SEPARATOR}" for field in SQUEUE_FIELDS)
        common = ["squeue", "--noheader", "--states=all", f"--Format={fields}", f"--user={uid}"]
        return [row for part in _parts(names) for row in parse_squeue(self._ask([*common, f"--name={part}"]))]

    def accounts(self, names: Iterable[str], uid: int, since: str) -> list[Row] | None:
        """The same of the accounting, however long ago; ``None`` where there is no accounting."""
        rows: list[Row] = []
        for part in _parts(names):
            command = [
                "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={','.join(SACCT_FIELDS)}",
                f"--uid={uid}", f"--starttime={since}", f"--name={part}",
            ]  # fmt: skip
            answer = self._call(command)
            if _NO_ACCOUNTING in answer.stderr:
                return None
            rows += parse_sacct(self._text(command, answer))
        return rows

    def submit(self, command: list[str], environment: Mapping[str, str], cwd: str) -> str:
        """Run ``sbatch``; returns the job's id. A clear refusal and an unclear end are two different errors."""
        answer = self._call(["sbatch", "--parsable", *command], environment, cwd)
        job_id = answer.stdout.strip().partition(";")[0]
        if answer.returncode == 0 and job_id.isdigit():
            return job_id
        said = _said(answer)
        if _REFUSED.search(answer.stderr):
            raise SpecDecodeError(f"Slurm refused the job: {said}.", "Mend the job's options and run again.")
        raise Unanswered(f"sbatch came to no clear end ({said})")

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Ask for the end of these jobs. Only a query tells whether it came: scancel says 0 for jobs it never heard of."""
        self._ask(["scancel", *job_ids])

    def message_timeout(self) -> float:
        """How long the controller and its clients wait for each other."""
        found = _MESSAGE_TIMEOUT.search(self.show("config"))
        return float(found[1]) if found else 10.0

    def show(self, *what: str) -> str:
        """``scontrol show``, one line an object."""
        return self._ask(["scontrol", "--oneliner", "show", *what])

    def update(self, *what: str) -> None:
        """``scontrol update``."""
        self._ask(["scontrol", "update", *what])

    def qualities(self) -> dict[str, str]:
        """What each quality of service may preempt; empty where there is no accounting to define any."""
        lines = self._managed("qos", "format=name,preempt")
        return {name: preempt for name, _bar, preempt in (line.partition(SEPARATOR) for line in lines)}

    def default_qualities(self, user: str) -> list[str]:
        """The qualities of service that a job of ``user`` gets when it names none: one of each of the user's accounts."""
        return sorted(set(self._managed("associations", "where", f"user={user}", "format=defaultqos")))

    def _managed(self, *what: str) -> list[str]:
        """Lines of ``sacctmgr show``; none where there is no accounting."""
        command = ["sacctmgr", "--noheader", "--parsable2", "show", *what]
        answer = self._call(command)
        if answer.returncode and _NO_ACCOUNTING_AT_ALL in answer.stderr:
            return []
        return [line for line in self._text(command, answer).splitlines() if line]

    def _ask(self, command: list[str]) -> str:
        return self._text(command, self._call(command))

    def _text(self, command: list[str], answer: subprocess.CompletedProcess[str]) -> str:
        if answer.returncode:
            raise Unanswered(f"{command[0]} ended with {answer.returncode}: {_said(answer)}")
        return answer.stdout

    def _call(
        self, command: list[str], environment: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        if self.cluster and command[0] != "sacctmgr":
            command = [command[0], f"--clusters={self.cluster}", *command[1:]]
        self.calls += 1
        given = {name: value for name, value in (environment or os.environ).items() if not _MISLEADING.fullmatch(name)}
        try:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
                timeout=self.limit_s, env={**given, "SLURM_TIME_FORMAT": "standard"}, cwd=cwd,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Unanswered(f"{command[0]} did not answer within {self.limit_s:.0f} s") from error
        except FileNotFoundError as error:
            raise SpecDecodeError(
                f"There is no {error.filename} on this machine.", "Run on a login host of the cluster, or load its module."
            ) from error


def _parts(names: Iterable[str]) -> list[str]:
    ordered = sorted(set(names))
    return [",".join(ordered[start : start + NAMES_PER_CALL]) for start in range(0, len(ordered), NAMES_PER_CALL)]


def _said(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return " / ".join(lines[-2:]).rstrip(".") or f"exit code {answer.returncode}"
