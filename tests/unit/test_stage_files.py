# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders on a volume under their checksums: whole, once, never overwritten."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.files import sha256_files
from ansible_collections.inference.spec_decode.plugins.module_utils.framing import unframe

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Volume:
    """A draft to stage, and the folder that stands for the serving volume."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.source = folder / "it's a draft"
        (self.source / "more").mkdir(parents=True)
        (self.source / "config.json").write_text("{}")
        (self.source / "more/model.safetensors").write_bytes(os.urandom(100_000))
        self.names = ["config.json", "more/model.safetensors"]
        self.sha = sha256_files([str(self.source / name) for name in self.names], str(self.source))[:16]
        self.place = folder / "models" / self.sha
        (folder / "spec_decode").symlink_to(ROOT / "plugins/module_utils")

    def run(self, remove: bool = False, sha: str | None = None) -> subprocess.CompletedProcess:
        plan = self.folder / "plan.json"
        wanted = self.sha if sha is None else sha
        plan.write_text(
            json.dumps(
                {"remove": remove, "folders": [{"source": str(self.source), "destination": str(self.place), "sha": wanted}]}
            )
        )
        return subprocess.run(
            [sys.executable, str(ROOT / "files/stage_files.py"), "--plan", str(plan)],
            env={**os.environ, "PYTHONPATH": str(self.folder)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def staged(self, **options) -> dict:
        answer = self.run(**options)
        assert answer.returncode == 0, answer.stderr
        return unframe(answer.stdout)["folders"][0]


@pytest.fixture
def volume(tmp_path):
    return Volume(tmp_path)


def test_staged_once(volume):
    first = volume.staged()
    assert first["changed"] and first["files"] == 2 and first["bytes"] > 100_000
    assert (volume.place / "more/model.safetensors").read_bytes() == (volume.source / "more/model.safetensors").read_bytes()
    assert not volume.staged()["changed"] and not volume.place.with_name(volume.sha + ".partial").exists()


def test_an_interrupted_copy_goes_on(volume):
    partial = volume.place.with_name(volume.sha + ".partial")
    volume.staged()
    volume.place.rename(partial)
    (partial / "config.json").unlink()
    (partial / "left-over").write_text("of the source as it was")
    record = json.loads((partial / ".spec-decode-checksums.json").read_text())
    (partial / ".spec-decode-checksums.json").write_text(json.dumps({**record, "left-over": "0"}))
    copied = (partial / "more/model.safetensors").stat().st_mtime_ns
    assert volume.staged()["changed"]
    assert sorted(os.listdir(volume.place)) == [".spec-decode-checksums.json", "config.json", "more"]
    assert (volume.place / "more/model.safetensors").stat().st_mtime_ns == copied


def test_another_content_is_never_overwritten(volume):
    volume.place.mkdir(parents=True)
    (volume.place / "config.json").write_text("someone else's")
    answer = volume.run()
    assert answer.returncode == 2 and "holds another content" in answer.stderr and "Nothing was overwritten." in answer.stderr
    assert (volume.place / "config.json").read_text() == "someone else's"


def test_a_draft_that_changed_since_is_refused(volume):
    (volume.source / "config.json").write_text("[]")
    answer = volume.run()
    assert answer.returncode == 2 and f"is to be staged as {volume.sha}" in answer.stderr and not volume.place.exists()


def test_without_a_checksum_the_source_is_compared(volume):
    assert volume.staged(sha="")["changed"] and not volume.staged(sha="")["changed"]
    (volume.source / "config.json").write_text("[]")
    assert "holds another content" in volume.run(sha="").stderr


def test_missing_source(volume):
    volume.source = volume.folder / "nowhere"
    assert "is not there" in volume.run().stderr


def test_removed_once_and_only_what_was_staged(volume):
    volume.staged()
    assert volume.staged(remove=True)["changed"] and not volume.place.exists()
    assert not volume.staged(remove=True)["changed"]
    volume.place.mkdir()
    assert "was not staged by this collection" in volume.run(remove=True).stderr and volume.place.exists()
