# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The answers of real Slurm versions, recorded by ``tests/slurm/record.py``: read, they are the same in all of them."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import slurm_client, slurm_policy, slurm_rows
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError, Unanswered
from ansible_collections.inference.spec_decode.plugins.module_utils.jobs import State
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_policy import Serving

DATA = pathlib.Path(__file__).parent / "data/slurm"
VERSIONS = sorted(path.name for path in DATA.iterdir())
#: of each recorded job: its state, exit code, signal and restarts
QUEUED = {
    "completed": (State.COMPLETED, 0, None, 0),
    "failed": (State.FAILED, 3, None, 0),
    "killed": (State.FAILED, None, 9, 0),
    "timed-out": (State.TIMEOUT, None, 15, 0),
    "running": (State.RUNNING, None, None, 0),
    "cancelled": (State.CANCELLED, None, 15, 0),
    "requeued": (State.REQUEUED, None, None, 1),
    "array": (State.FAILED, 5, None, 0),
    "too-long": (State.PENDING, None, None, 0),
    "never-runs": (State.CANCELLED, None, None, 0),
    "depends": (State.PENDING, None, None, 0),
}
#: Slurm's accounting knows neither restarts nor, of a job that Slurm itself ended, the signal
ACCOUNTED = {
    "completed": (State.COMPLETED, 0, None),
    "failed": (State.FAILED, 3, None),
    "killed": (State.FAILED, None, 9),
    "timed-out": (State.TIMEOUT, None, None),
    "running": (State.RUNNING, None, None),
    "cancelled": (State.CANCELLED, None, None),
    "requeued": (State.REQUEUED, None, None),
    "array": (State.FAILED, 5, None),
}
REASONS = {
    "requeued": "BeginTime",
    "too-long": "PartitionTimeLimit",
    "never-runs": "DependencyNeverSatisfied",
    "depends": "Dependency",
    "running": "",
    "failed": "",
    "timed-out": "TimeLimit",
    "node-fails": "NodeDown",
}


def recorded(version: str, name: str) -> str:
    return (DATA / version / name).read_text()


def seen(rows):
    """The jobs by name, the tasks of an array folded, as a look-up does it."""
    by_name: dict = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    return {name: slurm_rows.fold(same).sighting() for name, same in by_name.items()}


def test_versions_of_the_supported_range_are_recorded():
    releases = {tuple(map(int, version.split(".")[:2])) for version in VERSIONS}
    assert min(releases) == (22, 5) and max(releases) >= (26, 5) and len(releases) >= 4


@pytest.mark.parametrize("version", VERSIONS)
def test_squeue_tells_the_same(version):
    jobs = seen(slurm_rows.parse_squeue(recorded(version, "squeue.txt")))
    found = {name: (job.state, job.exit_code, job.signal, job.restarts) for name, job in jobs.items()}
    assert found.pop("node-fails")[0] is State.NODE_FAIL  # what its exit code says of a dead node is another in each version
    assert found == QUEUED
    assert {name: jobs[name].reason for name in REASONS} == REASONS
    assert jobs["never-runs"].never_ran and not jobs["cancelled"].never_ran
    assert jobs["running"].elapsed_s > 60 and jobs["running"].nodes == "n1" and jobs["depends"].nodes == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_comment_is_read_as_it_was_given(version):
    rows = {row.name: row for row in slurm_rows.parse_squeue(recorded(version, "squeue.txt"))}
    assert rows["completed"].comment == '{"k": "a|b, c"}' and rows["failed"].comment == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_sacct_tells_the_same(version):
    jobs = seen(slurm_rows.parse_sacct(recorded(version, "sacct.txt")))
    found = {name: (job.state, job.exit_code, job.signal) for name, job in jobs.items()}
    assert {name: found[name] for name in ACCOUNTED} == ACCOUNTED
    assert found["node-fails"][0] is State.NODE_FAIL


@pytest.mark.parametrize("version", VERSIONS)
def test_policy_reads_partitions_nodes_and_configuration(version):
    def admit(**options):
        told = (recorded(version, f"{name}.txt") for name in ("partitions", "nodes", "config"))
        return slurm_policy.admit(options, Serving(nodes=("n2",)), *told, {})

    assert admit(partition="train") == {"exclude": "n2"}
    with pytest.raises(SpecDecodeError, match="'serving' .priority tier 10. would preempt jobs of train"):
        admit(partition="serving")
    with pytest.raises(SpecDecodeError, match="no node that it may use is idle"):
        admit(partition="train", exclusive=True)
    with pytest.raises(SpecDecodeError, match="only serving, train"):
        admit(partition="nowhere")


def submissions(kind: str) -> list:
    return [
        pytest.param(answer, id=f"{version} {name}")
        for version in VERSIONS
        for name, answer in json.loads(recorded(version, "sbatch.json"))[kind].items()
    ]


@pytest.fixture
def submit(monkeypatch):
    def answered(answer):
        monkeypatch.setattr(slurm_client.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, **answer))
        return slurm_client.Slurm().submit([], {}, "/")

    return answered


@pytest.mark.parametrize("answer", submissions("refused"))
def test_refusal_is_told_from_silence(submit, answer):
    with pytest.raises(SpecDecodeError, match="Slurm refused the job") as error:
        submit(answer)
    assert not isinstance(error.value, Unanswered)


@pytest.mark.parametrize("answer", submissions("silent"))
def test_silence_is_told_from_refusal(submit, answer):
    with pytest.raises(Unanswered):
        submit(answer)


def test_json_is_what_differs():
    """Why the collection asks for text: the same failed job has other types in Slurm's JSON."""
    forms = {version: json.loads(recorded(version, "squeue.json")) for version in VERSIONS}
    old, new = forms[VERSIONS[0]], forms[VERSIONS[-1]]
    assert old["job_state"] == "FAILED" and new["job_state"] == ["FAILED"]
    assert isinstance(old["exit_code"], int) and new["exit_code"]["return_code"]["number"] == 3
    assert isinstance(old["submit_time"], int) and new["submit_time"]["number"] > 0


@pytest.mark.parametrize("status", ["", "3:", "three", "3:0:1", "-1"])
def test_exit_code_in_another_form_is_an_error_and_not_success(status):
    line = f"1|a|0|COMPLETED|{status}|0|0:01|n1|None|2026-11-24T22:21:00|2026-11-24T22:21:01|(null)|"
    with pytest.raises(SpecDecodeError, match="another form"):
        slurm_rows.parse_squeue(line)
