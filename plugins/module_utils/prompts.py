# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prompts to measure with, from the files that people have. Private to the collection."""

from __future__ import annotations

import json
from collections.abc import Iterator

from . import conversations
from .errors import SpecDecodeError

#: a line a prompt; ``vllm bench serve``'s custom rows ``{prompt}``; or conversations in any of their layouts
LAYOUTS = ("auto", "lines", "custom", *conversations.LAYOUTS[1:])
Prompt = tuple[dict[str, str], ...]


def read_prompts(path: str, count: int = 0, layout: str = "auto", most: int = 0) -> tuple[Prompt, ...]:
    """The first ``count`` prompts of a file (0: all), up to ``most`` if it holds more, in its order, as chat messages.

    Of a conversation the prompt is everything before the last assistant turn. With ``auto``, a name that ends in
    ``.txt`` means a prompt a line, rows with a ``prompt`` are custom ones, all others are conversations.
    """
    if layout not in LAYOUTS:
        raise SpecDecodeError(f"The layout {layout!r} of prompts is not one of {', '.join(LAYOUTS)}.")
    try:
        found = layout if layout != "auto" else _layout_of(path)
        rows = {"lines": _lines, "custom": _custom}.get(found)
        prompts = list(rows(path) if rows else _of_conversations(path, found))
    except FileNotFoundError:
        raise SpecDecodeError(
            f"The prompts {path} do not exist.", "Name a file, or run the data set phase, which writes data/eval.jsonl."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecDecodeError(f"The prompts {path} cannot be read: {error}.") from error
    if len(prompts) < max(count, 1):
        raise SpecDecodeError(f"{path} holds {len(prompts)} prompts, but {max(count, 1)} are asked for.", "Ask for fewer.")
    return tuple(prompts[: max(count, most)] if count else prompts)


def _layout_of(path: str) -> str:
    if path.endswith(".txt"):
        return "lines"
    with open(path, encoding="utf-8") as stream:
        first = next((line for line in stream if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return "auto"  # no JSON lines: a JSON array of conversations, or an error that its reader words
    return "custom" if isinstance(row, dict) and "prompt" in row else "auto"


def _lines(path: str) -> Iterator[Prompt]:
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield _user(line.strip())


def _custom(path: str) -> Iterator[Prompt]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield _user(conversations.text_of(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise SpecDecodeError(
                    f"Line {number} of {path} is no row with a prompt ({type(error).__name__}: {error}).",
                    'Expected {"prompt": "..."} on every line.',
                ) from error


def _of_conversations(path: str, layout: str) -> Iterator[Prompt]:
    with open(path, encoding="utf-8"):
        pass  # a file that is not there is worded as one of prompts, not of training data
    for row in conversations.read(path, layout):
        if "fault" in row:
            raise SpecDecodeError(
                f"Row {row['id']} of {path} is one {row['fault']}, which is no prompt.", "Take it out: prompts are texts."
            )
        turns = row["conversations"]
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if turns:
            yield tuple(turns)


def _user(text: str) -> Prompt:
    return ({"role": "user", "content": text},)
