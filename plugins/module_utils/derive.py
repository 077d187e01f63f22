# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a target's config.json to everything that a draft needs. Private to the collection.

Every derived value carries where it comes from and by which rule; an explicit value wins and is marked as such.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from .checkpoint import Target, read_target
from .errors import SpecDecodeError
from .files import read_json_object

METHODS = ("eagle3", "dflash")
LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers")
HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
HEAD_NAMES = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)
KV_HEAD_NAMES = ("num_key_value_heads", "multi_query_group_num", "n_head_kv", "num_kv_heads", "attention_num_kv_heads")
INNER_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "decoder_ffn_dim", "inner_dim")
LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
NORM_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
#: where multimodal and wrapper configs keep the language model
NESTED_NAMES = ("thinker_config", "text_config", "language_config", "llm_config", "language_model", "decoder")
#: rope variants that a one-dimensional draft can share with its target
ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3", "longrope"})
DEFAULT_K = {"eagle3": 3, "dflash": 7}
DFLASH_LAYERS, DFLASH_BLOCK = 5, 16
EAGLE3_DRAFT_VOCABULARY = 32000


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value, where it was read (``source``) and how it follows (``rule``)."""

    value: Any
    source: str
    rule: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, multimodal and thinker wrappers taken off."""
    current = config
    for _depth in range(4):
        nested = next((current[name] for name in NESTED_NAMES if isinstance(current.get(name), dict)), None)
        if nested is None or (first(current, LAYER_NAMES) is not None and first(nested, LAYER_NAMES) is None):
            break
        current = nested
    return current


def first(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of several names that the config has with a value."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def layer_count(config_or_count: Any) -> int:
    """Number of decoder layers, from a count or a config."""
    if isinstance(config_or_count, dict):
        found = first(text_config(config_or_count), LAYER_NAMES)
        if found is None:
            raise SpecDecodeError(
                f"The config has no number of layers (none of {', '.join(LAYER_NAMES)}).",
                "Check that this is a language model's config.json, or give aux_layers yourself.",
            )
    else:
        found = config_or_count
    if isinstance(found, bool) or not isinstance(found, int):
        raise SpecDecodeError(f"The number of layers must be a whole number, but is {found!r}.", "Check config.json.")
    if not 1 <= found <= 10000:
        raise SpecDecodeError(f"A target with {found} layers cannot be real.", "Check config.json.")
    return found


def aux_layers(config_or_count: Any) -> list[int]:
    """EAGLE3's three layers ``[1, L//2 - 1, L - 4]``: outputs of decoder layers, counted from 0 (SpecForge)."""
    count = layer_count(config_or_count)
    layers = [1, count // 2 - 1, count - 4]
    if not 0 <= layers[0] < layers[1] < layers[2] < count:
        raise SpecDecodeError(
            f"A target with {count} layers is too shallow for the aux layers [1, L//2-1, L-4] = {layers},"
            " which must be distinct and ascending (8 layers and more are).",
            "Give the layers yourself, for example -e aux_layers=0,1,2.",
        )
    return layers


def dflash_target_layers(config_or_count: Any, draft_layers: int = DFLASH_LAYERS) -> list[int]:
    """DFlash's layers for a draft of D layers: ``[L//2]`` for D = 1, else ``round(1 + i*(L-4)/(D-1))`` (SpecForge)."""
    count = layer_count(config_or_count)
    if draft_layers < 1:
        raise SpecDecodeError(f"A DFlash draft needs at least one layer, not {draft_layers}.")
    layers = (
        [count // 2]
        if draft_layers == 1
        else [round(1 + index * (count - 4) / (draft_layers - 1)) for index in range(draft_layers)]
    )
    if sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= count:
        raise SpecDecodeError(
            f"A target with {count} layers is too shallow for a DFlash draft of {draft_layers} layers, whose target"
            f" layers would be {layers}; they must be distinct and ascending.",
            "Give fewer draft layers, or the layers yourself with -e aux_layers=.",
        )
    return layers


def checked_layers(layers: list[int], count: int) -> list[int]:
    """Explicit layers, refused unless they are distinct, ascending and the target's."""
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= count:
        raise SpecDecodeError(
            f"The aux layers {layers} must be distinct, ascending and between 0 and {count - 1}.", "Mend aux_layers."
        )
    return list(layers)


def served_aux_layers(layers: list[int], method: str = "eagle3") -> list[int]:
    """The same layers in vLLM's convention. For EAGLE3 its id k is "after k layers": plus one. For DFlash it adds that itself."""
    return [layer + 1 for layer in layers] if method == "eagle3" else list(layers)


def spec_slug(name: str) -> str:
    """A short name for files, labels and jobs from a path or a model's name: lower case, digits and inner hyphens."""
    base = os.path.basename(str(name).rstrip("/"))
    slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:40].strip("-")
    if not slug:
        raise SpecDecodeError(f"No name can be made from {name!r}.", "Give one as experiment.")
    return slug


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The target's rotary embedding as a one-dimensional draft uses it; multimodal sections are dropped."""
    parameters, scaling = (
        config[key] if isinstance(config.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling")
    )
    if parameters and not any(key in parameters for key in ("rope_theta", "rope_type", "type")):
        # One entry for each kind of attention layer: the full attention's serves a draft with full attention.
        parameters = parameters.get("full_attention") or next(
            (value for value in parameters.values() if isinstance(value, dict)), {}
        )
    theta = parameters.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0
    kind = str(parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default")
    rest = {**scaling, **parameters} if kind in ROPE_TYPES - {"default"} else {}
    dropped = ("rope_theta", "type", "rope_type", "mrope_section", "mrope_interleaved", "partial_rotary_factor")
    extra = {key: value for key, value in rest.items() if key not in dropped and value is not None}
    scaled = {"rope_type": kind, **extra} if extra else None
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise SpecDecodeError(f"The target's rope_theta must be a positive number, but is {theta!r}.", "Check config.json.")
    return {"rope_theta": float(theta), "rope_scaling": scaled}


@dataclasses.dataclass
class _Fields:
    """Draft config fields as they are derived one after the other."""

    config: dict[str, Any]
    found: dict[str, Derived] = dataclasses.field(default_factory=dict)

    def take(self, name: str, names: tuple[str, ...], default: Any = None, rule: str = "copied from the target") -> Any:
        source = next((key for key in names if self.config.get(key) is not None), None)
        if source is not None:
            return self.set(name, self.config[source], f"config.json: {source}", rule)
        if default is None:
            raise SpecDecodeError(
                f"The target's config has none of {', '.join(names)}, which the draft's {name} is taken from.",
                f"Give it as an override of the draft config: {name}.",
            )
        return self.set(name, default, "default", f"the target's config has none of {', '.join(names)}")

    def set(self, name: str, value: Any, source: str, rule: str) -> Any:
        self.found[name] = Derived(value, source, rule)
        return value


def draft_config(
    config: dict[str, Any],
    method: str = "eagle3",
    *,
    layers: list[int] | None = None,
    mask_token_id: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Derived]:
    """The draft's config, field by field with its derivation. ``overrides`` win over every rule."""
    if method not in METHODS:
        raise SpecDecodeError(f"The method {method!r} is not known.", f"Choose one of {', '.join(METHODS)}.")
    explicit = overrides or {}
    text = {**text_config(config), **{key: value for key, value in explicit.items() if value is not None}}
    fields = _Fields(text)
    count = layer_count(config)
    hidden = _positive(fields.take("hidden_size", HIDDEN_NAMES), "hidden_size")
    vocabulary = _positive(fields.take("vocab_size", ("vocab_size", "padded_vocab_size", "n_vocab")), "vocab_size")
    _attention(fields, hidden)
    _inner_size(fields, hidden)
    _positive(fields.take("max_position_embeddings", LENGTH_NAMES, 2048), "max_position_embeddings")
    fields.take("rms_norm_eps", NORM_NAMES, 1e-6)
    for name, value in rope(text).items():
        fields.set(name, value, "config.json: rope_parameters, rope_theta, rope_scaling", "one-dimensional rotary embedding")
    fields.set("hidden_act", "silu", "rule", "the draft's own MLP is SwiGLU, whatever the target's is")
    fields.set("initializer_range", 0.02, "rule", "SpecForge's default")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = text.get(name, config.get(name))
        fields.set(name, value[0] if isinstance(value, list) and value else value, f"config.json: {name}", "copied")
    fields.set("attention_bias", False, "rule", "drafts have no attention bias")
    fields.set("attention_dropout", 0.0, "rule", "no dropout")
    fields.set("tie_word_embeddings", False, "rule", "the draft has its own head")
    fields.set("torch_dtype", "bfloat16", "rule", "SpecForge trains in bfloat16")
    fields.set("use_cache", True, "rule", "generation")
    if method == "eagle3":
        fields.set("architectures", ["LlamaForCausalLMEagle3"], "rule", "SpecForge's EAGLE3 draft")
        fields.set("model_type", "llama", "rule", "SpecForge's EAGLE3 draft")
        fields.set("num_hidden_layers", 1, "rule", "EAGLE3 has one decoder layer")
        fields.set(
            "draft_vocab_size", min(EAGLE3_DRAFT_VOCABULARY, vocabulary), "config.json: vocab_size",
            f"the smaller of {EAGLE3_DRAFT_VOCABULARY} and the target's vocabulary",
        )  # fmt: skip
    else:
        _dflash(fields, count, vocabulary, layers, mask_token_id, explicit)
    for name, value in explicit.items():
        if value is not None:
            fields.set(name, value, "explicit", "given by the user")
    return fields.found


def _attention(fields: _Fields, hidden: int) -> None:
    heads = _positive(fields.take("num_attention_heads", HEAD_NAMES), "num_attention_heads")
    text = fields.config
    latent = text.get("kv_lora_rank") is not None
    if text.get("head_dim") and not latent:
        fields.set("head_dim", _positive(text["head_dim"], "head_dim"), "config.json: head_dim", "copied from the target")
    elif hidden % heads == 0 and (hidden // heads) % 2 == 0:
        fields.set("head_dim", hidden // heads, "config.json", "hidden_size / num_attention_heads")
    else:
        fields.set("head_dim", 128, "rule", "hidden_size is no even multiple of num_attention_heads")
        heads = fields.set("num_attention_heads", max(1, hidden // 128), "rule", "hidden_size / head_dim")
    kv = first(text, KV_HEAD_NAMES)
    if latent:
        # Latent attention has no key-value heads of its own to copy; the draft gets plain grouped-query attention.
        kv = next(number for number in (8, 4, 2, 1) if heads % number == 0)
        fields.set("num_key_value_heads", kv, "rule", "plain grouped-query attention in place of latent attention")
    elif isinstance(kv, int) and kv > 0 and heads % kv == 0:
        fields.set("num_key_value_heads", kv, "config.json", "copied from the target")
    else:
        fields.set("num_key_value_heads", heads, "rule", "one for each attention head")


def _inner_size(fields: _Fields, hidden: int) -> None:
    text = fields.config
    experts = first(text, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    inner = first(text, INNER_NAMES)
    if isinstance(inner, list):
        inner = max((size for size in inner if isinstance(size, int)), default=None)
    if experts and (not isinstance(inner, int) or inner < 2 * hidden):
        fields.set("intermediate_size", 4 * hidden, "rule", "a dense MLP of 4 × hidden_size in place of the experts")
    elif isinstance(inner, int) and inner > 0:
        fields.set("intermediate_size", inner, "config.json", "copied from the target")
    else:
        fields.set("intermediate_size", 4 * hidden, "rule", "4 × hidden_size, the config names none")


def _dflash(
    fields: _Fields, count: int, vocabulary: int, layers: list[int] | None, mask: int | None, explicit: dict[str, Any]
) -> None:
    draft_layers = explicit.get("num_hidden_layers") or (len(layers) if layers else DFLASH_LAYERS)
    chosen = layers if layers is not None else dflash_target_layers(count, draft_layers)
    fields.set("architectures", ["DFlashDraftModel"], "rule", "SpecForge's DFlash draft")
    fields.set("model_type", "qwen3", "rule", "SpecForge's DFlash draft")
    fields.set("num_hidden_layers", draft_layers, "rule", "number of draft layers")
    fields.set("layer_types", ["full_attention"] * draft_layers, "rule", "every draft layer attends to all")
    fields.set("block_size", DFLASH_BLOCK, "rule", "SpecForge's default")
    fields.set("num_target_layers", count, "config.json", "number of the target's layers")
    fields.set("max_window_layers", draft_layers, "rule", "no sliding window")
    fields.set("sliding_window", None, "rule", "no sliding window")
    fields.set("use_sliding_window", False, "rule", "no sliding window")
    if mask is None:
        raise SpecDecodeError(
            "DFlash needs a mask token, and the target's tokenizer has neither a mask token nor an unused one.",
            "Give its id as mask_token_id: any token that never occurs in text.",
        )
    if not 0 <= mask < vocabulary:
        raise SpecDecodeError(
            f"The mask token id {mask} lies outside the target's vocabulary of {vocabulary}.",
            "Give another mask_token_id.",
        )
    fields.set(
        "dflash_config", {"mask_token_id": mask, "target_layer_ids": chosen}, "tokenizer, rule",
        "mask token; layers [L//2] for one draft layer, else round(1 + i*(L-4)/(D-1))",
    )  # fmt: skip


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecDecodeError(f"The target's {name} must be a positive whole number, but is {value!r}.", "Check config.json.")
    return value


def mask_token(path: str, vocabulary: int) -> Derived | None:
    """The id of a token that never occurs in text: the tokenizer's mask token, else a reserved or padding id."""
    tokenizer = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(tokenizer):
        return None
    document = read_json_object(tokenizer, "tokenizer")
    added = {str(item["content"]): int(item["id"]) for item in document.get("added_tokens", [])}
    for content, number in added.items():
        if re.fullmatch(r"[<\[]?\|?\s*mask\s*\|?[>\]]?", content, re.IGNORECASE) and number < vocabulary:
            return Derived(number, f"tokenizer.json: {content}", "the tokenizer's mask token")
    for content, number in sorted(added.items(), key=lambda item: item[1]):
        if re.search(r"reserved|unused|extra_id|fim_pad", content, re.IGNORECASE) and number < vocabulary:
            return Derived(number, f"tokenizer.json: {content}", "the first reserved token")
    model = document.get("model", {}).get("vocab", {})
    used = max([*added.values(), *(model.values() if isinstance(model, dict) else [len(model) - 1])], default=-1)
    if used + 1 < vocabulary:
        return Derived(vocabulary - 1, "config.json: vocab_size", "the last row of the padded embedding table")
    return None


def plan(path: str, method: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything about a draft for the target in ``path``.

    ``overrides`` may hold ``aux_layers``, ``mask_token_id``, ``num_speculative_tokens``, ``embedding_key``,
    ``lm_head_key`` and ``draft`` (fields of the draft config). Returns plain values under ``values`` and how each
    came about under ``derivation``.
    """
    if method not in METHODS:
        raise SpecDecodeError(f"The method {method!r} is not known.", f"Choose one of {', '.join(METHODS)}.")
    given = {key: value for key, value in (overrides or {}).items() if value not in (None, "", [], {})}
    target = read_target(path)
    count = layer_count(target.config)
    draft_overrides = dict(given.get("draft", {}))
    vocabulary = first(text_config(target.config), ("vocab_size", "padded_vocab_size", "n_vocab")) or 0
    mask = (
        Derived(int(given["mask_token_id"]), "explicit", "given by the user")
        if "mask_token_id" in given
        else mask_token(path, vocabulary)
    )
    layers = _planned_layers(given, target, method, count, draft_overrides)
    configs = {}
    for each in METHODS:
        if each == method or each == "eagle3" or mask is not None:
            own = layers.value if each == method else None
            try:
                configs[each] = draft_config(
                    target.config, each, layers=own, mask_token_id=mask.value if mask else None,
                    overrides=draft_overrides if each == method else None,
                )  # fmt: skip
            except SpecDecodeError:
                if each == method:
                    raise  # the other method's config is a courtesy; this one is what was asked for
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
        "values": {name: field.value for name, field in fields.items()},
        "draft_configs": {each: {k: f.value for k, f in config.items()} for each, config in configs.items()},
        "derivation": {
            **{name: field.as_dict() for name, field in fields.items()},
            "draft_config": {name: field.as_dict() for name, field in configs[method].items()},
        },
    }


def _planned_layers(given: dict[str, Any], target: Target, method: str, count: int, draft: dict[str, Any]) -> Derived:
    if "aux_layers" in given:
        return Derived(checked_layers(as_layers(given["aux_layers"]), count), "explicit", "given by the user")
    if method == "eagle3":
        return Derived(aux_layers(target.config), "config.json: number of layers", "[1, L//2-1, L-4]")
    depth = int(draft.get("num_hidden_layers") or DFLASH_LAYERS)
    return Derived(
        dflash_target_layers(target.config, depth), "config.json: number of layers",
        "[L//2] for one draft layer, else round(1 + i*(L-4)/(D-1))",
    )  # fmt: skip


def _planned_k(given: dict[str, Any], method: str, config: dict[str, Derived]) -> Derived:
    if "num_speculative_tokens" in given:
        return Derived(int(given["num_speculative_tokens"]), "explicit", "given by the user")
    if method == "dflash":
        block = config["block_size"].value
        return Derived(min(DEFAULT_K[method], block - 1), "draft config: block_size", "at most the block size less one")
    return Derived(DEFAULT_K[method], "rule", "the usual draft length of EAGLE3")


def _given(given: dict[str, Any], name: str, found: Any, source: str, rule: str) -> Derived:
    return Derived(given[name], "explicit", "given by the user") if name in given else Derived(found, source, rule)


def as_layers(value: Any) -> list[int]:
    """Layer ids from a list or a text such as ``1,7,12``."""
    items = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise SpecDecodeError(f"The aux layers {value!r} are no list of layer ids.", "Write them as 1,7,12.") from None
