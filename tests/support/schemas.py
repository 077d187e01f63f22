# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The result schemas of ``docs/schemas``, and whether a document is as its schema says."""

from __future__ import annotations

import json
import pathlib

import jsonschema

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "docs/schemas"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def schema(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def problems(name, document):
    """What differs from the schema, each with its place; empty if nothing does."""
    found = jsonschema.Draft202012Validator(schema(name)).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]
