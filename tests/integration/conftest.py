# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small target and a bundle's folder, built once for all tests that run the real engine."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"


class Built:
    """Where the small target and its data stand."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.work = folder / 'it\'s a "work" folder $(touch hacked)'
        self.target = self.work / "targets" / "small chat"
        self.data = self.work / "data"


@pytest.fixture(scope="session", autouse=True)
def facts_of_their_own(tmp_path_factory):
    """Verdicts of test experiments do not stay in the checkout's cache of facts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANSIBLE_CACHE_PLUGIN_CONNECTION", str(tmp_path_factory.mktemp("facts")))
        yield


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A target of 8 layers that learned a little; paths hold blanks, quotes and a command."""
    if not ENGINE.exists():
        pytest.skip("there is no engine environment; run make setup")
    found = Built(tmp_path_factory.mktemp("built"))
    subprocess.run(
        [str(ENGINE), str(ROOT / "demo/build_target.py"), "--out", str(found.target), "--data", str(found.data),
         "--layers", "8", "--hidden-size", "128", "--heads", "2", "--steps", "60", "--conversations", "2000", "--rows", "200"],
        check=True, timeout=600,
    )  # fmt: skip
    return found


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A folder with the node programs and their library, as the scaffold lays them down."""
    folder = tmp_path_factory.mktemp("bundle")
    for program in (ROOT / "files").glob("*.py"):
        shutil.copy(program, folder)
    shutil.copytree(ROOT / "plugins/module_utils", folder / "spec_decode")
    return folder


def pytest_terminal_summary(terminalreporter):
    """How many faults were made to happen, and what became of them."""
    outcomes = {
        word: [report for report in terminalreporter.getreports(word) if "fault" in report.keywords]
        for word in ("passed", "failed", "skipped")
    }
    if any(outcomes.values()):
        counts = ", ".join(f"{len(reports)} {word}" for word, reports in outcomes.items())
        terminalreporter.write_line(f"fault cases on real Slurm, nothing lost and nothing doubled: {counts}")
