# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What ansible-builder makes of the collection. No image is built: that needs a container engine and its registries."""

from __future__ import annotations

import shutil

import yaml

from .conftest import BIN, NAMESPACE, ROOT, run


def test_introspection_finds_the_collections_requirements(installed):
    answer = run(BIN / "ansible-builder", "introspect", installed.collections, env=installed.environment)
    found = yaml.safe_load(answer.stdout)
    lines = {kind: [line for line in lines if f"collection {NAMESPACE}" in line] for kind, lines in found.items()}
    # What only tests need stands in bindep's profile of that name, which an image leaves out.
    ours = {kind: [line.split()[0] for line in mine if "[test]" not in line] for kind, mine in lines.items()}
    assert ours["python"] == ["prometheus_client>=0.20", "requests>=2.31"]
    assert ours["system"] == ["openssh-clients", "openssh-client"]
    assert any("kubernetes.core" in line for line in found["python"]), "what the dependencies need comes along"


def test_build_context_holds_the_collection(tarball, tmp_path):
    for name in ("execution-environment.yml", "requirements.yml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "dist").mkdir()
    shutil.copy(tarball, tmp_path / "dist")
    run(BIN / "ansible-builder", "create", "--output-filename", "Containerfile", cwd=tmp_path)
    containerfile = (tmp_path / "context/Containerfile").read_text()
    assert f"collection install --no-deps /tmp/{tarball.name}" in containerfile
    assert (tmp_path / "context/_build/dist" / tarball.name).exists()
    wanted = yaml.safe_load((tmp_path / "context/_build/requirements.yml").read_text())["collections"]
    assert {item["name"] for item in wanted} == {"kubernetes.core", "awx.awx"}


def test_version_is_the_release_everywhere():
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    assert f"inference-spec_decode-{version}.tar.gz" in (ROOT / "execution-environment.yml").read_text()
