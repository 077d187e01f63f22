# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Any target: every model type of the installed transformers."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import METHODS
from ansible_collections.inference.spec_decode.plugins.module_utils.model_shape import draft_parameters

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
pytestmark = pytest.mark.skipif(not ENGINE.exists(), reason="there is no engine environment; run make setup")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    answer = subprocess.run(
        [str(ENGINE), str(ROOT / "scripts/targets_table.py"), "--out", str(folder / "targets.md"),
         "--json", str(folder / "all.json")],
        capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-5000:] + answer.stderr[-5000:]
    return folder


def test_every_model_type_gives_drafts_that_build_or_one_clear_reason(swept):
    found = json.loads((swept / "all.json").read_text())
    assert len(found) > 200
    for kind, drafts in found.items():
        assert set(drafts) == set(METHODS), kind
        for method, draft in drafts.items():
            assert not draft["problems"], (kind, method, draft["problems"])
            assert bool(draft["config"]) != bool(draft["reason"]), (kind, method)
            if draft["config"]:
                assert draft["parameters"] == sum(draft_parameters(draft["config"], method)), (kind, method)
                assert draft["figures"]["weight_bytes"] > 0, (kind, method)
            else:
                assert draft["reason"].endswith("."), (kind, method, draft["reason"])


def test_the_committed_table_is_what_the_script_writes(swept):
    assert (swept / "targets.md").read_text() == (ROOT / "docs/targets.md").read_text(), (
        "docs/targets.md is not what this transformers gives: run .engine/bin/python scripts/targets_table.py"
    )
