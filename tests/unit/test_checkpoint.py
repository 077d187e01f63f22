# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoint folders: whole ones, and every way of being half-copied."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import shutil
import struct

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import derive
from ansible_collections.inference.spec_decode.plugins.module_utils.checkpoint import INDEX, read_target
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.target_view import trainer_view

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 16, "hidden_size": 8, "num_attention_heads": 2,
    "intermediate_size": 16, "vocab_size": 10,
}  # fmt: skip


def write_safetensors(path, shapes):
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "a 'model' $(id)"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, "content": "<|mask|>"}]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_safetensors(folder / "a.safetensors", {"model.embed_tokens.weight": [10, 8]})
    write_safetensors(folder / "b.safetensors", {"lm_head.weight": [10, 8], "model.layers.0.w": [4, 4]})
    weight_map = {
        "model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors", "model.layers.0.w": "b.safetensors",
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_whole_checkpoint(target):
    found = read_target(str(target))
    assert (found.parameters, found.dtype, found.has_index, found.has_chat_template) == (176, "BF16", True, True)
    assert (found.embedding_key, found.lm_head_key) == ("model.embed_tokens.weight", "lm_head.weight")


def test_identity_follows_the_weights_and_the_config(target):
    before = read_target(str(target)).sha
    assert read_target(str(target)).sha == before
    raw = bytearray((target / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (target / "a.safetensors").write_bytes(bytes(raw))
    changed = read_target(str(target)).sha
    (target / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5.0}))
    assert len({before, changed, read_target(str(target)).sha}) == 3


def test_tied_embeddings_serve_as_the_head(target):
    (target / INDEX).unlink()
    (target / "b.safetensors").unlink()
    assert read_target(str(target)).lm_head_key == "model.embed_tokens.weight"


def damage_missing_folder(target):
    target.rename(target.with_name("elsewhere"))


def damage_missing_config(target):
    (target / "config.json").unlink()


def damage_broken_config(target):
    (target / "config.json").write_text("{broken")


def damage_config_that_is_a_list(target):
    (target / "config.json").write_text("[]")


def damage_missing_shard(target):
    (target / "b.safetensors").unlink()


def damage_truncated_shard(target):
    whole = (target / "b.safetensors").read_bytes()
    (target / "b.safetensors").write_bytes(whole[:-3])


def damage_empty_shard(target):
    (target / "b.safetensors").write_bytes(b"")


def damage_wrong_index(target):
    (target / INDEX).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "b.safetensors"}}))


def damage_index_that_leads_out(target):
    outside = target.parent / "b.safetensors"
    outside.write_bytes((target / "b.safetensors").read_bytes())
    (target / INDEX).write_text(json.dumps({"weight_map": {"a": "../b.safetensors", "b": str(outside)}}))


def damage_no_weights(target):
    for name in ("a.safetensors", "b.safetensors", INDEX):
        (target / name).unlink()


def damage_no_tokenizer(target):
    (target / "tokenizer.json").unlink()


def damage_quantised(target):
    quantisation = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (target / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantisation}))


def damage_quantised_language_model(target):
    text = {**CONFIG, "quantization_config": {"quant_method": "auto-round", "bits": 4}}
    (target / "config.json").write_text(json.dumps({"text_config": text}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing_folder, "is not a folder"),
        (damage_missing_config, "has no config.json"),
        (damage_broken_config, "is no valid JSON: .* at line 1"),
        (damage_config_that_is_a_list, "must hold a JSON object, but holds a list"),
        (damage_missing_shard, r"1 are missing \(b.safetensors\)"),
        (damage_truncated_shard, "b.safetensors is not whole: its header describes"),
        (damage_empty_shard, "b.safetensors is not whole"),
        (damage_wrong_index, "places tensor model.embed_tokens.weight in b.safetensors, which lacks it"),
        (damage_index_that_leads_out, r"2 are missing \(../b.safetensors, /"),
        (damage_no_weights, "has no safetensors weights"),
        (damage_no_tokenizer, "has no tokenizer"),
        (damage_quantised, "is quantised for serving"),
        (damage_quantised_language_model, "is quantised for serving .auto-round"),
    ],
)
def test_damage_is_refused_in_one_sentence(target, damage, words):
    damage(target)
    with pytest.raises(SpecDecodeError, match=words):
        read_target(str(target))


@pytest.mark.parametrize("format_", ["float8-quantized", "float-quantized", "mxfp8-quantized"])
def test_fp8_is_a_base_checkpoint(target, format_):
    fp8 = {"quant_method": "compressed-tensors", "format": format_}
    (target / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": fp8}))
    assert read_target(str(target)).parameters == 176


def test_view_of_a_checkpoint_without_index(target, tmp_path):
    (target / INDEX).unlink()
    view = trainer_view(str(target), str(tmp_path / "view"))
    assert read_target(view).has_index
    assert trainer_view(view, str(tmp_path / "other")) == view


@pytest.mark.parametrize("config", [None, {**CONFIG, "hidden_size": 8}])
def test_view_shows_the_last_target_alone(target, tmp_path, config):
    """Also where the former had an index and a config of its own in the view."""
    other = tmp_path / "other"
    shutil.copytree(target, other)
    (other / "former.index.json").touch()
    (target / INDEX).unlink()
    trainer_view(str(other), str(tmp_path / "view"), {"model_type": "former"})
    view = pathlib.Path(trainer_view(str(target), str(tmp_path / "view"), config))
    assert {path.name for path in view.iterdir()} == {path.name for path in target.iterdir()} | {INDEX}
    assert all(path.resolve().parent == target for path in view.iterdir() if path.name not in (INDEX, "config.json"))
    assert json.loads((view / "config.json").read_text()) == (config or CONFIG)
    assert read_target(str(view)).has_index and not (target / INDEX).exists()


def test_several_nodes_make_one_view_at_one_time(target, tmp_path):
    (target / INDEX).unlink()
    for number in range(40):
        (target / f"{number}.txt").touch()
    trainer_view(str(target), str(tmp_path / "view"))
    target.rename(tmp_path / "moved")
    with concurrent.futures.ThreadPoolExecutor(4) as nodes:
        made = [nodes.submit(trainer_view, str(tmp_path / "moved"), str(tmp_path / "view")) for _node in range(4)]
    views = {node.result() for node in made}
    assert all((tmp_path / "view" / f"{number}.txt").exists() for number in range(40))
    assert len(views) == 1 and read_target(views.pop()).has_index


def test_plan_names_everything_with_its_derivation(target):
    plan = derive.plan(str(target), "eagle3", {"aux_layers": "", "draft": {}})
    assert plan["values"]["aux_layers"] == [1, 7, 12] and plan["values"]["served_layers"] == [2, 8, 13]
    assert plan["derivation"]["aux_layers"]["rule"] == "[1, L//2-1, L-4]"
    assert plan["derivation"]["draft_configs"]["eagle3"]["hidden_size"]["source"] == "config.json: hidden_size"
    explicit = derive.plan(str(target), "eagle3", {"aux_layers": "2,5,9", "num_speculative_tokens": "5"})
    assert explicit["values"]["aux_layers"] == [2, 5, 9] and explicit["values"]["num_speculative_tokens"] == 5
    assert explicit["derivation"]["aux_layers"]["source"] == "explicit"


def test_mask_token_of_the_tokenizer_is_found(target):
    plan = derive.plan(str(target), "dflash", {"draft": {"dflash": {"num_hidden_layers": 2}}})
    assert plan["draft_configs"]["dflash"]["dflash_config"]["mask_token_id"] == 3


def tokenizer(target, added, words=3):
    vocabulary = {f"w{number}": number for number in range(words)}
    tokens = [{"id": number, "content": text} for text, number in added.items()]
    (target / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": vocabulary}}))


@pytest.mark.parametrize(
    ("added", "words", "number", "rule"),
    [
        ({"<|mask|>": 3, "<|fim_pad|>": 4}, 3, 3, "the tokenizer's mask token"),
        ({"<|fim_pad|>": 4}, 3, 5, "the first unused row of the padded table of 10"),
        ({"<|reserved_1|>": 9, "<|reserved_0|>": 8}, 8, 8, "the first reserved token"),
    ],
)
def test_mask_token_is_one_that_no_text_has(target, added, words, number, rule):
    tokenizer(target, added, words)
    plan = derive.plan(str(target), "dflash", {"draft": {"dflash": {"num_hidden_layers": 2}}})
    assert plan["values"]["mask_token_id"] == number and plan["derivation"]["mask_token_id"]["rule"] == rule
    assert plan["draft_configs"]["dflash"]["dflash_config"]["mask_token_id"] == number


def test_without_a_mask_token_only_dflash_is_refused(target):
    tokenizer(target, {"<|end|>": 9}, 9)
    plan = derive.plan(str(target), "eagle3")
    assert list(plan["draft_configs"]) == ["eagle3"]
    assert "Give its id as mask_token_id" in plan["derivation"]["draft_configs_refused"]["dflash"]
    with pytest.raises(SpecDecodeError, match="Give its id as mask_token_id"):
        derive.plan(str(target), "dflash")
    assert derive.plan(str(target), "dflash", {"mask_token_id": "4"})["derivation"]["mask_token_id"]["source"] == "explicit"
    with pytest.raises(SpecDecodeError, match="mask_token_id must be a whole number, but is 'x'"):
        derive.plan(str(target), "dflash", {"mask_token_id": "x"})


def test_both_draft_configs_take_their_overrides(target):
    plan = derive.plan(str(target), "eagle3", {"draft": {"eagle3": {"intermediate_size": 9}, "dflash": {"block_size": 4}}})
    assert plan["draft_configs"]["eagle3"]["intermediate_size"] == 9 and plan["draft_configs"]["dflash"]["block_size"] == 4
    assert plan["derivation"]["draft_configs"]["dflash"]["block_size"]["source"] == "explicit"
    with pytest.raises(SpecDecodeError, match="spec_draft holds block_size, but only eagle3 and dflash are known"):
        derive.plan(str(target), "eagle3", {"draft": {"block_size": 4}})


def test_tokens_that_were_added_without_resizing(target):
    tokenizer(target, {"<|extra|>": 10})
    with pytest.raises(SpecDecodeError, match=r"knows the id 10 \(<\|extra\|>\), but the embedding table has 10 rows"):
        derive.plan(str(target), "eagle3")


def test_vocabulary_that_config_and_weights_see_differently(target):
    (target / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 12}))
    with pytest.raises(SpecDecodeError, match="says a vocabulary of 12, but its embedding table has 10 rows"):
        derive.plan(str(target), "eagle3")


def test_embedding_of_an_unknown_name(target):
    (target / INDEX).unlink()
    (target / "b.safetensors").unlink()
    write_safetensors(target / "a.safetensors", {"model.tokens": [10, 8], "head": [10, 8]})
    with pytest.raises(SpecDecodeError, match="Give its name as embedding_key"):
        derive.plan(str(target), "eagle3")
    with pytest.raises(SpecDecodeError, match="has no tensor wte. Mend embedding_key"):
        derive.plan(str(target), "eagle3", {"embedding_key": "wte"})
    found = derive.plan(str(target), "eagle3", {"embedding_key": "model.tokens", "lm_head_key": "head"})["values"]
    assert (found["embedding_key"], found["lm_head_key"]) == ("model.tokens", "head")


def test_a_shallow_target_needs_its_layers_given(target):
    (target / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 4}))
    with pytest.raises(SpecDecodeError, match="is too shallow .* Give the layers yourself, for example -e aux_layers=0,1,2"):
        derive.plan(str(target), "eagle3")
    plan = derive.plan(str(target), "eagle3", {"aux_layers": "0,1,2"})
    draft = plan["derivation"]["draft_configs"]["eagle3"]["eagle_config"]
    assert draft["value"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2] and draft["source"] == "explicit"
    assert "too shallow for a DFlash draft of 5 layers" in plan["derivation"]["draft_configs_refused"]["dflash"]


@pytest.mark.parametrize(
    ("method", "number", "words"),
    [
        ("eagle3", "three", "num_speculative_tokens must be a whole number, but is 'three'"),
        ("eagle3", 0, "0 speculative tokens cannot be drafted. Mend"),
        ("dflash", 16, "16 speculative tokens cannot be drafted in a block of 16"),
    ],
)
def test_numbers_of_speculative_tokens_that_cannot_be(target, method, number, words):
    with pytest.raises(SpecDecodeError, match=words):
        derive.plan(str(target), method, {"num_speculative_tokens": number})


def test_unknown_method(target):
    with pytest.raises(SpecDecodeError, match="'medusa' is not known. Choose one of eagle3, dflash"):
        derive.plan(str(target), "medusa")
