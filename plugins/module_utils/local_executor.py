# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs as detached processes of this machine (Linux). Private to the collection.

A job's processes carry its attempt's key in their environment, which children inherit.
Whether the job lives is asked of ``/proc``, never of a stored pid: a reused pid does not
carry the mark and after a reboot nothing does. How it ended stands in ``exit-<n>.json``,
which the launcher writes last; a job without processes and without that file was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from .errors import SpecDecodeError
from .files import read_json_or_none
from .jobs import Attempt, JobSpec, Record, Sighting, State, job_environment, unmet_needs

KEY_VARIABLE = "SPEC_DECODE_JOB"
EXPERIMENT_VARIABLE = "SPEC_DECODE_EXPERIMENT"

#: Runs the job and records how it ended. Everything variable arrives as an argument, never as text. The last line keeps
#: the shell itself, which carries the job's mark, until the note is there: it would become ``mv`` otherwise, and a
#: process that is just becoming another shows no environment.
LAUNCHER = """
exit_file=$1; limit=$2; shift 2
if [ "$limit" -gt 0 ]; then timeout --kill-after=30 "$limit" "$@"; else "$@"; fi
code=$?
printf '{"exit_code": %d}\\n' "$code" > "$exit_file.tmp" && mv "$exit_file.tmp" "$exit_file"
exit
"""
TIMEOUT_CODE = 124
GRACE_S = 20.0


class LocalExecutor:
    """Runs each attempt in a session of its own, detached from the play."""

    name = "local"

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s

    def look_up(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """State by the end note first, then by living processes that carry the attempt's key."""
        ended = read_json_or_none(_exit_file(spec, attempt), "exit note of the job")
        if ended is not None:
            return _ended(spec, attempt, int(ended["exit_code"]))
        living = list(marked_processes(KEY_VARIABLE, attempt.key))
        if living:
            return Sighting(State.RUNNING, job_id=attempt.job_id or str(min(living)), elapsed_s=_age(spec, attempt))
        ended = read_json_or_none(_exit_file(spec, attempt), "exit note of the job")
        if ended is not None:  # it ended between the two looks
            return _ended(spec, attempt, int(ended["exit_code"]))
        if not os.path.exists(_start_file(spec, attempt)):
            return Sighting(State.ABSENT)
        return Sighting(State.LOST, job_id=attempt.job_id, reason="its processes are gone and left no exit code")

    def look_up_all(self, items: Sequence[tuple[JobSpec, Record, Attempt]]) -> list[Sighting]:
        """One after the other: each is a look at this machine's own processes."""
        return [self.look_up(*item) for item in items]

    def submit(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """Start the launcher in a new session; it is running when this returns."""
        unmet = unmet_needs(spec)
        if unmet:
            raise SpecDecodeError(
                f"Job {spec.name!r} needs job {unmet[0]!r}, whose result is not there yet. Local jobs do not wait for others.",
                f"Wait until {unmet[0]!r} is complete, then run again.",
            )
        command = [
            "/bin/bash", "-c", LAUNCHER, "spec-decode-job", _exit_file(spec, attempt), str(spec.time_limit_s),
            "/bin/bash", spec.script, *spec.arguments,
        ]  # fmt: skip
        environment = {**os.environ, **job_environment(spec, record, attempt)}
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_exit_file(spec, attempt))  # left by a namesake whose record was lost
        try:
            with open(spec.log, "ab") as log, open(_start_file(spec, attempt), "w", encoding="utf-8"):
                log.write(f"--- attempt {attempt.number} ({attempt.key}) at {attempt.submitted_at}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=spec.chdir or spec.folder,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise SpecDecodeError(
                f"Job {spec.name!r} could not be started in {spec.chdir or spec.folder}: {error.strerror}.",
                "Mend it and run again.",
            ) from error
        _until_marked(process, attempt.key)
        return Sighting(State.RUNNING, job_id=str(process.pid), elapsed_s=0.0)

    def cancel(self, spec: JobSpec, record: Record, attempt: Attempt) -> bool:
        """SIGTERM to every process that carries the key, SIGKILL to those left after the grace time."""
        return stop_marked(KEY_VARIABLE, attempt.key, self.grace_s)


def _until_marked(process: subprocess.Popen[bytes], key: str) -> None:
    """Wait until the new process can be found by its mark: the kernel shows its environment only a moment later."""
    wanted = f"{KEY_VARIABLE}={key}".encode()
    deadline = time.monotonic() + GRACE_S
    while process.poll() is None and not _carries(process.pid, wanted) and time.monotonic() < deadline:
        time.sleep(0.001)


def stop_marked(variable: str, value: str, grace_s: float = GRACE_S) -> bool:
    """Stop this user's processes whose environment says ``variable=value``. Returns whether there were any."""
    found = False
    deadline = time.monotonic() + grace_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked_processes(variable, value):
            found = True
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended by itself
        while time.monotonic() < deadline and any(True for _pid in marked_processes(variable, value)):
            time.sleep(0.1)
        deadline = time.monotonic() + grace_s
    return found


def marked_processes(variable: str, value: str) -> Iterator[int]:
    """Ids of this user's living processes whose start-up environment holds ``variable=value``."""
    wanted = f"{variable}={value}".encode()
    own = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == own:
            continue
        if _carries(int(entry), wanted):
            yield int(entry)


def _carries(pid: int, wanted: bytes) -> bool:
    """Whether a process is this user's, at work, and was started with the variable ``wanted``."""
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return False
        with open(f"/proc/{pid}/environ", "rb") as stream:
            if wanted not in stream.read().split(b"\0"):
                return False
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # a zombie waits to be reaped; it does no work
            return stream.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # ended meanwhile, or not ours to look at


def _ended(spec: JobSpec, attempt: Attempt, code: int) -> Sighting:
    job_id = attempt.job_id
    if code == 0:
        return Sighting(State.COMPLETED, job_id=job_id, exit_code=0)
    if code == TIMEOUT_CODE and spec.time_limit_s:
        return Sighting(State.TIMEOUT, job_id=job_id, exit_code=code, reason=f"ran past {spec.time_limit_s} s")
    if code > 128:
        return Sighting(State.FAILED, job_id=job_id, signal=code - 128, reason="killed by a signal")
    return Sighting(State.FAILED, job_id=job_id, exit_code=code)


def _age(spec: JobSpec, attempt: Attempt) -> float:
    try:
        return max(0.0, time.time() - os.stat(_start_file(spec, attempt)).st_mtime)
    except OSError:
        return 0.0


def _start_file(spec: JobSpec, attempt: Attempt) -> str:
    return os.path.join(spec.folder, f"start-{attempt.key}")


def _exit_file(spec: JobSpec, attempt: Attempt) -> str:
    return os.path.join(spec.folder, f"exit-{attempt.key}.json")
