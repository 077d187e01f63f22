# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversation files in their various layouts, as one. Private to the collection."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from .errors import SpecDecodeError
from .files import read_json, sha256_text

LAYOUTS = ("auto", "sharegpt", "ultrachat", "conversations")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def read(path: str, layout: str = "auto") -> Iterator[dict[str, Any]]:
    """Rows ``{id, conversations: [{role, content}]}`` of a JSON array or a JSON-lines file.

    Layouts: ``sharegpt`` (``conversations`` of ``{from, value}``), ``ultrachat`` (``messages`` of
    ``{role, content}``, or ``data``, a list of texts that alternate), ``conversations`` (the target layout).
    A row in its layout that is more than text has a ``fault`` that says so, and no turns.
    """
    if layout not in LAYOUTS:
        raise SpecDecodeError(f"The data layout {layout!r} of {path} is not one of {', '.join(LAYOUTS)}.")
    if not os.path.isfile(path):
        raise SpecDecodeError(f"The data source {path} does not exist.", "Check spec_sources.")
    count = 0
    for number, row in _raw_rows(path):
        count += 1
        yield _row(row, layout, path, number)
    if not count:
        raise SpecDecodeError(f"The data source {path} is empty.", "Give a file with conversations.")


def prompt_key(row: dict[str, Any]) -> str:
    """What makes two rows "the same prompt": the first user turn without regard to case and spacing."""
    for turn in row["conversations"]:
        if turn["role"] == "user":
            return " ".join(turn["content"].lower().split())
    return ""


def shares(total: int, weights: list[float]) -> list[int]:
    """``total`` rows divided by ``weights``; the parts sum to the total (largest remainders first)."""
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise SpecDecodeError(f"The sources' weights {weights} must be positive numbers.", "Check spec_sources.")
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    order = sorted(range(len(parts)), key=lambda index: (parts[index] - exact[index], index))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _raw_rows(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8") as stream:
        start = stream.read(64).lstrip()
    if start.startswith("["):
        yield from enumerate(read_json(path, "data source"), 1)
        return
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise SpecDecodeError(f"Line {number} of {path} is no valid JSON: {error.msg}.") from error


def _row(row: Any, layout: str, path: str, number: int) -> dict[str, Any]:
    try:
        found = layout if layout != "auto" else _layout_of(row)
        if found == "ultrachat" and "messages" not in row:
            turns = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(row["data"])]
        else:
            turns = row["messages" if found == "ultrachat" else "conversations"]
        speaker, words = ("from", "value") if found == "sharegpt" else ("role", "content")
        fault = _fault(turns, words)
        messages = [] if fault else [{"role": ROLES[str(turn[speaker])], "content": text_of(turn[words])} for turn in turns]
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecDecodeError(
            f"Row {number} of {path} is not in the layout {layout!r}: {type(error).__name__} {error}.",
            "Expected ShareGPT {conversations: [{from, value}]}, UltraChat {messages: [{role, content}]}"
            " or {conversations: [{role, content}]}.",
        ) from error
    given = row.get("id", row.get("prompt_id", number))
    # By the whole path: sources in different folders often have one name.
    return {"id": f"{sha256_text(os.path.abspath(path))[:8]}-{number}-{given}", "conversations": messages, **fault}


def text_of(content: Any) -> str:
    """The text of a turn, which may stand in parts; anything else, such as an image, is refused."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(text_of(part.get("text")) for part in content)
    raise ValueError(f"{json.dumps(content)[:60]} is no text")


def _fault(turns: list[dict[str, Any]], words: str) -> dict[str, str]:
    if any(turn.get("tool_calls") or turn.get("function_call") for turn in turns):
        return {"fault": "with calls of tools"}
    try:
        for turn in turns:
            text_of(turn[words])
    except ValueError:
        return {"fault": "with content that is no text"}
    return {}


def _layout_of(row: dict[str, Any]) -> str:
    if "conversations" not in row:
        return "ultrachat"
    first = row["conversations"][0] if row["conversations"] else {}
    return "sharegpt" if "from" in first else "conversations"
