# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The measuring client against a stub server: bursts, split events, errors, and the check against the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from aiohttp import web

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOKENS = 8


class Stub:
    """A server that speaks just enough of vLLM's API; ``pieces`` cuts the event stream anywhere."""

    def __init__(self) -> None:
        self.finished = 0
        self.tpot_sum = 0.0
        self.tokens_a_chunk = 1
        self.gap_s = 0.01
        self.cut = 0
        self.fail = ""
        self.bodies: list[dict] = []
        self.reported_tpot_s: float | None = None
        self.foreign_tokens = 0
        self.foreign_requests = 0
        self.starts = 1

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.fail == "status":
            return web.json_response({"error": "overloaded"}, status=503)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        first = last = loop.time()
        for place in range(0, TOKENS, self.tokens_a_chunk):
            if place:
                await asyncio.sleep(self.gap_s * self.tokens_a_chunk)
            last = loop.time()
            first = first if place else last
            await self.send(response, {"choices": [{"delta": {"content": "ä b " * self.tokens_a_chunk}}]})
            if self.fail == "early" and place:
                return response
            if self.fail == "error":
                await self.send(response, {"error": {"message": "engine died"}})
        usage = {"prompt_tokens": 5, "completion_tokens": TOKENS}
        await self.send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self.finished += 1
        self.during()
        self.tpot_sum += self.reported_tpot_s or (last - first) / (TOKENS - 1)
        return response

    def during(self) -> None:
        """What else happens while a request is served."""

    async def send(self, response: web.StreamResponse, message: dict) -> None:
        data = f"data: {json.dumps(message, ensure_ascii=False)}\n\n".encode()
        if not self.cut:
            await response.write(data)
            return
        for start in range(0, len(data), self.cut):
            await response.write(data[start : start + self.cut])
            await asyncio.sleep(0)

    async def metrics(self, _request: web.Request) -> web.Response:
        labels = '{engine="0",model_name="m"}'
        name = "vllm:request_time_per_output_token_seconds"
        return web.Response(
            text=f"process_start_time_seconds {self.starts}\n"
            f"vllm:request_success_total{labels} {self.finished + self.foreign_requests}\n"
            f"vllm:generation_tokens_total{labels} {self.finished * TOKENS + self.foreign_tokens}\n"
            f'{name}_bucket{{engine="0",model_name="m",le="+Inf"}} {self.finished}\n'
            f"{name}_sum{labels} {self.tpot_sum}\n{name}_count{labels} {self.finished}\n"
        )


@contextlib.contextmanager
def serving(stub):
    started, stop = threading.Event(), threading.Event()
    address: list[str] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", stub.chat)
        app.router.add_get("/metrics", stub.metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, stop.wait)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield address[0]
    finally:
        stop.set()
        thread.join(10)


@pytest.fixture
def client(programs):
    import dflash_vllm_eval

    return dflash_vllm_eval


@pytest.fixture
def load(client):
    prompts = tuple(({"role": "user", "content": f"question {number}"},) for number in range(4))
    return client.Load(model="m", prompts=prompts, concurrency=1, max_tokens=16, seed=3)


def trial(client, load, stub, speculative=False):
    with serving(stub) as url:
        return client.run_trial(url, load, speculative=speculative)


def undisturbed(take):
    """A trial during which the machine did not stall: one that does is void by the 5 % between client and server."""
    for _attempt in range(5):
        found = take()
        if not found["void"]:
            break
    return found


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 4])
def test_tpot_is_time_per_token_whatever_a_chunk_holds(client, load, tokens_a_chunk):
    def take():
        nonlocal stub
        stub = Stub()
        stub.tokens_a_chunk = tokens_a_chunk
        stub.gap_s = 0.05  # so long that a busy machine's delays stay below the tolerance
        return trial(client, load, stub)

    stub = Stub()
    found = undisturbed(take)
    assert not found["void"]
    expected = 1e3 * stub.tpot_sum / 4
    assert found["client"]["tpot_ms"]["mean"] == pytest.approx(expected, rel=0.05)
    assert found["client"]["output_tokens"] == {"mean": TOKENS, "min": TOKENS, "max": TOKENS, "total": 4 * TOKENS}
    assert found["client"]["tpot_ms"]["of_sums"] == pytest.approx(expected, rel=0.05)
    assert found["client"]["itl_ms"]["median"] >= 50 * tokens_a_chunk * 0.9
    assert found["client"]["errors"] == 0 and found["client"]["input_tokens"]["mean"] == 5


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_events_cut_anywhere_are_put_together(client, load, cut):
    stub = Stub()
    stub.cut = cut
    whole = trial(client, load, Stub())
    assert trial(client, load, stub)["texts"] == whole["texts"]
    assert len(set(whole["texts"])) == 1 and whole["texts"][0]


def test_what_is_sent_is_explicit(client, load):
    stub = Stub()
    trial(client, load, stub)
    assert [body["messages"][0]["content"] for body in stub.bodies] == [f"question {n}" for n in range(4)]
    assert all(body["temperature"] == 0.0 and body["stream"] and body["max_tokens"] == 16 for body in stub.bodies)
    assert [body["seed"] for body in stub.bodies] == [3, 4, 5, 6]


def test_all_prompts_are_driven_at_any_concurrency(client, load):
    import dataclasses

    stub = Stub()
    found = trial(client, dataclasses.replace(load, concurrency=3), stub)
    assert found["client"]["requests"] == 4 and [request["prompt"] for request in found["requests"]] == [0, 1, 2, 3]


def test_requests_in_flight_are_counted_and_not_believed(client):
    # Four answers of 1 s through three slots take 2 s: the second round has one request in flight.
    requests = [client.Request(prompt=n, ttft_s=0.1, tpot_s=0.1, e2e_s=1.0, output_tokens=10) for n in range(4)]
    assert client.client_figures(requests, requests, 2.0, 3)["in_flight"] == pytest.approx(2.0)


def test_trial_that_the_server_contradicts_is_void(client, load):
    stub = Stub()
    stub.reported_tpot_s = 0.5
    assert "of the server's, beyond 5%" in trial(client, load, stub)["void"]


def test_a_client_that_got_no_cpu_says_so(client, load, monkeypatch):
    """vLLM's engine polls: on few CPUs a client in another control group reads many tokens at once."""
    counted = iter([1.0, 9.0, 0.0, 0.0])
    monkeypatch.setattr(client, "waited_for_cpu", lambda: next(counted))
    stub = Stub()
    stub.reported_tpot_s = 0.5
    found = trial(client, load, stub)
    assert "; the client waited 8.00 of 0." in found["void"] and found["client"]["cpu_wait_s"] == 8
    assert "for a CPU" not in trial(client, load, stub)["void"]


def test_waiting_for_a_cpu_is_counted(client):
    """A thread that shares one CPU with a busy process of the same weight waits for about half of its time."""
    one = {min(os.sched_getaffinity(0))}
    spin = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {one})\nwhile True: pass"])
    before, allowed = client.waited_for_cpu(), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, one)
        until = time.monotonic() + 10
        while client.waited_for_cpu() - before < 0.05:
            assert time.monotonic() < until
    finally:
        os.sched_setaffinity(0, allowed)
        spin.kill()
        spin.wait()


@pytest.mark.parametrize(
    ("fail", "words"), [("status", "HTTP 503"), ("early", "ended early|ClientPayload|Closed"), ("error", "engine died")]
)
def test_server_that_fails_is_one_clear_error(client, load, fail, words):
    from spec_decode.errors import SpecDecodeError

    stub = Stub()
    stub.fail = fail
    with pytest.raises(SpecDecodeError, match=f"No request to .* succeeded: .*({words})"):
        trial(client, load, stub)


def test_other_traffic_or_a_restart_makes_a_trial_void(client, load):
    def foreign_request(stub):
        stub.foreign_requests += stub.finished == 2

    def foreign_tokens(stub):
        stub.foreign_tokens += 3 * (stub.finished == 2)

    def restart(stub):
        stub.starts += stub.finished == 2

    found = {}
    for happening in (foreign_request, foreign_tokens, restart):
        stub = Stub()
        stub.during = lambda stub=stub, happening=happening: happening(stub)
        found[happening] = trial(client, load, stub)
    assert "finished 5 requests in the window, but only 4 were driven" in found[foreign_request]["void"]
    assert found[foreign_tokens]["void"] == "the server generated 35 tokens, the client received 32"
    assert "restarted in the window: its process started anew" in found[restart]["void"]
    assert all(one["client"]["requests"] == 4 for one in found.values())


def test_failed_requests_are_errors_and_do_not_void_the_trial(client, load):
    stub = Stub()

    async def fails_once(request, real=stub.chat):
        stub.fail = "status" if not stub.bodies else ""
        return await real(request)

    stub.chat = fails_once
    found = trial(client, load, stub)
    assert (found["client"]["errors"], found["void"], found["engine"]["requests"]) == (1, "", 3)


def test_speculating_arm_that_drafts_nothing_is_refused(client, load):
    from spec_decode.errors import SpecDecodeError

    with pytest.raises(SpecDecodeError, match="drafted nothing while it answered 4 requests"):
        trial(client, load, Stub(), speculative=True)


@pytest.fixture
def paced():
    """A server of its own process that sends three tokens a chunk, every 20 ms."""
    command = [
        sys.executable,
        str(ROOT / "tests/support/stub_server.py"),
        "--tokens",
        "31",
        "--tokens-a-chunk",
        "3",
        "--gap-ms",
        "20",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.terminate()


def test_by_hand_against_a_known_pace(client, paced, tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("one\ntwo\nthree\n")
    monkeypatch.setattr(
        sys, "argv", ["dflash_vllm_eval.py", "--url", paced + "/", "--model", "stub", "--prompts", str(prompts), "--concurrency",
                      "1", "3", "--warmup", "1", "--trials", "1", "--out", str(out)],
    )  # fmt: skip
    with contextlib.suppress(SystemExit):  # a trial that a stall made void ends with 1, after all is written
        client.main()
    found = json.loads(out.read_text())
    assert [trial["client"]["concurrency"] for trial in found["trials"]] == [1, 3]
    for trial in found["trials"]:
        for request in trial["requests"]:
            # 31 tokens in 11 chunks: the time from the first to the last is that of 30 tokens, not of 10 chunks.
            assert (request["output_tokens"], request["chunks"]) == (31, 11)
            assert request["tpot_s"] == pytest.approx((request["e2e_s"] - request["ttft_s"]) / 30)
            assert request["e2e_s"] - request["ttft_s"] > 0
        assert trial["engine"]["acceptance_length"] == 3 and trial["client"]["requests"] == 3
    assert found["context"]["prompts"]["count"] == 3 and found["context"]["server"][1] == "server_info"
    assert "concurrency 3, trial 1: TPOT median" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("--num-prompts", "-5"), ("--trials", "0"), ("--concurrency", "1", "0"), ("--max-tokens", "1")]
)
def test_numbers_that_nothing_can_be_measured_with_are_refused(client, monkeypatch, capsys, words):
    given = ["dflash_vllm_eval.py", "--url", "http://127.0.0.1:9", "--model", "m", "--prompts", "p", "--out", "o", *words]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        client.main()
    assert "num-prompts at least 0" in capsys.readouterr().err
