# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A folder of captured features: which files belong to it, and whether they are whole. Private to the collection."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any

from .errors import SpecDecodeError
from .files import read_json_object, sha256_value, write_json, write_text

GROUP = 2000


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file as it was written: tokens, size in bytes, and whether all its values are finite."""

    tokens: int
    bytes: int
    finite: bool


class _Index:
    """The open list of written files; a line is added after its file is in place."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.count = 0

    def add(self, index: int, tokens: int, size: int, finite: bool) -> None:
        self._stream.write(json.dumps([index, tokens, size, finite]) + "\n")
        self.count += 1

    def flush(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())


class Store:
    """Features of one identity (data, layers, target). Another identity's leftovers are removed, never mixed in."""

    def __init__(self, folder: str, identity: str) -> None:
        self.folder, self._identity = folder, identity
        self._index = os.path.join(folder, "index.jsonl")
        self._manifest = os.path.join(folder, "manifest.json")

    def path(self, index: int) -> str:
        """Where sample ``index`` stands, in SpecForge's layout of groups."""
        group = index // GROUP * GROUP
        return os.path.join(self.folder, f"rows_{group}-{group + GROUP}", f"data_{index}.ckpt")

    def resume(self) -> dict[int, Entry]:
        """What is whole already. A file that is missing or of another size is to be captured again."""
        marker = os.path.join(self.folder, "identity")
        try:
            with open(marker, encoding="utf-8") as stream:
                same = stream.read().strip() == self._identity
        except FileNotFoundError:
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
        write_text(marker, self._identity + "\n")
        entries = {index: entry for index, entry in self._read_index().items() if self._is_whole(index, entry)}
        self.replace(entries)
        return entries

    def replace(self, entries: dict[int, Entry]) -> None:
        """List these entries and no others."""
        lines = [json.dumps([index, entry.tokens, entry.bytes, entry.finite]) for index, entry in sorted(entries.items())]
        write_text(self._index, "".join(f"{line}\n" for line in lines))

    @contextlib.contextmanager
    def writing(self) -> Iterator[_Index]:
        """The index, open for adding."""
        with open(self._index, "a", encoding="utf-8") as stream:
            yield _Index(stream)

    def verify(self, expected: int) -> dict[int, Entry]:
        """All entries whose files are whole, out of ``expected``."""
        entries = self._read_index()
        return {index: entry for index, entry in entries.items() if index < expected and self._is_whole(index, entry)}

    def seal(self, facts: dict[str, Any], entries: dict[int, Entry]) -> None:
        """Write the manifest: what training depends on, and nothing that changes between equal captures."""
        content = sha256_value([self._identity, sorted([i, e.tokens] for i, e in entries.items())])
        totals = {"samples": len(entries), "tokens": sum(entry.tokens for entry in entries.values())}
        write_json(self._manifest, {**facts, **totals, "content": content})

    def _is_whole(self, index: int, entry: Entry) -> bool:
        try:
            return os.path.getsize(self.path(index)) == entry.bytes
        except OSError:
            return False

    def _read_index(self) -> dict[int, Entry]:
        entries: dict[int, Entry] = {}
        if not os.path.exists(self._index):
            return entries
        with open(self._index, encoding="utf-8") as stream:
            for line in stream:
                try:
                    index, tokens, size, finite = json.loads(line)
                except ValueError:
                    break  # the line that was being written when the job was killed
                entries[index] = Entry(tokens, size, finite)
        return entries


def check_sealed(folder: str) -> dict[str, Any]:
    """The manifest of a finished capture, after checking that all its files are whole."""
    manifest = read_json_object(os.path.join(folder, "manifest.json"), "feature manifest")
    with open(os.path.join(folder, "identity"), encoding="utf-8") as stream:
        store = Store(folder, stream.read().strip())
    whole = store.verify(manifest["samples"])
    missing = sorted(set(range(manifest["samples"])) - set(whole))
    if missing:
        raise SpecDecodeError(
            f"Of {manifest['samples']} feature files in {folder}, {len(missing)} are missing or truncated"
            f" (the first: {store.path(missing[0])}).",
            "Delete results/capture.json and run again: the capture writes just those anew.",
        )
    return manifest
