# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders on a volume under their checksums: whole, once, never overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import stat
import subprocess
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.files import sha256_folder
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
        self.sha = sha256_folder(str(self.source))[:16]
        self.place = folder / "models" / self.sha
        (folder / "spec_decode").symlink_to(ROOT / "plugins/module_utils")

    def refused(self, **options) -> str:
        answer = self.run(**options)
        assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
        return answer.stderr

    def run(self, remove: bool = False, sha: str | None = None, place: str = "") -> subprocess.CompletedProcess:
        plan = self.folder / "plan.json"
        wanted = self.sha if sha is None else sha
        plan.write_text(
            json.dumps(
                {
                    "remove": remove,
                    "folders": [{"source": str(self.source), "destination": place or str(self.place), "sha": wanted}],
                }
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
    (partial / ".spec-decode-checksums.json").write_text(json.dumps({"../../kept": "0", "/kept": "0"}))
    kept = volume.folder / "kept"
    kept.write_text("nobody's business")
    (partial / "left-over").write_text("of the source as it was")
    (partial / "more/.copy-0123").write_text("of a copy that was killed")
    copied = (partial / "more/model.safetensors").stat().st_mtime_ns
    assert volume.staged()["changed"]
    assert sorted(os.listdir(volume.place)) == [".spec-decode-checksums.json", "config.json", "more"]
    assert os.listdir(volume.place / "more") == ["model.safetensors"] and kept.exists()
    assert not volume.staged()["changed"], "what was left over would make it another content"
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


def test_what_an_interrupted_staging_left_is_removed_too(volume):
    partial = volume.place.with_name(volume.sha + ".partial")
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    assert volume.staged(remove=True)["changed"] and not partial.exists()


def test_hidden_folders_are_no_part_of_a_draft(volume):
    """As hf download --local-dir leaves one, with the time of the download in it."""
    metadata = volume.source / ".cache/huggingface/download/config.json.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("1764100000.0")
    assert volume.staged()["files"] == 2 and not (volume.place / ".cache").exists()
    assert sha256_folder(str(volume.place))[:16] == volume.sha, "a staged draft is known by the same checksum"
    metadata.write_text("1764200000.0")
    assert not volume.staged()["changed"]


def test_a_file_that_rotted_in_an_interrupted_copy_is_copied_anew(volume):
    partial = volume.place.with_name(volume.sha + ".partial")
    volume.staged()
    volume.place.rename(partial)
    size = (partial / "more/model.safetensors").stat().st_size
    (partial / "more/model.safetensors").write_bytes(b"0" * size)
    assert volume.staged()["changed"]
    assert (volume.place / "more/model.safetensors").read_bytes() == (volume.source / "more/model.safetensors").read_bytes()


def escape_by_link(volume):
    (volume.source / "model.bin").symlink_to("/etc/passwd")
    return "model.bin is a link to /etc/passwd, which is not in"


def escape_by_relative_link(volume):
    (volume.folder / "secret").write_text("x")
    (volume.source / "more/vocab.json").symlink_to("../../secret")
    return "more/vocab.json is a link to ../../secret, which is not in"


def escape_by_a_chain_of_links(volume):
    (volume.source / "one").symlink_to("two")
    (volume.source / "two").symlink_to("../../../../../../etc/passwd")
    return "one is a link to two, which is not in"


def escape_by_a_sibling_of_the_same_beginning(volume):
    (volume.folder / "it's a draft of others").mkdir()
    (volume.folder / "it's a draft of others/x").write_text("x")
    (volume.source / "x").symlink_to("../it's a draft of others/x")
    return "which is not in"


def link_to_a_folder_outside(volume):
    (volume.source / "etc").symlink_to("/etc")
    return "etc is a link to /etc, which is not in"


def link_to_a_folder_inside(volume):
    (volume.source / "again").symlink_to("more")
    return "again is no file but a link to none"


def link_to_nothing(volume):
    (volume.source / "gone").symlink_to("nowhere")
    return "gone is no file but a link to none"


def link_to_itself(volume):
    (volume.source / "loop").symlink_to("loop")
    return "loop is no file but a link to none"


def pipe(volume):
    os.mkfifo(volume.source / "pipe")
    return "pipe is no file but a pipe"


def endpoint(volume):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(volume.source):
        server.bind("socket")
    return "socket is no file but a socket"


def device_by_link(volume):
    (volume.source / "zero").symlink_to("/dev/zero")
    return "zero is a link to /dev/zero, which is not in"


@pytest.mark.parametrize(
    "trick",
    [escape_by_link, escape_by_relative_link, escape_by_a_chain_of_links, escape_by_a_sibling_of_the_same_beginning,
     link_to_a_folder_outside, link_to_a_folder_inside, link_to_nothing, link_to_itself, pipe, endpoint, device_by_link],
)  # fmt: skip
@pytest.mark.parametrize("sha", [None, ""])
def test_only_a_folders_own_files_are_staged(volume, trick, sha):
    words = trick(volume)
    assert words in volume.refused(sha=sha)
    assert not volume.place.exists() and not volume.place.with_name(volume.sha + ".partial").exists()


def test_a_device_is_no_file(volume):
    device = volume.source / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device")
    assert "device is no file but a device" in volume.refused()


def test_a_folder_that_cannot_be_read_is_not_left_out(volume):
    (volume.source / "more").chmod(0)
    try:
        if os.access(volume.source / "more", os.R_OK):
            pytest.skip("root reads everything")
        assert "more cannot be read: Permission denied." in volume.refused()
    finally:
        (volume.source / "more").chmod(0o755)


def test_links_inside_the_folder_and_hard_links_become_files_of_their_own(volume):
    (volume.source / "again.json").symlink_to("config.json")
    os.link(volume.source / "config.json", volume.source / "hard.json")
    assert volume.staged(sha="")["files"] == 4
    copies = [volume.place / name for name in ("config.json", "again.json", "hard.json")]
    assert all(not copy.is_symlink() and copy.stat().st_nlink == 1 and copy.read_text() == "{}" for copy in copies)


def test_a_snapshot_in_hugging_faces_cache_is_staged_from_its_blobs(volume):
    repository = volume.folder / "models--org--base"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/0f").write_text("weights")
    volume.source = repository / "snapshots/a1"
    (volume.source / "more").mkdir(parents=True)
    (volume.source / "more/model.safetensors").symlink_to("../../../blobs/0f")
    assert volume.staged(sha="")["changed"]
    staged = volume.place / "more/model.safetensors"
    assert staged.read_text() == "weights" and not staged.is_symlink()
    (volume.source / "refs").symlink_to("../../refs/main")
    assert "refs is a link to ../../refs/main, which is not in" in volume.refused(sha="")


@pytest.mark.parametrize(
    ("place", "sha"),
    [("models/{sha}", None), ("/models/../etc/{sha}", None), ("/models/{sha}/..", None), ("/models/other", None),
     ("/models/../../{sha}", "../../{sha}"), ("/models/..", ".."), ("/", "")],
)  # fmt: skip
@pytest.mark.parametrize("remove", [False, True])
def test_a_destination_is_a_folder_of_its_own(volume, place, sha, remove):
    said = volume.refused(remove=remove, sha=sha and sha.format(sha=volume.sha), place=place.format(sha=volume.sha))
    assert "is no place for the content" in said


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_a_destination_that_is_a_link_is_not_followed(volume, suffix, remove):
    elsewhere = volume.folder / "elsewhere"
    volume.staged()
    volume.place.rename(elsewhere)
    volume.place.with_name(volume.sha + suffix).symlink_to(elsewhere)
    before = sorted(os.listdir(elsewhere))
    assert "is no folder but a link" in volume.refused(remove=remove)
    assert sorted(os.listdir(elsewhere)) == before


def test_an_interrupted_copy_is_not_gone_on_with_through_a_link(volume):
    partial = volume.place.with_name(volume.sha + ".partial")
    partial.mkdir(parents=True)
    elsewhere = volume.folder / "elsewhere"
    elsewhere.mkdir()
    (partial / "more").symlink_to(elsewhere)
    assert "more is a link to" in volume.refused() and os.listdir(elsewhere) == []


def test_a_volume_that_cannot_be_written_is_one_sentence(volume):
    volume.place.parent.write_text("no folder")
    assert "Cannot write " in volume.refused() and "spec_canary_run_as" in volume.refused()
