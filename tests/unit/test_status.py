# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where experiments stand, from bundles in every state."""

from __future__ import annotations

import json

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import status
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.files import sha256_file

DONE = {"status": "complete", "finished_at": "2026-11-20T10:00:00+00:00", "duration_s": 75.0}


@pytest.fixture
def work(tmp_path):
    """A work folder; ``work("name", dataset=…)`` lays an experiment with these results into it."""

    def make(name, **results):
        bundle = tmp_path / name / "spec-decode"
        (bundle / "results").mkdir(parents=True)
        (bundle / "data").mkdir()
        (bundle / "data/eval.jsonl").write_text("{}\n")
        (bundle / "experiment.json").write_text(json.dumps({"name": name, "method": "eagle3", "target": {"path": "/gone"}}))
        for result, facts in results.items():
            (bundle / f"results/{result}.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
        return bundle

    make.path = str(tmp_path)
    return make


def verdict(**holds):
    return {
        "decision": "ship", "tier": "VERDICT", "speedup_tpot": 1.8312, "measured_at": "2026-11-20T10:00:00+00:00",
        "arms": {"trained": {"acceptance_length": 2.4444}}, "expiry": {"holds_for": {"hardware": "H", "vllm": "0.32.0", **holds}},
    }  # fmt: skip


def job(name, state, **fields):
    return {"name": name, "state": state, "reason": "", "nodes": "", "log": "/log", "elapsed_s": None, "progress": {}, **fields}


def test_all_experiments_sorted_and_other_folders_left_out(work, tmp_path):
    work("b")
    work("a", dataset=DONE)
    (tmp_path / "drafts").mkdir()
    found = status.experiments(work.path)
    assert [each["name"] for each in found] == ["a", "b"]
    assert found[0]["phases"] == {"dataset": DONE} and found[1]["phases"] == {}
    assert status.experiments(work.path, "b") == found[1:]
    assert status.experiments("/nowhere") == []


@pytest.mark.parametrize(
    ("name", "words"), [("none", "There is no experiment none in "), ("../etc", "is no name of an experiment")]
)
def test_experiment_that_is_not_there(work, name, words):
    with pytest.raises(SpecDecodeError, match=words):
        status.experiments(work.path, name)


def test_verdict_is_stale_when_its_prompts_changed_and_not_before(work):
    bundle = work("a")
    prompts = sha256_file(str(bundle / "data/eval.jsonl"))
    (bundle / "results/verdict.json").write_text(json.dumps(verdict(prompts_sha256=prompts)))
    assert status.experiments(work.path)[0]["verdict"]["stale"] == []
    (bundle / "data/eval.jsonl").write_text("{}\n{}\n")
    assert "prompts_sha256 was" in status.experiments(work.path)[0]["verdict"]["stale"][0]


def test_verdict_is_stale_when_nothing_tells_what_the_target_is(work):
    work("a", verdict=verdict(target_sha="t"))
    assert status.experiments(work.path)[0]["verdict"]["stale"] == ["nothing tells what target_sha is now; it was t"]


def test_broken_file_is_said_and_hides_nothing(work):
    work("a", dataset="{")
    work("b", dataset=DONE)
    found = status.experiments(work.path)
    assert "results/dataset.json" in found[0]["problems"][0] and found[1]["phases"]
    assert any("results/dataset.json" in line for line in status.verdict_lines(found, "2026-11-24T10:00:00+00:00"))


def test_lines_show_what_runs_with_its_progress_and_time_left(work):
    work("a", dataset=DONE, capture=DONE)
    train = job("train", "RUNNING", nodes="gpu3", elapsed_s=600.0, progress={"text": "step 30/120", "done": 30, "total": 120})
    lines = status.status_lines(status.experiments(work.path), [[job("dataset", "COMPLETED"), train]])
    text = "\n".join(lines)
    assert "  dataset   done 2026-11-20T10:00:00+00:00, in 00:01:15" in lines
    assert "  train     RUNNING on gpu3 · step 30/120 · 00:10:00 so far, ~00:30:00 left" in lines
    assert "  convert   not started" in lines and "no verdict yet" in text
    assert lines[-1] == "  next: wait for train; running the playbook again attaches to it"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("results", "jobs", "words"),
    [
        ({}, [], "run the playbook: dataset comes next"),
        ({"dataset": DONE}, [job("capture", "TIMEOUT", reason="ran past 60 s")], "mend capture and run the playbook again"),
        ({name: DONE for name in ("dataset", "capture", "train", "convert", "acceptance")}, [], "is to be judged"),
    ],
)
def test_next_step(work, results, jobs, words):
    work("a", **results)
    assert words in status.status_lines(status.experiments(work.path), [jobs])[-1]


def test_next_step_after_a_verdict(work):
    results = {name: DONE for name in ("dataset", "capture", "train", "convert", "acceptance")}
    bundle = work("a", **results, verdict=verdict())
    found = status.experiments(work.path)
    assert status.status_lines(found, [[]])[-1] == f"  next: read {bundle}/report.md"
    found[0]["verdict"]["stale"] = ["draft_sha was a and is b now"]
    lines = status.status_lines(found, [[]])
    assert lines[-1] == "  next: measure again: run the playbook" and "STALE: draft_sha was a" in lines[-2]


def test_table_of_verdicts(work):
    work("a", verdict=verdict())
    work("b")
    lines = status.verdict_lines(status.experiments(work.path), "2026-11-24T11:00:00+00:00")
    assert lines[1].split() == ["a", "ship", "VERDICT", "1.83", "2.44", "4", "d"]
    assert lines[2].split() == ["b", "–", "–", "–", "–", "–"]


def test_empty_work_folder():
    assert status.status_lines([], []) == status.verdict_lines([], "") == ["There is no experiment here yet."]
