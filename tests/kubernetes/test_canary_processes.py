# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role canary with pods that are real processes: real staging, real clients, real counters of made-up servers."""

from __future__ import annotations

import os
import pathlib
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.files import sha256_file, sha256_value
from cluster_double import Image
from lab import SERVER, STAGING, Lab, said
from runtime_double import containers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))

import schemas

HERE = pathlib.Path(__file__).resolve().parent


@pytest.fixture
def lab(cluster, tmp_path):
    """Two volumes, a target on one and a draft on the other."""
    made = Lab(cluster, tmp_path)
    cluster.add_node("cpu-a")
    work = tmp_path / 'it\'s a "work" folder $(touch hacked)'
    cluster.claims = {"models": tmp_path / "models", "work": work}
    draft = work / "draft"
    for folder in (tmp_path / "models/base", draft):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    made.stage(str(draft), sha256_value({"config.json": sha256_file(str(draft / "config.json"))})[:16])
    commands = {"vllm": [sys.executable, str(HERE / "stub_vllm.py")], "python3": [sys.executable]}
    cluster.images[SERVER] = Image(process=containers(commands, {"PATH": os.environ["PATH"]}))
    return made


def staging(cluster):
    """The volume of the drafts, at the same place in the pods as here."""
    return {"spec_canary_source": {**STAGING["spec_canary_source"], "path": str(cluster.claims["work"])}}


def test_staged_served_and_measured(cluster, lab):
    lab.play(**staging(cluster), spec_canary_gpus=0)
    staged = cluster.claims["models"] / "target/speculator/tiny" / lab.draft["sha"]
    assert (staged / "config.json").read_text() == "{}"
    result = lab.result("acceptance")
    assert schemas.problems("acceptance", result) == []
    tpot = {arm: [t["client"]["tpot_ms"]["median"] for t in result["trials"] if t["arm"] == arm] for arm in result["arms"]}
    assert max(tpot["trained"]) < min(tpot["standing"]), "three tokens a time are faster than one"
    trained = [trial["engine"] for trial in result["trials"] if trial["arm"] == "trained"]
    assert [engine["acceptance_length"] for engine in trained] == [3.0, 3.0, 3.0]
    assert result["differences"] == [] and result["node"] == "cpu-a" and result["arms"]["trained"]["resolved"]["dtype"] == "none"
    assert result["plan"]["prompts"]["count"] == 4 and len(result["plan"]["prompts"]["sha256"]) == 64


def test_a_server_that_ends_says_why(cluster, lab):
    (cluster.claims["models"] / "base/config.json").unlink()
    output = said(lab.play(code=2, **staging(cluster), spec_canary_gpus=0))
    assert "was started again Its log ends with: ValueError:" in output and "holds no config.json" in output
    assert lab.own() == []
