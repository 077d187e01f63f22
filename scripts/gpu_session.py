#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The experiments of docs/gpu.md one after the other, and what of them is kept as evidence.

``run`` is for a GPU that is to be had for a short time: it builds the target, trains both drafts beside each other, and
then measures one experiment after the other, alone. Started again, it goes on: every play finds what is done already.
``evidence`` copies what a reader needs out of the bundles, with this machine's paths and name replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENGINE, CONTROLLER = str(ROOT / ".engine/bin/python"), str(ROOT / ".venv/bin/python")
TARGET = "gpu-chat"
STAGES = ("target", "train", "eagle3", "ngram", "dflash")
#: prompt lookup as a standing configuration, with as many tokens a step as the trained draft has
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
#: without these vLLM 0.24 runs another model runner and another scheduler with ngram than without it
NGRAM_ARGUMENTS, NGRAM_ENVIRONMENT = ["--no-async-scheduling"], {"VLLM_USE_V2_MODEL_RUNNER": "0"}
#: of a bundle, what tells what was done and found; no YAML, no features, no weights
KEPT = ("experiment.json", "HANDOFF.md", "report.md", "report.html", "configs/*.json", "results/*.json",
        "results/*.partial", "jobs/*/*.log", "train/*/metrics.jsonl")  # fmt: skip
#: single times and answers' tokens of every request: megabytes, and no figure rests on them that is not there beside them
DROPPED = ("requests", "snapshots")
NOISE = re.compile(r'it/s\]|s/it\]|\d%\||"(GET|POST) /\S* HTTP/1\.1" 200|\] Route: /')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("run", help="build, train and measure")
    each.add_argument("--work", type=pathlib.Path, default=ROOT / ".demo", help="where everything goes")
    each.add_argument("--engine", type=program, default=ENGINE, help="Python with vLLM and SpecForge")
    each.add_argument("--controller", type=program, default=CONTROLLER, help="Python with ansible-core")
    each.add_argument("--target-args", default="@demo/gpu_target.args", help="arguments for demo/build_target.py")
    each.add_argument("--settings", action="append", default=[], help="further files of settings, or JSON; the last wins")
    each.add_argument("--sweep", type=numbers, default=[1, 7], metavar="K,K", help="further values of K for the EAGLE3 draft")
    each.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none is named")
    each = commands.add_parser("evidence", help="copy what a reader needs")
    each.add_argument("--work", type=pathlib.Path, default=ROOT / ".demo")
    each.add_argument("--out", type=pathlib.Path, required=True, help="folder to write, such as docs/evidence/h100-2026-01-31")
    each.add_argument(
        "--replace", type=pair, nargs="*", default=[], metavar="FROM=TO", help="further words, such as the engine's folder"
    )
    options = parser.parse_args()
    if options.command == "evidence":
        return evidence(options.work, options.out, dict(options.replace))
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return Session(options).run(options.stages or STAGES)


def program(text: str) -> str:
    """A program's path, as it is called; an environment's Python must not be followed to the one that it was made from."""
    found = shutil.which(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no program that can be started; make setup makes .venv and .engine")
    return os.path.abspath(found)


def numbers(text: str) -> list[int]:
    """``1,7``, or nothing at all."""
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them: 1,7") from None


def pair(text: str) -> tuple[str, str]:
    before, equals, after = text.partition("=")
    if not before or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must say what is replaced by what: /opt/cuda=/opt/engine")
    return before, after


class Session:
    """Runs the stages; each writes a log, and what it took goes into ``times.json``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._work = options.work.resolve()
        self._logs = self._work / "session"
        self._target = self._work / "targets" / TARGET
        self._times: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def run(self, stages: tuple[str, ...] | list[str]) -> int:
        self._logs.mkdir(parents=True, exist_ok=True)
        known = self._logs / "times.json"
        earlier = json.loads(known.read_text()) if known.is_file() else []
        self._times = [*earlier]
        for stage in stages:
            getattr(self, stage)()
        failed = [each["step"] for each in self._times[len(earlier) :] if each["exit"]]
        if failed:
            print(f"failed: {', '.join(failed)}; see the logs in {self._logs}", file=sys.stderr)
        return 1 if failed else 0

    def target(self) -> None:
        if not self._target.exists():
            script = [self._options.engine, "demo/build_target.py", *self._options.target_args.split()]
            self._step("target", [*script, "--out", str(self._target), "--data", str(self._work / "data")])

    def train(self) -> None:
        """Both drafts at once, each on half of the CPU cores: two experiments share a GPU well until they are measured.

        Converting starts vLLM to see that the draft loads, which demo/gpu.yml lets it do beside another program: it tells
        vLLM how much memory to take.
        """
        cores = sorted(os.sched_getaffinity(0))
        halves = [cores[: len(cores) // 2] or cores, cores[len(cores) // 2 :]]
        with ThreadPoolExecutor() as pool:
            started = []
            for method, half in zip(("eagle3", "dflash"), halves):
                command = self._play(f"method={method}", "chat_template=qwen", "spec_stop_phase=convert")
                started.append(pool.submit(self._step, f"train-{method}", command, half))
        for each in started:
            each.result()

    def eagle3(self) -> None:
        """With the sweep; where it fails, without: what was measured of the draft's own K is judged all the same."""
        for sweep in (self._options.sweep, []):
            settings = json.dumps({"spec_sweep_k": sweep})
            if self._step("measure-eagle3", self._play("method=eagle3", "chat_template=qwen", settings)) == 0 or not sweep:
                break

    def dflash(self) -> None:
        self._step("measure-dflash", self._play("method=dflash", "chat_template=qwen"))

    def ngram(self) -> None:
        """The EAGLE3 draft against prompt lookup, on the prompts that it was not trained on."""
        bundle = self._work / f"{TARGET}-eagle3/spec-decode"
        if not (bundle / "results/convert.json").is_file():
            print(
                f"ngram: there is no converted EAGLE3 draft in {bundle}. Run the stages train and eagle3 first.", file=sys.stderr
            )
            self._times.append({"step": "measure-ngram", "seconds": 0.0, "exit": 2})
            return
        converted = json.loads((bundle / "results/convert.json").read_text())
        plan = json.loads((bundle / "experiment.json").read_text())
        settings = {
            "experiment": f"{TARGET}-against-ngram",
            "spec_standing_config": NGRAM,
            "spec_candidate": {
                "method": "eagle3",
                "model": converted["draft_dir"],
                "num_speculative_tokens": plan["num_speculative_tokens"],
            },
            "spec_prompts_file": str(bundle / "data/eval.jsonl"),
            "spec_prompts_held_out": f"{TARGET}-eagle3 trained this draft and compared them with its training data",
            "spec_server_arguments": [*plan["serving"]["server_arguments"], *NGRAM_ARGUMENTS],
            "spec_server_environment": {**plan["serving"]["server_environment"], **NGRAM_ENVIRONMENT},
        }
        self._step("measure-ngram", self._play(json.dumps(settings), book="validate_draft.yml"))

    def _play(self, *settings: str, book: str = "train_draft.yml") -> list[str]:
        own = {"spec_work_dir": str(self._work), "spec_engine_python": self._options.engine, "target": str(self._target)}
        words = ["@demo/gpu.yml", json.dumps(own), *self._options.settings, *settings]
        command = [self._options.controller, "-m", "ansible.cli.playbook", f"playbooks/{book}", "-i", "inventories/local"]
        return [*command, *(word for each in words for word in ("-e", each))]

    def _step(self, name: str, command: list[str], cores: list[int] | None = None) -> int:
        started = time.monotonic()
        print(f"{time.strftime('%H:%M:%S')} {name} …", flush=True)
        pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command] if cores else command
        with (self._logs / f"{name}.log").open("a") as log:
            code = subprocess.run(pinned, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
        with self._lock:
            self._times.append({"step": name, "seconds": round(time.monotonic() - started, 1), "exit": code})
            (self._logs / "times.json").write_text(json.dumps(self._times, indent=1))
        print(f"{time.strftime('%H:%M:%S')} {name}: {'done' if code == 0 else f'exit {code}'}", flush=True)
        return code


def evidence(work: pathlib.Path, out: pathlib.Path, replace: dict[str, str]) -> int:
    """Copy the bundles' documents and the session's logs, cleaned, into ``out``."""
    work = work.resolve()
    words = {
        **replace, str(work / "targets"): "/models", str(work): "/srv/spec", str(ROOT): "/srv/checkout",
        str(pathlib.Path.home()): "~", platform.node(): "node1",
    }  # fmt: skip
    files = {
        **{path: path.relative_to(work) for path in sorted(work.glob("session/*"))},
        **{
            path: pathlib.Path(bundle.parent.name) / path.relative_to(bundle)
            for bundle in sorted(work.glob("*/spec-decode"))
            for path in sorted(found for pattern in KEPT for found in bundle.glob(pattern))
        },
    }
    if not files:
        print(f"There is no experiment under {work}. Give the --work that the session ran with.", file=sys.stderr)
        return 2
    for source, place in files.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(cleaned(source, words))
    print(f"{len(files)} files in {out}")
    return 0


def cleaned(path: pathlib.Path, words: dict[str, str]) -> str:
    """A file's text without single requests, progress bars and accesses, and with every word replaced, longest first."""
    text = path.read_text(errors="replace")  # a log may end within a letter
    if path.suffix in (".json", ".partial"):
        text = json.dumps(without(json.loads(text)), indent=1) + "\n"
    if path.suffix == ".log":
        lines = (line.rstrip() for line in re.split(r"[\r\n]+", text))
        text = "".join(f"{line}\n" for line in lines if line and not NOISE.search(line))
    for word in sorted(words, key=len, reverse=True):
        # A name is replaced as a whole word only: a node called vm is no part of vmware.
        text = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", lambda _found, word=word: words[word], text)
    return text


def without(value: Any) -> Any:
    """The same without what DROPPED names, at any depth."""
    if isinstance(value, dict):
        return {name: without(each) for name, each in value.items() if not (name in DROPPED and isinstance(each, list | dict))}
    return [without(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
