# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The phases of an experiment by name, in their order. Pure; private to the collection."""

from __future__ import annotations

from .errors import SpecDecodeError

#: the phases that a run can be limited to; preflight and scaffold run always, for all others rest on them
PHASES = ("dataset", "capture", "train", "convert", "validate", "report")
#: the phases that run a job, with the name of its result file
RESULTS = {"dataset": "dataset", "capture": "capture", "train": "train", "convert": "convert", "validate": "acceptance"}


def selected(start: str, stop: str) -> list[str]:
    """The phases from ``start`` to ``stop``, both included; an empty name is the first or the last."""
    first, last = _place(start or PHASES[0], "spec_start_phase"), _place(stop or PHASES[-1], "spec_stop_phase")
    if first > last:
        raise SpecDecodeError(
            f"spec_start_phase {start} comes after spec_stop_phase {stop}.", f"The order is {', '.join(PHASES)}."
        )
    return list(PHASES[first : last + 1])


def next_step(chosen: list[str]) -> str:
    """What a run that stops after ``chosen`` leaves to be done, as one sentence; empty after the last phase."""
    after = PHASES.index(chosen[-1]) + 1
    if after == len(PHASES):
        return ""
    return f"Stopped after {chosen[-1]}, as asked. Next: {PHASES[after]}; go on with -e spec_start_phase={PHASES[after]}."


def _place(name: str, setting: str) -> int:
    if name not in PHASES:
        raise SpecDecodeError(f"{setting} {name!r} is no phase.", f"Choose one of {', '.join(PHASES)}.")
    return PHASES.index(name)
