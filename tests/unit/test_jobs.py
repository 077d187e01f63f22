# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Job identity and the table of outcomes, with an executor that does what it is told."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import jobs
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.files import sha256_file, write_json
from ansible_collections.inference.spec_decode.plugins.module_utils.jobs import Action, Policy, Sighting, State


class ScriptedExecutor:
    """Answers look-ups with ``seen`` and counts what it is asked to do."""

    name = "scripted"

    def __init__(self, seen: Sighting = Sighting(State.RUNNING, job_id="1")) -> None:
        self.seen = seen
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.fails_at_submit = False

    def look_up(self, spec, record, attempt):
        known = attempt.key in self.submitted or self.seen.state is State.UNKNOWN
        return self.seen if known else Sighting(State.ABSENT)

    def look_up_all(self, items):
        return [self.look_up(*item) for item in items]

    def submit(self, spec, record, attempt):
        if self.fails_at_submit:
            raise KeyboardInterrupt
        self.submitted.append(attempt.key)
        return Sighting(State.RUNNING, job_id=str(len(self.submitted)))

    def cancel(self, spec, record, attempt):
        self.cancelled.append(attempt.key)
        self.seen = Sighting(State.CANCELLED)
        return True


@pytest.fixture
def spec(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text("echo hello\n")
    data = tmp_path / "input.json"
    data.write_text("{}")
    return jobs.JobSpec(
        experiment="tiny-eagle3",
        name="train",
        script=str(script),
        directory=str(tmp_path / "jobs"),
        inputs=(str(data),),
        environment=(("METHOD", "eagle3"),),
        result=str(tmp_path / "result.json"),
    )


def finish(spec, fingerprint):
    write_json(spec.result, {"status": "complete", "fingerprint": fingerprint})


def test_first_call_submits_and_records(spec):
    executor = ScriptedExecutor()
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.SUBMIT and outcome.changed
    record = jobs.read_record(spec)
    assert record is not None and record.last is not None
    assert (record.last.job_id, record.last.state) == ("1", State.RUNNING)


def test_second_call_attaches(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.ATTACH and not outcome.changed
    assert len(executor.submitted) == 1


@pytest.mark.parametrize("state", sorted(jobs.ALIVE))
def test_every_living_state_is_attached_to(spec, state):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(state, job_id="1")
    assert jobs.ensure(spec, executor, Policy()).action is Action.ATTACH
    assert len(executor.submitted) == 1


def test_completed_job_is_left_alone(spec):
    executor = ScriptedExecutor()
    fingerprint = jobs.ensure(spec, executor, Policy()).fingerprint
    finish(spec, fingerprint)
    executor.seen = Sighting(State.COMPLETED, job_id="1", exit_code=0)
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.NOTHING and outcome.state is State.COMPLETED and not outcome.changed


def test_exit_code_zero_without_result_is_a_failure(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.COMPLETED, job_id="1", exit_code=0)
    assert jobs.query(spec, executor).state is State.FAILED
    assert jobs.ensure(spec, executor, Policy()).action is Action.RESUBMIT


def test_result_that_is_taken_away_costs_no_attempt(spec):
    """Recipes run by hand, or a deleted result: the work is done again however often, a failure is not."""
    executor = ScriptedExecutor()
    for number in range(1, 6):
        assert jobs.ensure(spec, executor, Policy(attempts=2)).changed and len(executor.submitted) == number
        executor.seen = Sighting(State.COMPLETED, exit_code=0)
        finish(spec, spec.fingerprint())
        assert jobs.ensure(spec, executor, Policy(attempts=2)).action is Action.NOTHING
        os.unlink(spec.result)
        assert jobs.query(spec, executor).state is State.FAILED
    for _failure in range(2):
        assert jobs.ensure(spec, executor, Policy(attempts=2)).action is Action.RESUBMIT
    with pytest.raises(SpecDecodeError, match=r"its 2 attempt\(s\) are used up"):
        jobs.ensure(spec, executor, Policy(attempts=2))


def test_result_of_the_same_work_needs_no_record(spec):
    finish(spec, spec.fingerprint())
    executor = ScriptedExecutor(Sighting(State.ABSENT))
    assert jobs.ensure(spec, executor, Policy()).action is Action.NOTHING
    assert executor.submitted == []


def test_failed_job_is_resubmitted_while_attempts_are_left_then_reported_then_starts_afresh(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy(attempts=2))
    executor.seen = Sighting(State.FAILED, job_id="1", exit_code=3)
    assert jobs.ensure(spec, executor, Policy(attempts=2)).action is Action.RESUBMIT
    with pytest.raises(SpecDecodeError, match=r"its 2 attempt\(s\) are used up. \(exit code 3\)"):
        jobs.ensure(spec, executor, Policy(attempts=2))
    assert jobs.ensure(spec, executor, Policy(attempts=2)).action is Action.RESUBMIT
    assert len(executor.submitted) == 3 and len(set(executor.submitted)) == 3


def test_state_that_is_not_retried_fails_at_once(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.CANCELLED, job_id="1")
    with pytest.raises(SpecDecodeError, match="ended as CANCELLED, which is not retried"):
        jobs.ensure(spec, executor, Policy(retry_on=frozenset({State.FAILED})))
    # The message said to run again once the cause is mended, which nothing that the fingerprint covers need tell.
    assert jobs.ensure(spec, executor, Policy(retry_on=frozenset({State.FAILED}))).action is Action.RESUBMIT


def test_refused_input_is_not_tried_again(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.FAILED, job_id="1", exit_code=jobs.REFUSED)
    with pytest.raises(SpecDecodeError, match="refused its input, which trying again does not change"):
        jobs.ensure(spec, executor, Policy())
    assert len(executor.submitted) == 1
    assert jobs.ensure(spec, executor, Policy()).action is Action.RESUBMIT and len(executor.submitted) == 2
    with pytest.raises(SpecDecodeError, match="refused its input"):
        jobs.ensure(spec, executor, Policy())


def test_unanswered_question_never_submits(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.UNKNOWN, reason="squeue timed out")
    with pytest.raises(SpecDecodeError, match=r"did not answer \(squeue timed out\); nothing was submitted"):
        jobs.ensure(spec, executor, Policy())
    assert len(executor.submitted) == 1


def test_changed_input_of_an_active_job_is_refused_and_named(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    with open(spec.inputs[0], "w") as stream:
        stream.write('{"changed": true}')
    with pytest.raises(SpecDecodeError, match=r"still active. It differs in: inputs.input.json"):
        jobs.ensure(spec, executor, Policy())


def test_every_input_counts_also_where_two_files_have_one_name(spec, tmp_path):
    paths = [tmp_path / side / "train.jsonl" for side in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("{}")
    two = dataclasses.replace(spec, inputs=tuple(map(str, paths)))
    found = {two.fingerprint()}
    for path in paths:
        path.write_text('{"changed": true}')
        found.add(two.fingerprint())
        path.write_text("{}")
    assert len(found) == 3
    one = dataclasses.replace(spec, inputs=(str(paths[0]),))
    assert one.identity()["inputs"] == {"train.jsonl": sha256_file(str(paths[0]))}, "known fingerprints stay"
    assert dataclasses.replace(one, inputs=one.inputs * 2).fingerprint() == one.fingerprint()


def test_changed_input_of_an_active_job_replaces_it_when_asked(spec):
    executor = ScriptedExecutor()
    first = jobs.ensure(spec, executor, Policy())
    other = dataclasses.replace(spec, environment=(("METHOD", "dflash"),))
    outcome = jobs.ensure(other, executor, Policy(replace=True))
    assert outcome.action is Action.REPLACE
    assert executor.cancelled == [first.record.last.key] and len(executor.submitted) == 2


def test_changed_input_of_an_ended_job_submits_anew_with_a_key_never_used(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.FAILED)
    other = dataclasses.replace(spec, arguments=("--more",))
    assert jobs.ensure(other, executor, Policy()).action is Action.SUBMIT
    assert jobs.ensure(spec, executor, Policy()).action is Action.SUBMIT
    assert len(set(executor.submitted)) == 3


def test_kill_between_record_and_submit_is_the_same_attempt(spec):
    executor = ScriptedExecutor(Sighting(State.ABSENT))
    executor.fails_at_submit = True
    with pytest.raises(KeyboardInterrupt):
        jobs.ensure(spec, executor, Policy())
    recorded = jobs.read_record(spec).last.key
    executor.fails_at_submit = False
    assert jobs.ensure(spec, executor, Policy()).action is Action.SUBMIT
    assert executor.submitted == [recorded]


def test_check_mode_looks_up_and_changes_nothing(spec):
    executor = ScriptedExecutor(Sighting(State.ABSENT))
    outcome = jobs.ensure(spec, executor, Policy(check_mode=True))
    assert outcome.changed and executor.submitted == []
    assert not os.path.exists(spec.directory)


def test_check_mode_says_what_it_waits_for(spec):
    later = dataclasses.replace(spec, inputs=("/nowhere/manifest.json",))
    outcome = jobs.ensure(later, ScriptedExecutor(), Policy(check_mode=True))
    assert outcome.changed and "/nowhere/manifest.json" in outcome.message


def test_missing_input_is_named(spec):
    later = dataclasses.replace(spec, inputs=("/nowhere/manifest.json",))
    with pytest.raises(SpecDecodeError, match="/nowhere/manifest.json"):
        jobs.ensure(later, ScriptedExecutor(), Policy())


def test_job_of_another_user_is_refused(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    record = jobs.read_record(spec)
    record.owner += 1
    jobs.write_record(spec, record)
    with pytest.raises(SpecDecodeError, match="belongs to the user with uid"):
        jobs.ensure(spec, executor, Policy())


class OtherExecutor(ScriptedExecutor):
    name = "other"


def other_with_a_job(spec, state=State.RUNNING):
    """An executor of another name, under which the job was submitted and last seen in ``state``."""
    executor = OtherExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(state, job_id="1")
    jobs.query(spec, executor)
    return executor


def test_job_that_runs_under_another_executor_is_not_started_beside_it(spec):
    other, executor = other_with_a_job(spec), ScriptedExecutor()
    for act in (jobs.ensure, jobs.remove):
        with pytest.raises(SpecDecodeError, match=r"runs under other, .* and this is scripted. Use that inventory"):
            act(spec, executor, Policy())
    assert executor.submitted == [] and jobs.remove(spec, other, Policy()).changed


def test_job_of_another_executor_is_shown_as_recorded_and_nothing_is_noted(spec):
    other_with_a_job(spec)
    with open(jobs.record_path(spec)) as stream:
        before = stream.read()
    executor = ScriptedExecutor(Sighting(State.FAILED))
    assert jobs.query(spec, executor).state is State.RUNNING
    with open(jobs.record_path(spec)) as stream:
        assert stream.read() == before


def test_job_that_ended_under_another_executor_may_run_anew_under_this_one(spec):
    other_with_a_job(spec, State.FAILED)
    executor = ScriptedExecutor()
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.RESUBMIT and [attempt.number for attempt in outcome.record.attempts] == [1, 2]
    assert jobs.ensure(spec, executor, Policy()).action is Action.ATTACH


def test_submission_that_another_executor_refused_bars_nothing(spec):
    class Refusing(OtherExecutor):
        def submit(self, spec, record, attempt):
            raise SpecDecodeError("No such partition.")

    with pytest.raises(SpecDecodeError, match="No such partition"):
        jobs.ensure(spec, Refusing(), Policy())
    assert jobs.ensure(spec, ScriptedExecutor(), Policy()).action is Action.SUBMIT


def test_copied_records_are_another_experiments(spec, tmp_path):
    """A bundle that was copied under another name: neither name's teardown or run may touch the other's job."""
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    copy = dataclasses.replace(spec, experiment="two", directory=str(tmp_path / "two"))
    shutil.copytree(spec.directory, copy.directory)
    for act in (jobs.ensure, jobs.remove):
        with pytest.raises(SpecDecodeError, match=r"is that of job 'train' of experiment 'tiny-eagle3'"):
            act(copy, executor, Policy())
    executor.seen = Sighting(State.FAILED)
    assert jobs.query(copy, executor).state is State.RUNNING
    assert executor.cancelled == [] and len(executor.submitted) == 1


def test_remove_cancels_only_what_is_alive(spec):
    executor = ScriptedExecutor()
    assert not jobs.remove(spec, executor, Policy()).changed
    jobs.ensure(spec, executor, Policy())
    assert jobs.remove(spec, executor, Policy()).changed
    assert not jobs.remove(spec, executor, Policy()).changed
    assert len(executor.cancelled) == 1


def test_job_that_the_teardown_cancelled_runs_anew_when_it_is_wanted_again(spec):
    executor, policy = ScriptedExecutor(), Policy(retry_on=frozenset({State.FAILED}), attempts=1)
    jobs.ensure(spec, executor, policy)
    assert jobs.remove(spec, executor, policy).state is State.CANCELLED
    outcome = jobs.ensure(spec, executor, policy)
    assert outcome.action is Action.SUBMIT and [attempt.number for attempt in outcome.record.attempts] == [1, 2]


def test_secret_environment_values_are_not_recorded(spec):
    secret = dataclasses.replace(spec, environment=(("HF_TOKEN", "hunter2-hunter2"),))
    jobs.ensure(secret, ScriptedExecutor(), Policy())
    with open(jobs.record_path(secret)) as stream:
        assert "hunter2" not in stream.read()


@pytest.mark.parametrize("name", ["", "Train", "a b", "-a", "a-", "x" * 64, "a/b", "$(id)"])
def test_names_that_cannot_be_labels_are_refused(spec, name):
    with pytest.raises(SpecDecodeError, match="must be 1 to 63 lower-case letters"):
        dataclasses.replace(spec, name=name)


def test_lost_record_does_not_double_the_job(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.FAILED, job_id="1", exit_code=3)
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.RUNNING, job_id="2")
    executor.submitted.pop(0)  # the first attempt is long forgotten; the second runs
    os.unlink(jobs.record_path(spec))
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.ATTACH and len(executor.submitted) == 1
    assert jobs.read_record(spec).numbered == 2


def test_complete_work_whose_record_was_moved_aside_gets_one_again(spec):
    executor = ScriptedExecutor()
    finish(spec, jobs.ensure(spec, executor, Policy()).fingerprint)
    executor.seen = Sighting(State.COMPLETED, exit_code=0)
    os.unlink(jobs.record_path(spec))
    assert jobs.ensure(spec, executor, Policy()).action is Action.NOTHING
    assert dataclasses.replace(spec, name="convert", needs=("train",)).missing() == []


def test_found_after_a_lost_reply_says_so(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    record = jobs.read_record(spec)
    record.last.job_id, record.last.state = "", State.ABSENT
    jobs.write_record(spec, record)
    outcome = jobs.ensure(spec, executor, Policy())
    assert outcome.action is Action.ATTACH and "found by its name" in outcome.message
    assert jobs.read_record(spec).last.job_id == "1" and jobs.read_record(spec).last.state is State.RUNNING


def test_directives_say_where_and_are_no_part_of_the_work(spec):
    plain = spec.fingerprint()
    with open(spec.script, "w") as stream:
        stream.write("#SBATCH --partition=train\necho hello\n")
    assert spec.fingerprint() == plain


def test_chained_job_is_known_before_its_input_exists(spec):
    executor = ScriptedExecutor()
    second = dataclasses.replace(spec, name="convert", needs=("train",), result="")
    with pytest.raises(SpecDecodeError, match="names job 'train' as its script or input"):
        second.fingerprint()
    jobs.ensure(spec, executor, Policy())
    assert jobs.unmet_needs(second) == ["train"]
    before = second.fingerprint()
    finish(spec, spec.fingerprint())
    assert jobs.unmet_needs(second) == [] and second.fingerprint() == before
    with open(spec.inputs[0], "w") as stream:
        stream.write('{"changed": true}')
    executor.seen = Sighting(State.COMPLETED, job_id="1")
    jobs.ensure(spec, executor, Policy())
    assert second.fingerprint() != before and jobs.unmet_needs(second) == ["train"]


def test_work_that_was_done_already_leaves_a_record_for_those_that_need_it(spec):
    finish(spec, spec.fingerprint())
    jobs.ensure(spec, ScriptedExecutor(), Policy())
    assert dataclasses.replace(spec, name="convert", needs=("train",)).missing() == []


def test_job_that_never_ran_is_submitted_without_costing_an_attempt(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy(attempts=1))
    executor.seen = Sighting(State.CANCELLED, job_id="1", never_ran=True)
    assert jobs.ensure(spec, executor, Policy(attempts=1)).action is Action.SUBMIT
    assert jobs.read_record(spec).tries == 1 and len(jobs.read_record(spec).attempts) == 2


def test_many_jobs_are_one_question(spec):
    class Counting(ScriptedExecutor):
        questions = 0

        def look_up_all(self, items):
            self.questions += 1
            return super().look_up_all(items)

    executor = Counting()
    specs = [dataclasses.replace(spec, name=f"job-{number}") for number in range(5)]
    for each in specs[:4]:
        jobs.ensure(each, executor, Policy())
    found = jobs.query_all(specs, executor)
    assert executor.questions == 1
    assert [outcome.state for outcome in found] == [State.RUNNING] * 4 + [State.ABSENT]


class Meanwhile(ScriptedExecutor):
    """Something happens between the look at the record and the answer."""

    def look_up_all(self, items):
        seen = super().look_up_all(items)
        self.meanwhile()
        return seen


def test_attempt_that_is_made_during_a_query_is_kept(spec):
    executor = Meanwhile()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.FAILED, exit_code=3)

    def resubmitted():
        assert jobs.ensure(spec, executor, Policy()).action is Action.RESUBMIT

    executor.meanwhile = resubmitted
    assert jobs.query(spec, executor).state is State.FAILED
    record = jobs.read_record(spec)
    assert [(attempt.number, attempt.state) for attempt in record.attempts] == [(1, State.FAILED), (2, State.RUNNING)]


def test_query_tells_of_a_teardown_that_came_meanwhile(spec):
    """The end is seen, and so must be why: the play that waits would submit the job again otherwise."""

    class Cancelled(Meanwhile):
        def look_up_all(self, items):
            self.meanwhile()
            return ScriptedExecutor.look_up_all(self, items)

    executor = Cancelled()
    jobs.ensure(spec, executor, Policy())
    executor.meanwhile = lambda: jobs.remove(spec, executor, Policy())
    found = jobs.describe(spec, jobs.query(spec, executor))
    assert (found["state"], found["removed"]) == ("CANCELLED", True)


def test_query_notes_nothing_while_somebody_else_has_the_job(spec):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    executor.seen = Sighting(State.FAILED)
    with open(os.path.join(spec.folder, "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert jobs.query(spec, executor).state is State.FAILED
        assert jobs.read_record(spec).last.state is State.RUNNING
    jobs.query(spec, executor)
    assert jobs.read_record(spec).last.state is State.FAILED


def test_job_of_another_user_is_shown_as_recorded_and_nothing_is_noted(spec):
    executor = ScriptedExecutor()
    record = jobs.ensure(spec, executor, Policy()).record
    record.owner += 1
    jobs.write_record(spec, record)
    executor.seen = Sighting(State.FAILED)
    assert jobs.query(spec, executor).state is State.RUNNING
    assert jobs.read_record(spec).last.state is State.RUNNING


@pytest.mark.parametrize(("text", "progress"), [('{"text": "st', {}), ("[1]", {}), ('{"text": "step 1"}', {"text": "step 1"})])
def test_progress_that_a_script_is_just_writing_fails_no_look(spec, text, progress):
    executor = ScriptedExecutor()
    jobs.ensure(spec, executor, Policy())
    with open(spec.progress, "w") as stream:
        stream.write(text)
    assert jobs.describe(spec, jobs.query(spec, executor))["progress"] == progress


def test_broken_record_is_one_clear_error(spec):
    os.makedirs(spec.folder)
    with open(jobs.record_path(spec), "w") as stream:
        stream.write('{"attempts": 3}')
    with pytest.raises(SpecDecodeError, match="is not one of this collection's"):
        jobs.ensure(spec, ScriptedExecutor(), Policy())
