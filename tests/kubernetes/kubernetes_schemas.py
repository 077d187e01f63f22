# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Objects against the published OpenAPI schemas of Kubernetes, as the package kubernetes-validate bundles them."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import importlib_resources
import jsonschema
from referencing import Registry, Resource

FOLDER = importlib_resources.files("kubernetes_validate") / "kubernetes-json-schema"
#: kinds of custom resources, which Kubernetes itself has no schema of
CUSTOM = ("PodMonitor", "ServiceMonitor")


def versions(oldest: int = 28) -> list[str]:
    """The bundled versions from 1.``oldest`` on."""
    minors = {int(match[1]) for entry in FOLDER.iterdir() if (match := re.match(r"v1\.(\d+)\.0-local$", entry.name))}
    return [f"1.{minor}" for minor in sorted(minors) if minor >= oldest]


def problems(item: dict[str, Any], version: str, strict: bool = True) -> list[str]:
    """What is wrong with an object; strict refuses unknown fields too."""
    if item["kind"] in CUSTOM:
        return []
    group = "meta-v1" if item["kind"] == "Status" else re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", item["apiVersion"])
    found = validator(f"v{version}.0-local{'-strict' if strict else ''}", f"{item['kind'].lower()}-{group}")
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found.iter_errors(item)]


@functools.cache
def validator(folder: str, name: str) -> jsonschema.Validator:
    schema = json.loads((FOLDER / folder / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ definitions(folder))


@functools.cache
def definitions(folder: str) -> Registry:
    return Resource.from_contents(json.loads((FOLDER / folder / "_definitions.json").read_text())) @ Registry()
