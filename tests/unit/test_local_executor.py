# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detached processes: real ones, killed, orphaned and forgotten."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
from ansible_collections.inference.spec_decode.plugins.action.slurm_job import ActionModule
from ansible_collections.inference.spec_decode.plugins.module_utils import jobs, local_executor
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.jobs import Action, Policy, State
from ansible_collections.inference.spec_decode.plugins.module_utils.local_executor import (
    LocalExecutor,
    marked_processes,
    stop_marked,
)
from ansible_collections.inference.spec_decode.plugins.modules import slurm_job

LIMIT_S = 20
# one of each process: tests that run side by side stop only their own jobs
EXPERIMENT = f"local-test-{os.getpid()}"


def until(condition, what):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    pytest.fail(f"not within {LIMIT_S} s: {what}")


#: Its jobs are stopped after each test by this name alone: another run of these tests must not share it.
EXPERIMENT = f"local-test-{os.getpid()}"


@pytest.fixture
def job(tmp_path):
    def make(text, **fields):
        script = tmp_path / "script.sh"
        script.write_text(text)
        return jobs.JobSpec(EXPERIMENT, "work", str(script), str(tmp_path / "jobs"), **fields)

    yield make
    stop_marked("SPEC_DECODE_EXPERIMENT", EXPERIMENT, grace_s=0.5)


def state(spec):
    return jobs.query(spec, LocalExecutor()).state


def ended(spec):
    until(lambda: state(spec) not in jobs.ALIVE, "the job ends")
    return jobs.query(spec, LocalExecutor()).sighting


def test_job_runs_with_its_arguments_environment_and_marks(job, tmp_path):
    spec = job(
        'printf "%s|" "$@" "$METHOD" "$SPEC_DECODE_EXPERIMENT" "$SPEC_DECODE_FINGERPRINT" > out\n',
        arguments=("a b", "$(touch hacked)", "it's"),
        environment=(("METHOD", "x; y"),),
        chdir=str(tmp_path),
    )
    outcome = jobs.ensure(spec, LocalExecutor(), Policy())
    assert ended(spec).exit_code == 0
    assert (tmp_path / "out").read_text() == f"a b|$(touch hacked)|it's|x; y|{EXPERIMENT}|{outcome.fingerprint}|"
    assert not (tmp_path / "hacked").exists()


def test_completed_job_is_not_started_again(job):
    spec = job("exit 0\n")
    jobs.ensure(spec, LocalExecutor(), Policy())
    ended(spec)
    assert jobs.ensure(spec, LocalExecutor(), Policy()).action is Action.NOTHING


def test_exit_code_and_signal_are_told_apart(job):
    spec = job("exit 3\n")
    jobs.ensure(spec, LocalExecutor(), Policy())
    found = ended(spec)
    assert (found.state, found.exit_code, found.signal) == (State.FAILED, 3, None)
    spec = job("kill -9 $$\n")
    jobs.ensure(spec, LocalExecutor(), Policy())
    found = ended(spec)
    assert (found.state, found.exit_code, found.signal) == (State.FAILED, None, 9)


def test_time_limit(job):
    spec = job("exec sleep 60\n", time_limit_s=1)
    jobs.ensure(spec, LocalExecutor(), Policy())
    assert ended(spec).state is State.TIMEOUT


def test_whole_job_killed_leaves_lost_and_is_resubmitted(job):
    spec = job("exec sleep 60\n")
    key = jobs.ensure(spec, LocalExecutor(), Policy()).record.last.key
    until(lambda: len(list(marked_processes("SPEC_DECODE_JOB", key))) >= 2, "launcher and job run")
    for pid in list(marked_processes("SPEC_DECODE_JOB", key)):
        os.kill(pid, signal.SIGKILL)
    until(lambda: state(spec) is State.LOST, "the loss is seen")
    outcome = jobs.ensure(spec, LocalExecutor(), Policy())
    assert outcome.action is Action.RESUBMIT and outcome.record.last.key != key


def test_orphan_without_its_launcher_still_counts_as_running(job):
    spec = job("sleep 60 & wait\n")
    outcome = jobs.ensure(spec, LocalExecutor(), Policy())
    key = outcome.record.last.key
    until(lambda: len(list(marked_processes("SPEC_DECODE_JOB", key))) >= 3, "all processes run")
    os.kill(int(outcome.sighting.job_id), signal.SIGKILL)
    assert state(spec) is State.RUNNING
    assert jobs.ensure(spec, LocalExecutor(), Policy()).action is Action.ATTACH


def test_cancel_stops_every_process_and_nobody_elses(job):
    spec = job("trap '' TERM; sleep 60 & (setsid sleep 60) & wait; sleep 60\n")
    stranger = subprocess.Popen(["sleep", "60"], env={**os.environ, "SPEC_DECODE_EXPERIMENT": f"{EXPERIMENT}-2"})
    try:
        key = jobs.ensure(spec, LocalExecutor(), Policy()).record.last.key
        until(lambda: len(list(marked_processes("SPEC_DECODE_JOB", key))) >= 4, "all processes run")
        assert jobs.remove(spec, LocalExecutor(grace_s=0.5), Policy()).changed
        assert list(marked_processes("SPEC_DECODE_JOB", key)) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_reused_pid_is_not_taken_for_the_job(job):
    spec = job("exec sleep 60\n")
    outcome = jobs.ensure(spec, LocalExecutor(), Policy())
    stop_marked("SPEC_DECODE_JOB", outcome.record.last.key, grace_s=0.2)
    record = jobs.read_record(spec)
    record.last.job_id = str(os.getpid())  # as if this very process had got the number
    jobs.write_record(spec, record)
    assert state(spec) is not State.RUNNING


def test_submitter_killed_right_after_the_start_loses_and_doubles_nothing(job, tmp_path):
    spec = job("echo started >> starts; exec sleep 60\n", chdir=str(tmp_path))
    program = (
        "import os, signal, sys, pickle\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils import jobs\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils.local_executor import LocalExecutor\n"
        "class Dies(LocalExecutor):\n"
        "    def submit(self, *arguments):\n"
        "        super().submit(*arguments)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "jobs.ensure(pickle.loads(bytes.fromhex(sys.argv[1])), Dies(), jobs.Policy())\n"
    )
    import pickle

    collections = str(pathlib.Path(jobs.__file__).parents[5])
    killed = subprocess.run(
        [sys.executable, "-c", program, pickle.dumps(spec).hex()], env={**os.environ, "PYTHONPATH": collections}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert jobs.ensure(spec, LocalExecutor(), Policy()).action is Action.ATTACH
    until((tmp_path / "starts").exists, "the job starts")
    assert (tmp_path / "starts").read_text() == "started\n"


def test_two_plays_at_once_start_one_job(job, tmp_path):
    spec = job("echo started >> starts; exec sleep 60\n", chdir=str(tmp_path))
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        actions = list(pool.map(lambda _: jobs.ensure(spec, LocalExecutor(), Policy()).action, range(8)))
    assert actions.count(Action.SUBMIT) == 1 and actions.count(Action.ATTACH) == 7


def test_older_namesakes_exit_note_is_not_believed(job):
    spec = job("exit 0\n")
    jobs.ensure(spec, LocalExecutor(), Policy())
    ended(spec)
    os.unlink(jobs.record_path(spec))
    again = dataclasses.replace(spec)
    assert jobs.ensure(again, LocalExecutor(), Policy()).action is Action.SUBMIT


def test_submit_returns_only_when_the_job_can_be_found_by_its_mark(job, monkeypatch):
    """The kernel shows a new process's environment a moment after it started; a look in between found it lost."""
    monkeypatch.setattr(jobs, "_found_without_record", lambda *_arguments: None)  # it would look, too
    looks = iter([False, False, True])
    monkeypatch.setattr(local_executor, "_carries", lambda pid, wanted: next(looks))
    jobs.ensure(job("exec sleep 60\n"), LocalExecutor(), Policy())
    monkeypatch.undo()
    assert next(looks, "all looked at") == "all looked at"


def test_job_keeps_its_mark_until_its_end_is_noted(job, tmp_path, monkeypatch):
    """A shell that becomes ``mv`` as its last act shows no environment for a moment: a look then found the job lost."""
    slow = tmp_path / "bin/mv"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\ntouch "$(dirname "$0")/moving"; sleep 0.5; exec /bin/mv "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    spec = job("exit 0\n")
    launcher = jobs.ensure(spec, LocalExecutor(), Policy()).sighting.job_id
    until((slow.parent / "moving").exists, "the end is being noted")
    assert b"spec-decode-job" in pathlib.Path(f"/proc/{launcher}/cmdline").read_bytes()
    assert ended(spec).state is State.COMPLETED


class Waiting(ActionModule):
    """The wait of a play, whose calls of the module stay in this process."""

    def __init__(self, spec, policy):
        self.spec, self.policy, self._host = spec, policy, ""

    def _ask(self, arguments, task_vars):
        try:
            outcome = jobs.ensure(self.spec, LocalExecutor(), self.policy)
        except SpecDecodeError as error:
            return {"failed": True, "msg": str(error)}
        return {"changed": outcome.changed, "submitted": outcome.changed, "job": jobs.describe(self.spec, outcome)}

    def _look(self, arguments, task_vars):
        return {"changed": False, "job": jobs.describe(self.spec, jobs.query(self.spec, LocalExecutor()))}


@pytest.mark.parametrize("attempts", [1, 3])
def test_teardown_ends_the_wait_for_a_job_and_only_a_new_run_submits_it(job, tmp_path, attempts):
    spec = job("echo started >> starts; exec sleep 60\n", chdir=str(tmp_path))
    policy = Policy(attempts=attempts)
    waiting = Waiting(spec, policy)

    def tear_down():
        until((tmp_path / "starts").exists, "the job starts")
        jobs.remove(spec, LocalExecutor(grace_s=0.5), policy)

    teardown = threading.Thread(target=tear_down)
    result = waiting._ask({}, {})
    teardown.start()
    result = waiting._wait({"poll_interval": 0.05, "wait_timeout": LIMIT_S}, result, {})
    teardown.join()
    assert result["failed"] and "was cancelled by the teardown" in result["msg"]
    assert (tmp_path / "starts").read_text() == "started\n"
    assert jobs.ensure(spec, LocalExecutor(), policy).action is Action.SUBMIT


def test_job_that_failed_before_the_teardown_came_is_not_tried_again_by_the_play_that_waits(job):
    spec = job("exit 3\n")
    waiting = Waiting(spec, Policy(attempts=3))
    result = waiting._ask({}, {})
    ended(spec)
    assert not jobs.remove(spec, LocalExecutor(), Policy()).changed
    result = waiting._wait({"poll_interval": 0.05}, result, {})
    assert "was cancelled by the teardown" in result["msg"] and len(jobs.read_record(spec).attempts) == 1


def test_job_that_a_teardown_could_not_stop_is_an_ordinary_one_once_it_is_wanted_again(job, tmp_path, monkeypatch):
    spec = job("until [ -e go ]; do sleep 0.05; done; exit 3\n", chdir=str(tmp_path))
    jobs.ensure(spec, LocalExecutor(), Policy())
    with monkeypatch.context() as patch, pytest.raises(SpecDecodeError, match="is still RUNNING after it was cancelled"):
        patch.setattr(LocalExecutor, "cancel", lambda *_arguments: False)
        jobs.remove(spec, LocalExecutor(), Policy())
    assert jobs.ensure(spec, LocalExecutor(), Policy()).action is Action.ATTACH
    (tmp_path / "go").touch()
    ended(spec)
    assert jobs.ensure(spec, LocalExecutor(), Policy(attempts=2)).action is Action.RESUBMIT


def test_attempt_that_was_never_started_is_withdrawn_by_the_teardown(job, monkeypatch):
    def killed(*_arguments):
        raise KeyboardInterrupt

    spec = job("exit 3\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalExecutor, "submit", killed)
        jobs.ensure(spec, LocalExecutor(), Policy())
    removed = jobs.remove(spec, LocalExecutor(), Policy())
    assert (removed.changed, removed.state) == (False, State.CANCELLED)
    assert jobs.ensure(spec, LocalExecutor(), Policy()).record.last.number == 2
    ended(spec)
    assert jobs.ensure(spec, LocalExecutor(), Policy(attempts=2)).action is Action.RESUBMIT


def module(folder, content, check_mode=False, diff=True, **given):
    """One call of the module with a script in the task."""
    params = {
        **dict.fromkeys(slurm_job.SLURM_OPTIONS), **dict.fromkeys(("script", "result", "chdir")), "content": content,
        **{name: [] for name in ("arguments", "inputs", "needs", "after", "verify", "retry_on")}, "environment": {},
        **{name: [] for name in ("serving_partitions", "serving_nodes", "allowed_partitions")}, "absence_limit": 300,
        "experiment": EXPERIMENT, "name": "work", "directory": str(folder), "executor": "local", "state": "present",
        "attempts": 1, "on_change": "fail", "options": {}, **given,
    }  # fmt: skip
    return slurm_job.run(types.SimpleNamespace(params=params, check_mode=check_mode, _diff=diff))


def test_script_in_the_task_is_written_when_the_job_is_submitted_and_never_by_a_check(tmp_path):
    folder = tmp_path / "jobs"
    found = module(folder, "exit 0\n", check_mode=True)
    assert (found["changed"], found["diff"][-1]["after"]) == (True, "exit 0\n") and not folder.exists()
    assert module(folder, "exit 0\n")["submitted"]
    spec = jobs.JobSpec(EXPERIMENT, "work", "", str(folder))
    assert ended(spec).state is State.COMPLETED
    assert (folder / "work/script.sh").read_text() == "exit 0\n"
    assert module(folder, "exit 0\n", check_mode=True)["action"] == "nothing"
    found = module(folder, "exit 1\n", check_mode=True)
    assert (found["action"], found["diff"]) == (
        "submit",
        [{"before_header": "script", "after_header": "script", "before": "exit 0\n", "after": "exit 1\n"}],
    )
    assert (folder / "work/script.sh").read_text() == "exit 0\n"
    assert module(folder, "exit 1\n")["submitted"] and ended(spec).exit_code == 1


def test_changed_script_in_the_task_touches_no_running_job(tmp_path):
    module(tmp_path, "exec sleep 60\n")
    try:
        with pytest.raises(SpecDecodeError, match="still active. It differs in: script"):
            module(tmp_path, "exec sleep 61\n")
        assert (tmp_path / "work/script.sh").read_text() == "exec sleep 60\n"
    finally:
        stop_marked("SPEC_DECODE_EXPERIMENT", EXPERIMENT, grace_s=0.5)
