# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The frame of a node program: one sentence for a user's error, one result file at the end. Private to the collection."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from .errors import SpecDecodeError
from .files import write_json
from .jobs import REFUSED, now


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a :class:`SpecDecodeError` becomes one message on stderr and exit status 2."""
    try:
        main()
    except SpecDecodeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(REFUSED) from None


class PhaseResult:
    """Collects what a phase found, and writes it whole as the phase's last act."""

    def __init__(self, phase: str, path: str) -> None:
        self._phase, self._path = phase, path
        self._started_at, self._clock = now(), time.monotonic()

    def complete(self, facts: dict[str, Any]) -> None:
        """Write the result file: the phase is done once it is there."""
        write_json(
            self._path,
            {
                "phase": self._phase,
                "status": "complete",
                "fingerprint": os.environ.get("SPEC_DECODE_FINGERPRINT", ""),
                "started_at": self._started_at,
                "finished_at": now(),
                "duration_s": round(time.monotonic() - self._clock, 3),
                **facts,
            },
        )
