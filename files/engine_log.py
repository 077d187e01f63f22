# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What went wrong, from the log of a vLLM that ended. Used where one is started."""

from __future__ import annotations

import re

from spec_decode.files import tail

#: what vLLM writes before the text of a line: which process, for an error when and where, and which rank
PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR \S+ \S+ \[\S+\] ?)?(?:\[rank\d+\]: )?")
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception): .+")


def error_lines(log: str) -> list[str]:
    """The exceptions that vLLM's log names, first cause first, without the stacks around them."""
    found: list[str] = []
    message = False
    for line in tail(log, 400):
        text = PREFIX.sub("", line)
        # An exception's message may go on in indented lines, as pydantic's do.
        message = bool(EXCEPTION.match(text)) or (message and text.startswith("  "))
        if message and text not in found:
            found.append(text)
    return found[:6]
