# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which phases a run goes through, and what it says is left."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jinja2
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


@pytest.mark.parametrize(
    ("start", "stop", "loads"),
    [("", "", True), ("train", "", True), ("", "capture", True), ("", "dataset", False), ("convert", "", False)],
)
def test_untrained_draft_is_loaded_only_before_what_it_spares(start, stop, loads):
    play = yaml.safe_load((ROOT / "playbooks/train_draft.yml").read_text())[0]
    environment = jinja2.Environment()
    environment.filters["bool"] = bool
    wanted = environment.from_string(play["vars"]["spec_untrained_first"])
    chosen = phases.selected(start, stop)
    assert wanted.render(spec_phases=chosen, spec_untrained_check=True) == str(loads)
    assert wanted.render(spec_phases=chosen, spec_untrained_check=False) == "False"
    role = next(role for role in play["roles"] if role["role"].endswith(".untrained"))
    chain = yaml.safe_load((ROOT / "roles/chain/defaults/main.yml").read_text())["chain_phases"]
    assert role["when"] == "spec_untrained_first | bool" and role["when"] in chain


def test_list_of_targets_is_found_from_the_current_folder(tmp_path):
    (tmp_path / "targets.yml").write_text("- {method: dflash}\n")
    hosts = tmp_path / "hosts.yml"
    hosts.write_text("spec_decode: {hosts: {localhost: {ansible_connection: local}}}\n")
    answer = subprocess.run(
        [pathlib.Path(sys.executable).with_name("ansible-playbook"), ROOT / "playbooks/train_drafts.yml", "-i", hosts,
         "-e", "targets_file=targets.yml"],
        cwd=tmp_path, env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(pathlib.Path(phases.__file__).parents[5])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # It was read, for what it lacks is named.
    assert "Entry 1 of the list of targets names no target" in answer.stdout + answer.stderr
