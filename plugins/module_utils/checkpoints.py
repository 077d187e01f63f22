# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SpecForge's training checkpoints: which are complete. Private to the collection.

Layout of the CLI generation: ``<run_id>-step<N>/training_state.pt`` with the shared state and
``training_state_rank<r>.pt`` for each rank, all of them zip archives that ``torch.save`` wrote. Layout of the scripts:
``epoch_<E>_step_<N>/`` with ``training_state.pt``, written first, then ``config.json`` and ``model.safetensors``.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile

STATE = "training_state.pt"
WEIGHTS = "model.safetensors"
_STEP = re.compile(r"(?:-step|_step_)(\d+)$")
_OF_SCRIPTS = re.compile(r"^epoch_\d+_step_\d+$")


def step_of(path: str) -> int:
    """The step that a checkpoint folder was taken at."""
    match = _STEP.search(path)
    return int(match[1]) if match else 0


def all_of(output: str, run_id: str) -> list[str]:
    """A run's checkpoint folders, whole or not, in no order."""
    return [
        os.path.join(output, name)
        for name in os.listdir(output)
        if (name.startswith(f"{run_id}-step") or is_of_scripts(name))
        and _STEP.search(name)
        and os.path.isdir(os.path.join(output, name))
    ]


def newest_complete(output: str, run_id: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The newest checkpoint that is whole, and the newer or older ones that are not, with the reason."""
    newest: str | None = None
    refused: list[tuple[str, str]] = []
    for path in sorted(all_of(output, run_id), key=step_of, reverse=True):
        fault = incompleteness(path)
        if fault:
            refused.append((path, fault))
        elif newest is None:
            newest = path
    return newest, refused


def is_of_scripts(path: str) -> bool:
    """Whether a checkpoint was written by the scripts generation."""
    return bool(_OF_SCRIPTS.match(os.path.basename(path)))


def incompleteness(path: str) -> str:
    """Why a checkpoint cannot be resumed from; empty if it can."""
    if is_of_scripts(path):
        return _incomplete_of_scripts(path)
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


def _incomplete_of_scripts(path: str) -> str:
    for name in (STATE, "config.json", WEIGHTS):
        if not os.path.isfile(os.path.join(path, name)):
            return f"{name} is missing"
    if not zipfile.is_zipfile(os.path.join(path, STATE)):
        return f"{STATE} is truncated"
    return "" if _whole_safetensors(os.path.join(path, WEIGHTS)) else f"{WEIGHTS} is truncated"


def _whole_safetensors(path: str) -> bool:
    """Whether a file is as long as its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
