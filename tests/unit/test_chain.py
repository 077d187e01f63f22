# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains and lists of drafts; the gate that a job runs on itself."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import chain, targets
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PHASES = ("dataset", "capture", "train", "convert", "validate")
EXPERIMENT = {
    "name": "tiny-eagle3",
    "bundle": "/work/it's/spec-decode", "engine_python": "/engine/python", "aux_layers": [1, 3, 4],
    "jobs": {phase: {"result": f"/work/results/{phase}.json"} for phase in PHASES},
}  # fmt: skip


def test_every_phase_but_the_measurement_judges_itself():
    links = chain.links(EXPERIMENT, [*PHASES, "report"], {"training": {"min_accuracy": 0.6}})
    assert [link["phase"] for link in links] == list(PHASES)
    verify = {link["phase"]: link["verify"] for link in links}
    assert verify["validate"] == []
    assert verify["train"][:4] == ["/engine/python", "/work/it's/spec-decode/judge_gate.py", "--gate", "training"]
    assert json.loads(verify["train"][5]) == {"train": "/work/results/train.json"}
    assert json.loads(verify["train"][7]) == {"min_accuracy": 0.6}
    assert json.loads(verify["capture"][7]) == {"layers": [1, 3, 4]}


def test_chain_of_some_phases():
    assert [link["phase"] for link in chain.links(EXPERIMENT, ["capture", "train"], {})] == ["capture", "train"]


def test_check_of_an_untrained_draft_comes_first():
    experiment = {**EXPERIMENT, "jobs": {**EXPERIMENT["jobs"], "untrained": {"result": "/work/results/untrained.json"}}}
    links = chain.links(experiment, ["untrained", "dataset", "capture"], {})
    assert [(link["phase"], link["after"]) for link in links] == [("untrained", []), ("dataset", ["untrained"]), ("capture", [])]
    assert json.loads(links[0]["verify"][5]) == {"convert": "/work/results/untrained.json"}
    assert chain.links(experiment, ["untrained"], {})[0]["after"] == []


def test_drafts_are_known_by_their_experiments():
    found = targets.named(
        [{"target": "/models/One"}, {"target": "/models/one", "method": "dflash"}, {"target": "x", "experiment": "b"}]
    )
    assert list(found) == ["one-eagle3", "one-dflash", "b"]
    assert found["one-dflash"] == {"target": "/models/one", "method": "dflash", "experiment": "one-dflash"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "empty or no list"),
        ({"target": "x"}, "empty or no list"),
        ([{"method": "eagle3"}], "Entry 1 of the list of targets names no target"),
        (["x"], "Entry 1"),
        ([{"target": "a"}, {"target": "/b/A"}], "Two entries of the list of targets are the experiment 'a-eagle3'"),
        ([{"target": "a", "experiment": "No Label"}], "cannot be a label"),
    ],
)
def test_lists_that_are_refused(entries, words):
    with pytest.raises(SpecDecodeError, match=words):
        targets.named(entries)


def judge(tmp_path, training, *arguments):
    (tmp_path / "spec_decode").symlink_to(ROOT / "plugins/module_utils")
    (tmp_path / "judge_gate.py").symlink_to(ROOT / "files/judge_gate.py")
    result = tmp_path / "train.json"
    if training:
        result.write_text(json.dumps(training))
    program = (
        "import runpy, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(ROOT / "files/judge_gate.py"), "--gate", "training",
         "--evidence", json.dumps({"train": str(result)}), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


GOOD = {
    "steps": 60, "max_steps": 60, "nonfinite_steps": 0, "first": {"loss": 5.0, "acc_0": 0.2}, "last": {"loss": 1.0, "acc_0": 0.9},
}  # fmt: skip


def test_green_gate_in_a_job(tmp_path):
    answer = judge(tmp_path, GOOD)
    assert (answer.returncode, answer.stdout) == (0, "the training gate is green\n"), answer.stderr


def test_red_gate_in_a_job_is_told_from_a_refusal(tmp_path):
    answer = judge(tmp_path, GOOD, "--thresholds", '{"min_accuracy": 0.95}')
    assert answer.returncode == 3 and "The training gate is red" in answer.stdout and "below 0.95" in answer.stdout


def test_gate_in_a_job_without_evidence(tmp_path):
    answer = judge(tmp_path, None)
    assert answer.returncode == 2 and "does not exist" in answer.stderr and "Traceback" not in answer.stderr
