# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The demonstration in a checkout whose folder has any name."""

from __future__ import annotations

import ctypes.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo

    return demo


def test_the_openmp_library_is_loaded_from_a_folder_with_blanks(demo, tmp_path):
    folder = tmp_path / "my draft" / "lib"
    folder.mkdir(parents=True)
    # Any shared library shows whether the loader finds it; every Linux has this one.
    source = next(pathlib.Path("/").glob(f"*lib*/*/{ctypes.util.find_library('m')}"))
    shutil.copy(source, folder / "libiomp5.so")
    answer = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/self/maps').read())"],
        env=demo.environment(folder.parent), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(folder / "libiomp5.so") in answer.stdout and not answer.stderr


def test_without_the_library_the_environment_is_the_callers(demo, tmp_path):
    assert demo.environment(tmp_path) == dict(os.environ)


@pytest.mark.parametrize("value", ["/models/base", '/my models/it\'s a "base" $(touch hacked)'])
def test_any_path_reaches_the_playbook_whole(demo, tmp_path, value):
    play = tmp_path / "play.yml"
    play.write_text(
        "- hosts: localhost\n  gather_facts: false\n  tasks:\n    - ansible.builtin.assert: {that: target == wanted}\n"
    )
    command = [pathlib.Path(sys.executable).with_name("ansible-playbook"), play, "-e", demo.variable("target", value)]
    answer = subprocess.run(
        [*command, "-e", json.dumps({"wanted": value})], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout
