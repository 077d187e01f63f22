# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model's config says of its size: parameters, cache, and how it can be split. Private to the collection."""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import SpecDecodeError
from .target_config import (
    EXPERT_NAMES,
    HEAD_NAMES,
    HEAD_SIZE_NAMES,
    HIDDEN_NAMES,
    INNER_NAMES,
    KV_HEAD_NAMES,
    LAYER_LIST_NAMES,
    LENGTH_NAMES,
    VOCABULARY_NAMES,
    first,
    language_model,
    layer_count,
    positive,
)

#: bytes of a value, by the names that torch and vLLM use
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
#: parts of layer kinds' names that keep a cache of keys and values; Nemotron-H's pattern marks them with a star
CACHING, PATTERN_ATTENTION = ("attention", "hybrid"), "*"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a language model. ``latent`` is the cached width of latent attention, 0 without it."""

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    tied: bool
    longest: int
    latent: int
    attention_layers: int
    experts: int
    experts_per_token: int
    expert_inner: int
    shared_inner: int
    dense_layers: int
    text: dict[str, Any]


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape, or what the config lacks for it."""
    text = language_model(config)
    layers = layer_count(config)
    hidden = positive(first(text, HIDDEN_NAMES), "hidden_size")
    heads = _whole(first(text, HEAD_NAMES), 0)
    experts = _whole(first(text, EXPERT_NAMES), 0)
    inner = first(text, INNER_NAMES)
    inner = max((size for size in inner if isinstance(size, int)), default=0) if isinstance(inner, list) else _whole(inner, 0)
    expert_inner = _whole(first(text, ("moe_intermediate_size", "expert_ffn_hidden_size")), inner)
    shared = _whole(text.get("shared_expert_intermediate_size"), 0) or _whole(text.get("n_shared_experts"), 0) * expert_inner
    return Shape(
        layers=layers,
        hidden=hidden,
        vocabulary=_whole(first(text, VOCABULARY_NAMES), 0),
        heads=heads,
        kv_heads=_whole(first(text, KV_HEAD_NAMES), heads),
        head_size=_whole(first(text, HEAD_SIZE_NAMES), hidden // heads if heads else 0),
        inner=inner or 4 * hidden,
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        longest=_whole(first(text, LENGTH_NAMES), 2048),
        latent=_whole(text.get("kv_lora_rank"), 0) and text["kv_lora_rank"] + _whole(text.get("qk_rope_head_dim"), 0),
        attention_layers=_attention_layers(text, layers) if heads else 0,
        experts=experts,
        experts_per_token=_whole(first(text, ("num_experts_per_tok", "moe_top_k", "num_experts_per_token", "moe_topk")), 1),
        expert_inner=expert_inner,
        shared_inner=shared,
        dense_layers=_whole(text.get("first_k_dense_replace"), 0) if experts else layers,
        text=text,
    )


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _attention_layers(text: dict[str, Any], layers: int) -> int:
    """Layers that keep keys and values. Sliding windows count as whole: an upper bound."""
    kinds = first(text, LAYER_LIST_NAMES)
    if isinstance(kinds, str):
        return kinds.count(PATTERN_ATTENTION)
    if isinstance(kinds, list) and kinds:
        return sum(any(part in str(kind) for part in CACHING) and "linear" not in str(kind) for kind in kinds)
    interval = _whole(first(text, ("full_attention_interval", "attn_layer_period")), 1)
    return layers // interval


def kv_values_per_token(shape: Shape, kv_heads: int | None = None) -> int:
    """Values that a token adds to the cache; of one device, if ``kv_heads`` are that device's."""
    if shape.latent:
        return shape.attention_layers * shape.latent
    return 2 * shape.attention_layers * (shape.kv_heads if kv_heads is None else kv_heads) * shape.head_size


def kv_bytes_per_token(config: dict[str, Any], cache_dtype: str, dtype: str) -> float | None:
    """Bytes that one token of context adds to the target's KV cache; ``None`` where the config does not tell."""
    width = BYTES.get((dtype if cache_dtype == "auto" else cache_dtype).removeprefix("torch."))
    try:
        values = kv_values_per_token(shape_of(config))
    except SpecDecodeError:
        return None
    return float(values * width) if width and values else None


def expert_parameters(shape: Shape) -> int:
    """Of one layer's one expert: gate, up and down projection."""
    return 3 * shape.hidden * shape.expert_inner


def parameters(shape: Shape) -> int:
    """Estimated from the config: projections, MLPs (three matrices each) and embeddings; norms and biases are left out."""
    moe_layers = shape.layers - shape.dense_layers
    mlp = shape.dense_layers * 3 * shape.hidden * shape.inner
    mlp += moe_layers * (
        shape.experts * expert_parameters(shape) + 3 * shape.hidden * shape.shared_inner + shape.hidden * shape.experts
    )
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.layers * _attention_parameters(shape) + mlp + embeddings


def _attention_parameters(shape: Shape) -> int:
    hidden, heads, text = shape.hidden, shape.heads, shape.text
    if not shape.latent:
        return 2 * hidden * heads * shape.head_size + 2 * hidden * shape.kv_heads * shape.head_size
    rope, plain = _whole(text.get("qk_rope_head_dim"), 64), _whole(text.get("qk_nope_head_dim"), 128)
    value, rank, kv_rank = _whole(text.get("v_head_dim"), 128), _whole(text.get("q_lora_rank"), 0), int(text["kv_lora_rank"])
    queries = heads * (plain + rope)
    return (
        (hidden * rank + rank * queries if rank else hidden * queries)
        + hidden * shape.latent
        + kv_rank * heads * (plain + value)
        + heads * value * hidden
    )


def active_parameters(shape: Shape, total: int) -> int:
    """Of ``total`` parameters, those that one token passes: all but the experts that it is not sent to."""
    idle = max(0, shape.experts - shape.experts_per_token)
    return max(0, total - (shape.layers - shape.dense_layers) * idle * expert_parameters(shape))


def draft_parameters(draft: dict[str, Any], method: str) -> tuple[int, int]:
    """Parameters of a rendered draft: those that are trained, and those of the token embedding that it shares."""
    hidden, inner, vocabulary = draft["hidden_size"], draft["intermediate_size"], draft["vocab_size"]
    queries = draft["num_attention_heads"] * draft["head_dim"]
    keys = draft["num_key_value_heads"] * draft["head_dim"]
    if method == "eagle3":
        # The layer reads the token's embedding beside the state: projections of twice the width.
        attention = 2 * hidden * (queries + 2 * keys) + queries * hidden
        head = draft["draft_vocab_size"] * hidden
        return 3 * hidden * hidden + attention + 3 * hidden * inner + 4 * hidden + head, vocabulary * hidden
    states = len(draft["dflash_config"]["target_layer_ids"])
    layer = 2 * hidden * (queries + keys) + 2 * draft["head_dim"] + 3 * hidden * inner + 2 * hidden
    return draft["num_hidden_layers"] * layer + 2 * hidden + states * hidden * hidden, 0


def tensor_parallel_sizes(shape: Shape, most: int, block: int = 0) -> list[int]:
    """Sizes up to ``most`` that vLLM can split the model by.

    They divide the heads; they divide the key-value heads or, beyond those, are a multiple of them (each head is then
    kept on several devices); they divide the MLPs, in whole blocks of a block-wise quantisation.
    """
    sizes = []
    for size in range(1, most + 1):
        kv = 1 if shape.latent else shape.kv_heads
        inners = [shape.inner] * bool(shape.dense_layers) + [shape.expert_inner] * bool(shape.experts)
        if (not shape.heads or (shape.heads % size == 0 and (kv % size == 0 or size % kv == 0))) and all(
            inner % size == 0 and (not block or (inner // size) % block == 0) for inner in inners
        ):
            sizes.append(size)
    return sizes
