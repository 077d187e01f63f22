# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a job is, how it is known again, and what to do with what is found. Private to the collection.

A job is known by ``(experiment, name, fingerprint)``. The fingerprint covers the script's
text, its arguments, its environment, the bytes of the files that it names as inputs and the
fingerprints of the jobs that it needs, so that "the same job" means "the same work". What
another job will write is known by that job and not by its bytes: a whole chain has its
identities before the first of it has run. An executor knows how to look one attempt up,
submit it and cancel it; everything else is decided here, once for all executors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import enum
import fcntl
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .errors import SpecDecodeError, Unanswered
from .files import (
    read_json,
    read_json_or_none,
    read_text_or_none,
    sha256_bytes,
    sha256_file,
    sha256_text,
    sha256_value,
    tail,
    write_json,
    write_text,
)
from .slurm_script import without_directives

#: exit status of a node program that refuses its input; it printed why
REFUSED = 2
NAME_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


class State(str, enum.Enum):
    """Where one attempt stands. ``UNKNOWN`` means that a source did not answer: it is never "no job"."""

    ABSENT = "ABSENT"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    PREEMPTED = "PREEMPTED"
    REQUEUED = "REQUEUED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    NODE_FAIL = "NODE_FAIL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    LOST = "LOST"
    UNKNOWN = "UNKNOWN"


ALIVE = frozenset({State.PENDING, State.RUNNING, State.PREEMPTED, State.REQUEUED})
ENDED_BADLY = frozenset({State.FAILED, State.TIMEOUT, State.CANCELLED, State.NODE_FAIL, State.OUT_OF_MEMORY, State.LOST})
ENDED = ENDED_BADLY | {State.COMPLETED}


class Action(str, enum.Enum):
    """What the table of outcomes asks for."""

    SUBMIT = "submit"
    RESUBMIT = "resubmit"
    REPLACE = "replace"
    ATTACH = "attach"
    NOTHING = "nothing"
    FAIL = "fail"


@dataclasses.dataclass(frozen=True)
class Sighting:
    """What an executor saw of one attempt."""

    state: State
    job_id: str = ""
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    restarts: int = 0
    nodes: str = ""
    elapsed_s: float | None = None
    #: what the attempt waited for failed, and so it never began
    never_ran: bool = False


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """One piece of work. ``directory`` is where all job records of the experiment live."""

    experiment: str
    name: str
    script: str
    directory: str
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()
    #: jobs of the same experiment that write what this one reads
    needs: tuple[str, ...] = ()
    #: jobs of the same experiment that must succeed first, though this one reads nothing of theirs
    after: tuple[str, ...] = ()
    #: what the job runs after its script succeeded, such as a gate; no part of the work
    verify: tuple[str, ...] = ()
    result: str = ""
    chdir: str = ""
    time_limit_s: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    #: the script's text, where it comes from the task: the file ``script`` is written when the job is submitted
    content: str | None = None

    def __post_init__(self) -> None:
        for label, value in (("experiment", self.experiment), ("job name", self.name)):
            if not NAME_PATTERN.match(value):
                raise SpecDecodeError(
                    f"The {label} {value!r} must be 1 to 63 lower-case letters, digits or inner hyphens,"
                    " because it becomes a job name, a label and a folder.",
                    f"Give another {label}.",
                )

    @property
    def folder(self) -> str:
        """The folder of this job's record, log and progress."""
        return os.path.join(self.directory, self.name)

    @property
    def log(self) -> str:
        """The file that takes the job's output, all attempts one after the other."""
        return os.path.join(self.folder, "output.log")

    @property
    def progress(self) -> str:
        """The file in which the job itself says how far it is."""
        return os.path.join(self.folder, "progress.json")

    def missing(self) -> list[str]:
        """The script, inputs and needed jobs that are not there (yet)."""
        files = (*([self.script] if self.content is None else []), *self.inputs)
        return [path for path in files if not os.path.isfile(path)] + [
            f"job {name!r}" for name in self.needs if not self._fingerprint_of(name)
        ]

    def _fingerprint_of(self, name: str) -> str:
        record = read_record(dataclasses.replace(self, name=name))
        return record.fingerprint if record else ""

    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers, part by part (values hashed where they are long)."""
        missing = self.missing()
        if missing:
            raise SpecDecodeError(
                f"Job {self.name!r} names {missing[0]} as its script or input, but there is no such thing.",
                "Run the phase that makes it first.",
            )
        return {
            "script": sha256_bytes(without_directives(self._script())),
            "arguments": list(self.arguments),
            "environment": {key: sha256_text(value) for key, value in sorted(self.environment)},
            "inputs": self._inputs(),
            "needs": {name: self._fingerprint_of(name) for name in self.needs},
        }

    def _script(self) -> bytes:
        if self.content is not None:
            return self.content.encode()
        with open(self.script, "rb") as stream:
            return stream.read()

    def _inputs(self) -> dict[str, str | list[str]]:
        """The checksum of each input by its file's name, not by its path; several of one name in their order."""
        found: dict[str, list[str]] = {}
        for path in dict.fromkeys(self.inputs):
            found.setdefault(os.path.basename(path), []).append(sha256_file(path))
        return {name: sums[0] if len(sums) == 1 else sums for name, sums in found.items()}

    def fingerprint(self) -> str:
        """64 hexadecimal digits that change when, and only when, the work changes."""
        return sha256_value(self.identity())


@dataclasses.dataclass
class Attempt:
    """One submission of a job. ``key`` marks it wherever it runs."""

    number: int
    key: str
    submitted_at: str
    job_id: str = ""
    state: State = State.ABSENT
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Record:
    """What is known of a job on disk: ``<directory>/<name>/record.json``."""

    experiment: str
    name: str
    executor: str
    fingerprint: str
    identity: dict[str, Any]
    owner: int
    #: the file that says the work is complete; empty if the job leaves none
    result: str = ""
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    #: the highest number that any attempt of the job ever had, whatever its fingerprint
    numbered: int = 0
    #: what was submitted last, to show what changed: the script's text and the options
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: attempts before this index belong to a failure that was already reported to the user
    forgiven: int = 0

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def tries(self) -> int:
        """Attempts that began and failed since the last failure that the user was told about.

        One that was complete once, and whose result somebody took away or replaced, is no failure; nor is one that the
        teardown put an end to.
        """
        since = self.attempts[self.forgiven :]
        return sum(not {"never_ran", "was_complete", "removed"} & attempt.details.keys() for attempt in since)

    @property
    def told(self) -> bool:
        """Whether the user heard of how the last attempt failed; calling again after that asks for another."""
        return bool(self.attempts) and self.forgiven >= len(self.attempts)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Any, path: str) -> Record:
        try:
            attempts = [Attempt(**{**item, "state": State(item["state"])}) for item in value["attempts"]]
            return cls(**{**value, "attempts": attempts})
        except (KeyError, TypeError, ValueError) as error:
            raise SpecDecodeError(
                f"The job record {path} is not one of this collection's ({error}).",
                "Move it aside; the job itself is then looked up by its name.",
            ) from error


class Executor(Protocol):
    """How attempts run somewhere. ``spec.folder`` exists when these are called."""

    name: str

    def look_up(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """What became of ``attempt``: ``ABSENT`` only when every source answered and none knows it."""

    def look_up_all(self, items: Sequence[tuple[JobSpec, Record, Attempt]]) -> list[Sighting]:
        """The same of many attempts, with as few questions as the executor can."""

    def submit(self, spec: JobSpec, record: Record, attempt: Attempt) -> Sighting:
        """Start ``attempt`` exactly once. The record with the attempt is on disk already."""

    def cancel(self, spec: JobSpec, record: Record, attempt: Attempt) -> bool:
        """Stop ``attempt`` if it is alive; returns whether something was stopped."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How far a call may go."""

    attempts: int = 3
    retry_on: frozenset[State] = ENDED_BADLY
    replace: bool = False
    check_mode: bool = False


@dataclasses.dataclass
class Outcome:
    """What a call found and did; the module returns it as facts."""

    action: Action
    changed: bool
    state: State
    fingerprint: str
    record: Record | None
    sighting: Sighting
    message: str = ""
    before: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: dict[str, Any] = dataclasses.field(default_factory=dict)
    before_shown: dict[str, Any] = dataclasses.field(default_factory=dict)
    after_shown: dict[str, Any] = dataclasses.field(default_factory=dict)


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def attempt_key(spec: JobSpec, fingerprint: str, number: int) -> str:
    """16 hexadecimal digits that mark one attempt, the same whenever it is computed again."""
    return sha256_value([spec.experiment, spec.name, fingerprint, number])[:16]


def job_environment(spec: JobSpec, record: Record, attempt: Attempt) -> dict[str, str]:
    """What every executor puts into a job's environment: the user's variables, then the job's marks."""
    return {
        **dict(spec.environment),
        "SPEC_DECODE_EXPERIMENT": spec.experiment,
        "SPEC_DECODE_JOB": attempt.key,
        "SPEC_DECODE_FINGERPRINT": record.fingerprint,
        "SPEC_DECODE_PROGRESS": spec.progress,
        # Programs that rewrite their process title would otherwise overwrite the marks in /proc.
        "SPT_NOENV": "1",
    }


def record_path(spec: JobSpec) -> str:
    return os.path.join(spec.folder, "record.json")


def read_record(spec: JobSpec) -> Record | None:
    """The job's record, or ``None`` if it never was submitted."""
    path = record_path(spec)
    value = read_json_or_none(path, "job record")
    return None if value is None else Record.from_dict(value, path)


def write_record(spec: JobSpec, record: Record) -> None:
    write_json(record_path(spec), record.as_dict())


def result_is_done(spec: JobSpec, fingerprint: str) -> bool:
    """Whether the job's result file says that this very work is complete."""
    return _says_complete(spec.result, fingerprint)


def _says_complete(path: str, fingerprint: str) -> bool:
    if not path or not os.path.exists(path):
        return False
    result = read_json(path, "result file")
    return isinstance(result, dict) and result.get("status") == "complete" and result.get("fingerprint") == fingerprint


def was_done_already(record: Record) -> bool:
    """Whether the work was complete without an attempt of this record's, and still is."""
    return record.last is None and _says_complete(record.result, record.fingerprint)


def decide(fingerprint: str, record: Record | None, sighting: Sighting, done: bool, policy: Policy) -> tuple[Action, str]:
    """The table of outcomes: what is found → what happens, with the reason in words. Pure."""
    if sighting.state is State.UNKNOWN:
        return Action.FAIL, f"The scheduler did not answer ({sighting.reason}); nothing was submitted."
    alive = sighting.state in ALIVE
    same = record is not None and record.fingerprint == fingerprint
    if record is None or record.last is None:
        if done:
            return Action.NOTHING, "The result of this very work is there already."
        return (Action.ATTACH, "found at the scheduler") if alive else (Action.SUBMIT, "No such job is known.")
    if not same:
        if alive:
            if policy.replace:
                return Action.REPLACE, "Another version of the job is active and is to be replaced."
            return Action.FAIL, "Another version of the job is still active."
        if done:
            return Action.NOTHING, "The result of this very work is there already."
        return Action.SUBMIT, "The job's inputs changed since it last ran."
    if alive:
        if record.last.state is State.ABSENT and not record.last.job_id:
            return Action.ATTACH, "Its submission had got no reply; the job was found by its name."
        return Action.ATTACH, "The job is active."
    if done or sighting.state is State.COMPLETED:
        return Action.NOTHING, "The job is complete."
    if sighting.state is State.ABSENT:
        return Action.SUBMIT, "The job was recorded, but never reached the scheduler."
    if sighting.never_ran:
        return Action.SUBMIT, "What the job waited for had failed, so it never ran."
    if record.last.details.get("removed"):
        return Action.SUBMIT, "It was cancelled by the teardown, as the user wished."
    if record.told:
        return Action.RESUBMIT, f"The job ended as {sighting.state.value}, which was reported; it is asked for again."
    if sighting.exit_code == REFUSED:
        return Action.FAIL, "The job refused its input, which trying again does not change."
    if sighting.state not in policy.retry_on:
        return Action.FAIL, f"The job ended as {sighting.state.value}, which is not retried."
    if record.tries < policy.attempts:
        return Action.RESUBMIT, f"The job ended as {sighting.state.value}; attempts are left."
    return Action.FAIL, f"The job ended as {sighting.state.value} and its {policy.attempts} attempt(s) are used up."


def ensure(spec: JobSpec, executor: Executor, policy: Policy) -> Outcome:
    """Bring the job to "submitted, active or complete", submitting exactly once.

    Order: take the job's lock, look up, record the attempt, submit, record the id. A kill
    between any two steps leaves a state that the next call recognises.
    """
    if policy.check_mode and spec.missing():
        message = f"The job would be submitted once {spec.missing()[0]} is there."
        return Outcome(Action.SUBMIT, True, State.ABSENT, "", None, Sighting(State.ABSENT), message, after_shown=shown(spec))
    fingerprint = spec.fingerprint()
    with _locked(spec, policy.check_mode):
        record = read_record(spec) or _found_without_record(spec, executor, fingerprint, policy)
        check_ours(spec, executor, record)
        sighting = _look_up(spec, executor, record)
        done = result_is_done(spec, fingerprint)
        action, message = decide(fingerprint, record, sighting, done, policy)
        outcome = Outcome(
            action=action,
            changed=action in (Action.SUBMIT, Action.RESUBMIT, Action.REPLACE),
            state=State.COMPLETED if action is Action.NOTHING else sighting.state,
            fingerprint=fingerprint,
            record=record,
            sighting=sighting,
            message=message,
            before=record.identity if record else {},
            after=spec.identity(),
            before_shown=record.shown if record else {},
            after_shown=shown(spec),
        )
        if action is Action.FAIL:
            reported = record is not None and record.fingerprint == fingerprint and sighting.state in ENDED_BADLY
            if record is not None and sighting.state is not State.UNKNOWN and not policy.check_mode:
                if reported:
                    # The user hears of it now; calling again after mending the cause starts afresh.
                    record.forgiven = len(record.attempts)
                write_record(spec, record)  # with since when the job has not been seen, or it would never count as lost
            failure = Unanswered if sighting.state is State.UNKNOWN else SpecDecodeError
            raise failure(*explain_failure(spec, outcome))
        if policy.check_mode:
            return outcome
        if action is Action.REPLACE and record is not None and record.last is not None:
            executor.cancel(spec, record, record.last)
        if outcome.changed:
            if record is not None and sighting.state is not State.ABSENT and record.fingerprint == fingerprint:
                _note(spec, record, sighting)  # how the attempt before ended
            outcome.record, outcome.sighting = _submit(spec, executor, record, fingerprint, outcome.after)
            outcome.state = outcome.sighting.state
        else:
            if record is None or record.fingerprint != fingerprint:
                record = _renewed(spec, executor, record, fingerprint, outcome.after)
            if record.last is None:
                write_record(spec, record)  # the work was there already; jobs that need this one know it by its record
            else:
                record.last.details.pop("removed", None)  # a teardown that could not stop it; it is wanted again
                _note(spec, record, sighting)
            outcome.record = record
        return outcome


def query(spec: JobSpec, executor: Executor) -> Outcome:
    """Look the recorded job up; change nothing but the record's own note of what was seen."""
    return query_all([spec], executor)[0]


def query_all(specs: Sequence[JobSpec], executor: Executor) -> list[Outcome]:
    """Look many recorded jobs up, with one question to the scheduler. Of another's the record alone tells."""
    records = [read_record(spec) for spec in specs]
    before = copy.deepcopy(records)
    known = {
        number: (spec, record, record.last)
        for number, (spec, record) in enumerate(zip(specs, records))
        if record is not None and record.last is not None and _can_tell(spec, executor, record)
    }
    seen = dict(zip(known, executor.look_up_all(list(known.values()))))
    outcomes = []
    for number, (spec, record) in enumerate(zip(specs, records)):
        sighting = Sighting(State.ABSENT)
        if record is not None and record.last is not None:
            sighting = _with_result(record, seen.get(number, recorded(record.last)))
            if number in seen:
                record = _note_unless_changed(spec, before[number], record, sighting)
        fingerprint = record.fingerprint if record else ""
        outcomes.append(Outcome(Action.NOTHING, False, sighting.state, fingerprint, record, sighting))
    return outcomes


def remove(spec: JobSpec, executor: Executor, policy: Policy) -> Outcome:
    """Cancel the job if it is active. Only a job with a record of this experiment is touched."""
    with _locked(spec, policy.check_mode):
        record = read_record(spec)
        check_ours(spec, executor, record)
        sighting = _look_up(spec, executor, record)
        alive = sighting.state in ALIVE
        if sighting.state is State.UNKNOWN:
            raise Unanswered(
                f"Job {spec.name!r} cannot be cancelled, because the scheduler did not answer: {sighting.reason}.",
                "Run the teardown again once it does.",
            )
        last = record.last if record else None
        if record is not None and last is not None and sighting.state is not State.COMPLETED and not policy.check_mode:
            # Before anything ends: a play that waits for the job must not take its end for a failure and submit it again.
            last.details["removed"] = True
            write_record(spec, record)
            if alive:
                executor.cancel(spec, record, last)
                sighting = executor.look_up(spec, record, last)
            elif sighting.state is State.ABSENT:
                sighting = Sighting(State.CANCELLED, reason="it was recorded, but never submitted")
            if sighting.state in ALIVE:
                write_record(spec, record)
                why = f" ({sighting.reason})" if sighting.reason else ""
                raise SpecDecodeError(
                    f"Job {spec.name!r} ({sighting.job_id}) is still {sighting.state.value} after it was cancelled{why}.",
                    "Run the teardown again.",
                )
            _note(spec, record, sighting)
        fingerprint = record.fingerprint if record else ""
        return Outcome(Action.NOTHING, alive, sighting.state, fingerprint, record, sighting)


def explain_failure(spec: JobSpec, outcome: Outcome) -> tuple[str, str]:
    """The message and remedy for an outcome that cannot go on."""
    text = f"Job {spec.name!r} of experiment {spec.experiment!r}: {outcome.message}"
    if outcome.sighting.state is State.UNKNOWN:
        return text, "Run again once the scheduler answers; nothing is lost or doubled by that."
    if outcome.record and outcome.record.fingerprint != outcome.fingerprint:
        differing = ", ".join(sorted(_differences(outcome.before, outcome.after))) or "its identity"
        return (
            f"{text} It differs in: {differing}.",
            "Wait for it, cancel it with playbooks/teardown.yml, or allow on_change: replace.",
        )
    return f"{text}{ending(outcome.sighting)}{log_tail(spec)}", f"See {spec.log}; mend the cause and run again."


def ending(sighting: Sighting) -> str:
    """How an attempt ended, as a clause: exit code and signal apart."""
    parts = []
    if sighting.exit_code:
        parts.append(f"exit code {sighting.exit_code}")
    if sighting.signal:
        parts.append(f"signal {sighting.signal}")
    if sighting.reason:
        parts.append(sighting.reason)
    return f" ({', '.join(parts)})" if parts else ""


def log_tail(spec: JobSpec, lines: int = 15) -> str:
    """The end of the job's log, ready to stand in a message."""
    last = tail(spec.log, lines)
    return "\nThe log ends with:\n" + "\n".join(f"    {line}" for line in last) + "\n" if last else ""


def _submit(
    spec: JobSpec, executor: Executor, record: Record | None, fingerprint: str, identity: dict[str, Any]
) -> tuple[Record, Sighting]:
    if record is None or record.fingerprint != fingerprint:
        record = _renewed(spec, executor, record, fingerprint, identity)
    record.executor, record.shown = executor.name, shown(spec)
    attempt = record.last
    if attempt is None or attempt.state is not State.ABSENT:
        record.numbered += 1
        attempt = Attempt(record.numbered, attempt_key(spec, fingerprint, record.numbered), now())
        record.attempts.append(attempt)
    # else: recorded by a call that was killed before it could submit: the same attempt, not another
    attempt.details = {}
    write_record(spec, record)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(spec.progress)  # an older attempt's progress would be shown as this one's
    if spec.content is not None:
        write_text(spec.script, spec.content, mode=0o755)
    try:
        sighting = executor.submit(spec, record, attempt)
    except Unanswered:
        raise
    except SpecDecodeError as error:
        attempt.details["refused"] = error.message  # it surely runs nowhere
        write_record(spec, record)
        raise
    _note(spec, record, sighting)
    return record, sighting


def _renewed(spec: JobSpec, executor: Executor, record: Record | None, fingerprint: str, identity: dict[str, Any]) -> Record:
    """A record of the work as it is now, without attempts."""
    # Numbers go on over a change of inputs: returning to older inputs must not find that older attempt's traces.
    numbered = max([record.numbered, *(attempt.number for attempt in record.attempts)]) if record else 0
    return Record(
        spec.experiment, spec.name, executor.name, fingerprint, identity, os.getuid(), spec.result, numbered=numbered
    )  # fmt: skip


def _found_without_record(spec: JobSpec, executor: Executor, fingerprint: str, policy: Policy) -> Record | None:
    """The record was lost, but the job may live: keys are the same whenever they are computed again.

    A number whose attempt ended is not given again: a new job under the same key would take the work for done by the old one.
    """
    record = Record(spec.experiment, spec.name, executor.name, fingerprint, spec.identity(), os.getuid(), spec.result)
    for number in itertools.count(1):
        attempt = Attempt(number, attempt_key(spec, fingerprint, number), now())
        seen = executor.look_up(spec, record, attempt)
        if seen.state in ALIVE or seen.state is State.UNKNOWN:
            record.numbered, record.attempts = number, [attempt]
            return record
        if seen.state is not State.ABSENT:
            record.numbered = number
        elif number >= policy.attempts:
            break
    return record if record.numbered else None


def unmet_needs(spec: JobSpec) -> list[str]:
    """The needed jobs whose work is not complete yet."""
    unmet = []
    for name in spec.needs:
        record = read_record(dataclasses.replace(spec, name=name))
        if record is None:
            unmet.append(name)
        elif record.result:
            if not _says_complete(record.result, record.fingerprint):
                unmet.append(name)
        elif record.last is None or record.last.state is not State.COMPLETED:
            unmet.append(name)
    return unmet


def shown(spec: JobSpec) -> dict[str, Any]:
    """What a person compares: the script's text and the options it is submitted with."""
    script = spec.content if spec.content is not None else read_text_or_none(spec.script) or ""
    return {"script": script, "options": dict(spec.options), "arguments": list(spec.arguments)}


def _note(spec: JobSpec, record: Record, sighting: Sighting) -> None:
    attempt = record.last
    if attempt is None or sighting.state is State.UNKNOWN:
        return
    attempt.job_id = sighting.job_id or attempt.job_id
    attempt.state, attempt.reason = sighting.state, sighting.reason
    attempt.exit_code, attempt.signal = sighting.exit_code, sighting.signal
    if sighting.never_ran:
        attempt.details["never_ran"] = True
    if sighting.state is State.COMPLETED:
        attempt.details["was_complete"] = True
    write_record(spec, record)


def _note_unless_changed(spec: JobSpec, before: Record | None, record: Record, sighting: Sighting) -> Record:
    """Note what was seen without the job's lock, unless somebody has the lock or noted something since.

    Returns the record as it is now, as far as it is still about the attempt that was looked at.
    """
    with _locked(spec, check_mode=False, wait=False) as held:
        current = read_record(spec)
        if held and current == before:
            _note(spec, record, sighting)
            return record
    if current is None or current.last is None or record.last is None or current.last.key != record.last.key:
        return record
    return current


def _look_up(spec: JobSpec, executor: Executor, record: Record | None) -> Sighting:
    if record is None or record.last is None:
        return Sighting(State.ABSENT)
    known = _can_tell(spec, executor, record)
    return _with_result(record, executor.look_up(spec, record, record.last) if known else recorded(record.last))


def recorded(attempt: Attempt) -> Sighting:
    """What was seen of ``attempt`` when it was last looked at."""
    return Sighting(
        attempt.state, job_id=attempt.job_id, reason=attempt.reason, exit_code=attempt.exit_code, signal=attempt.signal
    )


def _with_result(record: Record, sighting: Sighting) -> Sighting:
    if sighting.state is State.COMPLETED and record.result and not _says_complete(record.result, record.fingerprint):
        return dataclasses.replace(sighting, state=State.FAILED, reason=f"it ended without writing its result {record.result}")
    return sighting


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {*before, *after}:
        left, right = before.get(key), after.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def _can_tell(spec: JobSpec, executor: Executor, record: Record) -> bool:
    """Whether ``executor`` knows what became of the recorded attempts: this very job's, this user's, and run by it."""
    found = (record.experiment, record.name, record.owner, record.executor)
    return found == (spec.experiment, spec.name, os.getuid(), executor.name)


def check_ours(spec: JobSpec, executor: Executor, record: Record | None) -> None:
    """Refuse to act on a job of another experiment, of another user, or that may still run under another executor."""
    if record is None:
        return
    job = f"Job {spec.name!r} of experiment {spec.experiment!r}"
    if (record.experiment, record.name) != (spec.experiment, spec.name):
        raise SpecDecodeError(
            f"{job}: its record {record_path(spec)} is that of job {record.name!r} of experiment {record.experiment!r},"
            " so the folder was copied or renamed.",
            f"Use that experiment's own name and folder; of a copy, take {spec.directory} away.",
        )
    if record.owner != os.getuid():
        raise SpecDecodeError(
            f"{job} belongs to the user with uid {record.owner}, and you are uid {os.getuid()}.",
            "Use another experiment name, or run as that user.",
        )
    last = record.last
    if record.executor == executor.name or last is None or last.state in ENDED or "refused" in last.details:
        return
    raise SpecDecodeError(
        f"{job} runs under {record.executor}, as far as its record {record_path(spec)} knows, and this is {executor.name}.",
        f"Use that inventory (spec_executor: {record.executor}), for a teardown too; once the job has ended, playbooks/status.yml"
        " with that inventory notes it.",
    )


def known_jobs(directory: str) -> list[str]:
    """The names of all jobs that have a record in ``directory``, sorted."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SpecDecodeError(f"Cannot list the job records in {directory}: {error.strerror}.") from error
    return [name for name in names if os.path.isfile(os.path.join(directory, name, "record.json"))]


def describe(spec: JobSpec, outcome: Outcome) -> dict[str, Any]:
    """The facts that a module returns about one job."""
    sighting, record = outcome.sighting, outcome.record
    last = record.last if record else None
    bad = outcome.state in ENDED_BADLY
    return {
        "name": spec.name,
        "experiment": spec.experiment,
        "job_id": sighting.job_id or (last.job_id if last else ""),
        "state": outcome.state.value,
        "alive": outcome.state in ALIVE,
        "removed": bool(last and last.details.get("removed")),
        "reason": sighting.reason,
        "exit_code": sighting.exit_code,
        "signal": sighting.signal,
        "restarts": sighting.restarts,
        "nodes": sighting.nodes,
        "elapsed_s": sighting.elapsed_s,
        "attempts": len(record.attempts) if record else 0,
        "fingerprint": outcome.fingerprint,
        "log": spec.log,
        "log_tail": tail(spec.log) if bad else [],
        "progress": _progress(spec),
    }


def _progress(spec: JobSpec) -> dict[str, Any]:
    """What the job says of itself; nothing where a script of the user's own is just writing it, or wrote something else."""
    try:
        found = read_json_or_none(spec.progress, "progress file")
    except SpecDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _locked(spec: JobSpec, check_mode: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the job's lock, so that two plays cannot submit it twice; says whether it is held.

    Check mode leaves no folder behind. Without ``wait``, who has the lock is left to it.
    """
    if check_mode and not os.path.isdir(spec.folder):
        yield False
        return
    try:
        os.makedirs(spec.folder, exist_ok=True)
        lock = open(os.path.join(spec.folder, "lock"), "a", encoding="utf-8")  # noqa: SIM115 (held below)
    except OSError as error:
        if not wait:
            yield False
            return
        raise SpecDecodeError(
            f"Cannot keep the job record in {spec.folder}: {error.strerror}.", "Mend it and run again."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            if wait:
                raise
            held = False
        yield held
