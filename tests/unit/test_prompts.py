# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Prompts from the files that people have."""

from __future__ import annotations

import json

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.prompts import read_prompts


def turns(role, user, assistant, text):
    return [{role: user, text: "How are you?"}, {role: assistant, text: "x"}]


USER = ({"role": "user", "content": "How are you?"},)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "How are you?\n\n"),
        ("a.jsonl", json.dumps({"prompt": "How are you?", "output_tokens": 3}) + "\n"),
        ("a.json", json.dumps([{"id": 1, "conversations": turns("from", "human", "gpt", "value")}])),
        ("a.jsonl", json.dumps({"conversations": turns("role", "user", "assistant", "content")})),
        ("a.jsonl", json.dumps({"messages": turns("role", "user", "assistant", "content")})),
        ("a.jsonl", json.dumps({"prompt": [{"type": "text", "text": "How are you?"}]}) + "\n"),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_prompt(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert read_prompts(str(path)) == (USER,)


def test_prompts_leave_the_last_answer_out(tmp_path):
    rows = tmp_path / "eval.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    rows.write_text(json.dumps({"id": 1, "conversations": turns}) + "\n")
    (prompt,) = read_prompts(str(rows), 1)
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user"]
    with pytest.raises(SpecDecodeError, match="holds 1 prompts, but 2 are asked for"):
        read_prompts(str(rows), 2)


@pytest.mark.parametrize(
    ("content", "layout", "words"),
    [
        ("", "auto", "is empty"),
        ("", "lines", "holds 0 prompts, but 1 are asked for"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "auto", "Line 2 of .* is no row with a prompt"),
        ('{"prompt": 5}\n', "auto", "Line 1 of .* is no row with a prompt .ValueError: 5 is no text"),
        ('{"messages": [{"role": "user", "content": 5}]}\n', "auto", "-1-1 of .* is one with content that is no text"),
        ("<html>\n", "auto", "Line 1 of .* is no valid JSON"),
        ("a\n", "parquet", "is not one of auto, lines, custom, sharegpt"),
    ],
)
def test_files_that_are_none(tmp_path, content, layout, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(SpecDecodeError, match=words):
        read_prompts(str(path), layout=layout)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(SpecDecodeError, match=r"The prompts .*nowhere.jsonl do not exist"):
        read_prompts(str(tmp_path / "nowhere.jsonl"))
