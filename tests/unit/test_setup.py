# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the set-up says and removes, with a pip that is a script of the test's."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("checkout_setup", ROOT / "scripts/setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pip_that(folder, lines):
    pip = folder / "bin/pip"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\n" + lines)
    pip.chmod(0o755)
    return folder


def test_refused_torch_is_explained_by_what_pip_says_of_each_index(setup, tmp_path):
    folder = pip_that(
        tmp_path / "env",
        "case \"$*\" in *--index-url*) echo 'ERROR: Could not connect' >&2;; *)\n"
        "echo 'WARNING: slow' >&2; echo 'ERROR: Could not find a version' >&2; echo 'ERROR: No matching distribution' >&2;;\n"
        "esac\necho 'hint: see a page' >&2; exit 1\n",
    )
    with pytest.raises(setup.SetupError) as refused:
        setup.cpu_torch(folder)
    assert "pip as it is configured here: Could not find a version\n" in str(refused.value)
    assert f"{setup.PYTORCH_INDEX}: Could not connect" in str(refused.value)
    assert "hint" not in str(refused.value)


def test_second_index_is_taken_where_the_first_has_no_torch(setup, tmp_path, capsys):
    folder = pip_that(tmp_path / "env", 'case "$*" in *--index-url*) exit 0;; esac\nexit 1\n')
    assert setup.cpu_torch(folder) == ["--index-url", setup.PYTORCH_INDEX]
    assert setup.PYTORCH_INDEX in capsys.readouterr().out


def test_environment_of_another_checkout_loses_only_its_link(setup, tmp_path):
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    link, own = tmp_path / ".venv", tmp_path / ".engine"
    link.symlink_to(other)
    own.mkdir()
    for folder in (link, own, tmp_path / "none"):
        setup.remove(folder)
    assert (other / "bin").is_dir() and not link.is_symlink() and not own.exists()
