# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of chat templates agrees with the registry of the SpecForge that is installed."""

from __future__ import annotations

import json

import pytest

from .conftest import ROOT, run

QUESTION = """
import importlib.util, json, pathlib
folder = importlib.util.find_spec("specforge").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("templates", pathlib.Path(folder, "data/template.py"))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = {name: template.model_dump() for name, template in module.TEMPLATE_REGISTRY.templates.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def registry():
    return json.loads(run(ROOT / ".engine/bin/python", "-c", QUESTION).stdout)


def signatures():
    from ansible_collections.inference.spec_decode.plugins.module_utils.chat_templates import FAMILIES, THINK

    return THINK, sorted({signature for family in FAMILIES.values() for signature in family}, key=lambda found: found.name)


def test_every_name_is_registered_and_its_markers_are_the_registrys(registry):
    think, known = signatures()
    assert known
    for signature in known:
        fields = registry[signature.name]
        headers = "".join(fields[name] or "" for name in ("user_header", "assistant_header", "end_of_turn_token"))
        # a parser of its own writes the turns of some; those that think are known by what they think in
        if headers:
            assert all(marker in headers or marker == think for marker in signature.markers), signature
