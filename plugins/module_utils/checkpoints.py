# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SpecForge's training checkpoints: which are complete. Private to the collection.

Layout (SpecForge's ``training/checkpoint.py``): ``<run_id>-step<N>/training_state.pt`` with the shared
state and ``training_state_rank<r>.pt`` for each rank, all of them zip archives that ``torch.save`` wrote.
"""

from __future__ import annotations

import os
import re
import zipfile

STATE = "training_state.pt"
_STEP = re.compile(r"-step(\d+)$")


def step_of(path: str) -> int:
    """The step that a checkpoint folder was taken at."""
    match = _STEP.search(path)
    return int(match[1]) if match else 0


def newest_complete(output: str, run_id: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The newest checkpoint that is whole, and the newer or older ones that are not, with the reason."""
    found = [
        os.path.join(output, name)
        for name in os.listdir(output)
        if name.startswith(f"{run_id}-step") and _STEP.search(name) and os.path.isdir(os.path.join(output, name))
    ]
    newest: str | None = None
    refused: list[tuple[str, str]] = []
    for path in sorted(found, key=step_of, reverse=True):
        fault = incompleteness(path)
        if fault:
            refused.append((path, fault))
        elif newest is None:
            newest = path
    return newest, refused


def incompleteness(path: str) -> str:
    """Why a checkpoint cannot be resumed from; empty if it can."""
    ranks = sorted(name for name in os.listdir(path) if re.fullmatch(r"training_state_rank\d+\.pt", name))
    if not ranks:
        return "it holds no state of any rank"
    expected = [f"training_state_rank{number}.pt" for number in range(len(ranks))]
    if ranks != sorted(expected):
        return f"it lacks the state of a rank (it has {', '.join(ranks)})"
    for name in (STATE, *ranks):
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            return f"{name} is missing"
        # torch.save writes a zip archive whose directory stands at the end: a truncated file has none.
        if not zipfile.is_zipfile(file):
            return f"{name} is truncated"
    return ""
