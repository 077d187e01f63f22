# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The config of an EAGLE3 or DFlash draft from its target's, field by field with its derivation. Private to the collection."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .errors import SpecDecodeError
from .layers import AUX_RULE, DFLASH_LAYERS, DFLASH_RULE, aux_layers, checked_layers, dflash_target_layers
from .target_config import (
    EXPERT_NAMES,
    HEAD_NAMES,
    HEAD_SIZE_NAMES,
    HIDDEN_NAMES,
    INNER_NAMES,
    KV_HEAD_NAMES,
    LATENT_NAMES,
    LENGTH_NAMES,
    NORM_NAMES,
    TOKEN_NAMES,
    VOCABULARY_NAMES,
    first,
    language_model,
    layer_count,
    positive,
    refuse_unless_decoder,
)

METHODS = ("eagle3", "dflash")
DFLASH_BLOCK = 16
EAGLE3_DRAFT_VOCABULARY = 32000
#: the trainer keeps sines and cosines of every position in memory, one gigabyte for each million
LONGEST = 262144
HEAD_SIZE, LARGEST_HEAD_SIZE = 128, 256
#: MLP of a draft in place of experts, in hidden sizes: what most of SpecForge's own drafts for MoE targets have
EXPERTS_INNER = {"eagle3": 6, "dflash": 3}
#: Scaled rotary embeddings that trainer and server compute alike, with what each must have (None: no default).
ROPE_FIELDS: dict[str, dict[str, float | None]] = {
    "linear": {"factor": None},
    "dynamic": {"factor": None},
    "llama3": {
        "factor": None, "low_freq_factor": None, "high_freq_factor": None, "original_max_position_embeddings": None,
    },
    # A zero for mscale_all_dim means the usual magnitude to both, and the trainer wants a number.
    "yarn": {
        "factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
}  # fmt: skip
#: fields that other settings decide, so that there is one source of truth
ELSEWHERE = {
    "dflash_config": "aux_layers and mask_token_id",
    "eagle_config": "aux_layers",
    "eagle_aux_hidden_state_layer_ids": "aux_layers",
    "architectures": "method",
    "model_type": "method",
}


@dataclasses.dataclass(frozen=True)
class Derived:
    """A value, where it was read (``source``) and how it follows (``rule``)."""

    value: Any
    source: str
    rule: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


EXPLICIT = ("explicit", "given by the user")


@dataclasses.dataclass
class _Fields:
    """Draft config fields as they are derived one after the other; ``explicit`` ones are the user's."""

    config: dict[str, Any]
    explicit: dict[str, Any]
    method: str
    found: dict[str, Derived] = dataclasses.field(default_factory=dict)

    def take(self, name: str, names: tuple[str, ...], default: Any = None) -> Any:
        source = next((key for key in names if self.config.get(key) is not None), None)
        if source is not None:
            return self.set(name, self.config[source], f"config.json: {source}", "copied from the target")
        if default is None and name not in self.explicit:
            raise SpecDecodeError(
                f"The target's config has none of {', '.join(names)}, which the draft's {name} is taken from.",
                f"Give it in spec_draft.{self.method}.{name}.",
            )
        return self.set(name, default, "default", f"the target's config has none of {', '.join(names)}")

    def set(self, name: str, value: Any, source: str, rule: str) -> Any:
        """Note a field; what the user gave for it wins. Returns what holds."""
        given = self.explicit.get(name)
        self.found[name] = Derived(value, source, rule) if given is None else Derived(given, *EXPLICIT)
        return self.found[name].value


def draft_config(
    config: dict[str, Any],
    method: str = "eagle3",
    *,
    layers: list[int] | None = None,
    mask_token_id: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Derived]:
    """The draft's config, field by field with its derivation. ``layers`` and ``overrides`` win over every rule."""
    if method not in METHODS:
        raise SpecDecodeError(f"The method {method!r} is not known.", f"Choose one of {', '.join(METHODS)}.")
    explicit = {name: value for name, value in (overrides or {}).items() if value is not None}
    for name in explicit.keys() & ELSEWHERE.keys():
        raise SpecDecodeError(f"A draft's {name} is not given in spec_draft.{method}.", f"Give {ELSEWHERE[name]} instead.")
    refuse_unless_decoder(config)
    fields = _Fields(language_model(config), explicit, method)
    count = layer_count(config)
    if method == "eagle3":
        _eagle3(fields, count, layers)
    else:
        _dflash(fields, count, layers, mask_token_id)
    hidden, vocabulary = _sizes(fields)
    _attention(fields, hidden)
    _inner_size(fields, hidden)
    _positions(fields)
    eps = fields.take("rms_norm_eps", NORM_NAMES, 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
        raise SpecDecodeError(f"The rms_norm_eps must be a small number, but is {eps!r}.", "Check config.json.")
    _tokens(fields, vocabulary)
    fields.set("hidden_act", "silu", "rule", "the draft's own MLP is SwiGLU, whatever the target's is")
    fields.set("initializer_range", 0.02, "rule", "SpecForge's default")
    fields.set("attention_bias", False, "rule", "drafts have no attention bias")
    fields.set("attention_dropout", 0.0, "rule", "no dropout")
    fields.set("tie_word_embeddings", False, "rule", "the draft has its own head, whether the target ties its own or not")
    fields.set("torch_dtype", "bfloat16", "rule", "SpecForge trains in bfloat16")
    fields.set("use_cache", True, "rule", "generation")
    if method == "eagle3":
        smaller = min(EAGLE3_DRAFT_VOCABULARY, vocabulary)
        rule = f"the smaller of {EAGLE3_DRAFT_VOCABULARY} and the target's vocabulary"
        fields.set("draft_vocab_size", smaller, "config.json: vocab_size", rule)
    for name in explicit.keys() - fields.found.keys():
        fields.set(name, None, *EXPLICIT)
    _check(fields)
    return fields.found


def width_problem(draft: dict[str, Any], target: dict[str, Any]) -> str:
    """Why a served draft cannot read a target's hidden states; empty if it can, or if a config does not tell.

    vLLM's loader accepts one of another width, which then fails at its first request.
    """
    inner = draft.get("transformer_layer_config")  # where drafts made by speculators keep their sizes
    sizes = {**(inner if isinstance(inner, dict) else {}), **{name: size for name, size in draft.items() if size is not None}}
    reads, wide = first(sizes, ("target_hidden_size", "hidden_size")), first(language_model(target), HIDDEN_NAMES)
    if reads is None or wide is None or reads == wide:
        return ""
    return f"the draft reads hidden states of {reads} values, but the target's have {wide}"


def _sizes(fields: _Fields) -> tuple[int, int]:
    """Hidden size and vocabulary, which the draft shares with its target: it reads its states and embeds its tokens."""
    found = []
    for name, names in (("hidden_size", HIDDEN_NAMES), ("vocab_size", VOCABULARY_NAMES)):
        own = first(fields.config, names)
        value = positive(fields.take(name, names), name)
        if own is not None and value != own:
            raise SpecDecodeError(
                f"The draft's {name} of {value} cannot differ from the target's {own}: it reads the target's hidden states"
                " and shares its embeddings.",
                f"Leave out spec_draft.{fields.method}.{name}.",
            )
        found.append(value)
    for name in ("embedding_size", "word_embed_proj_dim"):
        width = fields.config.get(name)
        if width is not None and width != found[0]:
            raise SpecDecodeError(
                f"The target's token embeddings have {width} values ({name}), its hidden states {found[0]}: a draft shares"
                " the embeddings and cannot widen them.",
                "No setting mends that; choose another target.",
            )
    return found[0], found[1]


def _attention(fields: _Fields, hidden: int) -> None:
    text = fields.config
    heads = fields.explicit.get("num_attention_heads", first(text, HEAD_NAMES))
    if heads is not None:
        positive(heads, "num_attention_heads")
    source = next((name for name in HEAD_SIZE_NAMES if text.get(name) is not None), None)
    size = text[source] if source else (hidden // heads if heads and hidden % heads == 0 else None)
    why = ""
    if any(text.get(name) is not None for name in LATENT_NAMES):
        size, why = None, "plain grouped-query attention in place of latent attention"
    elif heads is None:
        size, why = None, "the target has no attention heads to copy"
    elif not _servable(size):
        why = f"attention kernels serve head sizes that are multiples of 8 up to {LARGEST_HEAD_SIZE}, not the target's {size}"
        size = None
    elif fields.method == "eagle3" and hidden % heads:
        why = f"SpecForge's EAGLE3 draft wants a multiple of its heads as hidden size, which {hidden} is not for {heads} heads"
    if why:
        size = size or (HEAD_SIZE if hidden >= HEAD_SIZE else max(8, hidden // 8 * 8))
        size = positive(fields.set("head_dim", size, "rule", why), "head_dim")
        most = max(1, hidden // size)
        heads = next(number for number in range(most, 0, -1) if hidden % number == 0)
        heads = fields.set("num_attention_heads", heads, "rule", f"hidden_size / head_dim: {why}")
    else:
        fields.set(
            "head_dim", size, f"config.json: {source}" if source else "config.json",
            "copied from the target" if source else "hidden_size / num_attention_heads",
        )  # fmt: skip
        fields.take("num_attention_heads", HEAD_NAMES)
    _key_value_heads(fields, positive(heads, "num_attention_heads"), why)


def _servable(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_HEAD_SIZE and size % 8 == 0


def _key_value_heads(fields: _Fields, heads: int, why: str) -> None:
    text = fields.config
    source = next((name for name in KV_HEAD_NAMES if text.get(name) is not None), "")
    own = text.get(source)
    if why:
        fields.set("num_key_value_heads", next(kv for kv in (8, 4, 2, 1) if heads % kv == 0), "rule", why)
    elif text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        fields.set("num_key_value_heads", 1, "config.json: multi_query", "all heads share one key-value head")
    elif isinstance(own, int) and own > 0 and heads % own == 0:
        fields.set("num_key_value_heads", own, f"config.json: {source}", "copied from the target")
    else:
        fields.set("num_key_value_heads", heads, "rule", "one for each attention head")


def _inner_size(fields: _Fields, hidden: int) -> None:
    text = fields.config
    source = next((name for name in INNER_NAMES if text.get(name) is not None), "")
    inner = text.get(source)
    if isinstance(inner, list):
        inner = max((size for size in inner if isinstance(size, int)), default=None)
    if not isinstance(inner, int) or isinstance(inner, bool) or inner < 1:
        inner = None
    if first(text, EXPERT_NAMES) and (inner is None or inner < 2 * hidden):
        times = EXPERTS_INNER[fields.method]
        rule = f"a dense MLP of {times} × hidden_size in place of the experts, as in SpecForge's drafts for such targets"
        fields.set("intermediate_size", times * hidden, "rule", rule)
    elif inner is not None:
        fields.set("intermediate_size", inner, f"config.json: {source}", "copied from the target")
    else:
        fields.set("intermediate_size", 4 * hidden, "rule", "4 × hidden_size, the config names none")


def _positions(fields: _Fields) -> None:
    source = next((name for name in LENGTH_NAMES if fields.config.get(name) is not None), None)
    longest = positive(fields.config[source], "max_position_embeddings") if source else 2048
    rule = "copied from the target" if longest <= LONGEST else f"at most {LONGEST}: the trainer keeps a table of all positions"
    fields.set(
        "max_position_embeddings", min(longest, LONGEST), f"config.json: {source}" if source else "default",
        rule if source else "the target's config names none",
    )  # fmt: skip
    values, why = rope(fields.config, longest)
    for name, value in values.items():
        fields.set(name, value, "config.json: rope_parameters, rope_theta, rope_scaling", why)


def rope(config: dict[str, Any], longest: int = 2048) -> tuple[dict[str, Any], str]:
    """The target's rotary embedding as a one-dimensional draft can share it, and the rule that was followed."""
    parameters, scaling = (
        config[key] if isinstance(config.get(key), dict) else {} for key in ("rope_parameters", "rope_scaling")
    )
    if parameters and not any(key in parameters for key in ("rope_theta", "rope_type", "type")):
        # One entry for each kind of attention layer: the full attention's serves a draft with full attention.
        parameters = parameters.get("full_attention") or next(
            (value for value in parameters.values() if isinstance(value, dict)), {}
        )
    theta = parameters.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise SpecDecodeError(f"The target's rope_theta must be a positive number, but is {theta!r}.", "Check config.json.")
    found = {**scaling, **parameters}
    kind = str(found.get("rope_type") or found.get("type") or "default")
    plain = {"rope_theta": float(theta), "rope_scaling": None}
    if kind in ("default", "mrope"):
        return plain, "one-dimensional rotary embedding with the target's base; multimodal sections are dropped"
    if kind not in ROPE_FIELDS:
        return plain, f"the target's base without its {kind} scaling, which the trainer does not know"
    wanted = dict(ROPE_FIELDS[kind])
    if kind == "yarn":
        # What transformers takes where a config does not say.
        wanted["original_max_position_embeddings"] = longest
    values = {name: default if found.get(name) is None else found[name] for name, default in wanted.items()}
    bad = [name for name, value in values.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if bad:
        return plain, f"the target's base without its {kind} scaling, whose {', '.join(bad)} the config does not say"
    return {**plain, "rope_scaling": {"rope_type": kind, **values}}, f"the target's base and {kind} scaling"


def _tokens(fields: _Fields, vocabulary: int) -> None:
    for name in TOKEN_NAMES:
        value = fields.config.get(name)
        value = value[0] if isinstance(value, list) and value else value
        inside = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary
        rule = "copied from the target" if inside or value is None else f"left out: {value} is no id of {vocabulary} tokens"
        fields.set(name, value if inside else None, f"config.json: {name}", rule)


def _eagle3(fields: _Fields, count: int, layers: list[int] | None) -> None:
    chosen = aux_layers(count) if layers is None else checked_layers(layers, count)
    if len(chosen) != 3:
        raise SpecDecodeError(f"An EAGLE3 draft reads three layers, not {len(chosen)} ({chosen}).", "Mend aux_layers.")
    fields.set("architectures", ["LlamaForCausalLMEagle3"], "rule", "SpecForge's EAGLE3 draft")
    fields.set("model_type", "llama", "rule", "SpecForge's EAGLE3 draft")
    if fields.set("num_hidden_layers", 1, "rule", "EAGLE3 has one decoder layer") != 1:
        raise SpecDecodeError("SpecForge's EAGLE3 draft has exactly one layer.", "Leave out spec_draft.eagle3.num_hidden_layers.")
    # The scripts generation of SpecForge trains on what stands here; the converter writes vLLM's own key.
    fields.found["eagle_config"] = Derived(
        {"eagle_aux_hidden_state_layer_ids": chosen, "use_aux_hidden_state": True},
        *(EXPLICIT if layers is not None else ("config.json: number of layers", AUX_RULE)),
    )


def _dflash(fields: _Fields, count: int, layers: list[int] | None, mask: int | None) -> None:
    depth = fields.set("num_hidden_layers", len(layers) if layers else DFLASH_LAYERS, "rule", "number of draft layers")
    chosen = dflash_target_layers(count, depth) if layers is None else checked_layers(layers, count)
    fields.set("architectures", ["DFlashDraftModel"], "rule", "SpecForge's DFlash draft")
    fields.set("model_type", "qwen3", "rule", "SpecForge's DFlash draft")
    fields.set("layer_types", ["full_attention"] * depth, "rule", "every draft layer attends to all")
    fields.set("block_size", DFLASH_BLOCK, "rule", "SpecForge's default")
    fields.set("num_target_layers", count, "config.json", "number of the target's layers")
    fields.set("max_window_layers", depth, "rule", "no sliding window")
    fields.set("sliding_window", None, "rule", "no sliding window")
    fields.set("use_sliding_window", False, "rule", "no sliding window")
    if mask is None:
        raise SpecDecodeError(
            "DFlash needs a mask token, and the target's tokenizer has neither a mask token nor an unused one.",
            "Give its id as mask_token_id: any token that never occurs in text.",
        )
    fields.found["dflash_config"] = Derived(
        {"mask_token_id": mask, "target_layer_ids": chosen}, "tokenizer, rule", f"mask token; layers {DFLASH_RULE}"
    )


def _check(fields: _Fields) -> None:
    """What every draft must fulfil, however its fields came about."""
    values = {name: field.value for name, field in fields.found.items()}
    given = ", ".join(sorted(fields.explicit)) or "nothing"
    remedy = f"Mend spec_draft.{fields.method} (given: {given}) or the target's config.json."
    sizes = ["num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"]
    sizes.append("draft_vocab_size" if fields.method == "eagle3" else "block_size")
    for name in sizes:
        if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < 1:
            raise SpecDecodeError(f"The draft's {name} must be a positive whole number, but is {values[name]!r}.", remedy)
    heads, kv, size = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    if heads % kv:
        raise SpecDecodeError(f"The draft's {heads} attention heads are no multiple of its {kv} key-value heads.", remedy)
    if fields.method == "eagle3" and values["hidden_size"] % heads:
        raise SpecDecodeError(f"The hidden size {values['hidden_size']} is no multiple of the draft's {heads} heads.", remedy)
    if size % 2:
        raise SpecDecodeError(f"The draft's head_dim must be even for its rotary embedding, but is {size}.", remedy)
    if fields.method == "eagle3" and values["draft_vocab_size"] > values["vocab_size"]:
        raise SpecDecodeError(
            f"The draft's vocabulary of {values['draft_vocab_size']} exceeds the target's {values['vocab_size']}.", remedy
        )
    if fields.method == "dflash":
        mask = values["dflash_config"]["mask_token_id"]
        if not 0 <= mask < values["vocab_size"]:
            raise SpecDecodeError(
                f"The mask token id {mask} lies outside the target's vocabulary of {values['vocab_size']}.",
                "Give another mask_token_id.",
            )
        if values["block_size"] < 2 or len(values["layer_types"]) != values["num_hidden_layers"]:
            raise SpecDecodeError(
                f"A DFlash draft of {values['num_hidden_layers']} layers needs as many layer_types and a block_size of 2 or more,"
                f" not {len(values['layer_types'])} and {values['block_size']}.",
                remedy,
            )
