# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs under Slurm, submitted exactly once. Private to the collection.

An attempt's key stands in the job's name, which is the one field that ``squeue``, ``sacct`` and ``scancel`` all know and
that a requeue keeps; an id alone is no identity, because a controller that crashed gives it out again. What is found
decides; a source that does not answer makes the answer UNKNOWN, and nothing is ever submitted on that.
"""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from . import slurm_policy
from .errors import SpecDecodeError, Unanswered
from .files import read_json_or_none, write_text
from .jobs import (
    ALIVE,
    Attempt,
    JobSpec,
    Record,
    Sighting,
    State,
    check_ours,
    job_environment,
    query,
    recorded,
    unmet_needs,
    was_done_already,
    write_record,
)
from .slurm_client import Slurm
from .slurm_rows import Row, fold, newest
from .slurm_script import option, options_in, options_of, wrapper

#: how long a job that ran may be seen by nobody before it counts as lost: a requeue, a restart of the controller
ABSENCE_LIMIT_S = 300.0
#: how long a cancelled job may take to go
CANCEL_LIMIT_S = 120.0
LONGEST_COMMENT = 1000
#: options of sbatch that the job's identity and record depend on
OURS = frozenset(
    {"job-name", "comment", "output", "error", "open-mode", "parsable", "wrap", "wait", "export", "export-file", "clusters",
     "cluster", "dependency", "kill-on-invalid-dep", "chdir", "array", "test-only", "input", "quiet"}
)  # fmt: skip
_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*\Z")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a site says of its cluster."""

    cluster: str = ""
    serving: slurm_policy.Serving = dataclasses.field(default_factory=slurm_policy.Serving)
    absence_limit_s: float = ABSENCE_LIMIT_S


class SlurmExecutor:
    """Runs each attempt as one Slurm job, or one job array."""

    name = "slurm"

    def __init__(self, settings: Settings | None = None, slurm: Slurm | None = None) -> None:
        self.settings = settings or Settings()
        self.slurm = slurm or Slurm(self.settings.cluster)

    # looking up

    def look_up(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """One job, see :meth:`look_up_all`."""
        return self.look_up_all([(spec, record, attempt)])[0]

    def look_up_all(self, items: Sequence[tuple[JobSpec, Record, Attempt]]) -> list[Sighting]:
        """All jobs in one call of ``squeue``, and one of ``sacct`` for those that it no longer knows."""
        names = [job_name(spec, attempt) for spec, _record, attempt in items]
        try:
            queued = _by_name(self.slurm.queue(names, os.getuid()))
            # What ended once, and was seen to, does not come back but by way of the queue.
            asked = {
                name: attempt.submitted_at
                for name, (spec, _record, attempt) in zip(names, items)
                if name not in queued and attempt.state in (State.ABSENT, *ALIVE)
            }
            accounted = self._accounted(asked)
        except Unanswered as error:
            return [Sighting(State.UNKNOWN, job_id=item[2].job_id, reason=error.message) for item in items]
        return [
            self._sighting(spec, attempt, queued.get(name), accounted.get(name))
            for name, (spec, _record, attempt) in zip(names, items)
        ]

    def _accounted(self, asked: dict[str, str]) -> dict[str, list[Row]]:
        if not asked:
            return {}
        # Clocks of a controller and of a login host may differ; a day more costs nothing.
        earliest = datetime.datetime.fromisoformat(min(asked.values())) - datetime.timedelta(days=1)
        rows = self.slurm.accounts(asked, os.getuid(), earliest.strftime("%Y-%m-%dT%H:%M:%S"))
        return _by_name(rows or [])

    def _sighting(self, spec: JobSpec, attempt: Attempt, queued: list[Row] | None, accounted: list[Row] | None) -> Sighting:
        queued, accounted = _real(queued, attempt), _real(accounted, attempt)
        if queued:
            attempt.details.pop("absent_since", None)
            return fold(_chosen(queued, _claimed_by(spec, attempt) or attempt.job_id)).sighting()
        if accounted:
            row = fold(newest(_chosen(accounted, _claimed_by(spec, attempt) or attempt.job_id)))
            if row.state not in ALIVE:
                attempt.details.pop("absent_since", None)
                return row.sighting()
        if attempt.state not in (State.ABSENT, *ALIVE):
            return recorded(attempt)
        return self._traces(spec, attempt)

    def _traces(self, spec: JobSpec, attempt: Attempt) -> Sighting:
        """Slurm answered, and knows the job no more, or not yet: what the record and the job itself left."""
        ended = read_json_or_none(_exit_note(spec, attempt), "exit note of the job")
        if ended is not None:
            return _ended(attempt, int(ended["exit_code"]), str(ended.get("job_id", "")))
        claimed = _claimed_by(spec, attempt)
        if not attempt.job_id and not claimed:
            return self._submission_in_flight(attempt)
        since = float(attempt.details.setdefault("absent_since", time.time()))
        absent = time.time() - since
        job_id = claimed or attempt.job_id
        if absent < self.settings.absence_limit_s:
            state = attempt.state if attempt.state in ALIVE else State.PENDING
            return Sighting(state, job_id=job_id, reason=f"not seen by Slurm for {absent:.0f} s")
        what = "started, but left neither an exit code nor a result" if claimed else "was accepted, but never started"
        return Sighting(State.LOST, job_id=job_id, reason=f"Slurm knows it no more; it {what}")

    def _submission_in_flight(self, attempt: Attempt) -> Sighting:
        """A submission without a reply may still be on its way to a controller that hangs."""
        begun = float(attempt.details.get("submitting_at", 0.0))
        if not begun or attempt.details.get("refused"):
            return Sighting(State.ABSENT)
        try:
            limit = 2 * self.slurm.message_timeout()
        except Unanswered as error:
            return Sighting(State.UNKNOWN, reason=error.message)
        passed = time.time() - begun
        if passed < limit:
            return Sighting(State.UNKNOWN, reason=f"a submission {passed:.0f} s ago got no reply and may still arrive")
        return Sighting(State.ABSENT)

    # submitting

    def submit(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """Run ``sbatch`` once. After an unclear end the next look-up, not a second sbatch, tells what came of it."""
        with open(spec.script, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            script = stream.read().replace("\r\n", "\n")  # sbatch refuses such endings; all other bytes stay as they are
        environment = {**os.environ, **job_environment(spec, record, attempt)}
        options = requested(spec, script)
        options.update(self._kept_off_serving({**options_of(script), **options_in(environment), **options}))
        command = [*self._identity(spec, record, attempt), *[option(name, value) for name, value in options.items()]]
        # The script as it is now: what is edited later must not run under this fingerprint.
        copy, batch = _file(spec, attempt, "script"), _file(spec, attempt, "batch")
        write_text(copy, script, mode=0o755, errors="surrogateescape")
        write_text(batch, wrapper(script), mode=0o755, errors="surrogateescape")
        command += [batch, _claim(spec, attempt), _exit_note(spec, attempt), str(len(spec.verify)), *spec.verify,
                    copy, *spec.arguments]  # fmt: skip
        attempt.details = {"submitting_at": time.time()}
        write_record(spec, record)
        try:
            job_id = self.slurm.submit(command, environment, spec.folder)
        except Unanswered as error:
            raise Unanswered(
                f"Job {spec.name!r} of experiment {spec.experiment!r}: {error.message}. It is not known whether it was queued.",
                "Run again: it is looked for by its name before anything is submitted.",
            ) from error
        except SpecDecodeError as error:
            raise SpecDecodeError(
                f"Job {spec.name!r} of experiment {spec.experiment!r}: {error.message}", error.remedy
            ) from error
        return Sighting(State.PENDING, job_id=job_id)

    def _identity(self, spec: JobSpec, record: Record, attempt: Attempt) -> list[str]:
        """The options that make the job known again."""
        mark = {"experiment": spec.experiment, "job": spec.name, "key": attempt.key, "fingerprint": record.fingerprint}
        text = str(dict(spec.options).get("comment", ""))
        if len(text) > LONGEST_COMMENT:
            raise SpecDecodeError(
                f"The comment has {len(text)} characters; Slurm would cut it off together with the job's mark.",
                f"Keep it below {LONGEST_COMMENT}.",
            )
        found = [
            option("job-name", job_name(spec, attempt)),
            option("comment", json.dumps({**mark, **({"text": text} if text else {})})),
            # A percent sign in a folder's name would be taken for one of Slurm's patterns.
            option("output", spec.log.replace("%", "%%")),
            option("open-mode", "append"),
            option("chdir", spec.chdir or spec.folder),
            option("kill-on-invalid-dep", "yes"),
            # A site's or a script's --export=NONE would take the job's marks and the user's variables away.
            option("export", "ALL"),
        ]
        dependency = ",".join(self._dependencies(spec))
        return [*found, option("dependency", dependency)] if dependency else found

    def _dependencies(self, spec: JobSpec) -> list[str]:
        """What the job waits for: the jobs that write its inputs, what the user says, and its own duplicates."""
        options = dict(spec.options)
        found = [f"afterok:{job_id}" for job_id in self._needed(spec)]
        if options.get("dependency"):
            found.append(str(options["dependency"]))
        if not options.get("array") and "?" not in str(options.get("dependency", "")):
            found.append("singleton")
        return found

    def _needed(self, spec: JobSpec) -> Iterable[str]:
        for name in (*unmet_needs(spec), *spec.after):
            needed = dataclasses.replace(spec, name=name)
            found = query(needed, self)
            seen = found.sighting
            if seen.state is State.COMPLETED or (found.record is not None and was_done_already(found.record)):
                continue
            check_ours(needed, self, found.record)
            if seen.state is State.UNKNOWN:
                raise Unanswered(f"Whether job {name!r}, which {spec.name!r} waits for, is alive is not known: {seen.reason}.")
            if seen.state not in ALIVE:
                raise SpecDecodeError(
                    f"Job {spec.name!r} needs job {name!r}, which is neither complete nor active ({seen.state.value}).",
                    f"Run {name!r} first.",
                )
            yield seen.job_id

    def _kept_off_serving(self, options: dict[str, Any]) -> dict[str, Any]:
        """Refuse what would disturb serving; returns options that keep the job off serving's nodes."""
        qualities = self.slurm.qualities()
        # What a job gets that names none matters only where one of them preempts.
        asked = any(qualities.values()) and not options.get("qos")
        return slurm_policy.admit(
            options, self.settings.serving, self.slurm.show("partition"), self.slurm.show("node"), self.slurm.show("config"),
            qualities, self.slurm.default_qualities(getpass.getuser()) if asked else [],
        )  # fmt: skip

    # cancelling

    def cancel(self, spec: JobSpec, record: Record, attempt: Attempt) -> bool:
        """Cancel the jobs that carry the attempt's mark, by id, and see them gone. A namesake without it is left alone."""
        name = job_name(spec, attempt)
        mine = {row.job_id for row in self.slurm.queue([name], os.getuid()) if row.state in ALIVE and _is_marked(row, attempt)}
        if not mine:
            return False
        self.slurm.cancel(sorted(mine))
        deadline = time.monotonic() + CANCEL_LIMIT_S
        pause = 0.2
        while any(row.job_id in mine and row.state in ALIVE for row in self.slurm.queue([name], os.getuid())):
            if time.monotonic() > deadline:
                raise SpecDecodeError(
                    f"Job {spec.name!r} ({', '.join(sorted(mine))}) is there {CANCEL_LIMIT_S:.0f} s after it was cancelled.",
                    "Run the teardown again; see scontrol show job for what holds it.",
                )
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
        return True


def job_name(spec: JobSpec, attempt: Attempt) -> str:
    """The job's name in Slurm; the key in it makes it nobody else's."""
    return f"{spec.experiment}.{spec.name}.{attempt.key}"


def requested(spec: JobSpec, script: str) -> dict[str, Any]:
    """The options for sbatch's command line, which win over the script's directives."""
    found: dict[str, Any] = {}
    for name, value in spec.options:
        if name in ("dependency", "comment", "cluster") or (value in (None, "", False) and name != "requeue"):
            continue
        if name == "requeue":
            found["requeue" if value else "no-requeue"] = True
        elif name == "array" or name not in OURS:
            if not _OPTION_NAME.match(name):
                raise SpecDecodeError(f"{name!r} is no option of sbatch.", "Write its long name without dashes.")
            found[name] = value
        else:
            raise SpecDecodeError(f"The sbatch option {name!r} is set by the module itself.", "Leave it out of options.")
    directives = options_of(script)
    own = {"array", "dependency", *([] if directives.get("clusters") == dict(spec.options).get("cluster") else ["clusters"])}
    forbidden = sorted(own & set(directives))
    if forbidden:
        raise SpecDecodeError(
            f"The script {spec.script} sets --{forbidden[0]} in a directive, which the module has to know of.",
            f"Give it as the option {forbidden[0].removesuffix('s')} instead.",
        )
    return found


def _by_name(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def _real(rows: list[Row] | None, attempt: Attempt) -> list[Row]:
    """Without what a refused submission left under the name, unless it is the recorded job itself."""
    return [row for row in rows or [] if not row.refused or row.job_id == attempt.job_id]


def _chosen(rows: list[Row], job_id: str) -> list[Row]:
    """Of several jobs with one name, the one that claimed the work or is recorded; else an active one, the oldest."""
    ids = {row.job_id for row in rows}
    if job_id not in ids:
        job_id = min((row.job_id for row in rows if row.state in ALIVE), key=int, default=max(ids, key=int))
    return [row for row in rows if row.job_id == job_id]


def _is_marked(row: Row, attempt: Attempt) -> bool:
    try:
        return bool(json.loads(row.comment)["key"] == attempt.key)
    except (ValueError, KeyError, TypeError):
        return False


def _ended(attempt: Attempt, code: int, job_id: str) -> Sighting:
    if code > 128:
        return Sighting(State.FAILED, job_id=job_id, signal=code - 128, reason="ended by a signal")
    return Sighting(State.COMPLETED if code == 0 else State.FAILED, job_id=job_id, exit_code=code)


def _claimed_by(spec: JobSpec, attempt: Attempt) -> str:
    """The id of the job that does, or did, the work."""
    try:
        return os.readlink(_claim(spec, attempt))
    except OSError:
        return ""


def _claim(spec: JobSpec, attempt: Attempt) -> str:
    return _file(spec, attempt, "claim")


def _exit_note(spec: JobSpec, attempt: Attempt) -> str:
    return _file(spec, attempt, "exit") + ".json"


def _file(spec: JobSpec, attempt: Attempt, what: str) -> str:
    return os.path.join(spec.folder, f"{what}-{attempt.key}")
