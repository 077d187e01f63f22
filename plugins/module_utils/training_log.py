# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What SpecForge's trainers print of their steps, in both generations. Private to the collection."""

from __future__ import annotations

import json
import re
from typing import Protocol

#: SpecForge's EAGLE3 loss: the loss of position i weighs 0.8^i
LOSS_DECAY = 0.8
#: names of the scripts' metrics in the CLI generation
METRICS = {"Acc": "acc", "Acceptance Rate": "acceptance_rate", "pLoss": "ploss"}


class TrainingLog(Protocol):
    """Takes a trainer's lines one after the other."""

    def feed(self, line: str) -> tuple[int, dict[str, float]] | None:
        """The step that this line completes, with its metrics by name."""


class CliLog:
    """``step N: {dictionary}`` of ``specforge train``."""

    _STEP = re.compile(r"^step (\d+): (\{.*\})\s*$")

    def feed(self, line: str) -> tuple[int, dict[str, float]] | None:
        match = self._STEP.match(line)
        return (int(match[1]), parse_metrics(match[2])) if match else None


class ScriptsLog:
    """The lines by position of ``train_eagle3.py``, which calls training steps ``Eval`` too.

    A step's lines come in three rounds, accuracies, acceptance rates and losses; the loss of the last position
    completes it.
    """

    _LINE = re.compile(r"Eval - Step (\d+) \[[^\]]*\], position (\d+),\s+(Acc|Acceptance Rate|pLoss): (\S+)")

    def __init__(self, positions: int) -> None:
        self._positions = positions
        self._step = -1
        self._values: dict[str, float] = {}

    def feed(self, line: str) -> tuple[int, dict[str, float]] | None:
        match = self._LINE.search(line)
        if not match:
            return None
        step, position = int(match[1]), int(match[2])
        if step != self._step:
            self._step, self._values = step, {}
        self._values[f"{METRICS[match[3]]}_{position}"] = float(match[4])
        if match[3] != "pLoss" or position != self._positions - 1:
            return None
        losses = [self._values.get(f"ploss_{index}", float("nan")) for index in range(self._positions)]
        return step, {**self._values, "loss": sum(LOSS_DECAY**index * loss for index, loss in enumerate(losses))}


def parse_metrics(text: str) -> dict[str, float]:
    """The dictionary that ``specforge train`` prints, lists of values by position taken apart."""
    document = re.sub(r"\binf\b", "Infinity", re.sub(r"\bnan\b", "NaN", text.replace("'", '"')))
    values: dict[str, float] = {}
    for key, value in json.loads(document).items():
        for suffix, number in [("", value)] if isinstance(value, float) else [(f"_{i}", v) for i, v in enumerate(value)]:
            values[f"{key.removeprefix('train/')}{suffix}"] = number
    return values
