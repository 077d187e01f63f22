#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring folders to a volume under their checksums, or take them away again.

What stands at a destination is never written to: it is found to be the same, or the program refuses. A copy goes to
a folder beside it, file by file, each checked after it was read back; an interrupted one goes on where it stopped.

Plain files inside the folder are all that is read and all that is written: a link that leads out of it, a link to a
folder, a device or the like is refused, never followed and never left out silently. Hidden folders are no part of a folder's
content.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import stat
import tempfile
from typing import Any

from spec_decode.errors import SpecDecodeError
from spec_decode.files import CHECKSUMS, names_below, read_json_object, sha256_file, sha256_value, write_json
from spec_decode.framing import frame
from spec_decode.program import run
from spec_decode.progress import Progress

SHA = re.compile(r"[0-9a-f]*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, help="JSON: remove, and folders as [{source, destination, sha}]")
    options = parser.parse_args()
    plan = read_json_object(options.plan, "staging plan")
    progress = Progress()
    act = remove if plan["remove"] else stage
    print(frame({"folders": [act(folder, progress) for folder in plan["folders"]]}), flush=True)


def stage(folder: dict[str, str], progress: Progress) -> dict[str, Any]:
    """One folder, copied or found."""
    source, destination, sha = folder["source"], own_place(folder), folder["sha"]
    if not os.path.isdir(source):
        raise SpecDecodeError(
            f"The folder {source} to stage is not there.",
            "Check spec_canary_source: its volume must hold the drafts at the path that is named.",
        )
    names = files_below(source)
    if not os.path.lexists(destination):
        copied = copy(source, f"{destination}.partial", names, progress)
        check_content(copied, sha, source)
        write_json(os.path.join(f"{destination}.partial", CHECKSUMS), copied)
        try:
            os.rename(f"{destination}.partial", destination)
        except OSError as error:
            if not os.path.isdir(destination):  # another job was faster, with a copy that is checked below
                raise cannot_write(destination, error) from error
        else:
            return {**folder, "files": len(copied), "bytes": total(destination, copied), "changed": True}
    found = checksums(destination, progress)
    wanted = sha or content(checksums(source, progress))
    if content(found)[: len(wanted)] != wanted:
        raise SpecDecodeError(
            f"{destination} holds another content: {content(found)[:16]} instead of {wanted[:16]}.",
            "Nothing was overwritten. Find out who wrote it; remove it yourself if it is damaged.",
        )
    return {**folder, "files": len(found), "bytes": total(destination, found), "changed": False}


def remove(folder: dict[str, str], progress: Progress) -> dict[str, Any]:
    """Take a staged folder away, and what an interrupted staging left: only what this program wrote."""
    destination = own_place(folder)
    if os.path.lexists(destination) and not os.path.isfile(os.path.join(destination, CHECKSUMS)):
        raise SpecDecodeError(f"{destination} was not staged by this collection.", "Nothing was removed.")
    there = [place for place in (destination, f"{destination}.partial") if os.path.lexists(place)]
    for place in there:
        progress.update(f"removing {place}")
        shutil.rmtree(place)
    return {**folder, "changed": bool(there)}


def own_place(folder: dict[str, str]) -> str:
    """The destination, if that can only be a folder of its own."""
    place, sha = folder["destination"].rstrip("/"), folder["sha"]
    named = bool(SHA.fullmatch(sha)) and (not sha or os.path.basename(place) == sha)
    if not os.path.isabs(place) or os.path.normpath(place) != place or not named:
        raise SpecDecodeError(
            f"{folder['destination']!r} is no place for the content {sha!r}: it must be an absolute path without .. that ends in"
            " that checksum.",
            "Mend spec_canary_drafts_path or spec_canary_target_path; a checksum comes from results/draft.json.",
        )
    for path in (place, f"{place}.partial"):
        if os.path.lexists(path) and not stat.S_ISDIR(os.lstat(path).st_mode):
            raise SpecDecodeError(f"{path} is no folder but {kind_of(path)}.", "Nothing was written; remove it yourself.")
    return place


def copy(source: str, partial: str, names: list[str], progress: Progress) -> dict[str, str]:
    """Copy what is not there yet; checksums by name."""
    done: dict[str, str] = {}
    if os.path.isdir(partial):
        for name in set(files_below(partial)) - set(names):  # the source lost it since, or the copy was cut off within it
            os.unlink(os.path.join(partial, name))
    for number, name in enumerate(names, 1):
        origin, target = os.path.join(source, name), os.path.join(partial, name)
        progress.update(f"{name} ({number}/{len(names)})", number, len(names))
        done[name] = sha = sha256_file(origin)
        if not (os.path.isfile(target) and os.path.getsize(target) == os.path.getsize(origin) and sha256_file(target) == sha):
            copy_file(origin, target, sha)
    return done


def copy_file(origin: str, target: str, sha: str) -> None:
    temporary = ""
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".copy-", dir=os.path.dirname(target))
        with os.fdopen(handle, "wb") as written, open(origin, "rb") as read:
            shutil.copyfileobj(read, written, 1 << 20)
            written.flush()
            os.fsync(written.fileno())
        if sha256_file(temporary) != sha:
            raise SpecDecodeError(f"{target} does not read back as it was written.", "Look at the volume's health.")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def cannot_write(path: str, error: OSError) -> SpecDecodeError:
    return SpecDecodeError(
        f"Cannot write {path}: {error.strerror}.",
        "Free space on the volume, or let spec_canary_run_as write there; the copy goes on from here.",
    )


def checksums(folder: str, progress: Progress) -> dict[str, str]:
    found = {}
    for name in files_below(folder):
        progress.update(f"checking {name}")
        found[name] = sha256_file(os.path.join(folder, name))
    return found


def files_below(folder: str) -> list[str]:
    """All files below a folder, by their paths there; not the program's own record. Refuses what is none."""
    found = names_below(folder)
    for name in found:
        check_plain(os.path.join(folder, name), folder)
    return found


def check_plain(path: str, folder: str) -> None:
    """A file of the folder's own, or a link to one."""
    where = os.path.realpath(path)
    if os.path.islink(path) and not any(os.path.commonpath([root, where]) == root for root in roots(folder)):
        raise SpecDecodeError(
            f"{path} is a link to {os.readlink(path)}, which is not in {folder}.",
            "Nothing outside a folder is staged with it: put the file itself there.",
        )
    if not stat.S_ISREG(mode_of(path)):
        raise SpecDecodeError(
            f"{path} is no file but {kind_of(path)}.", "Only files are staged: remove it, or put what it stands for there."
        )


def roots(folder: str) -> list[str]:
    """Where a folder's files may be: in it. A snapshot in Hugging Face's cache has them beside it, in its repository's blobs."""
    own = os.path.realpath(folder)
    repository, holds = os.path.split(os.path.dirname(own))
    return [own, os.path.join(repository, "blobs")] if holds == "snapshots" else [own]


def mode_of(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:  # a link that leads nowhere, or round in a circle
        return os.lstat(path).st_mode


def kind_of(path: str) -> str:
    mode = os.lstat(path).st_mode
    kinds = {stat.S_IFLNK: "a link to none", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def content(found: dict[str, str]) -> str:
    """The checksum of a folder, as conversion stages drafts under it."""
    return sha256_value(found)


def check_content(found: dict[str, str], sha: str, source: str) -> None:
    if sha and not content(found).startswith(sha):
        raise SpecDecodeError(
            f"{source} has the content {content(found)[:16]}, but it is to be staged as {sha}.",
            "It was changed after its conversion: convert it again.",
        )


def total(folder: str, found: dict[str, str]) -> int:
    return sum(os.path.getsize(os.path.join(folder, name)) for name in found)


if __name__ == "__main__":
    run(main)
