# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which phases a run goes through, and what it says is left."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import phases
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_from_one_phase_to_another():
    assert phases.selected("", "") == list(phases.PHASES)
    assert phases.selected("capture", "train") == ["capture", "train"]
    assert phases.selected("", "dataset") == ["dataset"]


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        ("tarin", "", "spec_start_phase 'tarin' is no phase. Choose one of dataset, capture"),
        ("", "all", "spec_stop_phase 'all' is no phase"),
        ("train", "capture", "spec_start_phase train comes after spec_stop_phase capture"),
    ],
)
def test_what_is_no_range(start, stop, words):
    with pytest.raises(SpecDecodeError, match=words):
        phases.selected(start, stop)


def test_next_step():
    assert phases.next_step(["dataset", "capture"]).endswith("go on with -e spec_start_phase=train.")
    assert phases.next_step(["report"]) == ""


def test_playbook_goes_through_the_phases_in_their_order():
    """Each phase's role stands in the playbook, with its tag and its place in the range."""
    play = yaml.safe_load((ROOT / "playbooks/train_draft.yml").read_text())[0]
    roles = {role["role"].rpartition(".")[2]: role for role in play["roles"]}
    assert [name for name in roles if name in phases.PHASES] == list(phases.PHASES)
    for name in phases.PHASES:
        assert roles[name]["tags"] == [name] and roles[name]["when"] == f"'{name}' in spec_phases"
