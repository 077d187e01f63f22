#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""List the flags and the run-config keys of a SpecForge revision, read from its source without running it.

    python scripts/specforge_flags.py SPECFORGE_GIT_FOLDER REVISION cli > tests/unit/data/specforge/cli.json

The lists are facts that the rendered commands are checked against; nothing of SpecForge's code is kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
from collections.abc import Iterator
from typing import Any

SCRIPTS = ("prepare_data.py", "prepare_hidden_states.py", "train_eagle3.py", "train_dflash.py")
#: helpers of the scripts that add flags of their own, in specforge/args.py
SHARED = ("SGLangBackendArgs", "TrackerArgs")


class Source:
    """Files of one revision."""

    def __init__(self, folder: str, revision: str) -> None:
        self._folder, self.revision = folder, revision

    def git(self, *arguments: str) -> str | None:
        answer = subprocess.run(["git", "-C", self._folder, *arguments], capture_output=True, text=True, check=False)
        return None if answer.returncode else answer.stdout

    def read(self, path: str) -> str | None:
        return self.git("show", f"{self.revision}:{path}")


def flags(tree: ast.AST) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every ``add_argument`` below ``tree`` whose first name is a long flag."""
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"):
            continue
        names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        long = next((name for name in names if str(name).startswith("--")), None)
        if long is None:
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        action = ast.unparse(given["action"]).strip("'\"") if "action" in given else ""
        yield (
            long,
            {
                "value": not action,
                "required": literal(given.get("required")) is True,
                **({"default": literal(given["default"])} if "default" in given else {}),
                **({"short": names[0]} if names[0] != long else {}),
            },
        )


def literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return f"computed: {ast.unparse(node)}"


def script_flags(source: Source, name: str) -> dict[str, Any] | None:
    text = source.read(f"scripts/{name}")
    if text is None:
        return None
    tree = ast.parse(text)
    # One parser of the DFlash script is another method's.
    tree.body = [node for node in tree.body if "dspark" not in getattr(node, "name", "")]
    found = dict(flags(tree))
    shared = ast.parse(source.read("specforge/args.py") or "")
    for node in shared.body:
        if isinstance(node, ast.ClassDef) and node.name in SHARED and f"{node.name}.add_args" in text:
            found.update(flags(node))
    return dict(sorted(found.items()))


def command_line(source: Source) -> dict[str, Any]:
    """The flags of ``specforge train`` and ``specforge export``: their parsers are variables of those names."""
    tree = ast.parse(source.read("specforge/cli.py") or "")
    found: dict[str, dict[str, Any]] = {"train": {}, "export": {}}
    for call in ast.walk(tree):
        owner = getattr(getattr(getattr(call, "func", None), "value", None), "id", "")
        if owner in found:
            found[owner].update(flags(ast.Expr(call)))
    return found


def schema(source: Source) -> dict[str, dict[str, Any]]:
    """Keys of the run config by section, with their defaults."""
    tree = ast.parse(source.read("specforge/config/schema.py") or "")
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    sections = {"model": "ModelConfig", "data": "DataConfig", "training": "TrainingConfig", "tracking": "TrackingConfig",
                "deployment": "DeploymentConfig", "deployment.trainer": "TrainerDeploymentConfig", "": "Config"}  # fmt: skip
    return {section: dict(keys(classes[name])) for section, name in sections.items() if name in classes}


def keys(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        value: ast.AST | None = item.value
        if isinstance(value, ast.Call):
            value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
        yield item.target.id, literal(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("revision")
    parser.add_argument("generation", choices=("scripts", "cli"))
    options = parser.parse_args()
    source = Source(options.folder, options.revision)
    found: dict[str, Any] = {
        "generation": options.generation,
        "source": "https://github.com/sgl-project/SpecForge",
        "revision": (source.git("rev-parse", options.revision) or "").strip(),
        "date": (source.git("log", "-1", "--format=%cs", options.revision) or "").strip(),
        "scripts": {name: script_flags(source, name) for name in SCRIPTS if script_flags(source, name) is not None},
    }
    if options.generation == "cli":
        found |= {"commands": command_line(source), "config": schema(source)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
