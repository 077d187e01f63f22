# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection as its users get it: built, installed from its tarball, and run far from the checkout."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))
import small_target

BIN = ROOT / ".venv/bin"
NAMESPACE = "inference.spec_decode"
OLDEST = "2.16.19"
PLAYBOOKS = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml"))


def run(*command, **options):
    """A command's finished process; what it printed is shown when it failed."""
    answer = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert answer.returncode == 0, f"{command}:\n{answer.stdout}{answer.stderr}"
    return answer


def clean_environment(home: pathlib.Path, collections: pathlib.Path) -> dict[str, str]:
    """Nothing of the checkout, nor of the user's own Ansible."""
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "ANSIBLE_HOME": str(home / ".ansible"), "LC_ALL": "C.UTF-8",
        "ANSIBLE_COLLECTIONS_PATH": str(collections),
    }  # fmt: skip


class Installed:
    """An empty home folder with the collection installed from its tarball, and a site of the user's own."""

    def __init__(self, home: pathlib.Path, tarball: pathlib.Path) -> None:
        self.home, self.tarball = home, tarball
        self.collections = home / "collections"
        self.collection = self.collections / "ansible_collections" / NAMESPACE.replace(".", "/")
        self.environment = clean_environment(home, self.collections)
        self.work = home / "work"
        self.target = home / "models/tiny"
        self.inventory = home / "inventory"

    def play(self, name: str, *arguments: str, ansible: pathlib.Path = BIN, **settings) -> str:
        """Run one of its playbooks by its fully qualified name, in the empty home folder."""
        return run(
            ansible / "ansible-playbook", f"{NAMESPACE}.{name}", "-i", self.inventory, "-e", json.dumps(settings), *arguments,
            env=self.environment, cwd=self.home,
        ).stdout  # fmt: skip


@pytest.fixture(scope="session")
def tarball(tmp_path_factory):
    """The release, built from what git knows and nothing else."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    run(sys.executable, ROOT / "scripts/tree.py", tree)
    run(
        BIN / "ansible-galaxy",
        "collection",
        "build",
        "--output-path",
        out,
        cwd=tree / "ansible_collections/inference/spec_decode",
    )
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def installed(tarball, tmp_path_factory):
    found = Installed(tmp_path_factory.mktemp("home"), tarball)
    # Its dependencies come from Galaxy for a user; here those of the controller's environment stand in.
    others = next((ROOT / ".venv").glob("lib/python*/site-packages/ansible_collections"))
    found.collection.parent.mkdir(parents=True)
    for path in others.iterdir():
        if path.is_dir():
            (found.collections / "ansible_collections" / path.name).symlink_to(path)
    run(
        BIN / "ansible-galaxy", "collection", "install", "--no-deps", "-p", found.collections, tarball,
        env=found.environment, cwd=found.home,
    )  # fmt: skip
    small_target.write_target(found.target)
    write_site(found)
    return found


def write_site(found: Installed) -> None:
    """An inventory of one machine, as a user would write it."""
    data = small_target.write_conversations(found.home / "conversations.json")
    settings = {
        "spec_work_dir": str(found.work), "spec_engine_python": str(ROOT / ".engine/bin/python"),
        "spec_sources": [{"path": str(data)}], "spec_train_rows": 10, "spec_eval_rows": 4,
    }  # fmt: skip
    (found.inventory / "group_vars").mkdir(parents=True)
    (found.inventory / "group_vars/spec_decode.yml").write_text(yaml.safe_dump(settings))
    host = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    (found.inventory / "hosts.yml").write_text(yaml.safe_dump({"spec_decode": {"hosts": {"localhost": host}}}))


@pytest.fixture(scope="session")
def oldest(tmp_path_factory):
    """The oldest ansible-core that the collection supports, in an environment of its own.

    It runs modules by the path of its Python, unquoted: in a checkout whose path has blanks it cannot live.
    """
    if sys.version_info[:2] > (3, 12):
        pytest.skip(f"ansible-core {OLDEST} does not know Python {sys.version_info.major}.{sys.version_info.minor}")
    place = ROOT / ".cache" if " " not in str(ROOT) else tmp_path_factory.mktemp("oldest")
    folder = place / f"ansible-core-{OLDEST}"
    if not (folder / "complete").exists():
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(folder / "bin/pip", "install", "--quiet", "--no-input", f"ansible-core=={OLDEST}")
        (folder / "complete").write_text("")
    return folder / "bin"
