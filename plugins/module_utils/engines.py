# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an engine's Python has installed, asked of it in under a second: no torch is imported. Private to the collection."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from .errors import SpecDecodeError

PACKAGES = ("torch", "vllm", "specforge", "transformers", "sglang")
QUESTION = """
import importlib.metadata, importlib.util, json, pathlib, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
facts = {"python": sys.version.split()[0], "versions": {name: version(name) for name in json.loads(sys.argv[1])}}
templates = []
spec = importlib.util.find_spec("specforge")
if spec and spec.submodule_search_locations:
    file = pathlib.Path(spec.submodule_search_locations[0], "data", "template.py")
    module_spec = importlib.util.spec_from_file_location("templates", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    templates = module.TEMPLATE_REGISTRY.get_all_template_names()
facts["templates"] = sorted(templates)
print(json.dumps(facts))
"""


def engine_facts(python: str) -> dict[str, Any]:
    """``{python, versions: {package: version or None}, templates: [names]}`` of the interpreter at ``python``."""
    if not os.path.isfile(python) or not os.access(python, os.X_OK):
        raise SpecDecodeError(
            f"The engine's Python {python} does not exist or cannot be executed.",
            "Run make setup, or set scaffold_engine_python to one that has vLLM and SpecForge.",
        )
    try:
        answer = subprocess.run(
            [python, "-c", QUESTION, json.dumps(PACKAGES)], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecDecodeError(f"The engine's Python {python} does not answer: {error}.", "Check the installation.") from error
    if answer.returncode:
        last = " ".join(answer.stderr.strip().splitlines()[-1:])
        raise SpecDecodeError(f"The engine's Python {python} fails: {last}", "Check the installation of SpecForge.")
    facts: dict[str, Any] = json.loads(answer.stdout)
    return facts
