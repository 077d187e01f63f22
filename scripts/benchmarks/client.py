# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The measuring client side by side with ``vllm bench serve``: the same prompts, the same server, taking turns.

Three servers: a real vLLM with ngram speculation, where both must find the same TPOT and acceptance; a stub of a known
pace, where both must find that pace; and a stub that answers faster than any client reads, where the one that drives
more requests in a second is the smaller bottleneck.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import demo

ROOT = demo.ROOT
ENGINE = ROOT / ".engine/bin/python"
TURNS = 4
#: turns on the real server, whose pace drifts by several per cent on a small machine
REAL_TURNS = 10
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FLAGS = [
    "--max-model-len=512", "--max-num-seqs=4", "--max-num-batched-tokens=512", "--dtype=bfloat16",
    "--no-enable-prefix-caching", "--enforce-eager", "--gpu-memory-utilization=0.4",
]  # fmt: skip
ENVIRONMENT = {
    **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip


def measured() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        lay_down_client(folder)
        target = the_target(folder)
        return {
            "context": {
                "machine": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "turns_each": {"real_server": REAL_TURNS, "stubs": TURNS},
                "clients": ["dflash_vllm_eval.py", "vllm bench serve"],
            },
            "real_server": on_a_real_server(folder, target),
            "known_pace": on_a_stub(
                folder, target, ["--tokens", "61", "--tokens-a-chunk", "3", "--gap-ms", "12"], 24, 61, 2, "tpot_ms"
            ),
            "fast_stub": on_a_stub(folder, target, ["--tokens", "32"], 3000, 32, 16, "requests_per_s"),
        }


def lay_down_client(folder: pathlib.Path) -> None:
    """The client beside its library, as in a bundle."""
    shutil.copy(ROOT / "files/dflash_vllm_eval.py", folder)
    (folder / "spec_decode").symlink_to(ROOT / "plugins/module_utils")


def the_target(folder: pathlib.Path) -> pathlib.Path:
    """The demonstration's target, or a smaller one made for this."""
    found = demo.WORK / "targets/tiny-chat"
    if (found / "config.json").exists():
        return found
    made = folder / "small"
    subprocess.run(
        [str(ENGINE), str(ROOT / "demo/build_target.py"), "--out", str(made), "--data", str(folder / "data"), "--layers", "8",
         "--hidden-size", "128", "--heads", "2", "--steps", "60", "--conversations", "2000", "--rows", "200"],
        check=True, stdout=sys.stderr,
    )  # fmt: skip
    return made


def on_a_real_server(folder: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
    prompts, concurrency, tokens = 16, 1, 120
    path = write_prompts(folder, prompts)
    with real_server(folder, target) as url:
        turns = take_turns(folder, url, "small", target, path, prompts, tokens, concurrency, warmup=4, turns=REAL_TURNS)
    context = {
        "server": "vLLM", "target": target.name, "speculative_config": SPECULATION, "flags": FLAGS, "prompts": prompts,
        "output_tokens": tokens, "concurrency": concurrency,
    }  # fmt: skip
    return {"context": context, **side_by_side(turns, ("tpot_ms", "acceptance_length"))}


def on_a_stub(
    folder: pathlib.Path, target: pathlib.Path, options: list[str], prompts: int, tokens: int, concurrency: int, figure: str
) -> dict[str, Any]:
    path = write_prompts(folder, prompts)
    command = [str(ENGINE), str(ROOT / "tests/support/stub_server.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = (server.stdout.readline() if server.stdout else "").strip()
            turns = take_turns(folder, url, "stub", target, path, prompts, tokens, concurrency, warmup=concurrency)
        finally:
            server.terminate()
    context = {"server": "stub", "options": options, "prompts": prompts, "output_tokens": tokens, "concurrency": concurrency}
    return {"context": context, **side_by_side(turns, (figure,))}


def take_turns(
    folder: pathlib.Path, url: str, model: str, target: pathlib.Path, prompts: pathlib.Path, count: int, tokens: int,
    concurrency: int, warmup: int, turns: int = TURNS,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Both clients in ABBA order, so that a drift of the machine touches both alike."""
    clients: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: ours(folder, url, model, prompts, tokens, concurrency, warmup),
        "vllm_bench_serve": lambda: theirs(folder, url, model, target, prompts, count, tokens, concurrency, warmup),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
    for turn in range(turns):
        for name in list(clients) if turn % 2 == 0 else list(clients)[::-1]:
            found[name].append(clients[name]())
    return found


def side_by_side(turns: dict[str, list[dict[str, Any]]], figures: tuple[str, ...]) -> dict[str, Any]:
    """Each figure of both clients, turn by turn, and how they compare.

    The median of the ratios of turns taken side by side, how well the mean of such ratios is known (one standard error),
    and the ratio of the best turns: on a machine that others use, the best turn is the one that they disturbed least.
    """
    table: dict[str, Any] = {}
    for figure in figures:
        best = min if figure == "tpot_ms" else max
        values = {name: [round(turn[figure], 4) for turn in found] for name, found in turns.items()}
        ours, theirs = values["ours"], values["vllm_bench_serve"]
        ratios = [one / other for one, other in zip(ours, theirs)]
        table[figure] = {
            **values,
            "median_ratio": round(statistics.median(ratios), 4),
            "standard_error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4),
            "best_ratio": round(best(ours) / best(theirs), 4),
        }
    return table


def ours(
    folder: pathlib.Path, url: str, model: str, prompts: pathlib.Path, tokens: int, concurrency: int, warmup: int
) -> dict[str, Any]:
    out = folder / "ours.json"
    command = [
        str(ENGINE), str(folder / "dflash_vllm_eval.py"), "--url", url, "--model", model, "--prompts", str(prompts),
        "--max-tokens", str(tokens), "--ignore-eos", "--concurrency", str(concurrency), "--trials", "1",
        "--warmup", str(warmup), "--out", str(out),
    ]  # fmt: skip
    if model == "stub":
        command.append("--no-speculation")
    out.unlink(missing_ok=True)
    # A trial that it calls void ends with 1; it counts here all the same, as the other client judges none of its own.
    subprocess.run(command, stdout=sys.stderr, check=False)
    (trial,) = json.loads(out.read_text())["trials"]
    return {
        "tpot_ms": trial["client"]["tpot_ms"]["median"],
        "requests_per_s": trial["client"]["requests_per_s"],
        "acceptance_length": trial["engine"].get("acceptance_length"),
    }


def theirs(
    folder: pathlib.Path, url: str, model: str, target: pathlib.Path, prompts: pathlib.Path, count: int, tokens: int,
    concurrency: int, warmup: int,
) -> dict[str, Any]:  # fmt: skip
    out = folder / "theirs.json"
    command = [
        str(ENGINE), "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat", "--base-url", url,
        "--endpoint", "/v1/chat/completions", "--model", model, "--tokenizer", str(target), "--dataset-name", "custom",
        "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle", "--num-prompts", str(count),
        "--custom-output-len", str(tokens), "--ignore-eos", "--temperature", "0", "--request-rate", "inf",
        "--max-concurrency", str(concurrency), "--num-warmups", str(warmup), "--disable-tqdm", "--save-result",
        "--result-dir", str(folder), "--result-filename", out.name,
    ]  # fmt: skip
    out.unlink(missing_ok=True)
    subprocess.run(command, stdout=sys.stderr, check=True, env=ENVIRONMENT)
    result = json.loads(out.read_text())
    return {
        "tpot_ms": result["median_tpot_ms"],
        "requests_per_s": result["request_throughput"],
        "acceptance_length": result.get("spec_decode_acceptance_length"),
    }


def write_prompts(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Rows of vLLM's custom layout, which both clients read. Repetition gives ngram speculation something to find."""
    path = folder / "prompts.jsonl"
    words = ("red", "green", "blue", "warm", "cold", "near", "far")
    rows = [{"prompt": f"Say {words[n % 7]} {n} and {words[n % 7]} {n} once more."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def real_server(folder: pathlib.Path, target: pathlib.Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        str(ENGINE), "-m", "vllm.entrypoints.cli.main", "serve", str(target), "--served-model-name", "small",
        "--host", "127.0.0.1", "--port", str(port), "--speculative-config", json.dumps(SPECULATION), *FLAGS,
    ]  # fmt: skip
    log = folder / "server.log"
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1"}
        )
    try:
        deadline = time.monotonic() + 600
        while not answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
