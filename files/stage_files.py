#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring folders to a volume under their checksums, or take them away again.

What stands at a destination is never written to: it is found to be the same, or the program refuses. A copy goes to
a folder beside it, file by file, each checked after it was read back; an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from typing import Any

from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, read_json_or_none, sha256_file, sha256_value, write_json
from spec_decode.framing import frame
from spec_decode.program import run
from spec_decode.progress import Progress

#: what is written beside the files: their checksums, relative path → SHA-256
CHECKSUMS = ".spec-decode-checksums.json"


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
    source, destination, sha = folder["source"], folder["destination"].rstrip("/"), folder["sha"]
    if not os.path.isdir(source):
        raise SpecDecodeError(
            f"The folder {source} to stage is not there.",
            "Check spec_canary_source: its volume must hold the drafts at the path that is named.",
        )
    names = files_below(source)
    if not os.path.isdir(destination):
        copied = copy(source, f"{destination}.partial", names, progress)
        check_content(copied, sha, source)
        write_json(os.path.join(f"{destination}.partial", CHECKSUMS), copied)
        try:
            os.rename(f"{destination}.partial", destination)
        except OSError:
            if not os.path.isdir(destination):  # another job was faster, with a copy that is checked below
                raise
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
    """Take a staged folder away: only one that this program wrote."""
    destination = folder["destination"].rstrip("/")
    if os.path.isdir(destination):
        if not os.path.isfile(os.path.join(destination, CHECKSUMS)):
            raise SpecDecodeError(f"{destination} was not staged by this collection.", "Nothing was removed.")
        progress.update(f"removing {destination}")
        shutil.rmtree(destination)
        return {**folder, "changed": True}
    return {**folder, "changed": False}


def copy(source: str, partial: str, names: list[str], progress: Progress) -> dict[str, str]:
    """Copy what is not there yet; checksums by name."""
    record = os.path.join(partial, CHECKSUMS)
    done: dict[str, str] = read_json_or_none(record, "record of an interrupted copy") or {}
    for number, name in enumerate(names, 1):
        origin, target = os.path.join(source, name), os.path.join(partial, name)
        progress.update(f"{name} ({number}/{len(names)})", number, len(names))
        sha = sha256_file(origin)
        if done.get(name) == sha and os.path.isfile(target) and os.path.getsize(target) == os.path.getsize(origin):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        copy_file(origin, target, sha)
        done[name] = sha
        write_json(record, done)
    for name in set(done) - set(names):  # the source lost it since the interrupted copy
        os.unlink(os.path.join(partial, name))
    return {name: done[name] for name in names}


def copy_file(origin: str, target: str, sha: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".copy-", dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as written, open(origin, "rb") as read:
            shutil.copyfileobj(read, written, 1 << 20)
            written.flush()
            os.fsync(written.fileno())
        if sha256_file(temporary) != sha:
            raise SpecDecodeError(f"{target} does not read back as it was written.", "Look at the volume's health.")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise SpecDecodeError(
            f"Cannot write {target}: {error.strerror}.",
            "Free space on the volume or mend its permissions; the copy goes on from here.",
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def checksums(folder: str, progress: Progress) -> dict[str, str]:
    found = {}
    for name in files_below(folder):
        progress.update(f"checking {name}")
        found[name] = sha256_file(os.path.join(folder, name))
    return found


def files_below(folder: str) -> list[str]:
    """All files below a folder, by their paths there; not the program's own record."""
    return sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _folders, names in os.walk(folder)
        for name in names
        if name != CHECKSUMS
    )


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
