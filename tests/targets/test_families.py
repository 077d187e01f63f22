# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Untrained drafts of a few families, loaded in vLLM with targets of random weights."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import draft_config
from ansible_collections.inference.spec_decode.plugins.module_utils.layers import layer_count, served_aux_layers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
pytestmark = pytest.mark.skipif(not ENGINE.exists(), reason="there is no engine environment; run make setup")

#: a small target with random weights, and its untrained draft as SpecForge builds it
BUILD = """
import json, os, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
folder, config, draft, served = sys.argv[1], *map(json.loads, sys.argv[2:])
torch.manual_seed(0)
kind = config.pop("model_type")
target = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), dtype=torch.bfloat16)
target.save_pretrained(os.path.join(folder, "target"))
os.makedirs(os.path.join(folder, "draft"))
path = os.path.join(folder, "draft", "config.json")
json.dump(draft, open(path, "w"))
model = AutoDraftModel.from_config(AutoDraftModelConfig.from_file(path), torch_dtype=torch.bfloat16)
tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name != "t2d"}
if draft.get("draft_vocab_size") == draft["vocab_size"]:
    del tensors["d2t"]
save_file(tensors, os.path.join(folder, "draft", "model.safetensors"))
json.dump(served, open(path, "w"))
"""
COMMON = {
    "num_hidden_layers": 8, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama, tied embeddings, smaller draft vocabulary": (
        "eagle3", {**COMMON, "model_type": "llama", "head_dim": 32, "tie_word_embeddings": True}, {"draft_vocab_size": 256}
    ),
    "mixture of experts": (
        "dflash",
        {
            **COMMON, "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        {"block_size": 4},
    ),
    "linear attention beside full attention": (
        "eagle3",
        {
            **COMMON, "model_type": "qwen3_next", "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        },
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_draft_of_a_family_loads_in_vllm(family, tmp_path):
    method, config, overrides = FAMILIES[family]
    draft = {name: field.value for name, field in draft_config(config, method, mask_token_id=3, overrides=overrides).items()}
    served = dict(draft)
    if method == "eagle3":
        layers = served.pop("eagle_config")["eagle_aux_hidden_state_layer_ids"]
        served["eagle_aux_hidden_state_layer_ids"] = served_aux_layers(layers)
    assert layer_count(config) == 8
    built = subprocess.run(
        [str(ENGINE), "-c", BUILD, str(tmp_path), *map(json.dumps, (config, draft, served))],
        capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    flags = ["--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "64", "--max-num-seqs", "2"]
    loaded = subprocess.run(
        [str(ENGINE), str(ROOT / "files/load_draft.py"), "--target-model-path", str(tmp_path / "target"),
         "--draft", str(tmp_path / "draft"), "--server-arguments", json.dumps(flags),
         "--speculative-config", json.dumps({"method": method, "num_speculative_tokens": 3})],
        capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stdout[-2000:] + loaded.stderr[-4000:]
    assert "the draft loads" in loaded.stdout
