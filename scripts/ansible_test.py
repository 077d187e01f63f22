#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run ``ansible-test`` in the current folder, a copy of the collection below ``ansible_collections/``.

It works where only a Python package index can be reached: ansible-test makes a virtual environment for each of its
tests and fetches the program that installs pip into them from a host of its own. That program is put into its cache
beforehand, made of the ``ensurepip`` that Python brings. Everything stays in the checkout's ``.cache``.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOME = ROOT / ".cache/ansible-test"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
#: the version of pip that the pinned ansible-core asks for (``get_venv_packages`` in its ``python_requirements.py``)
PIP = "24.2"
GET_PIP = """\
import subprocess
import sys

wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
# As programs of their own: pip inside this process would not read pip's configuration.
subprocess.run([sys.executable, "-m", "ensurepip"], check=True)
subprocess.run([sys.executable, "-m", "pip", "install", *wanted], check=True)
"""
ARGUMENTS = {
    # Each of sanity's tests gets an environment of its own.
    "sanity": ["--requirements"],
    "units": [],
}


def main() -> None:
    command = sys.argv[1]
    cache = HOME / f".ansible/test/cache/get_pip_{PIP.replace('.', '_')}.py"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(GET_PIP)
    keep_pip_settings()
    os.environ["HOME"] = str(HOME)
    with tempfile.TemporaryDirectory() as folder:
        # ansible-test starts pytest through a first line with this Python's path, which a blank in it would cut short.
        environment = pathlib.Path(folder, "environment")
        environment.symlink_to(sys.prefix)
        os.environ["PATH"] = os.pathsep.join([str(environment / "bin"), os.environ.get("PATH", os.defpath)])
        arguments = [command, "--local", "--python", VERSION, "--color", "no", *ARGUMENTS[command], *sys.argv[2:]]
        program = [str(environment / "bin/python"), str(environment / "bin/ansible-test")]
        sys.exit(subprocess.run([*program, *arguments], check=False).returncode)


def keep_pip_settings() -> None:
    """The user's configuration and cache of pip serve in the other home folder too."""
    for name in (".config/pip", ".pip", ".cache/pip"):
        theirs, ours = pathlib.Path.home() / name, HOME / name
        if theirs.is_dir() and not ours.is_symlink():
            ours.parent.mkdir(parents=True, exist_ok=True)
            ours.symlink_to(theirs)


if __name__ == "__main__":
    main()
