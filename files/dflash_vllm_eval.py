#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drive a vLLM server with chat prompts and measure it: latency at the client, acceptance in the engine.

For every method, whatever this program's name says. TPOT of a request is (last token's time - first token's) /
(output tokens - 1): under speculation several tokens arrive in one chunk, so gaps between chunks are no time per
token. Each trial is checked against the server's own counts of the same requests; one that disagrees is void.

A server that wants a key gets the one in the environment's VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import platform
import ssl
import statistics
import sys
import time
from typing import Any

import aiohttp
from spec_decode import resolved, vllm_metrics
from spec_decode.errors import SpecDecodeError
from spec_decode.files import sha256_file, write_json
from spec_decode.hardware import describe_hardware
from spec_decode.jobs import now
from spec_decode.program import run
from spec_decode.prompts import LAYOUTS, Prompt, read_prompts

# vLLM brings both along. Where the client runs without vLLM, the standard library does the same, only slower.
try:
    from msgspec.json import decode as decode_json
except ImportError:
    from json import loads as decode_json
try:
    from uvloop import run as run_loop
except ImportError:
    from asyncio import run as run_loop

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
    #: times between arrivals that brought tokens; summed up for a trial, not kept
    gaps_s: list[float] = dataclasses.field(default_factory=list, repr=False)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is driven: the same for every trial that is compared."""

    model: str
    prompts: tuple[Prompt, ...]
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False
    timeout_s: float = 600.0

    def body(self, index: int) -> bytes:
        """The request for one prompt; made before the clock starts."""
        message: dict[str, Any] = {
            "model": self.model,
            "messages": list(self.prompts[index]),
            "max_tokens": self.max_tokens,
            # Always explicit: the server's default comes from the checkpoint's generation config.
            "temperature": self.temperature,
            "seed": self.seed + index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            message["ignore_eos"] = True
        return json.dumps(message).encode()


async def one_request(session: aiohttp.ClientSession, url: str, body: bytes, index: int) -> Request:
    """Send one prompt and follow its stream."""
    result = Request(prompt=index)
    texts: list[str] = []
    started = time.perf_counter()
    first = last = 0.0
    finished = False
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                result.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return result
            pending = b""
            async for data in response.content.iter_any():
                # The time of arrival of the bytes, before anything is parsed: events of one packet share it.
                arrived = time.perf_counter()
                *events, pending = (pending + data).split(b"\n\n")
                for event in events:
                    payload = event.lstrip().removeprefix(b"data:").strip()
                    if payload == b"[DONE]":
                        finished = True
                        continue
                    if not payload or payload.startswith(b":"):
                        continue  # a comment that keeps the connection alive
                    message = decode_json(payload)
                    for choice in message.get("choices", ()):
                        delta = choice["delta"]
                        text = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or ""
                        # The first chunk only says who speaks. Any other brings tokens, be their text empty.
                        if not text and "role" in delta and not choice.get("finish_reason"):
                            continue
                        texts.append(text)
                        if not first:
                            first = last = arrived
                        elif arrived != last:
                            result.gaps_s.append(arrived - last)
                            last = arrived
                    if usage := message.get("usage"):
                        result.input_tokens, result.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    elif "error" in message:
                        result.error = str(message["error"])[:200]
                        return result
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
        result.error = f"{type(error).__name__}: {error}"[:200]
        return result
    if not finished or not first:
        result.error = "the stream ended early"
        return result
    result.chunks = len(texts)
    result.e2e_s, result.ttft_s = last - started, first - started
    if result.output_tokens > 1:
        result.tpot_s = (last - first) / (result.output_tokens - 1)
    result.text_sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
    return result


async def drive(url: str, load: Load, access: vllm_metrics.Access | None = None) -> tuple[list[Request], float]:
    """All prompts once, ``concurrency`` at a time; the requests in order of their prompts, and the seconds."""
    access = access or vllm_metrics.Access()
    bodies = [load.body(index) for index in range(len(load.prompts))]
    queue = iter(enumerate(bodies))
    results: list[Request] = []
    headers = {"Content-Type": "application/json"}
    if access.token:
        headers["Authorization"] = f"Bearer {access.token}"
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=load.timeout_s),
        connector=aiohttp.TCPConnector(limit=0, ssl=trusted(access)),
        headers=headers,
    ) as session:

        async def worker() -> None:
            for index, body in queue:
                results.append(await one_request(session, f"{url}/v1/chat/completions", body, index))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _worker in range(load.concurrency)))
        seconds = time.perf_counter() - started
    return sorted(results, key=lambda request: request.prompt), seconds


def trusted(access: vllm_metrics.Access) -> ssl.SSLContext | bool:
    """Which certificates the client believes, as aiohttp takes it."""
    if not access.verify:
        return False
    if not access.ca_path:
        return True
    try:
        return ssl.create_default_context(cafile=access.ca_path)
    except OSError as error:
        raise SpecDecodeError(f"The certificates {access.ca_path} cannot be used: {error}.") from error


def settled_snapshot(
    url: str, before: vllm_metrics.Snapshot, load: Load, finished: int, access: vllm_metrics.Access
) -> vllm_metrics.Snapshot:
    """The counters once they include the last finished request: vLLM counts it just after its last token."""
    deadline = time.monotonic() + COUNTING_S
    while True:
        after = vllm_metrics.scrape(url, access)
        try:
            seen = vllm_metrics.window(before, after, model_name=load.model, speculative=False)["requests"]
        except SpecDecodeError:
            return after  # the trial's own look at this window says why it is void
        idle = not any(sum(engine.gauges.values()) for engine in after.engines.values())
        if (seen >= finished and idle) or time.monotonic() > deadline:
            return after
        time.sleep(0.05)


def run_trial(
    url: str,
    load: Load,
    *,
    speculative: bool,
    access: vllm_metrics.Access | None = None,
    num_speculative_tokens: int | None = None,
) -> dict[str, Any]:
    """One trial: counters, all requests, counters. ``void`` says why it may not be used, or is empty."""
    access = access or vllm_metrics.Access()
    started_at = now()
    before = vllm_metrics.scrape(url, access)
    waited = waited_for_cpu()
    requests, seconds = run_loop(drive(url, load, access))
    waited = waited_for_cpu() - waited
    good = [request for request in requests if not request.error]
    if not good:
        raise SpecDecodeError(f"No request to {url} succeeded: {requests[0].error}.", "See the server's log.")
    after = settled_snapshot(url, before, load, len(good), access)
    client = {**client_figures(requests, good, seconds, load.concurrency), "cpu_wait_s": waited}
    engine: dict[str, Any] = {}
    try:
        engine = vllm_metrics.window(
            before, after, model_name=load.model, driven=len(requests), speculative=False,
            num_speculative_tokens=num_speculative_tokens,
        )  # fmt: skip
        void = disagreement(client, engine)
    except SpecDecodeError as error:
        void = error.message  # other traffic or a restart: this trial is lost, the next may be good
    if speculative and engine and not engine["drafts"]:
        raise SpecDecodeError(
            f"{url} drafted nothing while it answered {len(good)} requests.",
            "Check that it was started with --speculative-config, or measure it as an arm without speculation.",
        )
    return {
        "started_at": started_at,
        "client": client,
        "engine": engine,
        "void": void,
        "texts": [request.text_sha256 for request in requests],
        "requests": [recorded(request) for request in requests],
        "snapshots": {"before": before.as_dict(), "after": after.as_dict()},
    }


def waited_for_cpu() -> float:
    """Seconds that this thread could have run but had no CPU, as Linux counts them; 0 where it does not."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as stream:
            return int(stream.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def recorded(request: Request) -> dict[str, Any]:
    return {name: value for name, value in vars(request).items() if name != "gaps_s"}


def client_figures(requests: list[Request], good: list[Request], seconds: float, concurrency: int) -> dict[str, Any]:
    """What the client saw, over all requests that succeeded."""
    tpots = [request.tpot_s for request in good if request.tpot_s is not None]
    if not tpots:
        raise SpecDecodeError(
            "Every answer had one token, so there is no time per output token.", "Allow longer answers (max_tokens)."
        )
    lengths = [request.output_tokens for request in good]
    decoded = sum(length - 1 for length in lengths)
    return {
        "tpot_ms": {
            **milliseconds(tpots),
            # As vLLM's own figures have it: an answer of one token counts as 0, and sums divided by sums.
            "mean_of_all": 1e3 * sum(tpots) / len(good),
            "of_sums": 1e3 * sum(request.e2e_s - request.ttft_s for request in good) / decoded,
        },
        "ttft_ms": milliseconds([request.ttft_s for request in good]),
        "e2e_ms": milliseconds([request.e2e_s for request in good]),
        # Between arrivals of tokens: under speculation no time per token, for information.
        "itl_ms": milliseconds([gap for request in good for gap in request.gaps_s] or [0.0]),
        "output_tokens_per_s": sum(lengths) / seconds,
        "requests_per_s": len(good) / seconds,
        "input_tokens": spread([request.input_tokens for request in good]),
        "output_tokens": {**spread(lengths), "total": sum(lengths)},
        "requests": len(requests),
        "errors": len(requests) - len(good),
        "seconds": seconds,
        "concurrency": concurrency,
        # Little's law: a trial's beginning and end have fewer in flight than asked for, all the more the fewer its prompts.
        "in_flight": sum(request.e2e_s for request in good) / seconds,
    }


def milliseconds(seconds: list[float]) -> dict[str, float]:
    values = sorted(1e3 * value for value in seconds)
    return {
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
    }


def spread(lengths: list[int]) -> dict[str, float]:
    return {"mean": statistics.fmean(lengths), "min": min(lengths), "max": max(lengths)}


def disagreement(client: dict[str, Any], engine: dict[str, Any]) -> str:
    """Why the client's figures and the server's cannot both be right; empty if they agree."""
    good = client["requests"] - client["errors"]
    # A request that failed at the client may have been counted or not, so its tokens and times cannot be compared.
    if not good <= engine["requests"] <= client["requests"]:
        return f"the server counted {engine['requests']:.0f} requests, the client {good}"
    if client["errors"]:
        return ""
    if engine["generation_tokens"] != client["output_tokens"]["total"]:
        return (
            f"the server generated {engine['generation_tokens']:.0f} tokens,"
            f" the client received {client['output_tokens']['total']}"
        )
    tpot = engine.get("tpot_s")
    if tpot is not None and tpot["mean"]:
        ratio = client["tpot_ms"]["mean_of_all"] / (1e3 * tpot["mean"])
    elif engine["tpot_of_sums_s"]:
        ratio = client["tpot_ms"]["of_sums"] / (1e3 * engine["tpot_of_sums_s"])
    else:
        return "the server has no histogram of the time per output token to check the client's against"
    if abs(ratio - 1) > AGREEMENT:
        said = f"the client's mean TPOT is {ratio:.3f} of the server's, beyond {AGREEMENT:.0%}"
        waited, seconds = client["cpu_wait_s"], client["seconds"]
        if waited > AGREEMENT * seconds:
            # Tokens lie in the socket meanwhile, and are read all at once.
            said += f"; the client waited {waited:.2f} of {seconds:.2f} s for a CPU: give it one that the server does not use"
        return said
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
    parser.add_argument("--prompts", required=True, help="file with prompts, such as a bundle's data/eval.jsonl")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="of the file of prompts; lines: one a line")
    parser.add_argument("--num-prompts", type=int, default=0, help="0: all")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ignore-eos", action="store_true", help="let every answer have max-tokens tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=4, help="requests before the first trial at a concurrency, not counted")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--no-speculation", action="store_true", help="the server does not speculate")
    parser.add_argument("--num-speculative-tokens", type=int, help="for vLLM before 0.9, which does not count drafts")
    parser.add_argument("--timeout", type=float, default=600.0, help="longest time for one request, in seconds")
    parser.add_argument("--ca", default="", help="file of certificates to trust")
    parser.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    lowest = min(options.trials - 1, options.warmup, options.num_prompts, min(options.concurrency) - 1, options.max_tokens - 2)
    if lowest < 0:
        parser.error("trials and concurrency must be at least 1, warmup and num-prompts at least 0 and max-tokens at least 2")
    return options


def main() -> None:
    options = arguments()
    url = options.url.rstrip("/")
    access = vllm_metrics.Access(os.environ.get("VLLM_API_KEY", ""), options.ca, not options.insecure)
    load = Load(
        model=options.model,
        prompts=read_prompts(options.prompts, options.num_prompts, options.layout),
        concurrency=1,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        timeout_s=options.timeout,
    )
    trials = []
    for concurrency in options.concurrency:
        shaped = dataclasses.replace(load, concurrency=concurrency)
        if options.warmup:
            run_loop(drive(url, dataclasses.replace(shaped, prompts=load.prompts[: options.warmup]), access))
        for number in range(1, options.trials + 1):
            trial = run_trial(
                url, shaped, speculative=not options.no_speculation, access=access,
                num_speculative_tokens=options.num_speculative_tokens,
            )  # fmt: skip
            trials.append(trial)
            print(f"concurrency {concurrency}, trial {number}: {sentence(trial)}", flush=True)
    write_json(options.out, {"context": context(url, options, load, access), "trials": trials})
    if any(trial["void"] for trial in trials):
        sys.exit(1)


def sentence(trial: dict[str, Any]) -> str:
    length = trial["engine"].get("acceptance_length")
    return (
        f"TPOT median {trial['client']['tpot_ms']['median']:.2f} ms"
        f", acceptance length {'none' if length is None else f'{length:.3f}'}"
        f"{', VOID: ' + trial['void'] if trial['void'] else ''}"
    )


def context(url: str, options: argparse.Namespace, load: Load, access: vllm_metrics.Access) -> dict[str, Any]:
    """What the figures hold for. Each trial has its own concurrency and token counts beside its figures."""
    return {
        "url": url,
        "model": load.model,
        "server": resolved.of_running(url, access),
        "prompts": {
            "path": os.path.abspath(options.prompts),
            "sha256": sha256_file(options.prompts),
            "count": len(load.prompts),
        },
        "max_tokens": load.max_tokens,
        "ignore_eos": load.ignore_eos,
        "temperature": load.temperature,
        "seed": load.seed,
        "warmup": options.warmup,
        "trials": options.trials,
        "speculative": not options.no_speculation,
        "client": {
            "program": "dflash_vllm_eval.py",
            "node": platform.node(),
            "hardware": describe_hardware(),
            "python": platform.python_version(),
            "event_loop": run_loop.__module__.partition(".")[0],
            "json": decode_json.__module__.partition(".")[0],
        },
        "measured_at": now(),
    }


if __name__ == "__main__":
    run(main)
