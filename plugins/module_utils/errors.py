# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one exception that this collection's own code raises for a user to read. Private to the collection."""

from __future__ import annotations


class SpecDecodeError(Exception):
    """What went wrong, and what to do about it.

    ``message`` names what was expected, what was found and where;
    ``remedy`` is one sentence that says what to do next.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class Unanswered(SpecDecodeError):
    """A question that something did not answer: it must be asked again, and nothing follows from it."""
