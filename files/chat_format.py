# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversations as the target sees them: token ids and loss mask, by SpecForge's own parsers."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import torch
from jinja2 import TemplateError
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, sha256_text
from specforge.data import parse
from specforge.data.template import TEMPLATE_REGISTRY, ChatTemplate
from transformers import AutoTokenizer

#: how SpecForge's parsers and a target's own template refuse a conversation
REFUSALS = (UserWarning, ValueError, KeyError, IndexError, TypeError, TemplateError)
PARSERS = {
    "general": parse.GeneralParser,
    "thinking": parse.ThinkingParser,
    "glm": parse.GLMParser,
    "openai-harmony": parse.HarmonyParser,
}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One conversation: ``input_ids[T]``, ``loss_mask[T]`` (1 where the draft learns)."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor

    def trains(self, method: str) -> bool:
        """Whether there is something to learn; SpecForge's DFlash takes two supervised tokens side by side for it."""
        mask = self.loss_mask.bool()
        return bool((mask[:-1] & mask[1:]).any() if method == "dflash" else mask.any())


def register_template(template: str, template_file: str) -> ChatTemplate:
    """The SpecForge template of that name, registered from a user's own file if one is given.

    Without a system prompt of SpecForge's own, a conversation is rendered exactly as it will be served.
    """
    if template_file:
        fields = read_json_object(template_file, "chat template file")
        TEMPLATE_REGISTRY.register(template, ChatTemplate(**fields), override=True)
    known = TEMPLATE_REGISTRY.get_all_template_names()
    if template not in known:
        raise SpecDecodeError(
            f"The chat template {template!r} is not registered in the installed SpecForge,"
            f" which knows: {', '.join(sorted(known))}.",
            "Choose one of them, or give a JSON file with the template's fields as chat_template_file.",
        )
    found = TEMPLATE_REGISTRY.get(template).model_copy(update={"system_prompt": ""})
    TEMPLATE_REGISTRY.register(template, found, override=True)
    return found


class ChatFormat:
    """A target's tokenizer together with the SpecForge template that finds its assistant turns."""

    def __init__(self, target: str, template: str, template_file: str, max_length: int) -> None:
        self.template = register_template(template, template_file)
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self.max_length = max_length
        self._parser = PARSERS[self.template.parser_type](self.tokenizer, self.template)

    def render(self, conversation: list[dict[str, Any]]) -> Rendered:
        """Token ids and loss mask of one conversation, at most ``max_length`` tokens of it."""
        with warnings.catch_warnings():
            # SpecForge only warns when it drops or truncates turns; a system turn in the data is no such case.
            warnings.filterwarnings("error", category=UserWarning, module=r"specforge\.")
            warnings.filterwarnings("ignore", message="The first message is from system")
            input_ids, loss_mask = self._parser.parse(conversation, max_length=self.max_length)
        return Rendered(input_ids, loss_mask)

    @property
    def template_sha(self) -> str:
        """Changes with any field of the template, whose name may stay."""
        return sha256_text(self.template.model_dump_json())

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt as a server renders it before it answers."""
        encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])

    def supervised_text(self, rendered: Rendered) -> str:
        """What the loss mask covers, decoded."""
        return str(self.tokenizer.decode(rendered.input_ids[rendered.loss_mask.bool()]))

    def covers_only_assistant(self, conversation: list[dict[str, Any]], rendered: Rendered) -> bool:
        """Whether the supervised text is the assistant's words and turn ends, and nothing else.

        White space is ignored. A conversation cut at ``max_length`` may cover a beginning of the words only.
        """
        end = (self.template.end_of_turn_token or "").strip()
        covered = self.supervised_text(rendered)
        spoken = "".join(turn["content"] for turn in conversation if turn["role"] == "assistant")
        if end:
            covered = covered.replace(end, "")
        covered, spoken = (re.sub(r"\s+", "", text) for text in (covered, spoken))
        cut = len(rendered.input_ids) >= self.max_length
        return spoken.startswith(covered) if cut else spoken == covered
