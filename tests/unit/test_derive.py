# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derivations from configs: worked values, odd shapes, and properties over generated ones."""

from __future__ import annotations

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import derive
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
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
    ("count", "layers"), [(78, [1, 38, 74]), (16, [1, 7, 12]), (36, [1, 17, 32]), (61, [1, 29, 57]), (8, [1, 3, 4])]
)
def test_aux_layers_of_known_depths(count, layers):
    assert derive.aux_layers(count) == layers
    assert derive.aux_layers({"num_hidden_layers": count}) == layers


@given(st.integers(1, 10000))
def test_aux_layers_are_valid_or_refused(count):
    try:
        layers = derive.aux_layers(count)
    except SpecDecodeError as error:
        assert count < 8 and "aux_layers" in str(error)
        return
    assert derive.checked_layers(layers, count) == layers and len(layers) == 3


@pytest.mark.parametrize("count", [0, -3, 10001, True, 3.5, "12", None])
def test_absurd_layer_counts_are_refused(count):
    with pytest.raises(SpecDecodeError):
        derive.aux_layers(count)


def test_dflash_layers_of_specforge_example():
    assert derive.dflash_target_layers(36, 5) == [1, 9, 17, 25, 33]
    assert derive.dflash_target_layers(36, 1) == [18]


@given(st.integers(1, 500), st.integers(1, 12))
def test_dflash_layers_are_valid_or_refused(count, depth):
    try:
        layers = derive.dflash_target_layers(count, depth)
    except SpecDecodeError:
        return
    assert derive.checked_layers(layers, count) == layers and len(layers) == depth


def test_served_layers_follow_vllms_convention():
    assert derive.served_aux_layers([1, 38, 74], "eagle3") == [2, 39, 75]
    assert derive.served_aux_layers([1, 9], "dflash") == [1, 9]


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
    assert derive.aux_layers(wrapped) == [1, 17, 32]
    assert derive.draft_config(wrapped, "eagle3")["hidden_size"].value == 4096


def test_older_names():
    config = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    found = derive.draft_config(config, "eagle3")
    assert derive.aux_layers(config) == [1, 5, 8]
    assert (found["hidden_size"].value, found["head_dim"].value, found["intermediate_size"].value) == (768, 64, 3072)
    assert found["max_position_embeddings"].source == "config.json: n_positions"


def test_latent_attention_becomes_plain_grouped_query_attention():
    config = {**BASE, "kv_lora_rank": 512, "num_attention_heads": 56, "num_key_value_heads": 56, "hidden_size": 7168}
    found = derive.draft_config(config, "eagle3")
    assert (found["num_key_value_heads"].value, found["head_dim"].value) == (8, 128)


def test_experts_do_not_size_the_draft():
    found = derive.draft_config({**BASE, "num_experts": 128, "intermediate_size": 1536}, "eagle3")
    assert found["intermediate_size"].value == 4 * 4096


def test_draft_vocabulary_never_exceeds_the_targets():
    assert derive.draft_config(BASE, "eagle3")["draft_vocab_size"].value == 32000
    assert derive.draft_config({**BASE, "vocab_size": 1024}, "eagle3")["draft_vocab_size"].value == 1024


def test_multimodal_rope_is_dropped_and_scaling_kept():
    rope = {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20]}
    found = derive.draft_config({**BASE, "rope_parameters": rope}, "eagle3")
    assert (found["rope_theta"].value, found["rope_scaling"].value) == (5e6, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = derive.draft_config({**BASE, "rope_theta": 1e6, "rope_scaling": yarn}, "eagle3")
    assert found["rope_scaling"].value == yarn and found["rope_theta"].value == 1e6


def test_explicit_values_win_and_say_so():
    found = derive.draft_config(BASE, "eagle3", overrides={"draft_vocab_size": 16000})
    assert found["draft_vocab_size"].value == 16000 and found["draft_vocab_size"].source == "explicit"


def test_dflash_needs_a_mask_token_inside_the_vocabulary():
    with pytest.raises(SpecDecodeError, match="mask_token_id"):
        derive.draft_config(BASE, "dflash")
    with pytest.raises(SpecDecodeError, match="outside the target's vocabulary of 151936"):
        derive.draft_config(BASE, "dflash", mask_token_id=151936)
    found = derive.draft_config(BASE, "dflash", mask_token_id=7)
    assert found["dflash_config"].value == {"mask_token_id": 7, "target_layer_ids": [1, 9, 17, 25, 33]}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            key: st.one_of(st.none(), st.integers(-2, 300000), st.text("ab1", max_size=3), st.lists(st.integers(), max_size=2))
            for key in [*BASE, "rope_theta", "num_experts", "kv_lora_rank", "text_config", "eos_token_id"]
        },
    )
)
def test_any_config_gives_a_draft_or_one_clear_reason(config):
    try:
        found = derive.draft_config({**BASE, **config}, "eagle3")
    except SpecDecodeError as error:
        assert str(error).endswith(".")
        return
    heads, kv = found["num_attention_heads"].value, found["num_key_value_heads"].value
    assert heads % kv == 0 and found["head_dim"].value > 0


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
    assert derive.as_layers(value) == [1, 7, 12]


@pytest.mark.parametrize("layers", [[1, 1, 2], [3, 2, 1], [-1, 2], [1, 16], []])
def test_explicit_layers_are_checked(layers):
    with pytest.raises(SpecDecodeError, match="distinct, ascending and between 0 and 15"):
        derive.checked_layers(layers, 16)
