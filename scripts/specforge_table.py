#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the rendered draft configs with those that SpecForge ships, field by field: ``docs/specforge-configs.md``."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/unit/data/specforge_configs.json"
PAGE = ROOT / "docs/specforge-configs.md"
sys.path.insert(0, str(ROOT / ".collections"))

from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import draft_config

LAYERS = "aux layers"


def compared(row: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field → rendered value and SpecForge's, for each field that SpecForge's file and the draft's class have."""
    theirs, method = dict(row["specforge"]), "dflash" if "dflash" in row["file"] else "eagle3"
    inner = theirs.pop("dflash_config", {})
    found = draft_config(row["config"], method, mask_token_id=inner.get("mask_token_id"))
    ours = {name: field.value for name, field in found.items()}
    # What SpecForge's classes take where a file is silent.
    theirs.setdefault("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"])
    theirs.setdefault("rope_theta", 10000.0)
    theirs.setdefault("rope_scaling", None)
    aux = theirs.pop("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids")
    if "dtype" in theirs:
        theirs["torch_dtype"] = theirs.pop("dtype")
    pairs = {name: (ours.get(name), value) for name, value in theirs.items()}
    if aux:
        pairs[LAYERS] = (ours["eagle_config"]["eagle_aux_hidden_state_layer_ids"], aux)
    if inner:
        pairs["target layers"] = (ours["dflash_config"]["target_layer_ids"], inner["target_layer_ids"])
    return pairs


def differences(row: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The compared fields that differ."""
    return {name: pair for name, pair in compared(row).items() if pair[0] != pair[1]}


def reason(data: dict[str, Any], row: dict[str, Any], field: str) -> str:
    """Why a field differs: this file's own reason, else the field's."""
    return str(row["why"].get(field) or data["reasons"].get(field, ""))


def page(data: dict[str, Any]) -> str:
    """The page."""
    rows = data["compared"]
    equal = [row["file"] for row in rows if not differences(row)]
    fields = sum(len(compared(row)) for row in rows)
    different = sum(len(differences(row)) for row in rows)
    lines = [
        "# Rendered configs and SpecForge's",
        "",
        "<!-- Written by scripts/specforge_table.py; do not edit. -->",
        "",
        f"SpecForge ({data['specforge']}) ships {len(rows) + len(data['not_compared'])} draft configs for EAGLE3 and DFlash. For",
        f"{len(rows)} of them the target's config was available (see the sources below). Of {fields} compared fields {different}",
        f"differ; {len(equal)} files are equal in every compared field. Fields that neither draft class reads (versions, notes",
        "on the target) are not compared, nor are mask tokens: they come from a tokenizer, which was not available.",
        "",
        "## Differences",
        "",
        "| SpecForge's file | field | rendered | SpecForge | why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for field, (ours, theirs) in differences(row).items():
            lines.append(f"| {row['file']} | {field} | {_cell(ours)} | {_cell(theirs)} | {reason(data, row, field)} |")
    lines += ["", "## Equal", "", *(f"- {name}" for name in equal), "", "## Sources of the targets' configs", ""]
    lines += ["| SpecForge's file | target | source |", "|---|---|---|"]
    lines += [f"| {row['file']} | {row['target']} | {row['source']} |" for row in rows]
    lines += ["", "## Not compared: the target's config was not available", "", *(f"- {name}" for name in data["not_compared"])]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        return f"{len(value)} × {value[0]}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return "none" if value is None else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(DATA.read_text())))
