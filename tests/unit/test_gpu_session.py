# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The session on a GPU: which plays it runs in which order, and what of a bundle becomes evidence."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def session(monkeypatch, tmp_path):
    """The script, and the commands that it gave; none is run."""
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "scripts/gpu_session.py")
    gpu_session = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_session)
    given = []

    def run(command, *, stdout, **_rest):
        given.append(command)
        stdout.write("played\n")
        settings = settings_of(command)
        fails = (settings.get("method") == "dflash" and "spec_stop_phase" not in settings) or settings.get("spec_sweep_k") == [9]
        return subprocess.CompletedProcess(command, 3 if fails else 0)

    monkeypatch.setattr(gpu_session.subprocess, "run", run)

    def start(*words):
        # The two environments need not exist for this.
        given = ("--engine", sys.executable, "--controller", sys.executable) if words[0] == "run" else ()
        monkeypatch.setattr(sys, "argv", ["gpu_session.py", words[0], *given, *words[1:]])
        return gpu_session.main()

    return gpu_session, start, given


def settings_of(command):
    """Everything given with -e, as one dictionary."""
    found = {}
    for flag, word in itertools.pairwise(command):
        if flag == "-e" and word.startswith("{"):
            found.update(json.loads(word))
        elif flag == "-e" and not word.startswith("@"):
            found.update([word.split("=", 1)])
    return found


def bundle(work, name, **results):
    here = work / name / "spec-decode"
    for place, value in results.items():
        path = here / place.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return here


def test_one_thing_after_the_other_and_a_failure_does_not_end_it(session, tmp_path, capsys):
    _module, start, given = session
    serving = {"server_arguments": ["--max-num-seqs=32"], "server_environment": {"A": "1"}}
    bundle(
        tmp_path, "gpu-chat-eagle3", results__convert_json={"draft_dir": "/d/1"},
        experiment_json={"num_speculative_tokens": 3, "serving": serving},
    )  # fmt: skip
    assert start("run", "--work", str(tmp_path), "--sweep", "1,5", "--settings", '{"spec_prompts": 8}') == 1
    assert "failed: measure-dflash" in capsys.readouterr().err
    target, *trainings, eagle3, ngram, dflash = given
    assert target[1] == "demo/build_target.py"
    # Side by side, on different cores, and no further than training: nothing else may be measured meanwhile.
    assert {settings_of(each)["method"] for each in trainings} == {"eagle3", "dflash"}
    assert all(settings_of(each)["spec_stop_phase"] == "convert" for each in trainings)
    pinned = {each[2] for each in trainings if each[0] == "taskset"}
    assert len(pinned) == min(2, len(os.sched_getaffinity(0)))
    assert settings_of(eagle3)["spec_sweep_k"] == [1, 5] and settings_of(eagle3)["spec_prompts"] == 8
    assert settings_of(dflash)["method"] == "dflash" and "spec_sweep_k" not in settings_of(dflash)
    against = settings_of(ngram)
    assert "playbooks/validate_draft.yml" in ngram and against["spec_standing_config"]["method"] == "ngram"
    assert against["spec_candidate"] == {"method": "eagle3", "model": "/d/1", "num_speculative_tokens": 3}
    assert against["spec_server_arguments"] == ["--max-num-seqs=32", "--no-async-scheduling"]
    assert against["spec_server_environment"] == {"A": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    times = json.loads((tmp_path / "session/times.json").read_text())
    assert [each["exit"] for each in times] == [0, 0, 0, 0, 0, 3]


def test_sweep_without_being_told_fits_the_servers_graphs(session, tmp_path):
    """vLLM 0.24 makes its graphs for multiples of K + 1, which must divide the slots (docs/gpu.md)."""
    _module, start, given = session
    assert start("run", "--work", str(tmp_path), "eagle3") == 0
    arguments = yaml.safe_load((ROOT / "demo/gpu.yml").read_text())["spec_server_arguments"]
    slots = next(int(word.partition("=")[2]) for word in arguments if word.startswith("--max-num-seqs="))
    swept = settings_of(given[0])["spec_sweep_k"]
    assert swept and all(slots % (tokens + 1) == 0 for tokens in swept)


def test_sweep_that_fails_costs_no_verdict_on_the_draft_s_own_k(session, tmp_path):
    _module, start, given = session
    assert start("run", "--work", str(tmp_path), "--sweep", "9", "eagle3") == 1
    assert [settings_of(each)["spec_sweep_k"] for each in given] == [[9], []]


def test_second_start_keeps_what_the_first_one_told(session, tmp_path):
    _module, start, _given = session
    for _time in range(2):
        start("run", "--work", str(tmp_path), "--sweep=1", "eagle3")
    assert (tmp_path / "session/measure-eagle3.log").read_text() == "played\nplayed\n"
    assert [each["step"] for each in json.loads((tmp_path / "session/times.json").read_text())] == ["measure-eagle3"] * 2


def test_target_that_is_there_is_not_built_again(session, tmp_path):
    _module, start, given = session
    (tmp_path / "targets/gpu-chat").mkdir(parents=True)
    assert start("run", "--work", str(tmp_path), "target") == 0
    assert given == []


def test_unknown_stage_is_refused_before_anything_runs(session, tmp_path, capsys):
    _module, start, given = session
    with pytest.raises(SystemExit):
        start("run", "--work", str(tmp_path), "target", "eagle4")
    assert given == [] and "unknown stages eagle4; there are target, train" in capsys.readouterr().err


def test_ngram_without_a_draft_to_measure_says_what_to_run_first(session, tmp_path, capsys):
    _module, start, given = session
    assert start("run", "--work", str(tmp_path), "ngram") == 1
    said = capsys.readouterr().err
    assert given == [] and "Run the stages train and eagle3 first" in said and "failed: measure-ngram" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("run", "--engine", "/none/python"), "/none/python is no program that can be started"),
        (("run", "--sweep", "eagle3", "dflash"), "'eagle3' must be whole numbers with commas between them"),
        (("evidence", "--out", "o", "--replace", "/opt/cuda"), "must say what is replaced by what"),
    ],
)
def test_argument_that_cannot_be_used_is_refused(session, capsys, words, reason):
    _module, start, given = session
    with pytest.raises(SystemExit):
        start(*words)
    assert given == [] and reason in capsys.readouterr().err


def test_evidence_says_nothing_of_the_machine_and_leaves_single_requests_out(session, tmp_path):
    _module, start, _given = session
    work, out = tmp_path / "work", tmp_path / "evidence"
    here = bundle(
        work, "gpu-chat-eagle3",
        results__acceptance_json={
            "node": platform.node(), "target": f"{work}/targets/gpu-chat", "draft": f"{work}/drafts/1",
            "trials": [{"client": {"requests": 2}, "requests": [{"ttft": 1}], "snapshots": {"a": 1}}],
        },
    )  # fmt: skip
    cut_off = {"trials": [{"arm": "standing", "requests": [{"ttft": 1}]}]}
    (here / "results/acceptance.json.partial").write_text(json.dumps(cut_off))
    (here / "data").mkdir()
    (here / "data/train.jsonl").write_text("a row\n")
    (here / "jobs/servers").mkdir(parents=True)
    (here / "jobs/servers/server-standing.log").write_text(
        f"Loading /opt/cuda/vllm on {platform.node()}\rload: 50%|#| 1/2 [1.00it/s]\n"
        '127.0.0.1 - "POST /v1/completions HTTP/1.1" 200 OK\nready\n'
    )
    assert start("evidence", "--work", str(work), "--out", str(out), "--replace", "/opt/cuda=/opt/engine") == 0
    found = json.loads((out / "gpu-chat-eagle3/results/acceptance.json").read_text())
    assert found == {
        "node": "node1", "target": "/models/gpu-chat", "draft": "/srv/spec/drafts/1", "trials": [{"client": {"requests": 2}}],
    }  # fmt: skip
    assert (out / "gpu-chat-eagle3/jobs/servers/server-standing.log").read_text() == "Loading /opt/engine/vllm on node1\nready\n"
    partial = json.loads((out / "gpu-chat-eagle3/results/acceptance.json.partial").read_text())
    assert partial == {"trials": [{"arm": "standing"}]}
    assert not (out / "gpu-chat-eagle3/data").exists()


def test_evidence_of_nothing_is_refused(session, tmp_path, capsys):
    _module, start, _given = session
    assert start("evidence", "--work", str(tmp_path), "--out", str(tmp_path / "out")) == 2
    assert "no experiment under" in capsys.readouterr().err


def test_name_of_a_node_is_replaced_as_a_whole_word_only(session, tmp_path):
    module, _start, _given = session
    (tmp_path / "a.md").write_text("vm, vmlinux and my-vm on vm.")
    assert module.cleaned(tmp_path / "a.md", {"vm": "node1"}) == "node1, vmlinux and my-vm on node1."
