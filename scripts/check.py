#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every check and test of the project, and one table of what ran, passed and was skipped.

Checks run in two lanes side by side: one for those that keep the processor busy with a real engine, one after the
other, and one for all others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv/bin"
NAMESPACE = "inference.spec_decode"
SLURM_TESTS = "tests/integration/test_slurm.py"
PYTEST = [str(BIN / "python"), "-m", "pytest", "-q", "-rs"]
#: molecule's scenarios that keep the processor busy with a real engine
ENGINE_SCENARIOS = ("loop",)
_output = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    command: list[str]
    fast: bool = True
    cwd: pathlib.Path = ROOT
    #: runs beside the engine's checks; all fast ones do
    light: bool = False
    #: says why the check cannot run on this machine, or nothing
    obstacle: Callable[[], str] = str


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a check."""

    name: str
    outcome: str
    words: str
    seconds: float = 0.0


def checks(tree: pathlib.Path) -> list[Check]:
    """All checks; ``tree`` is a copy of the checkout at the place that Ansible's tools insist on."""
    copied = tree / "ansible_collections/inference/spec_decode"
    package = "ansible_collections.inference.spec_decode.plugins.module_utils"
    return [
        Check("ruff", [str(BIN / "ruff"), "check", "."]),
        Check("ruff format", [str(BIN / "ruff"), "format", "--check", "."]),
        Check(
            "mypy", [str(BIN / "mypy"), "--config-file", str(ROOT / "pyproject.toml"), "-p", package], cwd=ROOT / ".collections"
        ),
        *(
            Check(f"{kind} documentation", [str(BIN / "ansible-doc"), "--type", kind, *names])
            for kind, names in documented().items()
        ),
        Check("ansible-lint", [str(BIN / "ansible-lint"), "--offline", "--profile", "production"], cwd=copied),
        Check("changelog", [str(BIN / "antsibull-changelog"), "lint"]),
        Check("unit tests", [*PYTEST, "-n", "2", "tests/unit"]),
        Check("the loop, for real", [*PYTEST, "tests/integration", "--ignore", SLURM_TESTS], fast=False),
        Check("faults on a real Slurm", [*PYTEST, SLURM_TESTS], fast=False),
        Check("every target of transformers", [*PYTEST, "tests/targets"], fast=False, light=True),
        Check(
            "ansible-test sanity", [sys.executable, str(ROOT / "scripts/ansible_test.py"), "sanity"], False, copied, light=True
        ),
        Check("ansible-test units", [sys.executable, str(ROOT / "scripts/ansible_test.py"), "units"], False, copied, light=True),
        Check("the canary on Kubernetes", [*PYTEST, "-n", "2", "tests/kubernetes"], fast=False, light=True),
        *(
            Check(
                f"molecule {name}",
                [str(BIN / "molecule"), "test", "--scenario-name", name],
                fast=False,
                cwd=copied,
                light=name not in ENGINE_SCENARIOS,
            )
            for name in sorted(path.parent.name for path in ROOT.glob("extensions/molecule/*/molecule.yml"))
        ),
        Check(
            "rendered documentation",
            [str(BIN / "antsibull-docs"), "lint-collection-docs", "--plugin-docs", "."],
            fast=False,
            cwd=copied,
            light=True,
        ),
        Check("the collection installed", [*PYTEST, "tests/collection"], fast=False, light=True),
    ]


def documented() -> dict[str, list[str]]:
    """What has documentation of its own, by kind: found in the tree, so that nothing new is left out."""
    folders = {"module": "modules/*.py", "filter": "filter/*.yml", "lookup": "lookup/*.py"}
    found = {kind: sorted((ROOT / "plugins").glob(pattern)) for kind, pattern in folders.items()}
    found["role"] = sorted((ROOT / "roles").iterdir())
    return {kind: [f"{NAMESPACE}.{path.stem}" for path in paths] for kind, paths in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--only", metavar="WORDS", default="", help="run only checks with these words in their name")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        subprocess.run([sys.executable, str(ROOT / "scripts/tree.py"), str(tree)], check=True)
        wanted = [check for check in checks(tree) if options.only in check.name]
        rows = run_all(wanted, environment(tree), options.fast)
    print()
    for row in rows:
        show(row)
    outcomes = [row.outcome for row in rows]
    print(f"\nall in all {time.monotonic() - started:.0f} s")
    print(f"{outcomes.count('passed')} passed, {outcomes.count('FAILED')} failed, {outcomes.count('skipped')} skipped")
    return 1 if "FAILED" in outcomes else 0


def environment(tree: pathlib.Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".collections"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "ANSIBLE_COLLECTIONS_PATH": str(tree),
        "ANSIBLE_HOME": str(tree / "home"),
        "SPEC_ENGINE_PYTHON": str(ROOT / ".engine/bin/python"),
    }


def run_all(wanted: list[Check], environment: dict[str, str], fast: bool) -> list[Row]:
    """Run the checks in their lanes; the rows come back in the order of the checks."""
    with (
        concurrent.futures.ThreadPoolExecutor(max_workers=2 if fast else 1) as light,
        concurrent.futures.ThreadPoolExecutor(max_workers=1) as heavy,
    ):
        waiting = []
        for check in wanted:
            lane = light if check.fast or check.light else heavy
            waiting.append(lane.submit(run, check, environment, fast))
        return [future.result() for future in waiting]


def run(check: Check, environment: dict[str, str], fast: bool) -> Row:
    """Run one check; what a failed one printed is shown at once."""
    obstacle = "left out by --fast" if fast and not check.fast else check.obstacle()
    if obstacle:
        return Row(check.name, "skipped", obstacle)
    started = time.monotonic()
    # What measures a real engine comes first; what runs beside it takes what is left of the processor.
    command = ["nice", "-n", "10", *check.command] if check.light else check.command
    answer = subprocess.run(
        command, cwd=check.cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    good = answer.returncode == 0
    row = Row(check.name, "passed" if good else "FAILED", summary(answer.stdout), time.monotonic() - started)
    with _output:
        print(f"=== {row.name}: {row.outcome} ({row.seconds:.0f} s)", flush=True)
        if not good:
            print(answer.stdout, flush=True)
    return row


def summary(output: str) -> str:
    """What a test runner says at its end, where there is one, with the reason of whatever it skipped."""
    closing = re.findall(r"(\d+ (?:passed|failed).*?) in ", output)[-1:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", output, re.MULTILINE)
    faults = re.findall(r"^fault cases .*$", output, re.MULTILINE)
    tests = re.findall(r"^Running sanity test", output, re.MULTILINE)
    return "; ".join(
        [*closing, *faults, *([f"{len(tests)} sanity tests"] if tests else []), *(f"skipped: {reason}" for reason in skipped)]
    )


def show(row: Row) -> None:
    first, *others = textwrap.wrap(row.words, 90) or [""]
    print(f"{row.name:<28} {row.outcome:<8} {row.seconds:6.1f} s  {first}".rstrip())
    for words in others:
        print(f"{'':<49}{words}")


if __name__ == "__main__":
    sys.exit(main())
