# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that are either whole or absent, and their hashes. Private to the collection.

Uses the standard library alone and relative imports, so that the same text serves
inside Ansible and, copied into a bundle, beside the programs that run on the nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

from .errors import SpecDecodeError

#: what a staged folder has beside its own files: their checksums, relative path → SHA-256
CHECKSUMS = ".spec-decode-checksums.json"


def write_text(path: str, text: str, mode: int = 0o644, errors: str = "strict") -> bool:
    """Write ``text`` so that a reader sees the old file or the whole new one.

    The text goes to a temporary file beside ``path``, is flushed to the disk and
    renamed last. ``errors`` says what becomes of a character that is none, as for :func:`open`.
    Returns whether the content differed from what stood there.
    """
    if read_text_or_none(path) == text and (os.stat(path).st_mode & 0o777) == mode:
        return False
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors=errors, newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        _remove_quietly(temporary)
        raise _cannot_write(path, error) from error
    except BaseException:
        _remove_quietly(temporary)
        raise
    return True


def read_text_or_none(path: str) -> str | None:
    """The text of a file, or ``None`` if there is none or it is no text."""
    try:
        with open(path, encoding="utf-8", newline="") as stream:  # as it is: a carriage return is one
            return stream.read()
    except (OSError, UnicodeDecodeError):
        return None


def write_json(path: str, value: Any) -> bool:
    """Write ``value`` as indented JSON, whole or not at all. Returns whether the file changed."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_link(path: str, destination: str) -> bool:
    """Let ``path`` be a symbolic link to ``destination``, in one step in the place of another. Returns whether it changed."""
    if os.path.islink(path) and os.readlink(path) == destination:
        return False
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{os.path.basename(path)}.", dir=folder) as temporary:
            link = os.path.join(temporary, "link")
            os.symlink(destination, link)
            os.replace(link, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return True


def read_json(path: str, what: str = "file") -> Any:
    """Read one JSON document; ``what`` names it in the error."""
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise SpecDecodeError(f"The {what} {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecDecodeError(f"The {what} {path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise SpecDecodeError(
            f"The {what} {path} is no valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error


def read_json_or_none(path: str, what: str = "file") -> Any:
    """Like :func:`read_json`, but an absent file is ``None``; a broken one is still an error."""
    return read_json(path, what) if os.path.exists(path) else None


def read_json_object(path: str, what: str = "file") -> dict[str, Any]:
    """Read a JSON document that must be an object."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise SpecDecodeError(f"The {what} {path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def sha256_text(text: str) -> str:
    """The SHA-256 of a text, as 64 hexadecimal digits."""
    return sha256_bytes(text.encode("utf-8"))


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_value(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of key order and layout."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def sha256_file(path: str) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise SpecDecodeError(f"Cannot read {path} to compute its checksum: {error.strerror}.") from error
    return digest.hexdigest()


def sha256_files(paths: Iterable[str], root: str) -> str:
    """One SHA-256 over several files: their paths below ``root`` and their bytes."""
    return sha256_value({os.path.relpath(path, root): sha256_file(path) for path in sorted(paths)})


def sha256_folder(folder: str) -> str:
    """One SHA-256 over a folder's content, by which a draft is known wherever it stands."""
    return sha256_files([os.path.join(folder, name) for name in names_below(folder)], folder)


def names_below(folder: str) -> list[str]:
    """A folder's content: all that is no folder, at any depth, by its path there.

    Hidden folders are no part of it: tools keep there what they know of a download or a checkout.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in [*links, *names]]
    return sorted(name for name in found if name != CHECKSUMS)


def tail(path: str, lines: int = 20, window: int = 65536) -> list[str]:
    """The last lines of a text file (an empty list if there is none), reading at most ``window`` bytes."""
    try:
        with open(path, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - window))
            return stream.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def _cannot_write(path: str, error: OSError) -> SpecDecodeError:
    return SpecDecodeError(
        f"Cannot write {path}: {error.strerror}.",
        "Nothing was left half-written; free space or mend the permissions, then run again.",
    )


def _unreadable(error: OSError) -> None:
    raise SpecDecodeError(f"{error.filename} cannot be read: {error.strerror}.", "Mend its permissions.") from error


def _remove_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # the original error matters more than a temporary file left behind
