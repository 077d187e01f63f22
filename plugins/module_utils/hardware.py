# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a measurement ran on. Private to the collection."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any


def describe_hardware() -> dict[str, Any]:
    """Kind of accelerator and its number, or the processor; memory in bytes."""
    gpus = _gpus()
    return {
        "kind": "gpu" if gpus else "cpu",
        "name": gpus[0] if gpus else _processor(),
        "count": len(gpus) or os.cpu_count(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def plain_name(name: str) -> str:
    """An accelerator's name however it is spelled: a node's label has hyphens where nvidia-smi has blanks."""
    return re.sub(r"[\s-]+", " ", name).strip()


def _gpus() -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []  # no NVIDIA driver: a machine without such GPUs
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not every architecture lists it; the machine's own name for itself follows
    return os.uname().machine
