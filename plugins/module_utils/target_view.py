# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A target as SpecForge's offline trainer wants it: with a weight index, whatever its size. Private to the collection."""

from __future__ import annotations

import os

from .checkpoint import INDEX, read_target
from .files import write_json


def sharded_view(path: str, folder: str) -> str:
    """``path`` itself if it has an index, else ``folder`` with links to its files and an index beside them."""
    target = read_target(path)
    if target.has_index:
        return path
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(path):
        link = os.path.join(folder, name)
        if not os.path.lexists(link):
            os.symlink(os.path.abspath(os.path.join(path, name)), link)
    write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": target.bytes}, "weight_map": target.weight_map})
    return folder
