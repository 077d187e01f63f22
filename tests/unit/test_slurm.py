# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm without a Slurm: its answers read, a site's policy judged, scripts wrapped."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    bench_window,
    jobs,
    slurm_client,
    slurm_executor,
    slurm_policy,
    slurm_rows,
    slurm_script,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError, Unanswered
from ansible_collections.inference.spec_decode.plugins.module_utils.files import write_json
from ansible_collections.inference.spec_decode.plugins.module_utils.jobs import State
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_policy import Serving
from ansible_collections.inference.spec_decode.plugins.modules import slurm_job
from hypothesis import given
from hypothesis import strategies as st

# Recorded from Slurm 22.05.8 (Debian 12).
SQUEUE = """\
1|wrap|0|COMPLETED|0|0|0:01|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01|(null)|
2|tiny.train.0123456789abcdef|0|COMPLETING|768|0|0:01|n1|NonZeroExitCode|2026-11-24T22:23:31|2026-11-24T22:23:32|{"k":"a|b, c"}|
4|pend|0|PENDING|0|1|0:00||Dependency|2026-11-24T22:23:31|N/A|(null)|
3_1|arr|0|RUNNING|0|0|1-00:00:01|n1|None|2026-11-24T22:23:31|2026-11-24T22:23:32|(null)|
9|rej|0|FAILED|1|0|0:00||BadConstraints|2026-11-24T22:38:36|2026-11-24T22:38:36|(null)|
"""
SACCT = """\
1|wrap|0|COMPLETED|0:0|1|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01
7|job|0|CANCELLED by 1000|0:15|3|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01
8|job|0|OUT_OF_MEMORY|0:125|3|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01
5|again|0|PREEMPTED|0:0|20|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01
5|again|0|COMPLETED|0:0|30|n2|None|2026-11-24T22:25:00|2026-11-24T22:27:01
6|gone|0|PENDING|0:0|0|None assigned|Dependency|2026-11-24T22:25:00|Unknown
"""
PARTITIONS = """\
PartitionName=train AllowQos=ALL Default=YES Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE State=UP TotalNodes=2
PartitionName=serving AllowQos=ALL Default=NO Nodes=n[1-2],s1 PriorityTier=10 PreemptMode=OFF State=UP TotalNodes=3
"""
NODES = """\
NodeName=n1 Arch=x86_64 OS=Linux 6.1 #1 SMP PREEMPT_DYNAMIC @0  State=MIXED ThreadsPerCore=1 Partitions=train,serving
NodeName=n2 Arch=x86_64 OS=Linux 6.1 #1 SMP PREEMPT_DYNAMIC @0  State=IDLE ThreadsPerCore=1 Partitions=train,serving
NodeName=s1 Arch=x86_64 State=IDLE+DRAIN Partitions=serving Reason=disk is broken [root@2026-11-24T22:00:00]
"""
CONFIG = "PreemptMode             = REQUEUE\nPreemptType             = preempt/partition_prio\nMessageTimeout          = 5 sec\n"


def admit(serving=Serving(), config=CONFIG, qualities=None, defaults=(), **options):
    return slurm_policy.admit(options, serving, PARTITIONS, NODES, config, qualities or {}, defaults)


# what Slurm prints


def test_squeue_is_read():
    rows = {row.job_id: row for row in slurm_rows.parse_squeue(SQUEUE)}
    assert rows["2"].state is State.RUNNING and rows["2"].exit_code == 3 and rows["2"].comment == '{"k":"a|b, c"}'
    assert rows["4"].sighting().state is State.REQUEUED and rows["4"].reason == "Dependency"
    assert rows["3"].elapsed_s == 86401 and rows["3"].nodes == "n1"
    assert rows["9"].refused and not rows["2"].refused
    assert rows["1"].sighting() == jobs.Sighting(State.COMPLETED, "1", exit_code=0, nodes="n1", elapsed_s=1.0)


def test_sacct_is_read():
    rows = slurm_rows.parse_sacct(SACCT)
    seen = {row.job_id: row.sighting() for row in rows}
    assert seen["7"].state is State.CANCELLED and seen["7"].signal == 15 and seen["7"].exit_code is None
    assert seen["8"].state is State.OUT_OF_MEMORY and seen["8"].signal == 125
    latest = slurm_rows.newest([row for row in rows if row.name == "again"])
    assert [row.state for row in latest] == [State.COMPLETED]
    assert not rows[-1].started and rows[-1].nodes == ""


def test_several_clusters_have_their_names_between():
    assert len(slurm_rows.parse_squeue("CLUSTER: one\n" + SQUEUE + "\nCLUSTER: two\n")) == 5


@pytest.mark.parametrize("state", sorted(slurm_rows._STATES))
def test_every_state_of_slurm_has_its_word(state):
    line = f"1|a|0|{state}|0|0|0:01|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01|(null)|"
    assert slurm_rows.parse_squeue(line)[0].state is slurm_rows._STATES[state]


@pytest.mark.parametrize("text", ["1|a|0", SQUEUE.splitlines()[0].replace("COMPLETED", "LEVITATING")])
def test_answer_in_another_form_is_an_error_and_not_no_job(text):
    with pytest.raises(SpecDecodeError, match="another form|not known"):
        slurm_rows.parse_squeue(text)


def test_signal_that_a_shell_reports_is_a_signal():
    row = slurm_rows.Row("1", "a", 0, State.FAILED, exit_code=137)
    assert (row.sighting().exit_code, row.sighting().signal) == (None, 9)


def test_newest_record_of_each_task_of_an_array_counts():
    rows = slurm_rows.parse_sacct(
        "5_1|a|0|FAILED|3:0|1|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01\n"
        "5_2|a|0|NODE_FAIL|0:0|1|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01\n"
        "5_2|a|0|COMPLETED|0:0|1|n2|None|2026-11-24T22:25:00|2026-11-24T22:25:01\n"
    )
    newest = slurm_rows.newest(rows)
    assert [row.state for row in newest] == [State.FAILED, State.COMPLETED] and slurm_rows.fold(newest).state is State.FAILED


def test_array_is_alive_while_a_task_is_and_as_bad_as_its_worst():
    row = slurm_rows.Row("1", "a", 0, State.COMPLETED, nodes="n1")
    failed, running = dataclasses.replace(row, state=State.FAILED), dataclasses.replace(row, state=State.RUNNING, nodes="n2")
    assert slurm_rows.fold([row, failed]).state is State.FAILED
    assert slurm_rows.fold([row, failed, running]).state is State.RUNNING
    assert slurm_rows.fold([row, running]).nodes == "n1,n2"


# what sbatch says

REFUSALS = [
    "sbatch: error: Batch job submission failed: Invalid partition name specified",
    "sbatch: error: Batch job submission failed: Requested node configuration is not available",
    "sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: Requested node"
    " configuration is not available",
    "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time"
    " limits)",
    "sbatch: unrecognized option '--gpuz=1'",
    "sbatch: error: Invalid --exclusive specification",
]
SILENCES = [
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    "sbatch: error: Batch job submission failed: Protocol authentication error",
    'sbatch: error: Munge encode failed: Failed to access "/run/munge.sock"\nsbatch: error: Batch job submission failed:'
    " Unspecified error authentication",
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
    "",
]


@pytest.fixture
def sbatch(monkeypatch):
    def answer(code, stdout="", stderr=""):
        monkeypatch.setattr(
            slurm_client.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, stdout, stderr)
        )
        return slurm_client.Slurm().submit([], {}, "/")

    return answer


@pytest.mark.parametrize("words", REFUSALS)
def test_clear_refusal(sbatch, words):
    with pytest.raises(SpecDecodeError, match="Slurm refused the job") as error:
        sbatch(1, stderr=words)
    assert not isinstance(error.value, Unanswered)


@pytest.mark.parametrize("words", SILENCES)
def test_unclear_end_is_not_a_refusal(sbatch, words):
    with pytest.raises(Unanswered, match="no clear end"):
        sbatch(1, stderr=words)


def test_job_id_with_and_without_a_cluster(sbatch):
    assert sbatch(0, "12\n") == "12" and sbatch(0, "12;fx\n") == "12"
    with pytest.raises(Unanswered):
        sbatch(0, "")


def test_thousands_of_names_are_few_calls():
    names = [f"tiny-chat-eagle3.train.{number:016x}" for number in range(2500)]
    parts = slurm_client._parts(names)
    assert len(parts) == 3 and sum(part.count(",") + 1 for part in parts) == 2500
    assert max(map(len, parts)) < 131072, "longer than one argument of a command may be"


# never disturb serving


def test_ordinary_job_is_admitted_as_it_is():
    assert admit(partition="train") == {} and admit() == {}


@pytest.mark.parametrize(
    ("serving", "options", "words"),
    [
        (Serving(), {"partition": "serving"}, "would preempt jobs of train"),
        (Serving(("train",)), {}, "The partition 'train' serves"),
        (Serving(allowed_partitions=("idle",)), {"partition": "train"}, "is not one of those that experiments may use: idle"),
        (Serving(), {"partition": "nowhere"}, "knows no partition 'nowhere', only serving, train"),
        (Serving(nodes=("n[2-3]",)), {"nodelist": "n2"}, "asks for node n2, which serves"),
        (Serving(nodes=("n1", "n2")), {}, "Every node of partition train that the job could run on serves"),
        (Serving(), {"nodelist": "n1", "exclusive": True}, "others' jobs run there"),
        (Serving(nodes=("n2",)), {"exclusive": True}, "no node that it may use is idle"),
        (Serving(), {"qos": "urgent"}, "The QoS 'urgent' preempts jobs of normal,low"),
    ],
)
def test_what_could_disturb_serving_is_refused(serving, options, words):
    with pytest.raises(SpecDecodeError, match=words):
        admit(serving, qualities={"urgent": "normal,low", "normal": ""}, **options)


def test_default_quality_of_service_is_looked_at_where_none_is_named():
    qualities = {"urgent": "normal", "normal": ""}
    with pytest.raises(SpecDecodeError, match="The QoS 'urgent' preempts jobs of normal") as found:
        admit(qualities=qualities, defaults=["normal", "urgent"])
    assert "spec_slurm: {qos: ...}" in found.value.remedy
    assert admit(qualities=qualities, defaults=["normal", "urgent"], qos="normal") == {}


def test_job_is_kept_off_serving_nodes():
    assert admit(Serving(nodes=("n1", "elsewhere"))) == {"exclude": "n1"}
    assert admit(Serving(nodes=("s1",)), partition="train", exclude="n1") == {}


def test_tiers_do_not_matter_without_preemption():
    assert admit(config=CONFIG.replace("partition_prio", "none"), partition="serving") == {}


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("", []), ("(null)", []), ("n1", ["n1"]), ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)  # fmt: skip
def test_host_lists(hosts, names):
    assert slurm_policy.expand(hosts) == names


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20, unique=True))
def test_host_lists_of_any_numbers(numbers):
    assert slurm_policy.expand(f"n[{','.join(map(str, numbers))}]") == [f"n{number}" for number in numbers]


# scripts

SCRIPT = """\
#!/bin/bash
#SBATCH --partition=train -N 2 --gres=gpu:8
#SBATCH -t 10 --job-name "a name"

#SBATCH --exclusive  # alone
echo hello
#SBATCH --qos=too-late
"""


def test_directives_are_options():
    assert slurm_script.options_of(SCRIPT) == {
        "partition": "train", "nodes": "2", "gres": "gpu:8", "time": "10", "job-name": "a name", "exclusive": "",
    }  # fmt: skip


def test_wrapper_keeps_the_directives_and_is_clean(tmp_path):
    path = tmp_path / "batch.sh"
    path.write_text(slurm_script.wrapper(SCRIPT))
    assert path.read_text().startswith("#!/bin/bash\n#SBATCH --partition=train -N 2 --gres=gpu:8\n#SBATCH -t 10")
    assert "too-late" not in path.read_text()
    subprocess.run([str(pathlib.Path(sys.executable).with_name("shellcheck")), "--exclude=SC2064", str(path)], check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"job-name": "x"}, "is set by the module itself"),
        ({"output": "x"}, "is set by the module itself"),
        ({"mem=1;x": "x"}, "is no option of sbatch"),
    ],
)
def test_options_that_would_hide_the_job_are_refused(tmp_path, options, words):
    spec = jobs.JobSpec("tiny", "train", "/script", str(tmp_path), options=tuple(options.items()))
    with pytest.raises(SpecDecodeError, match=words):
        slurm_executor.requested(spec, "echo\n")


def test_array_in_a_directive_is_refused(tmp_path):
    spec = jobs.JobSpec("tiny", "train", "/script", str(tmp_path))
    with pytest.raises(SpecDecodeError, match="sets --array in a directive"):
        slurm_executor.requested(spec, "#!/bin/bash\n#SBATCH --array=1-3\necho\n")


def test_options_win_in_sbatchs_own_notation(tmp_path):
    options = (("mem", "4G"), ("requeue", False), ("exclusive", True), ("comment", "x"), ("gpus", ""))
    spec = jobs.JobSpec("tiny", "train", "/script", str(tmp_path), options=options)
    assert slurm_executor.requested(spec, "echo\n") == {"mem": "4G", "no-requeue": True, "exclusive": True}


@pytest.mark.parametrize(
    ("claimed", "code", "words"), [("", 0, "did it"), ("7", 0, "did it"), ("6", 0, "belongs to job 6"), (None, 1, "cannot claim")]
)
def test_job_begins_only_with_the_claim_and_fails_where_it_can_have_none(tmp_path, claimed, code, words):
    script, batch, claim = tmp_path / "script", tmp_path / "batch", tmp_path / "jobs/claim"
    script.write_text("#!/bin/bash\necho did it\n")
    script.chmod(0o755)
    batch.write_text(slurm_script.wrapper(script.read_text()))
    if claimed is not None:  # else the folder is not there
        claim.parent.mkdir()
    if claimed:
        claim.symlink_to(claimed)
    command = ["/bin/bash", str(batch), str(claim), str(tmp_path / "note"), "0", str(script)]
    ended = subprocess.run(
        command, env={**os.environ, "SLURM_JOB_ID": "7"}, capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == code and words in ended.stdout + ended.stderr
    assert ("did it" in ended.stdout) == (words == "did it")


# jobs


class Cluster:
    """What a cluster without accounting answers; what is submitted stands in its queue until it is taken from there."""

    def __init__(self):
        self.rows = []
        self.commands = []
        self.preempting = {}
        self.questions = 0

    def queue(self, names, uid):
        return [row for row in self.rows if row.name in names]

    def accounts(self, names, uid, since):
        return None

    def submit(self, command, environment, cwd):
        self.commands.append(command)
        name, comment = (next(word.partition("=")[2] for word in command if word.startswith(f"--{what}=")) for what in
                         ("job-name", "comment"))  # fmt: skip
        self.rows.append(slurm_rows.Row(str(len(self.commands)), name, 0, State.PENDING, comment=comment))
        return self.rows[-1].job_id

    def cancel(self, job_ids):
        self.rows = [row for row in self.rows if row.job_id not in job_ids]

    def show(self, *what):
        return {"partition": PARTITIONS, "node": NODES, "config": CONFIG}[what[0]]

    def message_timeout(self):
        return 0.0

    def qualities(self):
        return self.preempting

    def default_qualities(self, user):
        self.questions += 1
        return ["normal"]


@pytest.fixture
def job(tmp_path):
    script = tmp_path / "script.sbatch"
    script.write_text("#!/bin/bash\necho hello\n")
    return jobs.JobSpec("tiny", "train", str(script), str(tmp_path / "jobs"))


def under(cluster, **settings):
    return slurm_executor.SlurmExecutor(slurm_executor.Settings(**settings), cluster)


@pytest.mark.parametrize("code", [0, 3])
def test_attempt_whose_record_was_moved_aside_leaves_its_claim_to_no_other(job, code):
    """A job that meets an older one's claim does nothing and ends well: it must never get the same key."""
    cluster = Cluster()
    keys = [jobs.ensure(job, under(cluster), jobs.Policy()).record.last.key]
    for number in (2, 3):
        cluster.rows.clear()
        os.symlink(str(number - 1), f"{job.folder}/claim-{keys[-1]}")
        write_json(f"{job.folder}/exit-{keys[-1]}.json", {"exit_code": code, "job_id": str(number - 1)})
        os.unlink(jobs.record_path(job))
        outcome = jobs.ensure(job, under(cluster), jobs.Policy(attempts=1))
        keys.append(outcome.record.last.key)
        assert outcome.changed and outcome.record.last.number == number
    assert len(set(keys)) == len(cluster.commands) == 3


def test_partition_that_a_variable_of_the_job_names_is_judged_as_any_other(job):
    job = dataclasses.replace(job, environment=(("SBATCH_PARTITION", "serving"),))
    cluster = Cluster()
    with pytest.raises(SpecDecodeError, match="would preempt jobs of train"):
        jobs.ensure(job, under(cluster), jobs.Policy())
    assert cluster.commands == []


def test_defaults_of_the_user_are_asked_for_only_where_they_matter(job):
    cluster = Cluster()
    jobs.ensure(job, under(cluster), jobs.Policy())
    cluster.preempting = {"urgent": "normal", "normal": ""}
    jobs.ensure(dataclasses.replace(job, name="named", options=(("qos", "normal"),)), under(cluster), jobs.Policy())
    assert cluster.questions == 0
    jobs.ensure(dataclasses.replace(job, name="unnamed"), under(cluster), jobs.Policy())
    assert cluster.questions == 1


def test_script_reaches_slurm_byte_for_byte(job):
    text = b"#!/bin/bash\n# Latin-1: \xe9\nprintf 'a\rb' # a return of its own\n"
    pathlib.Path(job.script).write_bytes(text)
    key = jobs.ensure(job, under(Cluster()), jobs.Policy()).record.last.key
    assert pathlib.Path(job.folder, f"script-{key}").read_bytes() == text
    pathlib.Path(job.script).write_bytes(b"#SBATCH --comment=\xe9\r\necho\r\n")
    key = jobs.ensure(dataclasses.replace(job, name="dos"), under(Cluster()), jobs.Policy()).record.last.key
    folder = pathlib.Path(job.directory, "dos")
    assert (folder / f"script-{key}").read_bytes() == b"#SBATCH --comment=\xe9\necho\n"
    assert (folder / f"batch-{key}").read_bytes().startswith(b"#!/bin/bash\n#SBATCH --comment=\xe9\n")


def test_job_that_must_succeed_first_may_be_complete_by_its_result_alone(job, tmp_path):
    first = dataclasses.replace(job, name="first", result=str(tmp_path / "result.json"))
    second = dataclasses.replace(job, name="second", after=("first",))
    cluster = Cluster()
    write_json(first.result, {"status": "complete", "fingerprint": first.fingerprint()})
    assert jobs.ensure(first, under(cluster), jobs.Policy()).action is jobs.Action.NOTHING
    assert jobs.ensure(second, under(cluster), jobs.Policy()).changed
    assert "--dependency=singleton" in cluster.commands[0]
    os.unlink(first.result)
    with pytest.raises(SpecDecodeError, match="needs job 'first', which is neither complete nor active"):
        jobs.ensure(dataclasses.replace(second, name="third"), under(cluster), jobs.Policy())


def vanished(job, cluster):
    """A job that Slurm took, and that was gone before it began: nothing of it is left anywhere."""
    jobs.ensure(job, under(cluster), jobs.Policy())
    cluster.rows.clear()


def test_vanished_job_bars_the_teardown_for_a_while_only(job):
    cluster = Cluster()
    vanished(job, cluster)
    with pytest.raises(SpecDecodeError, match=r"still PENDING after it was cancelled \(not seen by Slurm for 0 s\)"):
        jobs.remove(job, under(cluster), jobs.Policy())
    time.sleep(0.1)
    found = jobs.remove(job, under(cluster, absence_limit_s=0.1), jobs.Policy())
    assert (found.changed, found.state) == (False, State.LOST)


def test_vanished_job_bars_another_version_for_a_while_only(job):
    cluster = Cluster()
    vanished(job, cluster)
    other = dataclasses.replace(job, arguments=("--more",))
    with pytest.raises(SpecDecodeError, match="Another version of the job is still active"):
        jobs.ensure(other, under(cluster), jobs.Policy(check_mode=True))
    assert "absent_since" not in jobs.read_record(job).last.details, "check mode writes nothing"
    with pytest.raises(SpecDecodeError, match="Another version of the job is still active"):
        jobs.ensure(other, under(cluster), jobs.Policy())
    time.sleep(0.1)
    assert jobs.ensure(other, under(cluster, absence_limit_s=0.1), jobs.Policy()).action is jobs.Action.SUBMIT


def test_scheduler_that_did_not_answer_leaves_no_record_of_a_job_that_was_never_submitted(job, monkeypatch):
    def silent(*_arguments):
        raise Unanswered("squeue ended with 1")

    cluster = Cluster()
    with monkeypatch.context() as patch, pytest.raises(Unanswered):
        patch.setattr(cluster, "queue", silent)
        jobs.ensure(job, under(cluster), jobs.Policy())
    assert jobs.read_record(job) is None
    assert jobs.ensure(job, under(cluster), jobs.Policy()).record.last.number == 1


def test_job_that_cannot_be_cancelled_keeps_none_of_the_others_running(job):
    cluster = Cluster()
    vanished(job, cluster)
    other = dataclasses.replace(job, name="validate")
    jobs.ensure(other, under(cluster), jobs.Policy())
    params = {"experiment": job.experiment, "name": None, "directory": job.directory}
    with pytest.raises(SpecDecodeError, match="Job 'train' .* is still PENDING"):
        slurm_job.remove(params, under(cluster), jobs.Policy())
    assert cluster.rows == [] and jobs.read_record(other).last.details["removed"]


# the measurement window


class Nodes:
    """A double for the two commands that a window needs."""

    def __init__(self, text=NODES):
        self.text, self.updates = text, []

    def show(self, what):
        return self.text

    def update(self, *what):
        self.updates.append(what)
        reason = next((word for word in what if word.startswith("reason=")), "")
        if reason:
            self.text = self.text.replace("State=IDLE ThreadsPerCore=1", f"State=IDLE+DRAIN ThreadsPerCore=1 Reason={reason[7:]}")


def opened(tmp_path, slurm, nodes="n2", phase="validate", serving=Serving()):
    path = str(tmp_path / "jobs/bench_window.json")
    return bench_window.open_window(path, "tiny", nodes, phase, "TPOT", serving, slurm), path


def test_window_is_opened_once_and_closed_once(tmp_path):
    slurm = Nodes()
    found, path = opened(tmp_path, slurm)
    assert found["changed"] and slurm.updates[0][:2] == ("nodename=n2", "state=drain")
    assert slurm.updates[0][2].startswith("reason=spec_decode:tiny: TPOT (")
    assert not opened(tmp_path, slurm)[0]["changed"]
    assert bench_window.close_window(path, "tiny", slurm) == {"changed": True, "nodes": ["n2"]}
    assert slurm.updates[-1] == ("nodename=n2", "state=resume")
    assert bench_window.close_window(path, "tiny", slurm) == {"changed": False, "nodes": []}


def test_window_of_an_aborted_play_does_not_resume_what_another_drained_meanwhile(tmp_path):
    slurm = Nodes()
    _found, path = opened(tmp_path, slurm)
    slurm.text = NODES.replace("State=IDLE ThreadsPerCore=1", "State=IDLE+DRAIN ThreadsPerCore=1 Reason=fans are loud")
    assert bench_window.close_window(path, "tiny", slurm) == {"changed": False, "nodes": []}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"phase": "train"}, "drained for a measurement only, not for 'train'"),
        ({"serving": Serving(nodes=("n[1-2]",))}, "Node n2 serves; it is never drained"),
        ({"nodes": "s1"}, "drained already, by somebody else: disk is broken"),
        ({"nodes": "n9"}, "knows no node 'n9'"),
        ({"nodes": ""}, "No node was named"),
    ],
)
def test_windows_that_are_refused(tmp_path, arguments, words):
    slurm = Nodes()
    with pytest.raises(SpecDecodeError, match=words):
        opened(tmp_path, slurm, **arguments)
    assert slurm.updates == [] and not (tmp_path / "jobs").exists()
