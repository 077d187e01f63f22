# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a target's checkpoint folder to everything that a draft needs. Private to the collection.

Every derived value carries where it comes from and by which rule; an explicit value wins and is marked as such.
"""

from __future__ import annotations

import os
import re
from typing import Any

from .checkpoint import Target, read_target
from .draft_config import EXPLICIT, METHODS, Derived, draft_config
from .errors import SpecDecodeError
from .files import read_json_object
from .layers import (
    AUX_RULE,
    DFLASH_LAYERS,
    DFLASH_RULE,
    as_layers,
    aux_layers,
    checked_layers,
    dflash_target_layers,
    served_aux_layers,
)
from .target_config import VOCABULARY_NAMES, first, language_model, layer_count, positive

DEFAULT_K = {"eagle3": 3, "dflash": 7}


def spec_slug(name: str) -> str:
    """A short name for files, labels and jobs from a path or a model's name: lower case, digits and inner hyphens."""
    base = os.path.basename(str(name).rstrip("/"))
    slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:40].strip("-")
    if not slug:
        raise SpecDecodeError(f"No name can be made from {name!r}.", "Give one as experiment.")
    return slug


def token_ids(path: str) -> dict[str, Any] | None:
    """``added`` tokens (text → id) and the ``highest`` id that the tokenizer in ``path`` knows; None without tokenizer.json."""
    tokenizer = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(tokenizer):
        return None
    document = read_json_object(tokenizer, "tokenizer")
    added = {str(item["content"]): int(item["id"]) for item in document.get("added_tokens", [])}
    model = document.get("model", {}).get("vocab", {})
    known = model.values() if isinstance(model, dict) else [len(model) - 1]
    return {"added": added, "highest": max([*added.values(), *known], default=-1)}


def mask_token(path: str, vocabulary: int) -> Derived | None:
    """The id of a token that never occurs in text: a mask token, else an unused row of the table, else a reserved token."""
    known = token_ids(path)
    if known is None:
        return None
    inside = sorted((number, text) for text, number in known["added"].items() if number < vocabulary)
    for number, text in inside:
        if re.fullmatch(r"[<\[]?\|?\s*mask\s*\|?[>\]]?", text, re.IGNORECASE):
            return Derived(number, f"tokenizer.json: {text}", "the tokenizer's mask token")
    if known["highest"] + 1 < vocabulary:
        # SpecForge's own choice for Qwen3 and Qwen3.5: a new token's id.
        return Derived(known["highest"] + 1, "tokenizer.json", f"the first unused row of the padded table of {vocabulary}")
    for number, text in inside:
        if re.search(r"reserved|unused|extra_id|fim_pad", text, re.IGNORECASE):
            return Derived(number, f"tokenizer.json: {text}", "the first reserved token")
    return None


def plan(path: str, method: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything about a draft for the target in ``path``.

    ``overrides`` may hold ``aux_layers``, ``mask_token_id``, ``num_speculative_tokens``, ``embedding_key``,
    ``lm_head_key`` and ``draft`` (for each method, fields of the draft config). Returns plain values under ``values``
    and how each came about under ``derivation``.
    """
    if method not in METHODS:
        raise SpecDecodeError(f"The method {method!r} is not known.", f"Choose one of {', '.join(METHODS)}.")
    given = {key: value for key, value in (overrides or {}).items() if value not in (None, "", [], {})}
    drafts = _draft_overrides(given.get("draft", {}))
    target = read_target(path, str(given.get("embedding_key", "")))
    count = layer_count(target.config)
    vocabulary = _vocabulary(target)
    mask = _planned_mask(given, path, vocabulary)
    layers = _planned_layers(given, target, method, count, drafts[method])
    configs, refused = {}, {}
    for each in METHODS:
        try:
            configs[each] = draft_config(
                target.config, each, mask_token_id=mask.value if mask else None, overrides=drafts[each],
                layers=layers.value if each == method and layers.source == "explicit" else None,
            )  # fmt: skip
        except SpecDecodeError as error:
            if each == method:
                raise  # the other method's config is a courtesy; this one is what was asked for
            refused[each] = str(error)
    fields = {
        "slug": Derived(spec_slug(path), "target's path", "its last part in lower case"),
        "num_layers": Derived(count, "config.json", "number of decoder layers"),
        "aux_layers": layers,
        "served_layers": Derived(
            served_aux_layers(layers.value, method), "aux_layers", "plus one for EAGLE3, unchanged for DFlash (vLLM)"
        ),
        "num_speculative_tokens": _planned_k(given, method, configs[method]),
        "embedding_key": _given(given, "embedding_key", target.embedding_key, "weights", "the token embedding"),
        "lm_head_key": _given(given, "lm_head_key", target.lm_head_key, "weights", "the LM head, or the tied embedding"),
        **({"mask_token_id": mask} if mask else {}),
    }
    return {
        "method": method,
        "target": {
            "path": path,
            "sha": target.sha,
            "architecture": (target.config.get("architectures") or ["unknown"])[0],
            "parameters": target.parameters,
            "bytes": target.bytes,
            "dtype": target.dtype,
            "hidden_size": configs[method]["hidden_size"].value,
            "vocab_size": configs[method]["vocab_size"].value,
            "has_chat_template": target.has_chat_template,
        },
        "config": target.config,
        "values": {name: field.value for name, field in fields.items()},
        "draft_configs": {each: {k: f.value for k, f in config.items()} for each, config in configs.items()},
        "derivation": {
            **{name: field.as_dict() for name, field in fields.items()},
            "draft_configs": {each: {k: f.as_dict() for k, f in config.items()} for each, config in configs.items()},
            "draft_configs_refused": refused,
        },
    }


def _draft_overrides(given: Any) -> dict[str, dict[str, Any]]:
    unknown = sorted(set(given) - set(METHODS)) if isinstance(given, dict) else ["a value that is no mapping"]
    if unknown:
        raise SpecDecodeError(
            f"spec_draft holds {', '.join(unknown)}, but only {' and '.join(METHODS)} are known there.",
            "Write fields of a draft config below its method.",
        )
    return {each: dict(given.get(each) or {}) for each in METHODS}


def _vocabulary(target: Target) -> int:
    """The target's vocabulary, after checking that config, embedding table and tokenizer agree on it."""
    vocabulary = positive(first(language_model(target.config), VOCABULARY_NAMES), "vocab_size")
    rows = target.embedding_shape[0] if len(target.embedding_shape) == 2 else vocabulary
    if rows != vocabulary:
        raise SpecDecodeError(
            f"The target's config.json says a vocabulary of {vocabulary}, but its embedding table has {rows} rows.",
            "If tokens were added, save the model again so that config.json agrees.",
        )
    known = token_ids(target.path)
    if known and known["highest"] >= vocabulary:
        texts = [text for text, number in known["added"].items() if number >= vocabulary]
        raise SpecDecodeError(
            f"The target's tokenizer knows the id {known['highest']}{' (' + texts[-1] + ')' if texts else ''}, but the embedding"
            f" table has {vocabulary} rows.",
            "Resize the model's embeddings to its tokenizer, or copy the tokenizer that belongs to it.",
        )
    return vocabulary


def _planned_mask(given: dict[str, Any], path: str, vocabulary: int) -> Derived | None:
    if "mask_token_id" not in given:
        return mask_token(path, vocabulary)
    return Derived(_whole_number(given, "mask_token_id"), *EXPLICIT)


def _whole_number(given: dict[str, Any], name: str) -> int:
    try:
        return int(given[name])
    except (TypeError, ValueError):
        raise SpecDecodeError(f"{name} must be a whole number, but is {given[name]!r}.", f"Mend {name}.") from None


def _planned_layers(given: dict[str, Any], target: Target, method: str, count: int, draft: dict[str, Any]) -> Derived:
    if "aux_layers" in given:
        return Derived(checked_layers(as_layers(given["aux_layers"]), count), *EXPLICIT)
    if method == "eagle3":
        return Derived(aux_layers(target.config), "config.json: number of layers", AUX_RULE)
    depth = draft.get("num_hidden_layers") or DFLASH_LAYERS
    return Derived(dflash_target_layers(target.config, depth), "config.json: number of layers", DFLASH_RULE)


def _planned_k(given: dict[str, Any], method: str, config: dict[str, Derived]) -> Derived:
    block = config["block_size"].value if method == "dflash" else None
    if "num_speculative_tokens" in given:
        number = _whole_number(given, "num_speculative_tokens")
        if number < 1 or (block and number >= block):
            raise SpecDecodeError(
                f"{number} speculative tokens cannot be drafted"
                + (f" in a block of {block}, whose first is the target's own." if block else "."),
                "Mend num_speculative_tokens" + (", or spec_draft.dflash.block_size." if block else "."),
            )
        return Derived(number, *EXPLICIT)
    if block:
        return Derived(min(DEFAULT_K[method], block - 1), "draft config: block_size", "at most the block size less one")
    return Derived(DEFAULT_K[method], "rule", "the usual draft length of EAGLE3")


def _given(given: dict[str, Any], name: str, found: Any, source: str, rule: str) -> Derived:
    return Derived(given[name], *EXPLICIT) if name in given else Derived(found, source, rule)
