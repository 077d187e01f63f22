# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derivations from configs: worked values, odd shapes, and properties over generated ones."""

from __future__ import annotations

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import derive, layers
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import LONGEST, draft_config
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "head_dim": 128,
}


@pytest.mark.parametrize(
    ("count", "expected"), [(78, [1, 38, 74]), (16, [1, 7, 12]), (36, [1, 17, 32]), (61, [1, 29, 57]), (7, [1, 2, 3])]
)
def test_aux_layers_of_known_depths(count, expected):
    assert layers.aux_layers(count) == expected
    assert layers.aux_layers({"num_hidden_layers": count}) == expected


@given(st.integers(1, 10000))
def test_aux_layers_are_valid_or_refused(count):
    try:
        found = layers.aux_layers(count)
    except SpecDecodeError as error:
        assert count < 7 and "from 7 layers on" in str(error) and "aux_layers" in str(error)
        return
    assert layers.checked_layers(found, count) == found and len(found) == 3


@pytest.mark.parametrize("count", [0, -3, 10001, True, 3.5, "12", None])
def test_absurd_layer_counts_are_refused(count):
    with pytest.raises(SpecDecodeError):
        layers.aux_layers(count)


def test_dflash_layers_of_specforge_example():
    assert layers.dflash_target_layers(36, 5) == [1, 9, 17, 25, 33]
    assert layers.dflash_target_layers(36, 1) == [18]


@given(st.integers(1, 500), st.integers(1, 12))
def test_dflash_layers_are_valid_or_refused(count, depth):
    try:
        found = layers.dflash_target_layers(count, depth)
    except SpecDecodeError:
        return
    assert layers.checked_layers(found, count) == found and len(found) == depth


def test_served_layers_follow_vllms_convention():
    assert layers.served_aux_layers([1, 38, 74], "eagle3") == [2, 39, 75]
    assert layers.served_aux_layers([1, 9], "dflash") == [1, 9]


@pytest.mark.parametrize(
    "wrapped",
    [
        {"text_config": BASE},
        {"thinker_config": {"text_config": BASE}},
        {"llm_config": BASE, "vision_config": {"num_hidden_layers": 27}},
        {"language_config": BASE},
    ],
)
def test_wrappers_are_taken_off(wrapped):
    assert layers.aux_layers(wrapped) == [1, 17, 32]
    assert draft_config(wrapped, "eagle3")["hidden_size"].value == 4096


def test_older_names():
    config = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    found = draft_config(config, "eagle3")
    assert layers.aux_layers(config) == [1, 5, 8]
    assert (found["hidden_size"].value, found["head_dim"].value, found["intermediate_size"].value) == (768, 64, 3072)
    assert found["max_position_embeddings"].source == "config.json: n_positions"


def value(found, *names):
    return tuple(found[name].value for name in names)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"kv_lora_rank": 512, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168}, (56, 8, 128)),
        ({"kv_lora_rank": 256, "num_attention_heads": 40, "hidden_size": 2560, "head_dim": None}, (20, 4, 128)),
        ({"q_lora_rank": 1024, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512}, (32, 8, 128)),
        ({"num_attention_heads": None}, (32, 8, 128)),
        ({"head_dim": 512}, (32, 8, 128)),
        ({"head_dim": 127}, (32, 8, 128)),
        ({"head_dim": None, "num_attention_heads": 71, "num_key_value_heads": 71, "hidden_size": 4544}, (71, 71, 64)),
        ({"head_dim": None, "num_attention_heads": 71, "multi_query": True, "hidden_size": 4544}, (71, 1, 64)),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 4}}, (32, 4, 128)),
        ({"num_key_value_heads": 5}, (32, 32, 128)),
        ({"head_dim": None, "kv_channels": 64}, (32, 8, 64)),
        # SpecForge's EAGLE3 draft is a Llama, whose config refuses heads that do not divide the hidden size.
        ({"num_attention_heads": 80}, (32, 8, 128)),
        ({"hidden_size": 2880, "num_attention_heads": None}, (20, 4, 128)),
    ],
)
def test_attention_that_a_draft_can_have(changes, heads):
    found = draft_config({**BASE, **changes}, "eagle3")
    assert value(found, "num_attention_heads", "num_key_value_heads", "head_dim") == heads


def test_experts_do_not_size_the_draft():
    experts = {**BASE, "num_experts": 128, "intermediate_size": 1536}
    assert draft_config(experts, "eagle3")["intermediate_size"].value == 6 * 4096
    assert draft_config(experts, "dflash", mask_token_id=7)["intermediate_size"].value == 3 * 4096
    assert draft_config({**experts, "intermediate_size": 12288}, "eagle3")["intermediate_size"].value == 12288


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**BASE, "is_encoder_decoder": True, "model_type": "whisper"}, "is an encoder-decoder \\(whisper\\)"),
        ({**BASE, "type_vocab_size": 2, "is_decoder": False, "model_type": "bert"}, "is an encoder \\(bert\\)"),
        ({**BASE, "embedding_size": 128}, "embeddings have 128 values"),
        ({"vision_config": BASE}, "no number of layers"),
    ],
)
def test_targets_that_no_draft_can_follow(config, words):
    with pytest.raises(SpecDecodeError, match=words):
        draft_config(config, "eagle3")


def test_hybrids_that_list_their_layers():
    config = {**BASE, "num_hidden_layers": None}
    assert layers.aux_layers({**config, "hybrid_override_pattern": "M-M*" * 13}) == [1, 25, 48]
    assert layers.aux_layers({**config, "layers_block_type": ["mamba", "attention"] * 8}) == [1, 7, 12]


def test_what_the_wrapper_holds_for_the_language_model():
    text = {key: size for key, size in BASE.items() if key != "vocab_size"}
    found = draft_config({"text_config": text, "vocab_size": 32064, "eos_token_id": [2, 3], "pad_token_id": 99999}, "eagle3")
    assert value(found, "vocab_size", "eos_token_id", "pad_token_id") == (32064, 2, None)
    assert "99999 is no id of 32064 tokens" in found["pad_token_id"].rule


def test_the_table_of_positions_is_bounded():
    found = draft_config({**BASE, "max_position_embeddings": 10485760}, "eagle3")["max_position_embeddings"]
    assert found.value == LONGEST and "at most" in found.rule


def test_draft_vocabulary_never_exceeds_the_targets():
    assert draft_config(BASE, "eagle3")["draft_vocab_size"].value == 32000
    assert draft_config({**BASE, "vocab_size": 1024}, "eagle3")["draft_vocab_size"].value == 1024


def test_multimodal_rope_is_dropped_and_scaling_kept():
    rope = {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20]}
    found = draft_config({**BASE, "rope_parameters": rope}, "eagle3")
    assert (found["rope_theta"].value, found["rope_scaling"].value) == (5e6, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = draft_config({**BASE, "rope_theta": 1e6, "rope_scaling": yarn}, "eagle3")
    # Trainer and server must compute the same magnitude, so that what they default differently is written out.
    assert found["rope_scaling"].value == {**yarn, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    assert found["rope_theta"].value == 1e6


@pytest.mark.parametrize(
    ("scaling", "rule"),
    [
        ({"type": "longrope", "short_factor": [1.0]}, "without its longrope scaling"),
        ({"rope_type": "dynamic", "alpha": 1000.0}, "whose factor the config does not say"),
        ({"rope_type": "llama3", "factor": 8.0}, "whose low_freq_factor, high_freq_factor, original_max_position_embeddings"),
    ],
)
def test_scaling_that_trainer_and_server_do_not_share_is_left_out(scaling, rule):
    found = draft_config({**BASE, "rope_scaling": scaling}, "eagle3")
    assert found["rope_scaling"].value is None and rule in found["rope_scaling"].rule


def test_explicit_values_win_and_say_so():
    given = {"draft_vocab_size": 16000, "num_attention_heads": 16, "intermediate_size": 999, "fc_norm": True}
    found = draft_config(BASE, "eagle3", overrides={**given, "rms_norm_eps": None})
    assert {name: found[name].value for name in given} == given
    assert {found[name].source for name in given} == {"explicit"} and found["rms_norm_eps"].source == "default"
    found = draft_config(BASE, "eagle3", layers=[1, 17, 33])["eagle_config"]
    assert found.value["eagle_aux_hidden_state_layer_ids"] == [1, 17, 33] and found.source == "explicit"


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("eagle3", {"num_key_value_heads": 5}, "32 attention heads are no multiple of its 5 key-value heads"),
        ("eagle3", {"head_dim": 63}, "head_dim must be even"),
        ("eagle3", {"num_attention_heads": 24, "head_dim": 128}, "hidden size 4096 is no multiple of the draft's 24 heads"),
        ("eagle3", {"draft_vocab_size": 200000}, "draft's vocabulary of 200000 exceeds the target's 151936"),
        ("eagle3", {"hidden_size": 2048}, "hidden_size of 2048 cannot differ from the target's 4096"),
        ("eagle3", {"num_hidden_layers": 2}, "exactly one layer"),
        ("eagle3", {"intermediate_size": "big"}, "intermediate_size must be a positive whole number, but is 'big'"),
        ("eagle3", {"eagle_config": {}}, "Give aux_layers instead"),
        ("dflash", {"dflash_config": {"mask_token_id": 3}}, "Give aux_layers and mask_token_id instead"),
        ("dflash", {"block_size": 1}, "a block_size of 2 or more"),
        ("dflash", {"num_hidden_layers": "five"}, "at least one layer, not 'five'"),
    ],
)
def test_explicit_values_that_cannot_be(method, given, words):
    with pytest.raises(SpecDecodeError, match=words):
        draft_config(BASE, method, mask_token_id=7, overrides=given)


def test_eagle3_reads_three_layers():
    with pytest.raises(SpecDecodeError, match="reads three layers, not 2"):
        draft_config(BASE, "eagle3", layers=[1, 2])


def test_dflash_needs_a_mask_token_inside_the_vocabulary():
    with pytest.raises(SpecDecodeError, match="mask_token_id"):
        draft_config(BASE, "dflash")
    with pytest.raises(SpecDecodeError, match="outside the target's vocabulary of 151936"):
        draft_config(BASE, "dflash", mask_token_id=151936)
    found = draft_config(BASE, "dflash", mask_token_id=7)
    assert found["dflash_config"].value == {"mask_token_id": 7, "target_layer_ids": [1, 9, 17, 25, 33]}


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300000), st.floats(allow_nan=True), st.text("ab1", max_size=3),
    st.lists(st.integers(-1, 9), max_size=2), st.dictionaries(st.sampled_from(["factor", "rope_type"]), st.none(), max_size=1),
)  # fmt: skip
LIKELY = {
    "num_hidden_layers": st.integers(1, 130),
    "hidden_size": st.sampled_from([64, 72, 100, 768, 2560, 4544, 7168]),
    "num_attention_heads": st.integers(1, 128),
    "num_key_value_heads": st.integers(1, 64),
    "head_dim": st.sampled_from([7, 64, 96, 127, 128, 256, 512]),
    "kv_lora_rank": st.just(512),
    "num_experts": st.integers(2, 256),
    "vocab_size": st.integers(2, 300000),
    "max_position_embeddings": st.integers(1, 20_000_000),
    "eos_token_id": st.integers(-1, 300000),
}
SPOILT = [*BASE, *LIKELY, "rope_theta", "rope_scaling", "rope_parameters", "text_config", "decoder", "attn_config", "multi_query",
          "rms_norm_eps", "layer_types", "is_decoder", "type_vocab_size", "pad_token_id"]  # fmt: skip


@settings(max_examples=400)
@given(
    st.fixed_dictionaries({}, optional=LIKELY),
    st.dictionaries(st.sampled_from(SPOILT), ODD, max_size=2),
    st.sampled_from(["eagle3", "dflash"]),
    st.integers(0, 300000),
)
def test_any_config_gives_a_sound_draft_or_one_clear_reason(likely, spoilt, method, mask):
    try:
        found = draft_config({**BASE, **likely, **spoilt}, method, mask_token_id=mask)
    except SpecDecodeError as error:
        assert str(error).endswith(".")
        return
    draft = {name: field.value for name, field in found.items()}
    assert draft["num_attention_heads"] % draft["num_key_value_heads"] == 0
    assert method == "dflash" or draft["hidden_size"] % draft["num_attention_heads"] == 0
    assert draft["head_dim"] % 2 == 0 and 0 < draft["head_dim"] <= 256
    assert 1 <= draft["max_position_embeddings"] <= LONGEST and draft["rope_theta"] > 0
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert draft[name] is None or 0 <= draft[name] < draft["vocab_size"]
    if method == "eagle3":
        read = draft["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        assert draft["draft_vocab_size"] <= draft["vocab_size"] and len(read) == 3
    else:
        read = draft["dflash_config"]["target_layer_ids"]
        assert draft["dflash_config"]["mask_token_id"] < draft["vocab_size"] and draft["num_hidden_layers"] == len(read)
    layers.checked_layers(read, layers.layer_count({**BASE, **likely, **spoilt}))


@pytest.mark.parametrize(
    ("name", "slug"),
    [("/models/base", "base"), ("zai-org/GLM-5.1-FP8", "glm-5-1-fp8"), ("a b/$(rm -rf x)'", "rm-rf-x"), ("Ünï/ü_x/", "x")],
)
def test_slugs(name, slug):
    assert derive.spec_slug(name) == slug


@given(st.text())
def test_slugs_are_labels_or_refused(name):
    try:
        slug = derive.spec_slug(name)
    except SpecDecodeError:
        return
    assert 1 <= len(slug) <= 40 and slug.strip("-") == slug and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("value", ["1,7,12", "[1, 7, 12]", [1, 7, 12], ["1", "7", "12"]])
def test_layers_from_the_command_line(value):
    assert layers.as_layers(value) == [1, 7, 12]


@pytest.mark.parametrize("given", [[1, 1, 2], [3, 2, 1], [-1, 2], [1, 16], []])
def test_explicit_layers_are_checked(given):
    with pytest.raises(SpecDecodeError, match="distinct, ascending and between 0 and 15"):
        layers.checked_layers(given, 16)
