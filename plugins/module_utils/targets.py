# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A list of drafts to train side by side. Pure; private to the collection."""

from __future__ import annotations

from typing import Any

from .derive import spec_slug
from .errors import SpecDecodeError
from .jobs import NAME_PATTERN


def named(entries: Any) -> dict[str, dict[str, Any]]:
    """Each draft's settings by its experiment's name, which no two may share."""
    if not isinstance(entries, list) or not entries:
        raise SpecDecodeError("The list of targets is empty or no list.", "Write one entry a draft: - {target: /models/base}.")
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry.get("target"):
            raise SpecDecodeError(f"Entry {number} of the list of targets names no target.", "Write {target: /models/base}.")
        name = str(entry.get("experiment") or f"{spec_slug(str(entry['target']))}-{entry.get('method', 'eagle3')}")
        if not NAME_PATTERN.match(name):
            raise SpecDecodeError(f"The experiment's name {name!r} cannot be a label.", "Give another as experiment.")
        if name in found:
            raise SpecDecodeError(f"Two entries of the list of targets are the experiment {name!r}.", "Name one otherwise.")
        found[name] = {**entry, "experiment": name}
    return found
