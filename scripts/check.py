#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every check and test of the project, and one table of what ran, passed and was skipped."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv/bin"
PLUGINS = {
    "module": ("bundle", "draft_plan", "prom_acceptance", "slurm_job", "spec_gate"),
    "filter": ("aux_layers", "dflash_target_layers", "draft_config", "served_aux_layers", "spec_slug"),
    "lookup": ("bundle_programs",),
}


@dataclasses.dataclass
class Check:
    """One line of the table."""

    name: str
    command: list[str]
    fast: bool = True
    cwd: pathlib.Path = ROOT


def checks(tree: pathlib.Path) -> list[Check]:
    """All checks; ``tree`` is a copy of the checkout at the place that Ansible's tools insist on."""
    copied = tree / "ansible_collections/inference/spec_decode"
    package = "ansible_collections.inference.spec_decode.plugins.module_utils"
    documented = [f"inference.spec_decode.{name}" for name in PLUGINS["module"]]
    return [
        Check("ruff", [str(BIN / "ruff"), "check", "."]),
        Check("ruff format", [str(BIN / "ruff"), "format", "--check", "."]),
        Check(
            "mypy", [str(BIN / "mypy"), "--config-file", str(ROOT / "pyproject.toml"), "-p", package], cwd=ROOT / ".collections"
        ),
        Check("documentation", [str(BIN / "ansible-doc"), "--type", "module", *documented]),
        Check(
            "filter documentation",
            [str(BIN / "ansible-doc"), "--type", "filter", *(f"inference.spec_decode.{name}" for name in PLUGINS["filter"])],
        ),
        Check("ansible-lint", [str(BIN / "ansible-lint"), "--offline", "--profile", "production"], cwd=copied),
        Check("changelog", [str(BIN / "antsibull-changelog"), "lint"]),
        Check("shellcheck of the launchers", [str(BIN / "python"), "-m", "pytest", "-q", "tests/unit/test_bundle.py"]),
        Check("unit tests", [str(BIN / "python"), "-m", "pytest", "-q", "tests/unit"]),
        Check("the loop, for real", [str(BIN / "python"), "-m", "pytest", "-q", "-x", "tests/integration"], fast=False),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave out what takes minutes")
    options = parser.parse_args()
    rows, failed, passed, skipped = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        subprocess.run([sys.executable, str(ROOT / "scripts/tree.py"), str(tree)], check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / ".collections"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(tree),
            "ANSIBLE_HOME": str(tree / "home"),
        }
        for check in checks(tree):
            if options.fast and not check.fast:
                rows.append((check.name, "skipped", "--fast leaves it out", 0.0))
                skipped += 1
                continue
            print(f"=== {check.name}", flush=True)
            started = time.monotonic()
            answer = subprocess.run(
                check.command,
                cwd=check.cwd,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            seconds = time.monotonic() - started
            good = answer.returncode == 0
            if not good:
                print(answer.stdout, flush=True)
            passed, failed = passed + good, failed + (not good)
            rows.append((check.name, "passed" if good else "FAILED", summary(answer.stdout), seconds))
    print()
    for name, outcome, words, seconds in rows:
        print(f"{name:<28} {outcome:<8} {seconds:6.1f} s  {words}")
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def summary(output: str) -> str:
    """What a test runner says at its end, where there is one."""
    found = re.findall(r"(\d+ (?:passed|failed).*?) in ", output)
    return found[-1] if found else ""


if __name__ == "__main__":
    sys.exit(main())
