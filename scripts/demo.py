#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration: build a small target on this machine, then run the public playbook on it, as a user would."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
PHASES = {"dataset": "dataset", "capture": "capture", "train": "train", "convert": "convert", "validate": "acceptance"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("eagle3", "dflash"), default="eagle3")
    parser.add_argument("--target", type=pathlib.Path, default=WORK / "targets/tiny-chat")
    parser.add_argument("--timings", type=pathlib.Path, help="write the times of this run as JSON")
    parser.add_argument("extra", nargs="*", help="more arguments for ansible-playbook, after --")
    options = parser.parse_args()
    started = time.monotonic()
    if options.target.is_dir():  # a target appears whole or not at all
        print(f"demo: the target {options.target} is there already", flush=True)
    elif subprocess.run(build_command(options.target), env=environment(), check=False).returncode:
        return 1
    built = time.monotonic()
    command = playbook_command(options.target, options.method, options.extra)
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    code = subprocess.run([str(ROOT / ".venv/bin" / command[0]), *command[1:]], cwd=ROOT, check=False).returncode
    played = time.monotonic()
    if code == 0 and "--check" not in options.extra:
        experiment = f"{options.target.name}-{options.method}"
        show_times(phase_times(WORK / experiment / "spec-decode/results"), built - started, played - built, options.timings)
    return code


def build_command(target: pathlib.Path) -> list[str]:
    return [
        str(ROOT / ".engine/bin/python"), str(ROOT / "demo/build_target.py"),
        "--out", str(target), "--data", str(WORK / "data"),
    ]  # fmt: skip


def playbook_command(target: pathlib.Path, method: str, extra: list[str]) -> list[str]:
    return [
        "ansible-playbook", "playbooks/train_draft.yml", "-i", "inventories/local",
        "-e", f"target={target}", "-e", f"method={method}", "-e", "chat_template=qwen", *extra,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    # Intel's OpenMP, which the engine's environment holds anyway, keeps idle threads from slowing the busy ones.
    library = ROOT / ".engine/lib/libiomp5.so"
    return {**os.environ, **({"LD_PRELOAD": str(library)} if library.exists() else {})}


def phase_times(results: pathlib.Path) -> dict[str, float]:
    """Seconds of each phase's job when it last did its work."""
    return {phase: json.loads((results / f"{name}.json").read_text())["duration_s"] for phase, name in PHASES.items()}


def show_times(phases: dict[str, float], target: float, playbook: float, timings: pathlib.Path | None) -> None:
    print("\nTime of each phase, in seconds (a phase that was done already is not done again):")
    for name, seconds in {"target": target, **phases}.items():
        print(f"  {name:<10} {seconds:7.1f}")
    print(f"  {'this play':<10} {playbook:7.1f}")
    if timings:
        timings.write_text(json.dumps({"target_s": target, "phases_s": phases, "playbook_s": playbook}, indent=2))


if __name__ == "__main__":
    sys.exit(main())
