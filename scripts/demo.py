#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration: build a small target on this machine, then run the public playbook on it, as a user would."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
PHASES = {"dataset": "dataset", "capture": "capture", "train": "train", "convert": "convert", "validate": "acceptance"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("eagle3", "dflash"), default="eagle3")
    parser.add_argument("--site", choices=("local", "slurm"), default="local", help="where the jobs run")
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
    command = playbook_command(options.site, options.target, options.method, options.extra)
    with slurm() if options.site == "slurm" else contextlib.nullcontext({}) as variables:
        print(f"\n$ {shlex.join(command)}\n", flush=True)
        played = time.monotonic()
        code = subprocess.run(
            [str(ROOT / ".venv/bin" / command[0]), *command[1:]], cwd=ROOT, env={**os.environ, **variables}, check=False
        ).returncode
        played = time.monotonic() - played
    if code == 0 and "--check" not in options.extra:
        experiment = f"{options.target.name}-{options.method}"
        results = work(options.site) / experiment / "spec-decode/results"
        show_times(phase_times(results), built - started, played, options.timings)
    return code


def build_command(target: pathlib.Path) -> list[str]:
    return [
        str(ROOT / ".engine/bin/python"), str(ROOT / "demo/build_target.py"),
        "--out", str(target), "--data", str(WORK / "data"),
    ]  # fmt: skip


def work(site: str) -> pathlib.Path:
    return WORK if site == "local" else WORK / site


def playbook_command(site: str, target: pathlib.Path, method: str, extra: list[str]) -> list[str]:
    # Sized for a small machine by the local site, run as the chosen site runs its jobs, on the same data.
    inventories = ["local"] if site == "local" else ["local", site]
    settings = {
        "spec_sources": [{"path": f"{WORK}/data/sharegpt.json"}, {"path": f"{WORK}/data/ultrachat.jsonl"}],
        "spec_confirm_shared_work_dir": True,  # all nodes are this machine
        "spec_poll_interval": 3,
    }
    return [
        "ansible-playbook", "playbooks/train_draft.yml", *[f"--inventory=inventories/{name}" for name in inventories],
        *(["-e", json.dumps(settings)] if site != "local" else []),
        "-e", variable("target", str(target)), "-e", f"method={method}", "-e", "chat_template=qwen", *extra,
    ]  # fmt: skip


@contextlib.contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """The project's own Slurm on this machine, for as long as the play runs; a job that it leaves goes on, and is found again."""
    sys.path.insert(0, str(ROOT / "tests/slurm"))
    import cluster

    folder = WORK / "slurm-site"
    if len(str(folder)) > cluster.LONGEST_FOLDER:
        folder = pathlib.Path(tempfile.gettempdir()) / f"spec-decode-slurm-{os.getuid()}"
    try:
        site = cluster.Cluster(folder, cluster.Settings()).up()
    except cluster.CannotRun as error:
        raise SystemExit(f"demo: no Slurm can run here: {error}") from error
    print(f"demo: a real Slurm in {folder}:\n{site.run('sinfo', '--Node', '--long')}", flush=True)
    try:
        yield site.environment
    finally:
        print(f"demo: its jobs:\n{site.run('squeue', '--states=all', '--format=%i %j %T %N %M')}", flush=True)
        site.down()


def variable(name: str, value: str) -> str:
    """A variable for ansible-playbook's -e, which splits the short form at blanks and takes quotes off."""
    return f"{name}={value}" if shlex.quote(value) == value else json.dumps({name: value})


def environment(engine: pathlib.Path = ROOT / ".engine") -> dict[str, str]:
    # Intel's OpenMP, which the engine's environment holds anyway, keeps idle threads from slowing the busy ones. The
    # loader splits LD_PRELOAD at blanks, so that a library is named alone and found by its folder.
    library = engine / "lib/libiomp5.so"
    if not library.exists():
        return dict(os.environ)
    folders = [str(library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_PRELOAD": library.name, "LD_LIBRARY_PATH": os.pathsep.join(folders)}


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
