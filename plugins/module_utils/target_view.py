# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A target as SpecForge's offline trainer wants it: with a weight index and a plain config. Private to the collection."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from .checkpoint import INDEX, read_target
from .files import write_json, write_link


def trainer_view(path: str, folder: str, config: dict[str, Any] | None = None) -> str:
    """``path`` itself if it has an index, else ``folder`` with links to its files and an index beside them.

    With a ``config`` in the place of the target's own it is always the folder. Several nodes may make it at one time.
    """
    target = read_target(path)
    if target.has_index and not config:
        return path
    os.makedirs(folder, exist_ok=True)
    names = set(os.listdir(path))
    for name in set(os.listdir(folder)) - names:
        if os.path.islink(os.path.join(folder, name)):  # of a former target; only another node can be removing it too
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
    for name in names - ({"config.json"} if config else set()):
        write_link(os.path.join(folder, name), os.path.abspath(os.path.join(path, name)))
    if config:
        write_json(os.path.join(folder, "config.json"), config)
    if not target.has_index:
        write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": target.bytes}, "weight_map": target.weight_map})
    return folder
