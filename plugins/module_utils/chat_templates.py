# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of SpecForge's chat templates is the target's own. Private to the collection.

A wrong template costs a training run: its loss mask covers nothing, or the wrong words. So a name is given only where
the family has one template whose markers the target's own template writes; everything else is the user's to say.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from .errors import SpecDecodeError
from .files import read_json_object, read_text_or_none
from .target_config import language_model


@dataclasses.dataclass(frozen=True)
class Signature:
    """A template of SpecForge's registry, and by which markers in a target's own template it is known."""

    name: str
    markers: tuple[str, ...]
    #: markers of a sibling that must not be there
    without: tuple[str, ...] = ()


THINK = "<think>"
_CHATML = ("<|im_start|>", "<|im_end|>")
_QWEN = (Signature("qwen", _CHATML, (THINK,)),)
_KIMI = ("<|im_middle|>", "<|im_end|>")
_DEEPSEEK = ("<｜Assistant｜>", "<｜User｜>")
#: ``model_type`` of a config → the registry's templates of that family. GPT-OSS has none here: SpecForge's parser for it
#: takes turns by their channel, such as ``assistant_final``, and refuses every row of the layouts that are read.
FAMILIES: dict[str, tuple[Signature, ...]] = {
    "llama": (Signature("llama3", ("<|start_header_id|>", "<|eot_id|>")),),
    "llama4": (Signature("llama4", ("<|header_start|>", "<|eot|>")),),
    "llama4_text": (Signature("llama4", ("<|header_start|>", "<|eot|>")),),
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN,
    # Qwen3 that thinks has a template of its own for each way of training; which one is meant, no file says.
    "qwen3": _QWEN,
    "qwen3_moe": _QWEN,
    "lfm2": (Signature("lfm", _CHATML),),
    "lfm2_moe": (Signature("lfm", _CHATML),),
    "gemma": (Signature("gemma", ("<start_of_turn>", "<end_of_turn>")),),
    "gemma2": (Signature("gemma", ("<start_of_turn>", "<end_of_turn>")),),
    "gemma3": (Signature("gemma", ("<start_of_turn>", "<end_of_turn>")),),
    "gemma3_text": (Signature("gemma", ("<start_of_turn>", "<end_of_turn>")),),
    # Phi-3 and Phi-4-mini differ in a line end only, which a template's text does not show for certain.
    "phi3": (Signature("phi4", ("<|im_sep|>", *_CHATML)),),
    "deepseek_v2": (Signature("deepseek-v2", ("Assistant: ", "User: "), _DEEPSEEK),),
    "deepseek_v3": (Signature("deepseek-v3", _DEEPSEEK, (THINK,)),),
    "deepseek_v32": (Signature("deepseek-v32", _DEEPSEEK),),
    "kimi_k2": (Signature("kimi-k2-instruct", _KIMI, (THINK,)), Signature("kimi-k2-thinking", (*_KIMI, THINK))),
    "longcat_flash": (
        Signature("longcat", (" ASSISTANT:", "</longcat_s>")),
        Signature("longcat_xml", ("<longcat_assistant>", "</longcat_s>")),
    ),
}


def match(model_type: str, text: str) -> Signature | None:
    """The one template of the family that ``text``, the target's own template, agrees with."""
    found = [
        signature
        for signature in FAMILIES.get(model_type, ())
        if all(marker in text for marker in signature.markers) and not any(marker in text for marker in signature.without)
    ]
    return found[0] if len(found) == 1 else None


def planned(plan: dict[str, Any], name: str, file: str, known: list[str]) -> dict[str, Any]:
    """The chat template that was given, or else the target's, with how it came about."""
    if file:
        return {"value": name or "own", "source": "explicit", "rule": f"its fields stand in {file}"}
    if name:
        return {"value": name, "source": "explicit", "rule": "given"}
    return derived(plan["target"]["path"], plan["config"], known)


def derived(path: str, config: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """The template's name with how it came about, or an error that lists what there is to choose from."""
    model_type = str(language_model(config).get("model_type") or config.get("model_type") or "unknown")
    found = match(model_type, own_template(path))
    if found is None or found.name not in known:
        reason = (
            f"its template writes {' '.join(found.markers)}, as {found.name} does, which is not registered"
            if found
            else "its own template is not for certain that of one of them"
        )
        raise SpecDecodeError(
            f"No chat template was given, and none can be derived for the target {path} (model_type {model_type}): {reason}.",
            f"Give -e chat_template= with one of {', '.join(known)}, or your own in chat_template_file.",
        )
    rule = f"the one of {model_type} whose markers the target's own template writes: {' '.join(found.markers)}"
    return {"value": found.name, "source": "config.json and the target's chat template", "rule": rule}


def own_template(path: str) -> str:
    """The text of the target's own chat template; empty if it has none."""
    text = read_text_or_none(os.path.join(path, "chat_template.jinja"))
    config = os.path.join(path, "tokenizer_config.json")
    if text is None and os.path.isfile(config):
        value = read_json_object(config, "tokenizer's config").get("chat_template") or ""
        # Several named templates stand in a list; the one called default is used.
        named = {item["name"]: item["template"] for item in value} if isinstance(value, list) else {"default": value}
        text = str(named.get("default", ""))
    return text or ""
