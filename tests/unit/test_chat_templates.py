# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A template's name is derived where it is certain, and refused everywhere else."""

from __future__ import annotations

import json

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import chat_templates
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
KNOWN = ["gemma", "gpt-oss", "llama3", "phi4", "qwen", "qwen3-instruct", "qwen3-thinking"]


def target(folder, model_type, text, nested=False):
    config = {"model_type": "wrapper", "text_config": {"model_type": model_type}} if nested else {"model_type": model_type}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    return {"target": {"path": str(folder)}, "config": config}


@pytest.mark.parametrize(
    ("model_type", "text", "name"),
    [
        ("qwen3", CHATML, "qwen"),
        ("llama", "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{{ content }}<|eot_id|>", "llama3"),
        ("gemma2", "<start_of_turn>{{ role }}\n{{ content }}<end_of_turn>\n", "gemma"),
        ("phi3", "<|im_start|>assistant<|im_sep|>{{ content }}<|im_end|>", "phi4"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_certain_match_is_named_with_its_rule(tmp_path, model_type, text, name, nested):
    found = chat_templates.planned(target(tmp_path, model_type, text, nested), "", "", KNOWN)
    assert found["value"] == name and model_type in found["rule"] and "explicit" not in found["source"]


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("qwen3", CHATML + "<think>"),  # thinking or not: no file says
        ("llama", CHATML),  # a Llama body with another family's template
        ("phi3", "<|user|>\n<|assistant|>\n<|end|>"),  # Phi-3 or Phi-4-mini
        ("glm_moe_dsa", "<|user|><|assistant|>"),  # not in the table
        ("deepseek_v3", "<｜User｜><｜Assistant｜>"),  # known, but not to this SpecForge
        ("gpt_oss", "<|start|>assistant<|channel|>final<|message|>"),  # its parser refuses conversations as they are read
        ("qwen3", ""),
    ],
)
def test_anything_else_is_refused_with_the_choices(tmp_path, model_type, text):
    with pytest.raises(SpecDecodeError, match=rf"none can be derived .*model_type {model_type}.*with one of gemma, gpt-oss"):
        chat_templates.planned(target(tmp_path, model_type, text), "", "", KNOWN)


def test_what_is_given_wins(tmp_path):
    plan = target(tmp_path, "qwen3", CHATML)
    assert chat_templates.planned(plan, "qwen3-instruct", "", KNOWN)["value"] == "qwen3-instruct"
    own = chat_templates.planned(plan, "", "/mine.json", KNOWN)
    assert (own["value"], own["rule"]) == ("own", "its fields stand in /mine.json")


def test_default_of_several_named_templates_counts(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert chat_templates.planned(target(tmp_path, "qwen2", named), "", "", KNOWN)["value"] == "qwen"


def test_template_file_wins_over_the_tokenizers_config(tmp_path):
    plan = target(tmp_path, "qwen3", CHATML)
    (tmp_path / "chat_template.jinja").write_text(CHATML + "<think>")
    with pytest.raises(SpecDecodeError):
        chat_templates.planned(plan, "", "", KNOWN)
