# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The phases as Slurm jobs: a chain that needs no controller, preempted in the middle of real training, and its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.local_executor import marked_processes

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/slurm"))
from cluster import CannotRun, Cluster, Settings

LIMIT_S = 400
EXPERIMENT = "chain-test"
STEPS = 90
TRAINING = {
    "batch_size": 8, "learning_rate": 0.002, "warmup_ratio": 0.05, "max_grad_norm": 1.0, "ttt_length": 3, "num_epochs": 100,
    "attention_backend": "sdpa", "fsdp_sharding": "NO_SHARD", "save_interval": 15, "log_interval": 5,
}  # fmt: skip


class Site:
    """The two inventories of the demonstration, on a cluster of the test's own."""

    def __init__(self, cluster: Cluster, built) -> None:
        self.cluster, self.target = cluster, built.target
        self.work = built.work / "slurm"
        self.bundle = self.work / EXPERIMENT / "spec-decode"
        self.settings = {
            "chat_template": "qwen", "spec_work_dir": str(self.work), "spec_verdicts_dir": str(self.work / "host_vars"),
            "spec_sources": [{"path": f"{built.data}/sharegpt.json"}, {"path": f"{built.data}/ultrachat.jsonl"}],
            "spec_train_rows": 120, "spec_eval_rows": 8, "spec_max_new_tokens": 40, "spec_train_steps": STEPS,
            "spec_training": {"eagle3": TRAINING}, "spec_thresholds": {"training": {"min_accuracy": 0.1}},
            "spec_poll_interval": 1, "spec_stop_phase": "train", "spec_untrained_check": False,
            "spec_capture_batch_tokens": 1,  # one conversation a batch: what a batch holds does not depend on where it resumed
            "spec_confirm_shared_work_dir": True,
        }  # fmt: skip

    def play(self, playbook: str, code: int = 0, **extra) -> str:
        answer = subprocess.run(
            self._command(playbook, extra), **self._place, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert answer.returncode == code, answer.stdout[-6000:] + answer.stderr[-2000:]
        return answer.stdout

    @contextlib.contextmanager
    def play_that_is_killed(self, playbook: str, **extra):
        """A play that is killed with all its processes at the end of the block."""
        process = subprocess.Popen(
            self._command(playbook, extra), **self._place, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield
            assert process.poll() is None, "the play ended before it could be killed"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _command(self, playbook: str, extra: dict) -> list[str]:
        return [
            str(ROOT / ".venv/bin/ansible-playbook"), f"playbooks/{playbook}.yml", "-i", "inventories/local",
            "-i", "inventories/slurm", "-e", json.dumps({**self.settings, **extra}),
        ]  # fmt: skip

    @property
    def _place(self) -> dict:
        return {"cwd": ROOT, "env": {**os.environ, **self.cluster.environment}}

    def drained(self) -> list[str]:
        """Nodes that take no new jobs."""
        lines = self.cluster.run("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        return sorted({line.split()[0] for line in lines if "drain" in line.split()[1]})

    def jobs(self) -> dict[str, list[str]]:
        """Ids of the jobs that Slurm knows, by ``experiment.phase``."""
        found: dict[str, list[str]] = {}
        for line in self.cluster.run("squeue", "-h", "-t", "all", "-O", "JobID:|,Name:|").splitlines():
            job_id, name = line.split("|")[:2]
            found.setdefault(name.rpartition(".")[0], []).append(job_id)
        return found

    def state(self, job_id: str) -> str:
        return self.cluster.run("squeue", "-h", "-t", "all", "-j", job_id, "-O", "State:|").split("|")[0]

    def preempt(self, job_id: str) -> None:
        """Push a job off its node by a higher partition, and let it back as soon as that is over."""
        node = self.cluster.run("squeue", "-h", "-j", job_id, "-o", "%N").strip()
        urgent = self.cluster.run(
            "sbatch", "--parsable", "-o", "/dev/null", "-p", "serving", "--exclusive", "-w", node, "--wrap=sleep 1"
        ).strip()
        until(
            lambda: self.cluster.run("squeue", "-h", "-j", job_id, "-O", "RestartCnt:|").startswith("1|"), "the job is preempted"
        )
        until(lambda: self.state(urgent) == "COMPLETED", "the urgent job is done")
        self.cluster.run("scontrol", "update", f"job={job_id}", "starttime=now")

    def key(self, phase: str) -> str:
        """What the processes of a phase's job carry in their environment."""
        return json.loads((self.bundle / f"jobs/{phase}/record.json").read_text())["attempts"][-1]["key"]

    def result(self, phase: str) -> dict:
        return json.loads((self.bundle / f"results/{phase}.json").read_text())


def until(condition, what, pause_s=0.3):
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(pause_s)
    pytest.fail(f"not within {LIMIT_S} s: {what}")


@pytest.fixture(scope="module")
def site(built):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sd-slurm-"))
    folder.chmod(0o755)
    try:
        cluster = Cluster(folder / "c", Settings()).up()
    except CannotRun as error:
        shutil.rmtree(folder)
        pytest.skip(f"no Slurm can run here: {error}")
    yield Site(cluster, built)
    cluster.run("scancel", f"--user={os.getuid()}", check=False)
    cluster.down()
    shutil.rmtree(folder)


def test_several_drafts_are_submitted_before_any_is_waited_for(site, tmp_path):
    targets = tmp_path / "targets.yml"
    targets.write_text(json.dumps([{"target": str(site.target), "experiment": f"side-{side}"} for side in "ab"]))
    output = site.play("train_drafts", targets_file=str(targets), spec_chain=True)
    assert "The chain of side-a runs by itself" in output and "The chain of side-b runs by itself" in output
    jobs = site.jobs()
    assert sorted(jobs) == sorted(f"side-{side}.{phase}" for side in "ab" for phase in ("dataset", "capture", "train"))
    for side in "ab":
        site.play("teardown", experiment=f"side-{side}")
    assert not {site.state(job_id) for ids in jobs.values() for job_id in ids} & {"PENDING", "RUNNING"}


def test_chain_runs_by_itself_and_outlives_preemptions_in_mid_capture_and_mid_training(site):
    """Real capture and real training, pushed off their node, go on from what they have under the same ids."""
    site.play("train_draft", target=str(site.target), experiment=EXPERIMENT, spec_chain=True)
    jobs = {name.rpartition(".")[2]: ids for name, ids in site.jobs().items() if name.startswith(f"{EXPERIMENT}.")}
    (capture,), (train,) = jobs["capture"], jobs["train"]
    until(lambda: len(list(site.bundle.glob("features/rows_*/*.ckpt"))) > 5, "capture is under way", pause_s=0.02)
    for pid in marked_processes("SPEC_DECODE_JOB", site.key("capture")):
        os.kill(pid, signal.SIGSTOP)  # it is fast: hold it where it is until Slurm ends it
    kept = len(list(site.bundle.glob("features/rows_*/*.ckpt")))
    assert kept < site.settings["spec_train_rows"] and not (site.bundle / "results/capture.json").exists()
    site.preempt(capture)
    until(lambda: list(site.bundle.glob("train/*/*-step15/training_state.pt")), "training is under way")
    samples = site.result("capture")["samples"]
    # The list of written files may lag behind the files by the batch that was being written. And Slurm lets a stopped
    # process go on before it ends it, so that it may get a few further.
    assert kept - 1 <= site.result("capture")["throughput"]["resumed_samples"] < site.settings["spec_train_rows"]
    assert samples["written"] == samples["expected"]
    site.preempt(train)
    assert not (site.bundle / "results/train.json").exists()
    until((site.bundle / "results/train.json").exists, "training ends")
    until(lambda: site.state(train) == "COMPLETED", "the gate in the job is green")
    found = site.result("train")
    assert found["resumed_at"] >= 15 and found["steps"] == STEPS
    assert (site.jobs()[f"{EXPERIMENT}.capture"], site.jobs()[f"{EXPERIMENT}.train"]) == ([capture], [train])


def test_later_play_attaches_to_the_chain_and_does_no_work(site):
    before = {phase: site.result(phase)["finished_at"] for phase in ("dataset", "capture", "train")}
    output = site.play("train_draft", target=str(site.target), experiment=EXPERIMENT)
    assert "changed=0" in output and "Stopped after train" in output
    assert {phase: site.result(phase)["finished_at"] for phase in before} == before


def by_hand(site, command: str, output: pathlib.Path) -> None:
    """A node program as the launcher runs it, in one go and into another folder."""
    subprocess.run(
        ["bash", "-c", f'set -eu; . "$2/recipe.env"; cd "$2"; exec "$ENGINE_PYTHON" {command}', "by-hand", str(output),
         str(site.bundle)],
        check=True, capture_output=True, timeout=LIMIT_S,
    )  # fmt: skip


def test_preempted_capture_equals_an_undisturbed_one(site, tmp_path):
    by_hand(
        site,
        'capture_hidden_states.py --batch-tokens "$CAPTURE_BATCH_TOKENS" --target-model-path "$TARGET_MODEL_PATH"'
        ' --method "$METHOD" --aux-layers "$AUX_LAYERS" --chat-template "$CHAT_TEMPLATE"'
        ' --chat-template-file "$CHAT_TEMPLATE_FILE" --max-length "$MAX_LENGTH" --data data --output "$1/features"'
        ' --result "$1/capture.json"',
        tmp_path,
    )
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("features/rows_*/*.ckpt")}
        for folder in (site.bundle, tmp_path)
    ]
    assert digests[0] == digests[1] and len(digests[0]) == site.settings["spec_train_rows"]


def test_preempted_training_equals_an_undisturbed_one(site, tmp_path):
    found = site.result("train")
    by_hand(
        site,
        'train_draft.py --config "$TRAIN_CONFIG" --features features --target-model-path "$TARGET_MODEL_PATH"'
        ' --aux-layers "$AUX_LAYERS" --output "$1" --result "$1/train.json"',
        tmp_path,
    )
    undisturbed = json.loads((tmp_path / "train.json").read_text())
    assert undisturbed["resumed_at"] == 0 and undisturbed["steps"] == found["steps"]
    assert found["last"]["loss"] == pytest.approx(undisturbed["last"]["loss"], rel=0.05)
    assert found["last"]["acc_0"] == pytest.approx(undisturbed["last"]["acc_0"], abs=0.05)


def test_red_gate_stops_the_chain(site):
    """A threshold that no draft reaches: the work is done, its gate in the job is red, and nothing after it starts."""
    red = {"experiment": "red-test", "spec_thresholds": {"dataset": {"max_mask_outside_fraction": -1}}}
    site.play("train_draft", target=str(site.target), spec_chain=True, **red)
    jobs = {name.partition(".")[2]: ids[0] for name, ids in site.jobs().items() if name.startswith("red-test.")}
    until(lambda: site.state(jobs["train"]) == "CANCELLED", "Slurm gives the rest up")
    assert site.state(jobs["dataset"]) == "FAILED" and site.state(jobs["capture"]) == "CANCELLED"
    log = (site.work / "red-test/spec-decode/jobs/dataset/output.log").read_text()
    assert "The dataset gate is red" in log
    for chain in (False, True):  # neither a play in steps nor another chain gets past it
        output = site.play("train_draft", code=2, target=str(site.target), spec_chain=chain, **red)
        assert "The dataset gate is red" in " ".join(output.split())


WINDOW = {
    "experiment": "window-test", "spec_bench_window": True, "spec_prompts": 6, "spec_max_tokens": 24, "spec_warmup": 1,
    "spec_trials": 1, "spec_candidate": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
}  # fmt: skip


def test_measuring_node_is_drained_and_resumed_whatever_becomes_of_the_play(site):
    """Real servers are measured in a real job; the play is killed twice in the open window."""
    settings = {**WINDOW, "target": str(site.target), "spec_prompts_file": str(site.bundle / "data/eval.jsonl")}
    with site.play_that_is_killed("validate_draft", **settings):
        (node,) = until(site.drained, "the window opens")
        assert "spec_decode:window-test: both arms are measured" in site.cluster.run("scontrol", "show", "node", node)
    assert site.drained() == [node], "a play that is killed cannot resume anything"
    site.play("teardown", experiment=WINDOW["experiment"])
    assert site.drained() == []

    with site.play_that_is_killed("validate_draft", **settings):
        (node,) = until(site.drained, "the window opens")
        stranger = site.cluster.run("sbatch", "--parsable", "-o", "/dev/null", "-w", node, "--wrap=true").strip()
        measuring = site.jobs()["window-test.validate"]
    output = site.play("validate_draft", **settings)
    assert "Resume what an aborted run drained" in output and site.drained() == []
    assert site.jobs()["window-test.validate"] == measuring, "the next run goes on with the job that is there"
    until(lambda: site.state(stranger) == "COMPLETED", "the node takes jobs again")
    results = site.work / "window-test/spec-decode/results"
    measured = json.loads((results / "acceptance.json").read_text())
    assert {trial["arm"] for trial in measured["trials"]} == {"standing", "trained"}
    assert json.loads((results / "verdict.json").read_text())["decision"] in ("ship", "do_not_ship", "inconclusive")
