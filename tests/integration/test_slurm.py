# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Submit once, survive everything: on a real Slurm that is stopped, killed, silenced and made to forget.

Every test marked ``fault`` is one way in which a naive module submits twice or loses a job. In each of them the work is
done exactly once, which is counted by the job's script itself.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import getpass
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import bench_window, jobs
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError, Unanswered
from ansible_collections.inference.spec_decode.plugins.module_utils.jobs import ALIVE, Action, Policy, State
from ansible_collections.inference.spec_decode.plugins.module_utils.local_executor import marked_processes
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_client import Slurm
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_executor import (
    Settings,
    SlurmExecutor,
    job_name,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_policy import Serving

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/slurm"))
from cluster import CannotRun, Cluster
from cluster import Settings as ClusterSettings
from login_host import LoginHost, NoServer

LIMIT_S = 90
#: the variable that names where another release's Slurm comes from; without it the tests run on this machine's own
APT_SOURCE = "SPEC_SLURM_APT_SOURCE"
fault = pytest.mark.fault


class Site:
    """One real cluster and a folder for jobs whose name holds blanks, quotes, a percent sign and a command."""

    def __init__(self, cluster: Cluster, folder) -> None:
        self.cluster = cluster
        self.folder = folder / 'it\'s a "work" folder 50%j $(touch hacked)'
        self.folder.mkdir()

    def spec(self, text: str, **fields) -> jobs.JobSpec:
        """A job of an experiment of its own; its script counts the times that it does its work."""
        experiment = fields.pop("experiment", f"test-{uuid.uuid4().hex[:8]}")
        folder = self.folder / experiment
        folder.mkdir(exist_ok=True)
        script = folder / f"{fields.get('name', 'work')}.sbatch"
        script.write_text(f"#!/bin/bash\n#SBATCH --partition=train\necho start >> {fields.get('name', 'work')}.starts\n{text}\n")
        fields = {"name": "work", "chdir": str(folder), **fields}
        return jobs.JobSpec(experiment=experiment, script=str(script), directory=str(folder / "jobs"), **fields)

    def starts(self, spec: jobs.JobSpec) -> int:
        try:
            with open(os.path.join(spec.chdir, f"{spec.name}.starts")) as stream:
                return len(stream.readlines())
        except FileNotFoundError:
            return 0

    def queued(self, spec: jobs.JobSpec) -> list[str]:
        """Ids of all jobs of the experiment that Slurm knows."""
        lines = self.cluster.run("squeue", "-h", "-t", "all", "-O", "JobID:|,Name:|").splitlines()
        return [line.split("|")[0] for line in lines if line.split("|")[1].startswith(f"{spec.experiment}.")]

    def stranger(self, *arguments: str) -> str:
        """A job that is not the collection's."""
        return self.cluster.run("sbatch", "--parsable", "-o", "/dev/null", *arguments).strip()


def up(settings: ClusterSettings):
    folder = tempfile.mkdtemp(prefix="sd-slurm-")
    os.chmod(folder, 0o755)
    try:
        settings = dataclasses.replace(settings, apt_source=os.environ.get(APT_SOURCE, ""))
        cluster = Cluster(pathlib.Path(folder) / "c", settings)
        cluster.up()
    except CannotRun as error:
        shutil.rmtree(folder)
        pytest.skip(f"no Slurm can run here: {error}")
    return cluster


def running(settings: ClusterSettings, tmp_path_factory):
    cluster = up(settings)
    try:
        yield Site(cluster, tmp_path_factory.mktemp("slurm"))
    finally:
        cluster.run("scancel", f"--user={os.getuid()}", check=False)
        cluster.down()
        shutil.rmtree(cluster.folder.parent)


@pytest.fixture(scope="module")
def accounted_site(tmp_path_factory):
    """A cluster with accounting, where it can have any, that forgets ended jobs quickly."""
    yield from running(ClusterSettings(min_job_age=5, message_timeout=3), tmp_path_factory)


@pytest.fixture(scope="module")
def bare_site(tmp_path_factory):
    """A second cluster without accounting, which forgets an ended job at once."""
    yield from running(ClusterSettings(accounting=False, nodes=1, min_job_age=2, message_timeout=3), tmp_path_factory)


def chosen(site: Site, monkeypatch) -> Site:
    for name, value in site.cluster.environment.items():
        monkeypatch.setenv(name, value)
    return site


@pytest.fixture
def site(accounted_site, monkeypatch):
    """The first cluster, to which Slurm's commands lead in this test."""
    return chosen(accounted_site, monkeypatch)


@pytest.fixture
def bare(bare_site, monkeypatch):
    """The second cluster, likewise."""
    return chosen(bare_site, monkeypatch)


def until(condition, what, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"not within {limit_s} s: {what}")


def importing() -> dict[str, str]:
    """The environment of a client that is a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT / ".collections")}


def executor(**settings) -> SlurmExecutor:
    return SlurmExecutor(Settings(**settings))


def look(spec, **settings):
    return jobs.query(spec, executor(**settings)).sighting


def submitted(spec, **policy):
    outcome = jobs.ensure(spec, executor(), Policy(**policy))
    assert outcome.changed
    return outcome


def ended(spec, **settings):
    return until(lambda: (seen := look(spec, **settings)).state not in ALIVE and seen, "the job ends")


def is_running(site, spec):
    """Slurm says that the job runs, and its script has begun, which may be seconds later."""
    until(lambda: site.starts(spec), "the script starts")
    return until(lambda: (seen := look(spec)).state is State.RUNNING and seen, "the job runs")


#: a script that waits for the test
WHEN_TOLD = "until [ -e go ]; do sleep 0.1; done"


def tell(spec, word="go"):
    with open(os.path.join(spec.chdir, word), "w"):
        pass


def attached(spec, limit_s=LIMIT_S, **settings):
    """Ask as a wait does, again and again while there is no answer, until the job is attached to or known to be complete."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return jobs.ensure(spec, executor(**settings), Policy())
        except Unanswered:
            assert time.monotonic() < deadline
            time.sleep(0.3)


@pytest.fixture(scope="module")
def overdue(accounted_site):
    """A job over its time limit; Slurm counts in minutes, so it is started first and looked at last."""
    spec = accounted_site.spec("exec sleep 300", options=(("time", "1"), ("partition", "train")), time_limit_s=60)
    with pytest.MonkeyPatch.context() as patch:
        chosen(accounted_site, patch)
        submitted(spec)
    return spec


# the ordinary life of a job


def test_job_gets_its_arguments_environment_and_marks(site, overdue):
    spec = site.spec(
        'printf "%s|" "$@" "$METHOD" "$SPEC_DECODE_EXPERIMENT" "$SPEC_DECODE_FINGERPRINT" "$CUDA_VISIBLE_DEVICES" > out',
        arguments=("a b", "$(touch hacked)", "it's"),
        environment=(("METHOD", "x; y, z"),),
        options=(("gres", "gpu:2"), ("comment", 'a person\'s words: "hi"')),
    )
    outcome = submitted(spec)
    seen = ended(spec)
    assert (seen.state, seen.exit_code, seen.nodes) == (State.COMPLETED, 0, "n1"), seen
    found = open(os.path.join(spec.chdir, "out")).read()
    assert found.startswith(f"a b|$(touch hacked)|it's|x; y, z|{spec.experiment}|{outcome.fingerprint}|")
    assert not list(site.folder.rglob("hacked"))
    again = jobs.ensure(spec, executor(), Policy())
    assert again.action is Action.NOTHING and site.starts(spec) == 1
    assert "restart 0 on" in open(spec.log).read()


def test_script_that_is_edited_after_submission_runs_as_submitted(site):
    first = site.spec(WHEN_TOLD, name="first")
    spec = site.spec("echo original > out", name="second", experiment=first.experiment, needs=("first",))
    submitted(first)
    submitted(spec)
    with open(spec.script, "a") as stream:
        stream.write("echo edited > out\n")
    tell(first)
    ended(spec)
    assert open(os.path.join(spec.chdir, "out")).read() == "original\n"


def test_signal_to_the_batch_script_reaches_the_users_script(site):
    spec = site.spec("trap 'echo got it > out; exit 0' USR1; sleep 60 & wait")
    submitted(spec)
    seen = is_running(site, spec)
    time.sleep(0.3)  # until it has set its trap
    site.cluster.run("scancel", "--batch", "--signal=USR1", seen.job_id)
    assert ended(spec).state is State.COMPLETED
    assert open(os.path.join(spec.chdir, "out")).read() == "got it\n"


def test_array_is_one_job(site):
    spec = site.spec('[ "$SLURM_ARRAY_TASK_ID" != 2 ] || exit 5', options=(("array", "0-3"),))
    submitted(spec)
    seen = ended(spec)
    assert (seen.state, seen.exit_code) == (State.FAILED, 5)
    assert site.starts(spec) == 4


def test_named_cluster(site):
    if not site.cluster.settings.accounting:
        pytest.skip("clusters have names only where there is accounting")
    spec = site.spec("exec sleep 60")
    settings = {"cluster": site.cluster.name}
    outcome = jobs.ensure(spec, executor(**settings), Policy())
    assert outcome.sighting.job_id.isdigit()
    assert jobs.ensure(spec, executor(**settings), Policy()).action is Action.ATTACH
    assert jobs.remove(spec, executor(**settings), Policy()).state is State.CANCELLED


def test_thousand_known_jobs_are_one_call(site):
    specs = []
    for number in range(1000):
        spec = jobs.JobSpec("many", f"job-{number}", "", str(site.folder / "many"))
        attempt = jobs.Attempt(1, f"{number:016x}", jobs.now(), job_id=str(number), state=State.COMPLETED)
        os.makedirs(spec.folder)
        jobs.write_record(spec, jobs.Record("many", spec.name, "slurm", "f", {}, os.getuid(), attempts=[attempt]))
        specs.append(spec)
    slurm = Slurm()
    found = jobs.query_all(specs, SlurmExecutor(slurm=slurm))
    assert slurm.calls == 1 and {outcome.state for outcome in found} == {State.COMPLETED}


# faults: nothing lost, nothing doubled


@fault
def test_two_plays_at_once(site, tmp_path):
    spec = site.spec("exec sleep 2")
    play = playbook(tmp_path, {**task(spec), "wait": True, "poll_interval": 1})
    plays = [run_play(play) for _time in range(2)]
    outputs = [finished(process) for process in plays]
    assert sorted("submitted: true" in output for output in outputs) == [False, True], outputs
    assert site.starts(spec) == 1 and len(site.queued(spec)) <= 1


@fault
def test_eight_callers_at_once(site):
    spec = site.spec("exec sleep 1")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        actions = list(pool.map(lambda _: jobs.ensure(spec, executor(), Policy()).action, range(8)))
    assert actions.count(Action.SUBMIT) == 1 and actions.count(Action.ATTACH) == 7
    assert ended(spec).state is State.COMPLETED and site.starts(spec) == 1


@fault
def test_client_killed_right_after_sbatch(site):
    spec = site.spec("exec sleep 1")
    program = (
        "import os, signal, sys, pickle\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils import jobs\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_executor import SlurmExecutor\n"
        "class Dies(SlurmExecutor):\n"
        "    def submit(self, *arguments):\n"
        "        super().submit(*arguments)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "jobs.ensure(pickle.loads(bytes.fromhex(sys.argv[1])), Dies(), jobs.Policy())\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, pickle.dumps(spec).hex()], env=importing(), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert jobs.read_record(spec).last.job_id == ""
    outcome = attached(spec)
    assert outcome.action in (Action.ATTACH, Action.NOTHING) and outcome.sighting.job_id.isdigit()
    assert ended(spec).state is State.COMPLETED and site.starts(spec) == 1


@fault
def test_client_and_its_sbatch_killed_in_mid_call(site):
    spec = site.spec("exec sleep 1")
    program = (
        "import sys, pickle\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils import jobs\n"
        "from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_executor import SlurmExecutor\n"
        "class Late(SlurmExecutor):\n"
        "    def look_up_all(self, items):\n"
        "        return [jobs.Sighting(jobs.State.ABSENT) for _ in items]\n"
        "    def _kept_off_serving(self, options):\n"
        "        return {}\n"
        "jobs.ensure(pickle.loads(bytes.fromhex(sys.argv[1])), Late(), jobs.Policy())\n"
    )
    with site.cluster.paused("slurmctld"):
        client = subprocess.Popen(
            [sys.executable, "-c", program, pickle.dumps(spec).hex()], env=importing(), start_new_session=True
        )
        until(lambda: jobs.read_record(spec) and jobs.read_record(spec).last.details.get("submitting_at"), "sbatch is called")
        time.sleep(0.5)  # sbatch has sent, and waits
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()
    outcome = attached(spec)
    assert ended(spec).state is State.COMPLETED
    assert site.starts(spec) == 1, outcome


@fault
def test_controller_hangs_during_submit(site):
    spec = site.spec("exec sleep 1")
    late = executor()
    late._kept_off_serving = lambda options: {}  # it would already ask, and not be answered
    late.look_up_all = lambda items: [jobs.Sighting(State.ABSENT) for _item in items]
    with site.cluster.paused("slurmctld"), pytest.raises(Unanswered, match="It is not known whether it was queued"):
        jobs.ensure(spec, late, Policy())
    outcome = attached(spec)
    assert outcome.action is Action.ATTACH and "found by its name" in outcome.message
    assert ended(spec).state is State.COMPLETED
    assert site.starts(spec) == 1 and len(jobs.read_record(spec).attempts) == 1


@fault
def test_duplicates_that_reached_slurm_all_the_same_do_the_work_once(site):
    """The last safety net: three submissions of one attempt."""
    spec = site.spec("sleep 1")
    outcome = submitted(spec)
    record = jobs.read_record(spec)
    for _time in range(2):
        executor().submit(spec, record, record.last)
    jobs.write_record(spec, outcome.record)
    until(lambda: all(state not in ("PENDING", "RUNNING", "COMPLETING") for state in states(site, spec)), "all three end")
    assert ended(spec).state is State.COMPLETED and site.starts(spec) == 1
    assert open(spec.log).read().count("leaving it alone") == 2


def states(site, spec):
    lines = site.cluster.run("squeue", "-h", "-t", "all", "-O", "Name:|,State:|").splitlines()
    return [line.split("|")[1] for line in lines if line.startswith(f"{spec.experiment}.")]


@fault
def test_controller_down_during_look_up(site):
    spec = site.spec("exec sleep 60")
    submitted(spec)
    is_running(site, spec)
    with site.cluster.stopped("slurmctld"):
        assert look(spec).state is State.UNKNOWN
        with pytest.raises(Unanswered, match="did not answer .* nothing was submitted"):
            jobs.ensure(spec, executor(), Policy())
        with pytest.raises(Unanswered, match="cannot be cancelled, because the scheduler did not answer"):
            jobs.remove(spec, executor(), Policy())
        assert jobs.read_record(spec).last.state is State.RUNNING
    assert attached(spec).action is Action.ATTACH
    assert jobs.remove(spec, executor(), Policy()).state is State.CANCELLED and site.starts(spec) == 1


@fault
def test_controller_loses_its_state_and_gives_the_id_to_a_stranger(site):
    spec = site.spec("true", options=(("begin", "now+1hour"),))
    state = site.cluster.folder / "state/ctld"
    kept = site.cluster.folder / "state/kept"
    site.cluster.stop("slurmctld")
    shutil.copytree(state, kept)
    site.cluster.start("slurmctld")
    job_id = submitted(spec).sighting.job_id
    site.cluster.stop("slurmctld", signal.SIGKILL)
    shutil.rmtree(state)
    kept.rename(state)
    site.cluster.start("slurmctld")
    until(lambda: site.stranger("--begin=now+1hour", "--wrap=true") == job_id, "a stranger gets the id")
    seen = look(spec)
    assert seen.state is State.PENDING and "not seen by Slurm" in seen.reason
    assert jobs.ensure(spec, executor(), Policy()).action is Action.ATTACH  # a while is a while
    assert look(spec, absence_limit_s=0).state is State.LOST
    outcome = jobs.ensure(spec, executor(absence_limit_s=0), Policy())
    assert outcome.action is Action.RESUBMIT and outcome.sighting.job_id != job_id
    assert jobs.remove(spec, executor(), Policy()).state is State.CANCELLED
    assert site.cluster.run("squeue", "-h", "-j", job_id, "-o", "%T").strip() == "PENDING", "the stranger is left alone"
    site.cluster.run("scancel", job_id)


@fault
def test_munge_down(site):
    if site.cluster.rootless:
        pytest.skip("the rootless cluster has no munge")
    spec = site.spec("true")
    with site.cluster.stopped("munged"), pytest.raises(Unanswered):
        jobs.ensure(spec, executor(), Policy())
    assert attached(spec).state is State.PENDING
    assert ended(spec).state is State.COMPLETED and site.starts(spec) == 1


@fault
def test_accounting_down_is_no_answer(site):
    if not site.cluster.settings.accounting:
        pytest.skip("the rootless cluster has no accounting")
    spec = site.spec("true")
    submitted(spec)
    until(lambda: site.starts(spec) and not site.queued(spec), "the controller forgets the job")
    with site.cluster.stopped("slurmdbd"):
        assert look(spec).state is State.UNKNOWN
    seen = until(lambda: (seen := look(spec)).state is not State.UNKNOWN and seen, "the accounting answers")
    assert seen.state is State.COMPLETED


@fault
def test_rejected_submission_is_reported_and_its_record_ignored(site):
    spec = site.spec("true", options=(("mem", "999G"),))
    for _time in range(2):
        with pytest.raises(SpecDecodeError, match=r"Slurm refused the job: .*(Memory|Requested node)"):
            jobs.ensure(spec, executor(), Policy())
    time.sleep(1)  # a record of the refusal may reach the accounting now
    outcome = submitted(dataclasses.replace(spec, options=()))
    assert ended(spec).state is State.COMPLETED and site.starts(spec) == 1
    assert len(outcome.record.attempts) == 1


@fault
def test_oversize_request_that_pends_is_said_with_slurms_reason(site):
    spec = site.spec("true", options=(("time", "40-0"),), time_limit_s=40 * 86400)
    submitted(spec)
    seen = until(lambda: (seen := look(spec)).reason and seen, "Slurm gives its reason")
    assert seen.state is State.PENDING and seen.reason in ("PartitionTimeLimit", "PartitionConfig"), seen
    jobs.remove(spec, executor(), Policy())


@fault
def test_failed_by_exit_code_signal_and_missing_command(site):
    endings = {"exit 3": (3, None), "kill -9 $$": (None, 9), "no-such-command": (127, None)}
    specs = {text: site.spec(text) for text in endings}
    for spec in specs.values():
        submitted(spec)
    for text, spec in specs.items():
        seen = ended(spec)
        assert (seen.state, seen.exit_code, seen.signal) == (State.FAILED, *endings[text]), (text, seen)
        assert jobs.ensure(spec, executor(), Policy(attempts=2)).action is Action.RESUBMIT
        ended(spec)
        with pytest.raises(SpecDecodeError, match=r"its 2 attempt\(s\) are used up"):
            jobs.ensure(spec, executor(), Policy(attempts=2))
        assert site.starts(spec) == 2


@fault
def test_cancelled_by_somebody_is_not_submitted_again(site):
    spec = site.spec("exec sleep 60")
    submitted(spec)
    site.cluster.run("scancel", is_running(site, spec).job_id)
    assert ended(spec).state is State.CANCELLED
    with pytest.raises(SpecDecodeError, match="ended as CANCELLED, which is not retried"):
        jobs.ensure(spec, executor(), Policy(retry_on=frozenset({State.FAILED})))
    assert site.starts(spec) == 1


@fault
def test_cancel_leaves_a_strangers_job_of_the_same_name_alone(site):
    spec = site.spec("exec sleep 60")
    outcome = submitted(spec)
    namesake = site.stranger(f"--job-name={job_name(spec, outcome.record.last)}", "--wrap=sleep 60")
    removed = jobs.remove(spec, executor(), Policy())
    assert removed.changed
    assert site.cluster.run("squeue", "-h", "-j", namesake, "-o", "%T").strip() in ("PENDING", "RUNNING")
    assert not jobs.remove(dataclasses.replace(spec, name="never-was"), executor(), Policy()).changed
    site.cluster.run("scancel", namesake)


def idle_node(site) -> str:
    """A node on which nothing of an earlier test is left, if there is one."""
    lines = site.cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
    return lines[0] if lines else ""


@fault
def test_preempted_and_requeued_is_one_job(site):
    node = until(lambda: idle_node(site), "a node is idle")
    spec = site.spec("[ -e second ] || { touch second; sleep 60; }", options=(("nodelist", node), ("exclusive", True)))
    job_id = submitted(spec).sighting.job_id
    is_running(site, spec)
    urgent = site.stranger("--partition=serving", f"--nodelist={node}", "--exclusive", "--wrap=sleep 2")
    seen = until(lambda: (seen := look(spec)).state is State.REQUEUED and seen, "the job is requeued")
    assert seen.job_id == job_id and seen.restarts == 1
    assert jobs.ensure(spec, executor(), Policy()).action is Action.ATTACH
    until(lambda: urgent not in site.cluster.run("squeue", "-h", "-o", "%i").split(), "the urgent job ends")
    site.cluster.run("scontrol", "update", f"job={job_id}", "starttime=now")
    seen = ended(spec)
    assert (seen.state, seen.job_id) == (State.COMPLETED, job_id)
    assert site.starts(spec) == 2 and len(jobs.read_record(spec).attempts) == 1


@fault
def test_node_that_dies(site):
    last = site.cluster.node_names[-1]
    fails = site.spec("exec sleep 300", options=(("nodelist", last), ("requeue", False)))
    returns = site.spec("[ -e second ] || { touch second; exec sleep 300; }", options=(("nodelist", last),))
    job_ids = [submitted(spec).sighting.job_id for spec in (fails, returns)]
    is_running(site, fails)
    is_running(site, returns)
    # The node goes with everything on it: its daemon and the job's own processes.
    pattern = f"slurmstepd: \\[({'|'.join(job_ids)})\\."
    doomed = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    with site.cluster.stopped(last, signal.SIGKILL):
        for pid in doomed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        assert ended(fails).state is State.NODE_FAIL
        assert until(lambda: (seen := look(returns)).restarts == 1 and seen, "the job is requeued").state in ALIVE
    assert jobs.ensure(returns, executor(), Policy()).action is Action.ATTACH
    assert jobs.ensure(fails, executor(), Policy()).action is Action.RESUBMIT
    for spec in (fails, returns):
        jobs.remove(spec, executor(), Policy())


@fault
def test_purged_without_accounting_is_known_by_its_own_note(bare):
    specs = {0: bare.spec("true"), 3: bare.spec("exit 3")}
    for spec in specs.values():
        submitted(spec)
    until(lambda: not any(bare.queued(spec) for spec in specs.values())
          and all(bare.starts(spec) for spec in specs.values()), "the controller forgets both jobs")  # fmt: skip
    for code, spec in specs.items():
        seen = look(spec)
        assert (seen.state, seen.exit_code) == (State.FAILED if code else State.COMPLETED, code)
    assert jobs.ensure(specs[0], executor(), Policy()).action is Action.NOTHING
    assert bare.starts(specs[0]) == 1


@fault
def test_gone_without_a_trace_counts_as_lost_after_a_while(bare):
    spec = bare.spec("exec sleep 300")
    job_id = submitted(spec).sighting.job_id
    until(lambda: bare.starts(spec), "the job starts")
    # As if the node had been switched off: nothing is left to write a note.
    step = subprocess.run(["pgrep", "-f", f"slurmstepd: \\[{job_id}\\."], capture_output=True, text=True, check=True)
    key = jobs.read_record(spec).last.key
    for pid in [*map(int, step.stdout.split()), *marked_processes("SPEC_DECODE_JOB", key)]:
        os.kill(pid, signal.SIGKILL)
    bare.cluster.run("scancel", job_id)
    until(lambda: not bare.queued(spec), "the controller forgets the job")
    assert look(spec).state in (State.RUNNING, State.PENDING)
    assert look(spec, absence_limit_s=0).state is State.LOST
    assert jobs.ensure(spec, executor(absence_limit_s=0), Policy()).action is Action.RESUBMIT
    jobs.remove(spec, executor(), Policy())


@fault
def test_wrong_configuration_ends_within_the_time_limit(site, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    started = time.monotonic()
    with pytest.raises(Unanswered):
        jobs.ensure(site.spec("true"), SlurmExecutor(slurm=Slurm(limit_s=3)), Policy())
    assert time.monotonic() - started < 10


@fault
def test_lost_record_is_found_by_name(site):
    spec = site.spec("exec sleep 60")
    submitted(spec)
    os.unlink(jobs.record_path(spec))
    assert jobs.ensure(spec, executor(), Policy()).action is Action.ATTACH
    jobs.remove(spec, executor(), Policy())
    assert site.starts(spec) <= 1 and len(site.queued(spec)) <= 1


@fault
def test_chain_stops_at_the_first_failure_and_goes_on_after_it_is_mended(site):
    first = site.spec(f"{WHEN_TOLD}; [ -e mended ]", name="first")
    second = site.spec("true", name="second", experiment=first.experiment, needs=("first",))
    third = site.spec("true", name="third", experiment=first.experiment, needs=("second",))
    for spec in (first, second, third):
        submitted(spec)
    tell(first)
    assert ended(first).state is State.FAILED
    for spec in (second, third):
        seen = ended(spec)
        assert (seen.state, seen.never_ran) == (State.CANCELLED, True), seen
    tell(first, "mended")
    assert jobs.ensure(first, executor(), Policy()).action is Action.RESUBMIT
    for spec in (second, third):
        assert jobs.ensure(spec, executor(), Policy(attempts=1)).action is Action.SUBMIT
    assert ended(third).state is State.COMPLETED
    assert [site.starts(spec) for spec in (first, second, third)] == [2, 1, 1]


@fault
def test_red_gate_in_the_job_stops_what_needs_it(site):
    first = site.spec(WHEN_TOLD, name="first", verify=("/bin/bash", "-c", "echo the gate is red; exit 3"))
    second = site.spec("true", name="second", experiment=first.experiment, needs=("first",))
    submitted(first)
    submitted(second)
    tell(first)
    seen = ended(first)
    assert (seen.state, seen.exit_code) == (State.FAILED, 3) and "the gate is red" in open(first.log).read()
    assert ended(second).never_ran and site.starts(second) == 0


def test_serving_is_never_disturbed(site):
    busy = site.stranger("--partition=train", "--nodelist=n1", "--wrap=sleep 60")
    until(lambda: site.cluster.run("squeue", "-h", "-j", busy, "-o", "%T").strip() == "RUNNING", "a stranger's job runs")
    refusals = {
        "would preempt jobs of train": (Settings(), (("partition", "serving"),)),
        "The partition 'train' serves": (Settings(serving=Serving(partitions=("train",))), ()),
        "is not one of those that experiments may use": (Settings(serving=Serving(allowed_partitions=("idle",))), ()),
        "asks for node n2, which serves": (Settings(serving=Serving(nodes=("n[2-9]",))), (("nodelist", "n2"),)),
        "others' jobs run there": (Settings(), (("nodelist", "n1"), ("exclusive", True))),
    }
    for words, (settings, options) in refusals.items():
        spec = site.spec("true", options=options)
        with pytest.raises(SpecDecodeError, match=words):
            jobs.ensure(spec, SlurmExecutor(settings), Policy())
        assert site.queued(spec) == []
    site.cluster.run("scancel", busy)
    if site.cluster.settings.accounting:
        site.cluster.run("sacctmgr", "-i", "add", "qos", "pushy", "preempt=normal")
        with pytest.raises(SpecDecodeError, match="The QoS 'pushy' preempts jobs of normal"):
            jobs.ensure(site.spec("true", options=(("qos", "pushy"),)), executor(), Policy())
        me = getpass.getuser()
        site.cluster.run("sacctmgr", "-i", "add", "account", "research")
        site.cluster.run("sacctmgr", "-i", "add", "user", me, "account=research", "qos=normal,pushy", "defaultqos=pushy")
        with pytest.raises(SpecDecodeError, match="The QoS 'pushy' preempts jobs of normal"):
            jobs.ensure(site.spec("true"), executor(), Policy())
        site.cluster.run("sacctmgr", "-i", "delete", "user", me, "account=research")
    kept_off = site.spec("true")
    jobs.ensure(kept_off, SlurmExecutor(Settings(serving=Serving(nodes=("n1",)))), Policy())
    assert ended(kept_off).nodes == "n2"


@fault
def test_variables_of_the_users_own(site, monkeypatch):
    spec = site.spec('echo "mark $SPEC_DECODE_JOB"; sleep 5')
    text = open(spec.script).read()
    with open(spec.script, "w") as stream:
        stream.write(text.replace("#SBATCH", "#SBATCH --export=NONE\n#SBATCH", 1))
    # Filters of the user's squeue hide the job, NONE takes its marks away, an array and --wait make it another.
    own = {
        "SQUEUE_PARTITION": "serving", "SQUEUE_STATES": "FAILED", "SACCT_FORMAT": "jobid", "SBATCH_EXPORT": "NONE",
        "SBATCH_ARRAY_INX": "0-3", "SBATCH_WAIT": "1", "SLURM_CLUSTERS": "elsewhere", "SBATCH_CLUSTERS": "elsewhere",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        submitted(spec)
        assert jobs.ensure(spec, executor(), Policy()).action is Action.ATTACH
        seen = ended(spec)
    assert (seen.state, site.starts(spec), site.queued(spec)) == (State.COMPLETED, 1, [seen.job_id])
    assert f"mark {jobs.read_record(spec).last.key}" in open(spec.log).read()
    monkeypatch.setenv("SBATCH_PARTITION", "serving")
    with pytest.raises(SpecDecodeError, match="would preempt jobs of train"):
        jobs.ensure(site.spec("true"), executor(), Policy())


@fault
def test_time_limit(site, overdue):
    seen = until(lambda: (seen := look(overdue)).state not in ALIVE and seen, "Slurm ends the job", limit_s=150)
    accounted = site.cluster.run(
        "sacct", "-n", "-P", "-D", "-X", "-j", seen.job_id, "-o", "JobID,State,Submit,Start,End", check=False
    )
    assert seen.state is State.TIMEOUT and site.starts(overdue) == 1, (seen, accounted)


# through Ansible


def task(spec, **options) -> dict:
    return {
        "experiment": spec.experiment, "name": spec.name, "directory": spec.directory, "script": spec.script,
        "chdir": spec.chdir, "executor": "slurm", **options,
    }  # fmt: skip


def playbook(folder, arguments: dict, **play) -> str:
    path = folder / f"play-{uuid.uuid4().hex[:6]}.json"
    tasks = [{"inference.spec_decode.slurm_job": arguments, "register": "found"}, {"ansible.builtin.debug": {"var": "found"}}]
    path.write_text(json.dumps([{"hosts": "spec_decode", "gather_facts": False, "tasks": tasks, **play}]))
    return str(path)


def run_play(path: str, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", "inventories/local", path, *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == code, output
    return output


def test_check_and_diff_mode_then_run_then_run_again(site, tmp_path):
    spec = site.spec("echo done")
    arguments = {**task(spec, poll_interval=1), "options": {"mem": "100M"}, "comment": "hello"}
    play = playbook(tmp_path, arguments)
    output = finished(run_play(play, "--check", "--diff"))
    assert "changed=1" in output and '+  "mem": "100M"' in output and "+echo done" in output
    assert site.queued(spec) == [] and not os.path.exists(spec.directory)
    output = finished(run_play(play))
    assert "changed=1" in output and "state: COMPLETED" in output and "submitted: true" in output
    output = finished(run_play(play, "--diff"))
    assert "changed=0" in output and "action: nothing" in output
    with open(spec.script, "a") as stream:
        stream.write("echo more\n")
    output = finished(run_play(play, "--check", "--diff"))
    assert "changed=1" in output and "+echo more" in output and "-echo done" not in output
    assert site.starts(spec) == 1


def test_failure_shows_the_end_of_the_log(site, tmp_path):
    spec = site.spec("echo the reason why; exit 4")
    output = finished(run_play(playbook(tmp_path, task(spec, attempts=1, poll_interval=1))), code=2)
    assert "ended as FAILED" in output and "exit code 4" in output and "the reason why" in output
    assert "Traceback" not in output


def shown_while_broken(process: subprocess.Popen, cut, back) -> str:
    """All that a waiting play shows; its line is cut once the job gets on, and comes back once the play says that it is lost."""
    shown = []
    assert process.stdout is not None
    for line in process.stdout:
        shown.append(line)
        if "step 1200/10000" in line and not any("is lost" in other for other in shown):
            cut()
        if "the connection is lost, trying again: " in line:
            back()
    return "".join(shown)


@fault
def test_wait_survives_a_lost_connection(site, tmp_path):
    """The line is dead for a while in the middle of the wait; the job and the play go on."""
    spec = site.spec(
        'echo \'{"text": "step 1200/10000 · acc_0 0.61"}\' > "$SPEC_DECODE_PROGRESS"; until [ -e enough ]; do sleep 0.2; done'
    )
    broken = tmp_path / "broken"
    process = run_play(
        playbook(tmp_path, task(spec, poll_interval=1)), "-e", "ansible_connection=flaky",
        ANSIBLE_CONNECTION_PLUGINS=str(ROOT / "tests/slurm/connection"), FLAKY_BROKEN=str(broken),
    )  # fmt: skip

    def back():
        broken.unlink(missing_ok=True)
        tell(spec, "enough")

    output = shown_while_broken(process, broken.touch, back)
    assert process.wait() == 0, output
    assert re.search(r"work RUNNING \d\d:\d\d:\d\d on n1 · step 1200/10000 · acc_0 0.61", output), output
    assert "the connection is lost" in output and "state: COMPLETED" in output and "submitted: true" in output
    assert site.starts(spec) == 1


@pytest.fixture
def login(site, tmp_path):
    """The same machine as a login host of the cluster, reached by SSH; where Slurm is, only its sessions know."""
    found = {"PATH": os.environ["PATH"], **site.cluster.environment}
    try:
        host = LoginHost(tmp_path, found)
        host.start()
    except NoServer as error:
        pytest.skip(f"no login host can run here: {error}")
    sockets = tempfile.mkdtemp(prefix="sd-cp-")  # the address of a socket must be short
    host.variables["ansible_control_path_dir"] = sockets
    yield host
    host.stop()
    shutil.rmtree(sockets)


def over_ssh(login, tmp_path, arguments: dict, **environment: str) -> subprocess.Popen:
    """A play that reaches the login host by SSH, from a controller where no Slurm is configured."""
    hosts = tmp_path / "login.json"
    hosts.write_text(json.dumps({"spec_decode": {"hosts": {"login": login.variables}}}))
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(hosts), playbook(tmp_path, arguments, environment=environment)]
    own = {**os.environ, "PYTHONUNBUFFERED": "1", "SLURM_CONF": "/nowhere"}
    return subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@fault
def test_wait_over_ssh_survives_a_broken_session(site, login, tmp_path):
    """The login host is cut off in the middle of the wait and back later; script and job are on its side."""
    spec = site.spec("")
    script = (
        "#!/bin/bash\n#SBATCH --partition=train\necho start >> work.starts\n"
        'echo \'{"text": "step 1200/10000 · acc_0 0.61"}\' > "$SPEC_DECODE_PROGRESS"\n'
        "until [ -e enough ]; do sleep 0.2; done\n"
    )
    arguments = {key: value for key, value in task(spec, poll_interval=1).items() if key != "script"}
    process = over_ssh(login, tmp_path, {**arguments, "content": script})

    def back():
        tell(spec, "enough")
        login.start()

    output = shown_while_broken(process, login.stop, back)
    assert process.wait() == 0, output
    assert re.search(r"work RUNNING \d\d:\d\d:\d\d on n\d · step 1200/10000 · acc_0 0.61", output), output
    assert "the connection is lost" in output and "state: COMPLETED" in output and "submitted: true" in output
    assert site.starts(spec) == 1 and len(site.queued(spec)) <= 1


@fault
def test_session_broken_before_the_reply_of_sbatch(site, login, tmp_path):
    """Slurm has the job, and the connection breaks before its reply is through: the play finds the job by its name."""
    spec = site.spec("exec sleep 2")
    calls = tmp_path / "calls"
    shim = tmp_path / "bin/sbatch"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nreply=$({shutil.which("sbatch")} "$@")\necho "$reply" >> {calls}\nsleep 30\n')
    shim.chmod(0o755)
    process = over_ssh(login, tmp_path, task(spec, poll_interval=1), PATH=f"{shim.parent}:{os.environ['PATH']}")
    until(calls.exists, "Slurm has the job")
    login.stop()
    login.start()
    output = finished(process)
    assert "the connection is lost" in output and "state: COMPLETED" in output, output
    assert site.starts(spec) == 1 and len(calls.read_text().splitlines()) == 1
    assert [attempt.job_id for attempt in jobs.read_record(spec).attempts] == calls.read_text().split()


@fault
def test_wait_survives_a_controller_that_is_away(site, tmp_path):
    spec = site.spec("sleep 3")
    process = run_play(playbook(tmp_path, task(spec, poll_interval=1)))
    until(lambda: site.starts(spec), "the job starts")
    with site.cluster.stopped("slurmctld"):
        shown = until(
            lambda: "no answer, asking again" in (process.stdout.readline() if process.stdout else ""), "the play notices"
        )
    assert shown and "state: COMPLETED" in finished(process)
    assert site.starts(spec) == 1


def test_play_ends_without_waiting_and_a_later_one_attaches(site, tmp_path):
    spec = site.spec("exec sleep 3")
    output = finished(run_play(playbook(tmp_path, task(spec, wait=False))))
    assert "action: submit" in output and re.search("state: (PENDING|RUNNING)", output)
    output = finished(run_play(playbook(tmp_path, task(spec, poll_interval=1))))
    assert "changed=0" in output and "state: COMPLETED" in output and site.starts(spec) == 1


def test_teardown_needs_the_experiments_name_and_its_inventory(site, tmp_path):
    """A mistyped name and the other inventory are refused, and stop nothing; a teardown that is done may be done again."""
    spec = site.spec("exec sleep 60")
    bundle = tmp_path / spec.experiment / "spec-decode"
    bundle.mkdir(parents=True)
    (bundle / "experiment.json").write_text("{}")
    spec = dataclasses.replace(spec, directory=str(bundle / "jobs"))
    submitted(spec)

    def tear_down(inventory, experiment, code=0):
        given = json.dumps({"experiment": experiment, "spec_work_dir": str(tmp_path)})
        return " ".join(finished(run_play("playbooks/teardown.yml", "-i", inventory, "-e", given), code).split())

    assert f"There is no experiment mistyped in {tmp_path}. Check experiment" in tear_down("inventories/slurm", "mistyped", 2)
    assert "(the name is empty)" in tear_down("inventories/slurm", "", 2)
    assert "runs under slurm" in tear_down("inventories/local", spec.experiment, 2)
    assert look(spec).state in ALIVE
    assert "changed=1" in tear_down("inventories/slurm", spec.experiment)
    assert look(spec).state is State.CANCELLED
    assert "changed=0" in tear_down("inventories/slurm", spec.experiment)
    assert "changed=0" in tear_down("inventories/local", spec.experiment)


def test_node_is_drained_for_a_measurement_and_resumed_after_an_aborted_play(site, tmp_path):
    """A measuring job runs; the role drains its node, and the play goes no further."""
    spec = site.spec(WHEN_TOLD, name="validate")
    role = {
        "ansible.builtin.include_role": {"name": "inference.spec_decode.bench_window", "tasks_from": "open.yml"},
        "vars": {
            "bench_window_experiment_name": spec.experiment, "bench_window_directory": spec.directory,
            "bench_window_cluster": "", "bench_window_serving_nodes": [], "bench_window_phase": "validate",
        },
    }  # fmt: skip
    tasks = [{"inference.spec_decode.slurm_job": task(spec, wait=False)}, role]
    assert "changed=2" in finished(run_play(playbook(tmp_path, {}, tasks=tasks)))
    node = is_running(site, spec).nodes
    shown = site.cluster.run("scontrol", "show", "node", node)
    assert "DRAIN" in shown, shown
    assert re.search(rf"Reason=spec_decode:{spec.experiment}: both arms are measured \(\w+, 20", shown), shown
    kept_off = site.spec("true", options=(("nodelist", node),))
    submitted(kept_off)
    # The play died here. The next one, or the teardown, closes whatever its experiment left open.
    arguments = {"experiment": spec.experiment, "directory": spec.directory, "state": "closed"}
    play = playbook(tmp_path, {}, tasks=[{"inference.spec_decode.bench_window": arguments}])
    assert site.starts(kept_off) == 0
    assert "changed=1" in finished(run_play(play)) and "changed=0" in finished(run_play(play))
    assert "DRAIN" not in site.cluster.run("scontrol", "show", "node", node)
    assert ended(kept_off).nodes == node
    tell(spec)
    assert ended(spec).state is State.COMPLETED
    with pytest.raises(SpecDecodeError, match="not for 'train'"):
        bench_window.open_window(str(tmp_path / "none.json"), "tiny", node, "train", "faster", Serving(), Slurm())


def test_one_query_serves_all_jobs_of_a_play(site, tmp_path):
    """Three hosts of one play wait for a job each; what squeue is asked is written down."""
    specs = {name: site.spec("sleep 4") for name in ("one", "two", "three")}
    real, log = (
        shutil.which("squeue", path=f"{site.cluster.environment.get('PATH', '')}:{os.environ['PATH']}"),
        tmp_path / "calls",
    )
    shim = tmp_path / "bin/squeue"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {real} "$@"\n')
    shim.chmod(0o755)
    own = {name: task(spec, poll_interval=1) for name, spec in specs.items()}
    arguments = {key: "{{ own[inventory_hostname]." + key + " }}" for key in own["one"]}
    play = playbook(tmp_path, arguments, hosts="side", vars={"own": own})
    hosts = tmp_path / "hosts.ini"
    hosts.write_text("\n".join(["[side]", *specs, ""]))
    output = finished(
        run_play(
            play,
            "-i",
            str(hosts),
            "-e",
            json.dumps({"ansible_connection": "local", "ansible_python_interpreter": sys.executable}),
            PATH=f"{shim.parent}:{os.environ['PATH']}",
        )
    )
    assert output.count("state: COMPLETED") == 3
    asked = [re.search(r"--name=(\S+)", line)[1].split(",") for line in log.read_text().splitlines()]
    assert max(map(len, asked)) == 3, asked
