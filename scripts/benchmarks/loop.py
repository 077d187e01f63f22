# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration for both methods: what it reached, and how long it took."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import demo

FIGURES = ("decision", "tier", "speedup_tpot")


def measured() -> dict:
    return {method: reached(method) for method in ("eagle3", "dflash")}


def reached(method: str) -> dict:
    """One method's demonstration: its verdict's figures, the phases' times, and the time of a rerun without work."""
    with tempfile.TemporaryDirectory() as folder:
        timings = pathlib.Path(folder) / "timings.json"
        command = [sys.executable, demo.__file__, "--method", method, "--timings", str(timings)]
        started = time.monotonic()
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise SystemExit(f"bench: the demonstration of {method} failed")
        total = time.monotonic() - started
        times = json.loads(timings.read_text())
        started = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        rerun = time.monotonic() - started
    results = demo.WORK / f"tiny-chat-{method}/spec-decode/results"
    verdict = json.loads((results / "verdict.json").read_text())
    return {
        **{name: verdict[name] for name in FIGURES},
        "arms": {
            name: {"acceptance_length": arm["acceptance_length"], "tpot_ms": arm["tpot_ms"], "ttft_ms": arm["ttft_ms"]}
            for name, arm in verdict["arms"].items()
        },
        "context": verdict["context"],
        "times_s": {**times, "total": total, "rerun_without_work": rerun},
    }
