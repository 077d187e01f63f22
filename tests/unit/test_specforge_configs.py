# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rendered configs beside those that SpecForge ships: every difference is explained, and no explanation is stale."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DATA = json.loads((ROOT / "tests/unit/data/specforge_configs.json").read_text())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("specforge_table", ROOT / "scripts/specforge_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("row", DATA["compared"], ids=lambda row: row["file"])
def test_every_difference_is_explained(script, row):
    different = script.differences(row)
    assert {field for field in different if not script.reason(DATA, row, field)} == set()
    assert set(row["why"]) <= set(different)


def test_the_page_is_what_the_script_writes(script):
    assert (ROOT / "docs/specforge-configs.md").read_text() == script.page(DATA)


def test_layers_agree_wherever_specforge_follows_its_own_rule(script):
    own = [row["file"] for row in DATA["compared"] if {"aux layers", "target layers"} & set(script.differences(row))]
    assert own == ["configs/gpt-oss-120B-eagle3.json"]
