# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The executors by name. Private to the collection."""

from __future__ import annotations

from .jobs import Executor
from .local_executor import LocalExecutor
from .slurm_executor import Settings, SlurmExecutor

EXECUTORS = ("local", "slurm")


def executor_named(name: str, settings: Settings | None = None) -> Executor:
    """The executor called ``name``; ``settings`` are a Slurm site's."""
    return SlurmExecutor(settings) if name == "slurm" else LocalExecutor()
