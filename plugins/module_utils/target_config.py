# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading a target's config.json, whatever shape it has: wrappers, older names, odd values. Private to the collection."""

from __future__ import annotations

from typing import Any

from .errors import SpecDecodeError

LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "decoder_layers", "layers")
#: hybrids that say the kind of each layer and no number of them
LAYER_LIST_NAMES = ("layers_block_type", "hybrid_override_pattern", "layer_types")
HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "emb_dim", "embed_dim")
HEAD_NAMES = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "attention_heads",
)
HEAD_SIZE_NAMES = ("head_dim", "kv_channels", "attention_head_dim")
KV_HEAD_NAMES = (
    "num_key_value_heads",
    "multi_query_group_num",
    "n_head_kv",
    "num_kv_heads",
    "attention_num_kv_heads",
    "kv_n_heads",
)
#: low-rank projections of latent attention
LATENT_NAMES = ("kv_lora_rank", "q_lora_rank")
INNER_NAMES = (
    "intermediate_size_mlp",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "d_ff",
    "decoder_ffn_dim",
    "inner_dim",
)
EXPERT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
VOCABULARY_NAMES = ("vocab_size", "padded_vocab_size", "n_vocab", "n_words")
LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "context_length",
    "model_max_length",
)
NORM_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
TOKEN_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
#: where multimodal and wrapper configs keep the language model
NESTED_NAMES = ("thinker_config", "text_config", "language_config", "llm_config", "language_model", "decoder")
#: parts of a language model's config that hold some of its sizes
PART_NAMES = {"attn_config": ("kv_n_heads",), "ffn_config": ("ffn_hidden_size", "moe_num_experts", "moe_top_k")}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, multimodal and thinker wrappers taken off."""
    current = config
    for _depth in range(4):
        nested = next((current[name] for name in NESTED_NAMES if isinstance(current.get(name), dict)), None)
        if nested is None or (first(current, LAYER_NAMES) is not None and first(nested, LAYER_NAMES) is None):
            break
        current = nested
    return current


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's fields that have a value, those included that a wrapper or a nested part holds for it."""
    text = text_config(config)
    outer = {name: config.get(name) for name in (*VOCABULARY_NAMES, *TOKEN_NAMES)}
    parts = [
        {name: text[part].get(name) for name in names} for part, names in PART_NAMES.items() if isinstance(text.get(part), dict)
    ]
    found: dict[str, Any] = {}
    for fields in (outer, *parts, text):
        found.update({name: value for name, value in fields.items() if value is not None})
    return found


def first(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of several names that the config has with a value."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def layer_count(config_or_count: Any) -> int:
    """Number of decoder layers, from a count or a config."""
    found = _layers_of(text_config(config_or_count)) if isinstance(config_or_count, dict) else config_or_count
    if isinstance(found, bool) or not isinstance(found, int):
        raise SpecDecodeError(f"The number of layers must be a whole number, but is {found!r}.", "Check config.json.")
    if not 1 <= found <= 10000:
        raise SpecDecodeError(f"A target with {found} layers cannot be real.", "Check config.json.")
    return found


def _layers_of(text: dict[str, Any]) -> Any:
    found = first(text, LAYER_NAMES)
    if found is not None:
        return found
    kinds = first(text, LAYER_LIST_NAMES)
    if isinstance(kinds, (list, str)) and kinds:
        return len(kinds)
    raise SpecDecodeError(
        f"The config has no number of layers (none of {', '.join(LAYER_NAMES + LAYER_LIST_NAMES)}),"
        f" neither on top nor in {', '.join(NESTED_NAMES)}.",
        "Check that this is the config.json of one language model.",
    )


def refuse_unless_decoder(config: dict[str, Any]) -> None:
    """A draft continues what a decoder-only target says; other kinds of models have nothing to be drafted."""
    text = text_config(config)
    kind = text.get("model_type") or config.get("model_type") or "unknown"
    if config.get("is_encoder_decoder") is True or text.get("is_encoder_decoder") is True:
        raise SpecDecodeError(
            f"The target is an encoder-decoder ({kind}): EAGLE3 and DFlash drafts read a decoder-only target.",
            "Choose a decoder-only target.",
        )
    segments = text.get("type_vocab_size") is not None and text.get("is_decoder") is not True
    if segments or text.get("is_encoder") is True:
        raise SpecDecodeError(
            f"The target is an encoder ({kind}), which generates no text.",
            "Choose a decoder-only target, or set is_decoder in its config.json if it is one.",
        )


def positive(value: Any, name: str) -> int:
    """A size of the target's, refused unless it can be one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecDecodeError(f"The target's {name} must be a positive whole number, but is {value!r}.", "Check config.json.")
    return value
