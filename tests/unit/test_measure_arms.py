# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measuring arms whose servers run already: two stub servers of a known pace stand for them."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STUB = ROOT / "tests/support/stub_server.py"


@contextlib.contextmanager
def stub(*options):
    command = [sys.executable, str(STUB), "--tokens", "13", "--gap-ms", "6", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture
def urls():
    """A standing arm with a token every 6 ms, and one that has three a time.

    New ones for each test: ansible-test runs each in a process of its own, which ends what belongs to that test alone.
    """
    with stub() as standing, stub("--tokens-a-chunk", "3") as trained:
        yield standing, trained


@pytest.fixture
def program(programs):
    import measure_arms

    return measure_arms


@pytest.fixture
def plan(urls, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    speculative = {"method": "eagle3", "num_speculative_tokens": 2}
    return {
        "model": "stub", "target": {"path": "/t", "sha": "1"}, "prompts": {"path": str(tmp_path / "prompts.txt"), "count": 2},
        "max_tokens": 13, "temperature": 0.0, "seed": 0, "warmup": 1, "trials": 3, "aa_trials": 1, "concurrencies": [1, 2],
        "startup_timeout_s": 9, "arms": [
            {"name": "standing", "url": urls[0]}, {"name": "trained", "url": urls[1], "speculative_config": speculative},
        ],
    }  # fmt: skip


def measure(program, plan, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs/arms.json").write_text(json.dumps(plan))
    out = tmp_path / "acceptance.json"
    monkeypatch.setattr(sys, "argv", ["measure_arms.py", "--plan", str(tmp_path / "configs/arms.json"), "--out", str(out)])
    program.main()
    return json.loads(out.read_text())


def names(trials):
    return [(trial["concurrency"], trial["arm"], trial["pair"], trial["purpose"]) for trial in trials]


def test_arms_that_run_already(program, plan, urls, tmp_path, monkeypatch):
    found = measure(program, plan, tmp_path, monkeypatch)
    block = [
        ("standing", 4, "noise"), ("standing", 1, "compare"), ("trained", 1, "compare"), ("trained", 2, "compare"),
        ("standing", 2, "compare"), ("standing", 3, "compare"), ("trained", 3, "compare"),
    ]  # fmt: skip
    assert names(found["trials"]) == [(concurrency, *trial) for concurrency in (1, 2) for trial in block]
    assert [trial["position"] for trial in found["trials"]] == list(range(1, 15))
    assert found["arms"]["trained"]["url"] == urls[1] and found["arms"]["trained"]["command"] is None
    assert found["arms"]["standing"]["resolved_from"] == "server_info" and found["arms"]["standing"]["starts_s"] == []
    assert found["design"] == {"order": "ABBA", "resident": True, "aa_trials": 1, "sweep": []}
    for trial in found["trials"]:
        speculates = trial["arm"] == "trained"
        assert trial["engine"]["acceptance_length"] == (3 if speculates else None)
        assert len(trial["texts"]) == 2 and trial["client"]["concurrency"] == trial["concurrency"]
        assert 0 < trial["client"]["in_flight"] <= trial["concurrency"]
    # 6 ms and 2 ms a token, whatever a busy machine adds or takes.
    tpot = {
        arm: statistics.median(t["client"]["tpot_ms"]["median"] for t in found["trials"] if t["arm"] == arm)
        for arm in found["arms"]
    }
    assert tpot["standing"] > 1.5 * tpot["trained"]
    assert len(found["plan"]["prompts"]["sha256"]) == 64
    assert not (tmp_path / "acceptance.json.partial").exists()


def test_more_requests_in_flight_take_more_prompts(program, plan, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("".join(f"question {number}\n" for number in range(8)))
    plan.update(trials=1, aa_trials=0)
    found = measure(program, plan, tmp_path, monkeypatch)
    # Five for one in flight; ten for two, of which the file has eight.
    assert [(trial["concurrency"], len(trial["texts"])) for trial in found["trials"]] == [(1, 5), (1, 5), (2, 8), (2, 8)]


def test_whole_pairs_survive_a_kill(program, plan, tmp_path, monkeypatch):
    taken = []
    real = program.client.run_trial

    def until_the_sixth(url, load, **options):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(load.concurrency)
        return {**real(url, load, **options), "void": ""}

    monkeypatch.setattr(program.client, "run_trial", until_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        measure(program, plan, tmp_path, monkeypatch)
    kept = json.loads((tmp_path / "acceptance.json.partial").read_text())["trials"]
    assert names(kept) == [
        (1, "standing", 4, "noise"), (1, "standing", 1, "compare"), (1, "trained", 1, "compare"), (1, "trained", 2, "compare"),
        (1, "standing", 2, "compare"),
    ]  # fmt: skip
    again = []
    monkeypatch.setattr(program.client, "run_trial", lambda *args, **kw: again.append(1) or {**real(*args, **kw), "void": ""})
    found = measure(program, plan, tmp_path, monkeypatch)
    assert len(found["trials"]) == 14 and len(again) == 9
    assert [t["started_at"] for t in found["trials"][:5]] == [t["started_at"] for t in kept]


def test_one_more_k_and_one_more_concurrency_measure_only_what_is_missing(program, started, tmp_path, monkeypatch):
    taken, real = [], program.client.run_trial
    monkeypatch.setattr(program.client, "run_trial", lambda *args, **kw: taken.append(1) or {**real(*args, **kw), "void": ""})
    started.update(trials=1, aa_trials=0, concurrencies=[1], sweep_num_speculative_tokens=[5])
    first = measure(program, started, tmp_path, monkeypatch)
    started.update(concurrencies=[1, 2], sweep_num_speculative_tokens=[1, 5])
    second = measure(program, started, tmp_path, monkeypatch)
    kept = [trial for trial in second["trials"] if trial["started_at"] <= first["finished_at"]]
    assert [{**trial, "position": 0} for trial in kept] == [{**trial, "position": 0} for trial in first["trials"]]
    assert len(taken) == 4 + 8 and len(second["trials"]) == 12
    # Every new trial of a draft has a standing trial of the same session beside it.
    new = [trial for trial in second["trials"] if trial not in kept]
    assert {(t["pair"], t["concurrency"]) for t in new if t["arm"] == "standing"} == {
        (t["pair"], t["concurrency"]) for t in new if t["arm"] != "standing"
    }
    assert {name: len(arm["starts_s"]) for name, arm in second["arms"].items()} == {
        "standing": 2, "trained": 2, "trained-k1": 1, "trained-k5": 2,
    }  # fmt: skip
    assert second["differences"] == [] and not (tmp_path / "acceptance.json.partial").exists()


def test_void_pair_of_a_finished_measurement_is_measured_again(program, started, tmp_path, monkeypatch):
    started.update(trials=2, aa_trials=0, concurrencies=[1])
    real = program.client.run_trial
    monkeypatch.setattr(program.client, "run_trial", lambda *args, **kw: {**real(*args, **kw), "void": ""})
    first = measure(program, started, tmp_path, monkeypatch)
    first["trials"][0]["void"] = "the machine stalled"
    (tmp_path / "acceptance.json").write_text(json.dumps(first))
    again = measure(program, started, tmp_path, monkeypatch)
    assert [trial["started_at"] > first["finished_at"] for trial in again["trials"]] == [True, True, False, False]
    assert not any(trial["void"] for trial in again["trials"])


def test_another_vllm_measures_everything_again(program, started, tmp_path, monkeypatch):
    started.update(trials=1, aa_trials=0, concurrencies=[1])
    first = measure(program, started, tmp_path, monkeypatch)
    monkeypatch.setattr(program, "engine_version", lambda: "1.0")
    again = measure(program, started, tmp_path, monkeypatch)
    assert all(trial["started_at"] > first["finished_at"] for trial in again["trials"])


def test_draft_that_was_replaced_in_its_folder_is_measured_anew(program, started, tmp_path, monkeypatch):
    started.update(trials=1, aa_trials=0, concurrencies=[1])
    draft = tmp_path / "draft"
    draft.mkdir()
    started["arms"][1]["speculative_config"]["model"] = str(draft)
    (draft / "model.safetensors").write_bytes(b"weights")
    first = measure(program, started, tmp_path, monkeypatch)
    (draft / "model.safetensors").write_bytes(b"other weights")
    again = measure(program, started, tmp_path, monkeypatch)
    assert all(trial["started_at"] > first["finished_at"] for trial in again["trials"])
    shas = [found["arms"]["trained"]["draft_sha"] for found in (first, again)]
    assert shas[0] != shas[1] and again["arms"]["standing"]["draft_sha"] is None


def test_start_that_resolves_otherwise_is_named(program, started, tmp_path, monkeypatch):
    started.update(trials=3, aa_trials=0, concurrencies=[1], resident=False)
    real, looks = program.resolved.of_running, []

    def drifting(*args):
        looks.append(1)
        found = real(*args)
        return found._replace(config={**found.config, "scheduler_config.max_num_seqs": 4 if len(looks) < 4 else 8})

    monkeypatch.setattr(program.resolved, "of_running", drifting)
    found = measure(program, started, tmp_path, monkeypatch)
    named = {each["field"]: each["values"] for each in found["differences"]}
    assert named == {"scheduler_config.max_num_seqs of the trained arm's starts": {"first start": 4, "this start": 8}}


def test_trials_of_another_plan_are_not_taken_over(program, plan, tmp_path, monkeypatch):
    (tmp_path / "acceptance.json.partial").write_text(
        json.dumps({"identity": "other", "trials": [{"arm": "standing"}], "seen": {}})
    )
    assert len(measure(program, {**plan, "trials": 1, "concurrencies": [1]}, tmp_path, monkeypatch)["trials"]) == 3


def test_void_trial_is_measured_again(program, plan, tmp_path, monkeypatch):
    real, seen = program.client.run_trial, []

    def void_twice(*args, **options):
        seen.append(1)
        return {**real(*args, **options), "void": "the machine stalled" if len(seen) < 3 else ""}

    monkeypatch.setattr(program.client, "run_trial", void_twice)
    found = measure(program, {**plan, "trials": 1, "aa_trials": 0, "concurrencies": [1]}, tmp_path, monkeypatch)
    assert len(seen) == 4 and [trial["void"] for trial in found["trials"]] == ["", ""]


def test_server_that_speculates_otherwise_than_the_plan_says(program, plan, tmp_path, monkeypatch):
    real = program.resolved.of_running

    def three_tokens(*args):
        found = real(*args)
        return found._replace(config={**found.config, "speculative_config.num_speculative_tokens": 3})

    monkeypatch.setattr(program.resolved, "of_running", three_tokens)
    with pytest.raises(program.SpecDecodeError, match="standing arm's server at .* is not what the plan says: it drafts 3"):
        measure(program, plan, tmp_path, monkeypatch)


def test_server_that_drafts_unasked(program, plan, urls, tmp_path, monkeypatch):
    """It need not tell its configuration: its counters do."""
    plan["arms"][0]["url"] = urls[1]
    with pytest.raises(program.SpecDecodeError, match="drafted, though the plan names no speculative_config"):
        measure(program, plan, tmp_path, monkeypatch)


def test_running_server_that_was_started_again_is_measured_again(program, plan, tmp_path, monkeypatch):
    taken, real = [], program.client.run_trial
    monkeypatch.setattr(program.client, "run_trial", lambda *args, **kw: taken.append(1) or {**real(*args, **kw), "void": ""})
    plan.update(trials=1, aa_trials=0, concurrencies=[1])
    measure(program, plan, tmp_path, monkeypatch)
    measure(program, plan, tmp_path, monkeypatch)
    assert len(taken) == 2
    with stub("--tokens-a-chunk", "3") as trained:
        plan["arms"][1]["url"] = trained
        measure(program, plan, tmp_path, monkeypatch)
        assert len(taken) == 4
    with pytest.raises(program.SpecDecodeError, match="does not answer /health"):
        measure(program, plan, tmp_path, monkeypatch)


def test_no_proxy_is_asked_for_this_machine_and_none_is_told_the_token(program, urls, monkeypatch):
    import arm_servers

    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert arm_servers.healthy(urls[0], program.Access("sekret"))


def test_start_of_a_running_server_tells_it_from_an_earlier_one(program, urls):
    from arm_servers import RunningServer

    first, other = (RunningServer("a", url, "", program.Access()).running_since() for url in urls)
    assert first == RunningServer("a", urls[0], "", program.Access()).running_since() != other


def test_server_that_is_not_there(program, plan, tmp_path, monkeypatch):
    from spec_decode.errors import SpecDecodeError

    plan["arms"][0]["url"] = "http://127.0.0.1:9"
    with pytest.raises(SpecDecodeError, match="The standing arm's server at http://127.0.0.1:9 does not answer /health"):
        measure(program, plan, tmp_path, monkeypatch)


@pytest.fixture
def started(program, plan, tmp_path, monkeypatch):
    """The plan with arms that are started: a stub process stands for each vLLM, with as many tokens a chunk as K says."""
    from arm_servers import Server, free_port

    def stubs(_plan, made, logs, _access):
        found = {}
        for arm in made.values():
            tokens = 1 + (arm.num_speculative_tokens or 0)
            command = [sys.executable, str(STUB), "--tokens", "13", "--gap-ms", "6", "--tokens-a-chunk", str(tokens)]
            found[arm.name] = Server(arm.name, command, {}, free_port(), str(tmp_path / f"{arm.name}.log"))
        return found

    monkeypatch.setattr(program, "servers", stubs)
    for arm in plan["arms"]:
        del arm["url"]
    return plan


@pytest.mark.parametrize(("resident", "starts"), [(False, {"standing": 2, "trained": 2}), (True, {"standing": 1, "trained": 1})])
def test_servers_are_started_as_the_design_says(program, started, resident, starts, tmp_path, monkeypatch):
    started.update(trials=3, aa_trials=0, concurrencies=[1], resident=resident)
    found = measure(program, started, tmp_path, monkeypatch)
    assert {name: len(arm["starts_s"]) for name, arm in found["arms"].items()} == starts
    assert [trial["arm"][0] for trial in found["trials"]] == ["s", "t", "t", "s", "s", "t"]
    assert found["design"]["resident"] is resident and found["arms"]["standing"]["command"][1] == str(STUB)
    for arm in found["arms"].values():
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{arm['url']}/health", timeout=5)


@pytest.mark.parametrize(
    ("flags", "order"),
    [([], ["start", "wait", "start", "wait"]), (["--kv-cache-memory-bytes=4294967296"], ["start", "start", "wait", "wait"])],
)
def test_servers_that_are_told_their_memory_start_at_once(program, started, flags, order, tmp_path, monkeypatch):
    from arm_servers import Server

    seen = []
    for name in ("start", "wait"):
        real = getattr(Server, name)
        monkeypatch.setattr(Server, name, lambda *args, name=name, real=real: seen.append(name) or real(*args))
    started.update(trials=1, aa_trials=0, concurrencies=[1], server_arguments=flags)
    measure(program, started, tmp_path, monkeypatch)
    assert seen == order


def test_sockets_that_a_server_leaves_behind_go_with_it(programs, tmp_path, monkeypatch):
    from arm_servers import Server, free_port, socket_folder

    words = "import os, pathlib, time; pathlib.Path(os.environ['VLLM_RPC_BASE_PATH'], 'left').touch(); time.sleep(60)"
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr("tempfile.tempdir", short)
        server = Server("standing", [sys.executable, "-c", words], {}, free_port(), str(tmp_path / "log"))
        server.start()
        deadline = time.monotonic() + 30
        while not list(pathlib.Path(short).glob("*/left")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(list(pathlib.Path(short).glob("*/left"))) == 1
        server.stop()
        assert list(pathlib.Path(short).iterdir()) == []
    # Where the folder's own name is long already, vLLM is left to its own.
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert socket_folder() is None and list(deep.iterdir()) == []


def test_sweep_measures_each_k_beside_the_standing_arm(program, started, tmp_path, monkeypatch):
    started.update(trials=1, aa_trials=0, concurrencies=[1], sweep_num_speculative_tokens=[1, 5])
    found = measure(program, started, tmp_path, monkeypatch)
    assert [trial["arm"] for trial in found["trials"]] == [
        "standing", "trained", "standing", "trained-k1", "standing", "trained-k5",
    ]  # fmt: skip
    assert found["design"]["sweep"] == [1, 5] and [arm["sweep"] for arm in found["arms"].values()] == [False, False, True, True]
    lengths = {trial["arm"]: trial["engine"].get("acceptance_length") for trial in found["trials"]}
    assert lengths == {"standing": None, "trained": 3, "trained-k1": 2, "trained-k5": 6}


def test_server_is_not_told_of_folders_that_it_may_not_search(programs, tmp_path, monkeypatch):
    """vLLM's /server_info looks for programs in all of them, and ends with an error at the first that it may not enter."""
    from arm_servers import Server, searchable

    closed = str(tmp_path / "closed")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and real(path, mode))
    assert searchable(f"/usr/bin:{closed}:/bin") == "/usr/bin:/bin"
    words = "import os; print('ValueError:', os.environ['PATH'], flush=True); raise SystemExit(3)"
    server = Server("standing", [sys.executable, "-c", words], {"PATH": f"{closed}:/bin"}, 0, str(tmp_path / "log"))
    from spec_decode.errors import SpecDecodeError
    from spec_decode.progress import Progress

    with pytest.raises(SpecDecodeError, match="ValueError: /bin See"):
        server.start()
        server.wait(30, Progress(""))


def test_server_that_ends_or_takes_too_long_says_its_last_words(programs, tmp_path):
    from arm_servers import Server, free_port
    from spec_decode.errors import SpecDecodeError
    from spec_decode.progress import Progress

    words = "print('ValueError: no such model', flush=True); raise SystemExit(3)"
    server = Server("standing", [sys.executable, "-c", words], {}, free_port(), str(tmp_path / "log"))
    with pytest.raises(
        SpecDecodeError, match=r"ended with exit code 3 after [0-9]+ s. Its log ends with:\n    ValueError: no such model"
    ):
        server.start()
        server.wait(30, Progress(""))
    slow = Server("trained", [sys.executable, "-c", "import time; time.sleep(60)"], {}, free_port(), str(tmp_path / "log"))
    slow.start()
    with pytest.raises(SpecDecodeError, match="was not ready after [0-9]+ s"):
        slow.wait(0.1, Progress(""))
    slow.stop()
    assert not slow.up


def test_exceptions_are_told_without_the_process_that_met_them(programs, tmp_path):
    import engine_log

    log = tmp_path / "log"
    log.write_text(
        "Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-25 07:39:45 [core.py:1] ValueError: of the engine\n"
        "[rank0]: AssertionError: Error in memory profiling.\n"
        "[rank0]:[W1125 07:39:45.735345194 Process.cpp:1575] Warning: not an exception\n"
    )
    assert engine_log.error_lines(str(log)) == ["ValueError: of the engine", "AssertionError: Error in memory profiling."]


class Recorded:
    """A server that only notes what is done to it."""

    def __init__(self, name, notes):
        self.name, self.notes, self.up = name, notes, False

    def start(self):
        self.notes.append(f"start {self.name}")

    def wait(self, _timeout_s, _progress):
        self.notes.append(f"wait {self.name}")
        self.up = True

    def stop(self):
        if self.up:
            self.notes.append(f"stop {self.name}")
        self.up = False


def test_servers_change_one_at_a_time_and_all_stop(programs):
    from arm_servers import Fleet

    notes = []
    with Fleet({name: Recorded(name, notes) for name in "abc"}, 1.0, None) as fleet:
        for names_needed in (("a",), ("b",), ("b",), ("a", "c")):
            fleet.need(names_needed)
    assert notes == [
        "start a", "wait a", "stop a", "start b", "wait b", "stop b",
        "start a", "wait a", "start c", "wait c", "stop a", "stop c",
    ]  # fmt: skip
