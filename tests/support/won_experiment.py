#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bundle of an experiment that won, as far as a promotion reads it, made up without a measurement."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from ansible_collections.inference.spec_decode.plugins.module_utils import promotion
from ansible_collections.inference.spec_decode.plugins.module_utils.evidence import draft_sha
from ansible_collections.inference.spec_decode.tests.unit.measurements import WIN, judge, measurement

#: what production serves on, which the machine of a test does not know
SERVING = {"hardware": "H", "vllm": "0.32.0", "target_sha": "t"}


def write_won(bundle: pathlib.Path, draft: pathlib.Path) -> dict[str, Any]:
    """Lay down a draft and a VERDICT that ships it; returns its speculative config."""
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "model.safetensors").write_bytes(b"weights")
    found = measurement(*WIN)
    config: dict[str, Any] = found["arms"]["trained"]["speculative_config"]
    config["model"] = str(draft)
    found["draft"]["sha"] = draft_sha(str(draft))
    (bundle / "results").mkdir(parents=True, exist_ok=True)
    (bundle / "results/acceptance.json").write_text(json.dumps(found))
    (bundle / "results/verdict.json").write_text(json.dumps(judge(found)))
    return config


def write_promoted(bundle: pathlib.Path, config: dict[str, Any]) -> None:
    """The record of a promotion that can be rolled back."""
    known = promotion.record({"speculative_config": config, "previous": None, "measurement": "m"}, None, None)
    (bundle / "results/promotion.json").write_text(json.dumps(known))


if __name__ == "__main__":
    work = pathlib.Path(sys.argv[1])
    write_won(work / "won/spec-decode", work / "draft")
    write_promoted(work / "promoted/spec-decode", write_won(work / "promoted/spec-decode", work / "draft"))
