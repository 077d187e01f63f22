# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measuring a real vLLM: every reason not to trust a window, provoked for real, and arms with ngram speculation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import time

import pytest
import requests
from ansible_collections.inference.spec_decode.plugins.module_utils import vllm_metrics as vm
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.modules import prom_acceptance

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
FLAGS = [
    "--max-model-len=512", "--max-num-seqs=4", "--max-num-batched-tokens=512", "--dtype=bfloat16", "--no-enable-prefix-caching",
    "--enforce-eager", "--gpu-memory-utilization=0.2",
]  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
STARTUP_S = 240


class Server:
    """One vLLM with ngram speculation on a port of its own, started as often as needed."""

    def __init__(self, target, log) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._target, self._log = target, log
        self._process = None

    def start(self) -> None:
        command = [
            str(ENGINE), "-m", "vllm.entrypoints.cli.main", "serve", str(self._target), "--served-model-name", "small",
            "--host", "127.0.0.1", "--port", str(self.port), "--speculative-config", json.dumps(NGRAM), *FLAGS,
        ]  # fmt: skip
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env={**os.environ, **ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"},
            )  # fmt: skip
        deadline = time.monotonic() + STARTUP_S
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).ok:
                    return
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def chat(self, tokens=48, model="small") -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Count one two one two one two."}], "temperature": 0,
                "max_tokens": tokens, "ignore_eos": True}  # fmt: skip
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)


@pytest.fixture(scope="module")
def server(built, tmp_path_factory):
    found = Server(built.target, tmp_path_factory.mktemp("server") / "server.log")
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"Say {number} and {number} and {number} again.\n" for number in range(6)))
    return path


def module(**params):
    defaults = {"urls": None, "before": None, "after": None, "prometheus_url": None, "model_name": "", "driven": None,
                "speculative": True, "num_speculative_tokens": None, "bearer_token": None, "ca_path": None,
                "validate_certs": True, "timeout": 10}  # fmt: skip
    return prom_acceptance.run({**defaults, **params})


def settled(server, before, requests_seen):
    """Snapshots once the server counted its last request, which it does just after answering it."""
    deadline = time.monotonic() + 10
    while True:
        after = module(urls=[server.url], before=before, speculative=False)
        idle = not any(sum(engine["gauges"].values()) for engine in after["snapshots"][0]["engines"])
        if (after["acceptance"]["requests"] >= requests_seen and idle) or time.monotonic() > deadline:
            return after["snapshots"]
        time.sleep(0.05)


def evaluate(bundle, server, prompts, out, *options):
    command = [
        str(ENGINE), str(bundle / "dflash_vllm_eval.py"), "--url", server.url, "--prompts", str(prompts),
        "--max-tokens", "40", "--warmup", "2", "--out", str(out), *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_quiet_window_is_trusted_and_nothing_drafted_is_refused(server):
    before = module(urls=[server.url])["snapshots"]
    for _number in range(2):
        assert server.chat().ok
    found = module(before=before, after=settled(server, before, 2), driven=2, model_name="small")
    assert found["acceptance"]["requests"] == 2 and found["acceptance"]["generation_tokens"] == 96
    assert found["acceptance"]["acceptance_length"] == pytest.approx(1 + sum(found["acceptance"]["acceptance_per_position"]))
    assert len(found["engines"]) == 1 and found["engines"][0]["drafts"] == found["acceptance"]["drafts"] > 0
    # One token comes from the prompt's own step, which no draft precedes.
    before = found["snapshots"]
    assert server.chat(tokens=1).ok
    after = settled(server, before, 1)
    with pytest.raises(SpecDecodeError, match="drafted nothing in the window"):
        module(before=before, after=after)


def test_foreign_traffic_is_refused(server):
    before = module(urls=[server.url])["snapshots"]
    for _number in range(3):
        assert server.chat().ok
    with pytest.raises(SpecDecodeError, match="finished 3 requests in the window, but only 2 were driven"):
        module(before=before, after=settled(server, before, 3), driven=2)


def test_request_still_running_is_refused(server):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        before = module(urls=[server.url])["snapshots"]
        foreign = pool.submit(server.chat, 400)
        deadline = time.monotonic() + 20
        while not any(engine["gauges"]["running"] for engine in module(urls=[server.url])["snapshots"][0]["engines"]):
            assert time.monotonic() < deadline and not foreign.done()
        with pytest.raises(SpecDecodeError, match="running or waiting at the end of the window|began 1 requests"):
            module(urls=[server.url], before=before, driven=0)
        assert foreign.result().ok
    settled(server, before, 1)


def test_foreign_traffic_makes_a_trial_void(server, bundle, prompts, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(evaluate, bundle, server, prompts, tmp_path / "out.json", "--model", "small", "--trials", "1")
        while not running.done():
            server.chat(tokens=4)
        answer = running.result()
    assert answer.returncode == 1 and "VOID" in answer.stdout, answer.stdout + answer.stderr
    (trial,) = json.loads((tmp_path / "out.json").read_text())["trials"]
    assert "traffic" in trial["void"] or "requests" in trial["void"] or "tokens" in trial["void"]


def test_evaluation_by_hand(server, bundle, prompts, tmp_path):
    answer = evaluate(
        bundle, server, prompts, tmp_path / "out.json", "--model", "small", "--trials", "2", "--concurrency", "1", "2"
    )
    assert answer.returncode in (0, 1), answer.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    resolved, source, problem = found["context"]["server"]
    assert (source, problem) == ("server_info", "") and resolved["speculative_config.method"] == "ngram"
    assert [trial["client"]["concurrency"] for trial in found["trials"]] == [1, 1, 2, 2]
    assert len({tuple(trial["texts"]) for trial in found["trials"][:2]}) == 1, "greedy answers must not change between trials"
    assert any(not trial["void"] for trial in found["trials"])


def test_wrong_model_name_is_refused(server, bundle, prompts, tmp_path):
    answer = evaluate(bundle, server, prompts, tmp_path / "out.json", "--model", "other")
    assert answer.returncode == 2 and "HTTP 404" in answer.stderr and "Traceback" not in answer.stderr, answer.stderr
    assert not (tmp_path / "out.json").exists()
    before = module(urls=[server.url])["snapshots"]
    with pytest.raises(SpecDecodeError, match="serves small, not other"):
        module(urls=[server.url], before=before, model_name="other")


def test_arm_that_runs_beside_one_that_is_restarted(server, built, bundle, prompts, tmp_path):
    """The standing arm is the server of these tests, K = 3; the other has K = 1 and is up for its own trials only."""
    plan = {
        "model": "small", "target": {"path": str(built.target)}, "prompts": {"path": str(prompts), "count": 6}, "max_tokens": 40,
        "temperature": 0.0, "seed": 0, "warmup": 2, "trials": 3, "aa_trials": 1, "concurrencies": [1], "ports": [0, 0],
        "resident": False,
        "startup_timeout_s": STARTUP_S, "server_arguments": FLAGS, "server_environment": ENVIRONMENT,
        "arms": [
            {"name": "standing", "url": server.url, "speculative_config": NGRAM},
            {"name": "trained", "speculative_config": {**NGRAM, "num_speculative_tokens": 1}},
        ],
    }  # fmt: skip
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/arms.json").write_text(json.dumps(plan))
    out = tmp_path / "acceptance.json"
    command = [str(ENGINE), str(bundle / "measure_arms.py"), "--plan", str(tmp_path / "configs/arms.json"), "--out", str(out)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=2 * STARTUP_S + 60, check=False)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-3000:]
    found = json.loads(out.read_text())
    assert [trial["arm"][0] for trial in found["trials"]] == ["s", "s", "t", "t", "s", "s", "t"]
    assert found["design"] == {"order": "ABBA", "resident": False, "aa_trials": 1, "sweep": []}
    # Neither the arms nor the two starts of one differ in anything but the speculative config.
    assert found["differences"] == [] and found["node"] == platform.node()
    assert {each["field"] for each in found["speculative_differences"]} >= {"speculative_config.num_speculative_tokens"}
    assert found["arms"]["standing"]["resolved"]["max_num_seqs"] == 4 and len(found["arms"]["trained"]["starts_s"]) == 2
    assert {len(t["engine"]["acceptance_per_position"]) for t in found["trials"] if t["arm"] == "trained" and not t["void"]} == {
        1
    }
    assert server.chat(tokens=4).ok, "an arm that runs already must not be stopped"


def test_restart_in_the_window_is_refused(server):
    """Last but one: the server is killed and started anew on the same port."""
    before = module(urls=[server.url])["snapshots"]
    server.kill()
    with pytest.raises(SpecDecodeError, match="could not be scraped"):
        module(urls=[server.url], before=before)
    server.start()
    assert server.chat().ok
    with pytest.raises(SpecDecodeError, match="restarted in the window: its process started anew"):
        module(urls=[server.url], before=before)
    # Where nothing tells when the process started, the counters do.
    without = [{**snapshot, "process_start": None} for snapshot in before]
    with pytest.raises(SpecDecodeError, match="restarted in the window: its counter of .* fell"):
        module(urls=[server.url], before=without)


def test_dead_server_is_refused(server):
    server.kill()
    with pytest.raises(SpecDecodeError, match="could not be scraped: .*[Cc]onnection"):
        vm.scrape(server.url)
