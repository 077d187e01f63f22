# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the words stand for what went wrong. Private to the collection."""

from __future__ import annotations

PAGE = "docs/runbook.md"
#: sections for what no gate is named after
PENDING, CANARY, DRAFT_TIER = "pending", "canary", "draft-tier"


def more(section: str) -> str:
    """The end of a message whose cause and way out the runbook explains."""
    return f"More: {PAGE}#{section}"
