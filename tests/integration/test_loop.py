# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole loop for real, at a small scale: real hidden states, SpecForge, vLLM; killed, resumed, rerun, changed.

Everything happens in a folder whose name holds blanks, quotes and a command: paths are data, never code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.local_executor import marked_processes, stop_marked

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))
import schemas

EXPERIMENT = "loop-test"
LIMIT_S = 900


class Loop:
    """One experiment in a folder of its own."""

    def __init__(self, work: pathlib.Path, target: pathlib.Path) -> None:
        self.work, self.target = work, target
        self.bundle = work / EXPERIMENT / "spec-decode"

    def command(self, **extra) -> list[str]:
        settings = {
            "target": str(self.target),
            "method": "eagle3",
            "chat_template": "qwen",
            "experiment": EXPERIMENT,
            "spec_work_dir": str(self.work),
            "spec_verdicts_dir": str(self.work / "host_vars"),
            "spec_train_rows": 160,
            "spec_eval_rows": 12,
            "spec_max_new_tokens": 60,
            "spec_train_steps": 60,
            "spec_prompts": 8,
            "spec_max_tokens": 48,
            "spec_warmup": 2,
            "spec_poll_interval": 1,
            "spec_training": {"eagle3": {**TRAINING}},
            "spec_thresholds": {"training": {"min_accuracy": 0.1}},
            **extra,
        }
        return [
            str(ROOT / ".venv/bin/ansible-playbook"), "playbooks/train_draft.yml", "-i", "inventories/local",
            "-e", json.dumps(settings),
        ]  # fmt: skip

    def play(self, *arguments: str, **extra) -> str:
        """Run the playbook to its end; returns what it printed."""
        answer = subprocess.run(
            [*self.command(**extra), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
        return answer.stdout

    def result(self, phase: str) -> dict:
        return json.loads((self.bundle / "results" / f"{phase}.json").read_text())


TRAINING = {
    "batch_size": 8, "learning_rate": 0.002, "warmup_ratio": 0.05, "max_grad_norm": 1.0, "ttt_length": 3, "num_epochs": 100,
    "attention_backend": "sdpa", "fsdp_sharding": "NO_SHARD", "save_interval": 20, "log_interval": 5,
}  # fmt: skip


def changed(output: str) -> int:
    return int(re.findall(r"changed=(\d+)", output)[-1])


@pytest.fixture(scope="module")
def loop(built):
    yield Loop(built.work, built.target)
    stop_marked("SPEC_DECODE_EXPERIMENT", EXPERIMENT, grace_s=2)


def test_check_mode_of_a_new_experiment_writes_nothing(loop):
    output = loop.play("--check", "--diff")
    assert "State the parameters back" in output and changed(output) == 6
    assert not loop.bundle.exists()


def kill_once(loop: Loop, under_way: str) -> None:
    """Start the play, and kill -9 it and its job as soon as a file of the bundle says that the phase is under way."""
    play = subprocess.Popen(
        loop.command(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not list(loop.bundle.glob(under_way)):
            assert play.poll() is None and time.monotonic() < deadline, f"the play ended before there was {under_way}"
            time.sleep(0.1)
    finally:
        if play.poll() is None:
            os.killpg(play.pid, signal.SIGKILL)
        play.wait()
    jobs = list(marked_processes("SPEC_DECODE_EXPERIMENT", EXPERIMENT))
    assert jobs, "the job must outlive the play"
    for pid in jobs:
        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
            os.kill(pid, signal.SIGKILL)


#: phases whose result has another name
RESULTS = {"validate": "acceptance"}
#: phase → what stands in the bundle when it is under way
UNDER_WAY = {
    "dataset": "jobs/dataset/start-*",
    "capture": "features/rows_*/data_*.ckpt",
    "train": "train/*/*-step20/training_state.pt",
    "convert": "jobs/convert/start-*",
    "validate": "jobs/servers/server-standing.log",
}


@pytest.mark.parametrize("phase", UNDER_WAY)
def test_killed_in_any_phase_loses_nothing_that_was_done(loop, phase):
    """Each kill strikes one phase later than the last: what was complete before must not be done again."""
    done = {path: path.stat().st_mtime_ns for path in loop.bundle.glob("results/*.json")}
    kill_once(loop, UNDER_WAY[phase])
    assert not (loop.bundle / "results" / f"{RESULTS.get(phase, phase)}.json").exists()
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_the_next_run_goes_on_and_finishes(loop):
    output = loop.play()
    train = loop.result("train")
    assert train["resumed_at"] >= 20 and train["steps"] == 60
    steps = [json.loads(line)["step"] for line in (loop.bundle / train["metrics_path"]).read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    assert "DRAFT" in output and not list(loop.bundle.parent.rglob("hacked"))


def test_verdict_holds_what_it_promises(loop):
    verdict = loop.result("verdict")
    assert verdict["tier"] == "DRAFT" and "measured on a CPU, where there are no CUDA graphs" in verdict["tier_reasons"]
    assert verdict["decision"] in ("ship", "do_not_ship", "inconclusive")
    for arm in ("standing", "trained"):
        found = verdict["arms"][arm]
        assert len(found["tpot_ms"]["trials"]) == verdict["shapes"][0]["pairs"]
        assert found["tpot_ms"]["median"] > 0 and found["ttft_ms"]["median"] > 0
    trained = verdict["arms"]["trained"]
    assert len(trained["acceptance_per_position"]) == 3
    assert trained["acceptance_length"] == pytest.approx(1 + sum(trained["acceptance_per_position"]))
    assert verdict["shapes"][0]["texts_equal"], "greedy outputs must not depend on the draft"
    assert verdict["context"]["trained"]["workload"]["concurrency"] == 1 and verdict["next_levers"]


def test_trials_agree_with_the_server(loop):
    trials = loop.result("acceptance")["trials"]
    compared = [t["arm"] for t in trials if t["purpose"] == "compare"]
    assert compared == ["standing", "trained", "trained", "standing", "standing", "trained"]
    assert [t["arm"] for t in trials if t["purpose"] == "noise"] == ["standing", "standing"]
    # A busy machine may leave a trial void, but not all of them; none that counts disagrees.
    usable = [trial for trial in trials if not trial["void"]]
    assert {trial["arm"] for trial in usable} == {"standing", "trained"}
    for trial in usable:
        assert trial["client"]["tpot_ms"]["mean"] == pytest.approx(1e3 * trial["engine"]["tpot_s"]["mean"], rel=0.05)


def test_evidence_of_each_phase(loop):
    assert loop.result("dataset")["overlap_train_eval"] == 0
    capture = loop.result("capture")
    assert capture["samples"] == {"expected": 160, "written": 160} and capture["layers"] == [1, 3, 4]
    convert = loop.result("convert")
    assert convert["loads"] and convert["layers_served"] == [2, 4, 5]
    assert os.path.isfile(os.path.join(convert["draft_dir"], "model.safetensors"))


@pytest.mark.parametrize("name", schemas.NAMES)
def test_results_are_as_their_schemas_say(loop, name):
    assert schemas.problems(name, loop.result(name)) == []


def test_reports_and_facts_are_written(loop):
    report = (loop.bundle / "report.md").read_text()
    assert "What keeps it a DRAFT" in report and "cudagraph_mode" in report
    assert EXPERIMENT in (loop.work / "host_vars" / "spec_decode_verdicts.yml").read_text()


def test_rerun_does_no_work(loop):
    output = loop.play()
    assert changed(output) == 0


def test_truncated_feature_is_captured_anew_and_nothing_else(loop):
    files = sorted(loop.bundle.glob("features/rows_*/data_*.ckpt"))
    untouched = files[1].stat().st_mtime_ns
    with open(files[0], "ab") as stream:
        stream.truncate(100)
    os.unlink(loop.bundle / "results/capture.json")
    loop.play("--tags", "capture")
    assert loop.result("capture")["samples"]["written"] == 160
    assert files[1].stat().st_mtime_ns == untouched


def test_changed_measurement_measures_again_and_trains_nothing(loop):
    trained = (loop.bundle / "results/train.json").stat().st_mtime_ns
    loop.play("--tags", "validate,report", spec_prompts=6)
    assert loop.result("acceptance")["plan"]["prompts"]["count"] == 6
    assert (loop.bundle / "results/train.json").stat().st_mtime_ns == trained


def test_recipe_by_hand_gives_the_same_artifact(loop):
    staged = loop.result("convert")["sha"]
    subprocess.run(["bash", str(loop.bundle / "run-small-chat-offline.sh")], check=True, timeout=LIMIT_S, cwd="/")
    assert loop.result("convert")["sha"] == staged


def test_teardown_leaves_nothing_running_and_keeps_the_draft(loop):
    draft = loop.result("convert")["draft_dir"]
    answer = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), "playbooks/teardown.yml", "-i", "inventories/local",
         "-e", json.dumps({"experiment": EXPERIMENT, "spec_work_dir": str(loop.work)})],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout
    assert list(marked_processes("SPEC_DECODE_EXPERIMENT", EXPERIMENT)) == []
    assert os.path.isdir(draft)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "/nowhere"}, "The target /nowhere is not a folder."),
        ({"method": "medusa"}, "The method 'medusa' is not known. Choose one of eagle3, dflash."),
        ({"chat_template": "glm5p1"}, "'glm5p1' is not one of"),
        ({"aux_layers": "1,2,99"}, "must be distinct, ascending and between 0 and 7"),
        ({"spec_sources": [{"path": "/nowhere.json"}]}, "/nowhere.json is missing or empty"),
        ({"experiment": "Not A Label"}, "must be 1 to 63 lower-case letters"),
    ],
)
def test_bad_input_is_one_clear_sentence_before_any_work(loop, change, words):
    answer = subprocess.run(
        loop.command(**{"experiment": "bad-input", **change}), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode != 0
    assert words in " ".join(answer.stdout.split()), answer.stdout[-3000:]
    assert "Traceback" not in answer.stdout and not (loop.work / "bad-input").exists()
