# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The measuring client against a stub server: bursts, split events, errors, and the check against the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest
from aiohttp import web

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
        self.tpot_sum += self.reported_tpot_s or (last - first) / (TOKENS - 1)
        return response

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
            text="process_start_time_seconds 1\n"
            f"vllm:request_success_total{labels} {self.finished}\n"
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


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 4])
def test_tpot_is_time_per_token_whatever_a_chunk_holds(client, load, tokens_a_chunk):
    stub = Stub()
    stub.tokens_a_chunk = tokens_a_chunk
    stub.gap_s = 0.05  # so long that a busy machine's delays stay below the tolerance
    found = trial(client, load, stub)
    assert not found["void"]
    expected = 1e3 * stub.tpot_sum / 4
    assert found["client"]["tpot_ms"]["mean"] == pytest.approx(expected, rel=0.05)
    assert found["client"]["output_tokens"] == {"mean": TOKENS, "total": 4 * TOKENS}
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


def test_trial_that_the_server_contradicts_is_void(client, load):
    stub = Stub()
    stub.reported_tpot_s = 0.5
    assert "of the server's, beyond 5%" in trial(client, load, stub)["void"]


@pytest.mark.parametrize(
    ("fail", "words"), [("status", "HTTP 503"), ("early", "ended early|ClientPayload|Closed"), ("error", "engine died")]
)
def test_server_that_fails_is_one_clear_error(client, load, fail, words):
    from spec_decode.errors import SpecDecodeError

    stub = Stub()
    stub.fail = fail
    with pytest.raises(SpecDecodeError, match=f"No request to .* succeeded: .*({words})"):
        trial(client, load, stub)


def test_prompts_leave_the_last_answer_out(client, tmp_path):
    rows = tmp_path / "eval.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    rows.write_text(json.dumps({"id": 1, "conversations": turns}) + "\n")
    (prompt,) = client.read_prompts(str(rows), 1)
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user"]
    from spec_decode.errors import SpecDecodeError

    with pytest.raises(SpecDecodeError, match="holds 1 prompts, but 2 are asked for"):
        client.read_prompts(str(rows), 2)
