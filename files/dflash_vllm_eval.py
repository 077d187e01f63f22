#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drive a vLLM server with chat prompts and measure it: latency at the client, acceptance in the engine.

For every method, whatever this program's name says. TPOT of a request is (last token's time - first token's) /
(output tokens - 1): under speculation several tokens arrive in one chunk, so gaps between chunks are no time per
token. Each trial is checked against the server's own histogram of the same requests; one that disagrees is void.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from typing import Any

import aiohttp
from spec_decode import vllm_metrics
from spec_decode.errors import SpecDecodeError
from spec_decode.files import write_json
from spec_decode.program import run

#: largest relative difference between the client's and the server's mean TPOT
AGREEMENT = 0.05
#: how long the server may take to count the last request of a trial, in seconds
COUNTING_S = 5.0


@dataclasses.dataclass
class Request:
    """One request as the client saw it; times in seconds."""

    prompt: int
    ttft_s: float = 0.0
    tpot_s: float | None = None
    e2e_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    chunks: int = 0
    text_sha256: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is driven: the same for every trial that is compared."""

    model: str
    prompts: tuple[tuple[dict[str, str], ...], ...]
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0


def read_prompts(path: str, count: int) -> tuple[tuple[dict[str, str], ...], ...]:
    """Prompts from rows ``{conversations: [...]}``: everything before the last assistant turn."""
    prompts = []
    try:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                turns = json.loads(line)["conversations"]
                while turns and turns[-1]["role"] == "assistant":
                    turns = turns[:-1]
                if turns:
                    prompts.append(tuple(turns))
    except FileNotFoundError:
        raise SpecDecodeError(f"The prompts {path} do not exist.", "Run the data set phase first.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise SpecDecodeError(f"The prompts {path} are not rows with conversations: {error}.") from error
    if len(prompts) < count:
        raise SpecDecodeError(f"{path} holds {len(prompts)} prompts, but {count} are asked for.", "Ask for fewer.")
    return tuple(prompts[:count]) if count else tuple(prompts)


async def one_request(session: aiohttp.ClientSession, url: str, load: Load, index: int) -> Request:
    """Send one prompt and follow its stream."""
    result = Request(prompt=index)
    body = {
        "model": load.model,
        "messages": list(load.prompts[index]),
        "max_tokens": load.max_tokens,
        # Always explicit: the server's default comes from the checkpoint's generation config.
        "temperature": load.temperature,
        "seed": load.seed + index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    digest = hashlib.sha256()
    started = time.perf_counter()
    first = last = 0.0
    finished = False
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return result
            pending = b""
            async for data in response.content.iter_any():
                # The time of arrival of the bytes, before anything is parsed: events of one packet share it.
                arrived = time.perf_counter()
                pending += data
                *events, pending = pending.split(b"\n\n")
                for event in events:
                    payload = event.strip().removeprefix(b"data:").strip()
                    if payload == b"[DONE]":
                        finished = True
                        continue
                    message = json.loads(payload)
                    if "error" in message:
                        result.error = str(message["error"])[:200]
                        return result
                    usage = message.get("usage")
                    if usage:
                        result.input_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    for choice in message.get("choices", []):
                        text = choice.get("delta", {}).get("content") or choice.get("delta", {}).get("reasoning") or ""
                        if text or choice.get("finish_reason"):
                            last = arrived
                            first = first or arrived
                            result.chunks += 1
                            digest.update(text.encode())
    except (aiohttp.ClientError, asyncio.TimeoutError, json.JSONDecodeError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"[:200]
        return result
    if not finished or not first:
        result.error = "the stream ended early"
        return result
    result.e2e_s, result.ttft_s = last - started, first - started
    if result.output_tokens > 1:
        result.tpot_s = (last - first) / (result.output_tokens - 1)
    result.text_sha256 = digest.hexdigest()
    return result


async def drive(url: str, load: Load) -> tuple[list[Request], float]:
    """All prompts once, ``concurrency`` at a time; the requests in order of their prompts, and the seconds."""
    queue = iter(range(len(load.prompts)))
    results: list[Request] = []
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def worker() -> None:
            for index in queue:
                results.append(await one_request(session, url, load, index))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _worker in range(load.concurrency)))
        seconds = time.perf_counter() - started
    return sorted(results, key=lambda request: request.prompt), seconds


def settled_snapshot(url: str, before: vllm_metrics.Snapshot, load: Load, finished: int) -> vllm_metrics.Snapshot:
    """The counters once they include the last finished request: vLLM counts it just after its last token."""
    deadline = time.monotonic() + COUNTING_S
    while True:
        after = vllm_metrics.scrape(url)
        seen = vllm_metrics.window(before, after, model_name=load.model, speculative=False)["requests"]
        if seen >= finished or time.monotonic() > deadline:
            return after
        time.sleep(0.05)


def run_trial(url: str, load: Load, *, speculative: bool) -> dict[str, Any]:
    """One trial: counters, all requests, counters. ``void`` says why it may not be used, or is empty."""
    before = vllm_metrics.scrape(url)
    requests, seconds = asyncio.run(drive(url, load))
    good = [request for request in requests if not request.error]
    if not good:
        raise SpecDecodeError(f"No request to {url} succeeded: {requests[0].error}.", "See the server's log.")
    after = settled_snapshot(url, before, load, len(good))
    engine = vllm_metrics.window(before, after, model_name=load.model, driven=len(requests), speculative=speculative)
    tpots = [request.tpot_s for request in good if request.tpot_s is not None]
    ttfts = sorted(request.ttft_s for request in good)
    lengths = [request.output_tokens for request in good]
    client = {
        "tpot_ms": {"median": 1e3 * statistics.median(tpots), "mean": 1e3 * statistics.fmean(tpots)},
        "ttft_ms": {"median": 1e3 * statistics.median(ttfts), "p99": 1e3 * percentile(ttfts, 0.99)},
        "e2e_ms": {"median": 1e3 * statistics.median(request.e2e_s for request in good)},
        "output_tokens_per_s": sum(lengths) / seconds,
        "input_tokens": {"mean": statistics.fmean(request.input_tokens for request in good)},
        "output_tokens": {"mean": statistics.fmean(lengths), "total": sum(lengths)},
        "requests": len(requests),
        "errors": len(requests) - len(good),
        "seconds": seconds,
        "concurrency": load.concurrency,
    }
    return {
        "client": client,
        "engine": engine,
        "void": disagreement(client, engine, len(good)),
        "texts": [request.text_sha256 for request in requests],
        "requests": [dataclasses.asdict(request) for request in requests],
        "snapshots": {"before": before.as_dict(), "after": after.as_dict()},
    }


def disagreement(client: dict[str, Any], engine: dict[str, Any], good: int) -> str:
    """Why the client's figures and the server's cannot both be right; empty if they agree."""
    if engine["requests"] != good:
        return f"the server counted {engine['requests']:.0f} requests, the client {good}"
    tpot = engine.get("tpot_s")
    if tpot is None or tpot["mean"] is None:
        return "the server has no histogram of the time per output token to check the client's against"
    ratio = client["tpot_ms"]["mean"] / (1e3 * tpot["mean"])
    if abs(ratio - 1) > AGREEMENT:
        return f"the client's mean TPOT is {ratio:.3f} of the server's, beyond {AGREEMENT:.0%}"
    return ""


def percentile(values: list[float], q: float) -> float:
    """The q-quantile of sorted values, interpolated."""
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="server's address, such as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name that the server serves the model under")
    parser.add_argument("--prompts", required=True, help="JSON lines with conversations")
    parser.add_argument("--num-prompts", type=int, default=0, help="0: all")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=4, help="requests before the first trial, not counted")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--no-speculation", action="store_true", help="the server does not speculate")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    url = options.url.rstrip("/")
    load = Load(
        model=options.model,
        prompts=read_prompts(options.prompts, options.num_prompts),
        concurrency=1,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    if options.warmup:
        asyncio.run(drive(url, dataclasses.replace(load, prompts=load.prompts[: options.warmup])))
    trials = []
    for concurrency in options.concurrency:
        for number in range(1, options.trials + 1):
            trial = run_trial(url, dataclasses.replace(load, concurrency=concurrency), speculative=not options.no_speculation)
            trials.append(trial)
            length = trial["engine"]["acceptance_length"]
            print(
                f"concurrency {concurrency}, trial {number}: TPOT median {trial['client']['tpot_ms']['median']:.2f} ms"
                f", acceptance length {'none' if length is None else f'{length:.3f}'}"
                f"{', VOID: ' + trial['void'] if trial['void'] else ''}",
                flush=True,
            )
    write_json(options.out, {"url": url, "model": options.model, "prompts": os.path.abspath(options.prompts), "trials": trials})
    if any(trial["void"] for trial in trials):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
