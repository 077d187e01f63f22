# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the set-up says and removes, with a pip that is a script of the test's."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

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


def made(setup, folder, files=(), interrupted=False):
    """Set up an environment in a folder that holds these files already."""
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_text("of other requirements")
    requirements = folder.with_name("requirements.txt")
    requirements.write_text("one==1\n")

    def install(begun, _requirements):
        assert (begun / "incomplete").is_file() and not (begun / "complete").exists()
        if interrupted:
            raise KeyboardInterrupt

    # Without pip, which takes seconds and is not what this is about.
    setup.call = lambda command, what: subprocess.run([*command, "--without-pip"], check=True)
    setup.environment("test", folder, sys.executable, requirements, install)


@pytest.mark.parametrize("files", [(), ("complete", "old"), ("incomplete", "old")], ids=["empty", "complete", "begun"])
def test_environment_of_its_own_is_made_anew(setup, tmp_path, files):
    folder = tmp_path / ".engine"
    made(setup, folder, files)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"complete", "pyvenv.cfg"}


def test_environment_that_was_interrupted_is_made_anew(setup, tmp_path):
    folder = tmp_path / ".engine"
    with pytest.raises(KeyboardInterrupt):
        made(setup, folder, interrupted=True)
    assert not (folder / "complete").exists()
    made(setup, folder)
    assert (folder / "complete").is_file() and not (folder / "incomplete").exists()


def test_removal_that_is_interrupted_leaves_the_mark(setup, tmp_path, monkeypatch):
    folder = tmp_path / ".engine"
    (folder / "lib").mkdir(parents=True)
    for name in ("complete", "pyvenv.cfg"):
        (folder / name).write_text("")

    rmtree = setup.shutil.rmtree

    def interrupted(path):
        rmtree(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(setup.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.remove(folder)
    assert (folder / "complete").exists()


def test_environment_of_a_wheelhouse_is_left_alone(setup, tmp_path):
    folder = tmp_path / ".engine"
    with pytest.raises(setup.SetupError, match="was not made by this set-up") as refused:
        made(setup, folder, ("pyvenv.cfg",))
    assert str(folder) in str(refused.value) and "without make" in str(refused.value)
    assert [path.name for path in folder.iterdir()] == ["pyvenv.cfg"]
