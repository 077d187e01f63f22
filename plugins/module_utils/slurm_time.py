# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slurm's notations of a duration. Private to the collection."""

from __future__ import annotations

import re

from .errors import SpecDecodeError

_NOTATION = re.compile(r"^(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d{1,2}){0,2})$")


def seconds(text: str) -> int:
    """Seconds of ``MM``, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS`` (as ``man sbatch`` has it)."""
    match = _NOTATION.match(text.strip())
    if not match:
        raise SpecDecodeError(
            f"{text!r} is no time limit that Slurm knows.",
            "Write MINUTES, HH:MM:SS or D-HH:MM:SS, for example 12:00:00.",
        )
    numbers = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, rest = ([*numbers, 0, 0])[:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    return numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
