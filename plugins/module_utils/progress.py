# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a job says how far it is. Private to the collection."""

from __future__ import annotations

import os
import sys
import time

from .files import write_json


class Progress:
    """Writes ``{text, done, total, at}`` to the file that the job's environment names.

    At most one write a second reaches the disk, except for the last (``done == total``).
    Without a file the text is printed, so that a program run by hand shows the same.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = path if path is not None else os.environ.get("SPEC_DECODE_PROGRESS", "")
        self._written = 0.0
        self._printed = ""

    def update(self, text: str, done: int = 0, total: int = 0) -> None:
        """Say in words, and as ``done`` of ``total``, where the job stands."""
        moment = time.monotonic()
        if moment - self._written < 1.0 and done != total:
            return
        self._written = moment
        if text != self._printed:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
            self._printed = text
        if self._path:
            write_json(self._path, {"text": text, "done": done, "total": total, "at": time.time()})
