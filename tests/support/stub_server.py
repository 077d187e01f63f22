#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A server that streams made-up answers as vLLM does, faster than any client reads them or at an exact pace.

For tests and benchmarks of measuring clients: what they are to find is known. It computes nothing, so it stays out of
the way; it counts what it sends as vLLM counts it. Prints its address once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import socket
import time

try:
    from uvloop import run as run_loop
except ImportError:
    from asyncio import run as run_loop

LENGTH = b"content-length:"


@dataclasses.dataclass
class Answer:
    """What every request gets."""

    model: str = "stub"
    tokens: int = 32
    tokens_a_chunk: int = 1
    #: pause before each chunk after the first; 0 sends all of them at once
    gap_s: float = 0.0
    prompt_tokens: int = 7

    @property
    def drafts(self) -> int:
        """Every chunk after the first is a verified draft of tokens_a_chunk - 1 tokens, all accepted, and the bonus token."""
        return (self.tokens - 1) // self.tokens_a_chunk if self.tokens_a_chunk > 1 else 0

    def chunks(self) -> list[bytes]:
        """The first token alone, the others by ``tokens_a_chunk``; then the usage and the end."""
        base = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": self.model}
        sizes = [1]
        while sum(sizes) < self.tokens:
            sizes.append(min(self.tokens_a_chunk, self.tokens - sum(sizes)))
        deltas: list[dict] = [{"role": "assistant", "content": ""}, *({"content": "word " * size} for size in sizes)]
        events = [
            {**base, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]} for delta in deltas
        ]
        events[-1]["choices"][0]["finish_reason"] = "length"
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": 0}
        events.append({**base, "choices": [], "usage": usage})
        framed = [http_chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n") for event in events]
        # Who speaks comes with the first token; usage and end come with the last.
        return [framed[0] + framed[1], *framed[2:-2], framed[-2] + framed[-1] + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"]


@dataclasses.dataclass
class Counts:
    """What vLLM's counters would say."""

    requests: int = 0
    decode_s: float = 0.0
    tpot_s: float = 0.0
    started: float = dataclasses.field(default_factory=time.time)

    def text(self, answer: Answer) -> str:
        labels = f'engine="0",model_name="{answer.model}"'
        drafts = self.requests * answer.drafts
        width = answer.tokens_a_chunk - 1
        values = {
            "vllm:request_success_total": self.requests,
            "vllm:generation_tokens_total": self.requests * answer.tokens,
            "vllm:prompt_tokens_total": self.requests * answer.prompt_tokens,
            "vllm:num_requests_running": 0,
            **{
                f"vllm:{name}{part}": value
                for name, total in (
                    ("request_time_per_output_token_seconds", self.tpot_s),
                    ("request_decode_time_seconds", self.decode_s),
                )
                for part, value in (("_sum", total), ("_count", self.requests))
            },
        }
        if width:
            values["vllm:spec_decode_num_drafts_total"] = drafts
            values["vllm:spec_decode_num_draft_tokens_total"] = drafts * width
            values["vllm:spec_decode_num_accepted_tokens_total"] = drafts * width
        lines = [f"process_start_time_seconds {self.started}", *(f"{name}{{{labels}}} {value}" for name, value in values.items())]
        lines += [
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="{place}"}} {drafts}'
            for place in range(width)
        ]
        return "\n".join(lines) + "\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests on it come one after the other."""

    def __init__(self, answer: Answer, counts: Counts, chunks: list[bytes]) -> None:
        self._answer, self._counts, self._chunks = answer, counts, chunks
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport) -> None:
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, _error) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            lowered = head.lower()
            place = lowered.find(LENGTH)
            length = int(lowered[place + len(LENGTH) :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._respond(head.split(b" ", 2)[1])

    def _respond(self, path: bytes) -> None:
        if path == b"/v1/chat/completions":
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            if self._answer.gap_s:
                asyncio.get_running_loop().create_task(self._paced(head))
                return
            self._transport.write(head + b"".join(self._chunks))
            self._counts.requests += 1
            return
        pages = {
            b"/metrics": ("text/plain", lambda: self._counts.text(self._answer)),
            b"/health": ("text/plain", lambda: ""),
            b"/server_info": ("application/json", lambda: json.dumps({"vllm_config": {"model_config": {"dtype": "none"}}})),
            b"/version": ("application/json", lambda: json.dumps({"version": "0.0.stub"})),
            b"/v1/models": (
                "application/json",
                lambda: json.dumps({"data": [{"id": self._answer.model, "max_model_len": 4096}]}),
            ),
        }
        kind, page = pages.get(path.partition(b"?")[0], ("text/plain", None))
        status = "200 OK" if page else "404 Not Found"
        body = (page() if page else "not found").encode()
        self._transport.write(f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    async def _paced(self, head: bytes) -> None:
        """Chunks at exact times from the first one on, so that pauses do not add up their errors."""
        started = time.perf_counter()
        self._transport.write(head + self._chunks[0])
        for number, chunk in enumerate(self._chunks[1:], 1):
            await asyncio.sleep(started + number * self._answer.gap_s - time.perf_counter())
            if self._transport is None:
                return
            self._transport.write(chunk)
        seconds = time.perf_counter() - started
        self._counts.requests += 1
        self._counts.decode_s += seconds
        self._counts.tpot_s += seconds / (self._answer.tokens - 1)


async def serve(answer: Answer, port: int, host: str = "127.0.0.1") -> None:
    counts, chunks = Counts(), answer.chunks()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(answer, counts, chunks), host, port)
    print(f"http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tokens-a-chunk", type=int, default=1)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    options = parser.parse_args()
    answer = Answer(options.model, options.tokens, options.tokens_a_chunk, options.gap_ms / 1e3)
    run_loop(serve(answer, options.port))


if __name__ == "__main__":
    main()
