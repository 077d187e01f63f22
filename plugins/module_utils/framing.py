# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A JSON document that travels in a log, whole or not at all. Private to the collection."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from .errors import SpecDecodeError
from .files import sha256_text

BEGIN, END = "spec-decode-document-begins", "spec-decode-document-ends"
WIDTH = 4096


def frame(value: Any) -> str:
    """The lines to print: short ones, since container runtimes split long lines, with a checksum."""
    text = json.dumps(value, allow_nan=False)
    # Without a time stamp, so that the same document is the same text.
    packed = base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode("ascii")
    lines = [packed[start : start + WIDTH] for start in range(0, len(packed), WIDTH)]
    return "\n".join([f"{BEGIN} {sha256_text(text)} {len(lines)}", *lines, END])


def unframe(log: str) -> Any:
    """The last document in a log."""
    lines = log.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(BEGIN + " ")]
    if not starts:
        raise SpecDecodeError(
            f"The log holds no result; it ends with: {' / '.join(lines[-5:]) or 'nothing'}.", "Look at the pod's whole log."
        )
    _word, checksum, count = lines[starts[-1]].split()
    body = lines[starts[-1] + 1 : starts[-1] + 1 + int(count)]
    try:
        text = gzip.decompress(base64.b64decode("".join(body), validate=True)).decode("utf-8")
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(str(error)) from error
    if sha256_text(text) != checksum:
        raise _damaged("its checksum does not agree")
    return json.loads(text)


def _damaged(why: str) -> SpecDecodeError:
    return SpecDecodeError(f"The result in the log is not whole: {why}.", "Its log was cut or rotated: run the playbook again.")
