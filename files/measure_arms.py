#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Serve the standing config and the trained draft on this machine, and measure them side by side.

Both arms are started one after the other and stay up; trials alternate in ABBA order, so that a drift of the
machine touches both alike. The servers end with this program, however it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import dflash_vllm_eval as client
from spec_decode import resolved
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, read_json_or_none, sha256_value, tail, write_json
from spec_decode.hardware import describe_hardware
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress

#: how often a trial that turned out void is measured again before it stays void
REPEATS = 2
#: what vLLM writes before the text of a line: which process, and for an error when and where
PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ \[\S+\] ?)?")
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception): .+")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, help="JSON: target, server, arms, prompts, trials, concurrencies")
    parser.add_argument("--draft", default="", help="JSON of the staged draft, whose folder replaces {draft} in the arms")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


class Server:
    """One arm's vLLM server: started, ready, stopped."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], port: int, log: str) -> None:
        self.name, self.port, self.log = name, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*command, "--port", str(port)]
        self._environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float, progress: Progress) -> float:
        """Seconds until the server answered ``/health``."""
        refuse_taken_port(self.port)
        started = time.monotonic()
        with open(self.log, "wb") as log:
            # A group of its own in this session: it can be stopped as a whole and still carries the job's mark.
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, process_group=0
            )
        while not self._healthy():
            passed = time.monotonic() - started
            if self._process.poll() is not None:
                raise SpecDecodeError(
                    f"The {self.name} arm's server ended with exit code {self._process.returncode} after {passed:.0f} s."
                    f" Its log ends with:\n{self._last_lines()}",
                    f"See {self.log}.",
                )
            if passed > timeout_s:
                raise SpecDecodeError(
                    f"The {self.name} arm's server was not ready after {timeout_s:.0f} s. Its log ends with:\n"
                    f"{self._last_lines()}",
                    "Raise scaffold_startup_timeout if it only needs longer.",
                )
            progress.update(f"starting the {self.name} arm", int(passed), 0)
            time.sleep(0.5)
        return time.monotonic() - started

    def stop(self) -> None:
        """End the server and everything that it started."""
        if self._process is None:
            return
        for number, grace in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived their parent

    def check_alive(self) -> None:
        """Refuse to go on with a server that died between two trials."""
        if self._process is not None and self._process.poll() is not None:
            raise SpecDecodeError(
                f"The {self.name} arm's server died while it was measured. Its log ends with:\n{self._last_lines()}",
                f"See {self.log}.",
            )

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def resolved_config(self) -> dict[str, Any]:
        """The configuration as the running server resolved it."""
        try:
            return {
                **resolved.flatten(self.get("/server_info?config_format=json")),
                "version": self.get("/version")["version"],
            }
        except (urllib.error.URLError, ValueError, KeyError) as error:
            raise SpecDecodeError(
                f"The {self.name} arm's server does not tell its resolved configuration: {error}.",
                "It must run with VLLM_SERVER_DEV_MODE=1, which this program sets.",
            ) from error

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last_lines(self) -> str:
        return "\n".join(f"    {line}" for line in error_lines(self.log) or tail(self.log, 12))


def error_lines(log: str) -> list[str]:
    """The exceptions that a server's log names, first cause first, without the stacks around them."""
    found: list[str] = []
    message = False
    for line in tail(log, 400):
        text = PREFIX.sub("", line)
        # An exception's message may go on in indented lines, as pydantic's do.
        message = bool(EXCEPTION.match(text)) or (message and text.startswith("  "))
        if message and text not in found:
            found.append(text)
    return found[:6]


def refuse_taken_port(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SpecDecodeError(
                f"Port {port} on this machine is in use already ({error.strerror}).",
                "Stop what uses it, or set scaffold_ports to others (0 takes a free one).",
            ) from error


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def servers(plan: dict[str, Any], draft: dict[str, Any], logs: str) -> dict[str, Server]:
    """The arms' servers, not started yet. They differ in the speculative config and in nothing else."""
    os.makedirs(logs, exist_ok=True)
    made = {}
    for arm, port in zip(plan["arms"], plan["ports"]):
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", plan["target"]["path"],
                   "--served-model-name", plan["model"], "--host", "127.0.0.1", *plan["server_arguments"]]  # fmt: skip
        config = speculative_config(arm, draft)
        if config is not None:
            command += ["--speculative-config", json.dumps(config, sort_keys=True)]
        made[arm["name"]] = Server(
            arm["name"], command, plan["server_environment"], port or free_port(),
            os.path.join(logs, f"server-{arm['name']}.log"),
        )  # fmt: skip
    return made


def speculative_config(arm: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any] | None:
    config = arm.get("speculative_config")
    if not config:
        return None
    if config.get("model") == "{draft}":
        return {**config, "model": draft["draft_dir"]}
    return dict(config)


@contextlib.contextmanager
def running(made: dict[str, Server], timeout_s: float, progress: Progress) -> Iterator[dict[str, float]]:
    """All servers up, one after the other (two at once would profile each other's memory); all down afterwards."""
    try:
        yield {name: server.start(timeout_s, progress) for name, server in made.items()}
    finally:
        for server in made.values():
            server.stop()


def order(names: list[str], trials: int) -> list[tuple[str, int]]:
    """ABBA: every pair holds each arm once, and who goes first alternates."""
    return [(name, pair) for pair in range(1, trials + 1) for name in (names if pair % 2 else names[::-1])]


def measure(
    plan: dict[str, Any], made: dict[str, Server], speculative: dict[str, bool], concurrency: int, progress: Progress
) -> list[dict[str, Any]]:
    """All trials at one concurrency, after a warm-up of each arm that is not counted."""
    prompts = client.read_prompts(plan["prompts"]["path"], plan["prompts"]["count"])
    load = client.Load(
        model=plan["model"],
        prompts=prompts,
        concurrency=concurrency,
        max_tokens=plan["max_tokens"],
        temperature=plan["temperature"],
        seed=plan["seed"],
    )
    for name, server in made.items():
        progress.update(f"warming the {name} arm up at concurrency {concurrency}")
        asyncio.run(client.drive(server.url, dataclasses.replace(load, prompts=prompts[: plan["warmup"]])))
    trials = []
    steps = order(list(made), plan["trials"])
    for number, (name, pair) in enumerate(steps, 1):
        for _attempt in range(1 + REPEATS):
            made[name].check_alive()
            trial = client.run_trial(made[name].url, load, speculative=speculative[name])
            if not trial["void"]:
                break
            print(f"void trial of the {name} arm: {trial['void']}", flush=True)
        del trial["snapshots"]
        trials.append({"arm": name, "pair": pair, "concurrency": concurrency, **trial})
        progress.update(
            f"concurrency {concurrency} · trial {number}/{len(steps)} · {name}"
            f" TPOT {trial['client']['tpot_ms']['median']:.2f} ms",
            number,
            len(steps),
        )
    return trials


def main() -> None:
    options = arguments()
    result = PhaseResult("acceptance", options.out)
    progress = Progress()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the servers are stopped
    plan = read_json_object(options.plan, "measurement plan")
    draft = read_json_object(options.draft, "staged draft") if options.draft else {}
    made = servers(plan, draft, os.path.join(os.path.dirname(os.path.abspath(options.plan)), "..", "jobs", "servers"))
    speculative = {arm["name"]: speculative_config(arm, draft) is not None for arm in plan["arms"]}
    partial = f"{options.out}.partial"
    identity = sha256_value([plan, draft])
    known = read_json_or_none(partial, "partial measurement") or {}
    blocks: dict[str, list[dict[str, Any]]] = known.get("blocks", {}) if known.get("identity") == identity else {}
    with running(made, plan["startup_timeout_s"], progress) as startup:
        configs = {name: server.resolved_config() for name, server in made.items()}
        for concurrency in plan["concurrencies"]:
            if str(concurrency) not in blocks:
                blocks[str(concurrency)] = measure(plan, made, speculative, concurrency, progress)
                write_json(partial, {"identity": identity, "blocks": blocks})
    trials = [trial for concurrency in plan["concurrencies"] for trial in blocks[str(concurrency)]]
    result.complete(
        {
            "plan": plan,
            "draft": draft,
            "arms": {
                arm["name"]: {
                    "speculative_config": speculative_config(arm, draft),
                    "command": made[arm["name"]].command,
                    "startup_s": round(startup[arm["name"]], 1),
                    "resolved": resolved.essentials(configs[arm["name"]]),
                }
                for arm in plan["arms"]
            },
            "differences": resolved.differences(configs),
            "node": platform.node(),
            "hardware": describe_hardware(),
            "trials": trials,
        }
    )
    os.unlink(partial)


if __name__ == "__main__":
    run(main)
