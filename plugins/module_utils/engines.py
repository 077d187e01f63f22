# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an engine's Python has installed, asked of it in about a second: no torch is imported. Private to the collection.

The answers are cheap enough to be asked anew each time, so that no cache can be stale.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
from typing import Any

from . import inspection
from .errors import SpecDecodeError

LIMIT_S = 120.0


def engine_facts(python: str, target: str = "") -> dict[str, Any]:
    """What :func:`inspection.facts` finds with the interpreter at ``python``, of a target's folder too if one is given."""
    if not os.path.isfile(python) or not os.access(python, os.X_OK):
        raise SpecDecodeError(
            f"The engine's Python {python} does not exist or cannot be executed.",
            "Run make setup, or set spec_engine_python to one that has vLLM and SpecForge.",
        )
    try:
        # From the root folder: a module in the current one must not pass for an engine.
        answer = subprocess.run(
            [python, "-c", inspect.getsource(inspection), os.path.abspath(target) if target else ""],
            capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd="/",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecDecodeError(f"The engine's Python {python} does not answer: {error}.", "Check the installation.") from error
    if answer.returncode:
        last = " ".join(answer.stderr.strip().splitlines()[-1:])
        raise SpecDecodeError(f"The engine's Python {python} fails: {last}", "Check the installation of SpecForge.")
    facts: dict[str, Any] = json.loads(answer.stdout)
    return facts
