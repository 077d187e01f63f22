# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What fits: parameter counts of public models, splits that vLLM accepts, memory, disk and speed with their rules."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import experiment, model_shape
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.fit import GIB, fit, summary
from hypothesis import given
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TABLE = yaml.safe_load((ROOT / "configs/sol-ceilings.yaml").read_text())
LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_30B_A3B = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 18432, "vocab_size": 129280, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "tie_word_embeddings": False,
    "max_position_embeddings": 163840, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [(LLAMA_8B, 8.03e9, 8.03e9), (QWEN3_30B_A3B, 30.5e9, 3.3e9), (DEEPSEEK_V3, 671e9, 37e9)],
    ids=["Llama 3 8B", "Qwen3 30B A3B", "DeepSeek V3"],
)
def test_parameter_counts_of_public_models(config, total, active):
    shape = model_shape.shape_of(config)
    estimated = model_shape.parameters(shape)
    assert estimated == pytest.approx(total, rel=0.01)
    assert model_shape.active_parameters(shape, estimated) == pytest.approx(active, rel=0.03)


def test_cache_of_a_token():
    def cache(config):
        return fit(config)["kv_bytes_per_token"]["value"]

    assert cache(LLAMA_8B) == 2 * 32 * 8 * 128 * 2
    assert cache(DEEPSEEK_V3) == 61 * (512 + 64) * 2
    assert cache({**LLAMA_8B, "layer_types": ["linear_attention", "full_attention"] * 16}) == 2 * 16 * 8 * 128 * 2
    assert cache({**LLAMA_8B, "num_hidden_layers": None, "hybrid_override_pattern": "M-M*" * 8}) == 2 * 8 * 8 * 128 * 2
    assert cache({**LLAMA_8B, "full_attention_interval": 4}) == 2 * 8 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("changes", "most", "sizes"),
    [
        ({}, 8, [1, 2, 4, 8]),
        ({}, 64, [1, 2, 4, 8, 16, 32]),  # beyond 8 the key-value heads are kept several times
        ({"num_attention_heads": 40, "num_key_value_heads": 10, "head_dim": 128}, 8, [1, 2]),  # 4 divides 40, but not 10
        (
            {"num_attention_heads": 40, "num_key_value_heads": 5, "head_dim": 128, "intermediate_size": 12800},
            64,
            [1, 5, 10, 20, 40],
        ),
        ({"intermediate_size": 14336 + 2}, 8, [1, 2]),
        ({"quantization_config": {"weight_block_size": [128, 128]}, "intermediate_size": 384}, 8, [1]),
    ],
)
def test_splits_that_vllm_accepts(changes, most, sizes):
    assert fit({**LLAMA_8B, **changes}, num_gpus=most)["tp_sizes"]["value"] == sizes


def test_smallest_split_that_fits():
    def size(config, **options):
        return fit(config, context=8192, **options)["tp_size"]

    assert size(LLAMA_8B, gpu_memory_gib=80, num_gpus=8)["value"] == 1
    assert size(LLAMA_8B, gpu_memory_gib=16, num_gpus=8)["value"] == 2
    assert size(DEEPSEEK_V3, gpu="h200", table=TABLE, num_gpus=8, dtype="F8_E4M3")["value"] == 8
    assert size(LLAMA_8B)["value"] is None and "spec_gpu" in size(LLAMA_8B)["rule"]
    assert size(LLAMA_8B, tp_size="4") == {"value": 4, "unit": "GPUs", "source": "explicit", "rule": "given by the user"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpu_memory_gib": 16, "num_gpus": 8}, r"needs about 171.1 GiB on each of 8 GPUs, but one has 14.7 GiB usable"),
        ({"tp_size": 3}, "spec_tp_size 3 cannot split this target on 64 GPUs; possible are 1, 2, 4, 8, 16"),
        ({"tp_size": 16, "num_gpus": 8}, "spec_tp_size 16 cannot split this target on 8 GPUs"),
        ({"tp_size": "four"}, "spec_tp_size must be a positive whole number, but is 'four'"),
        ({"num_gpus": 0}, "spec_num_gpus must be a positive whole number, but is 0"),
        ({"gpu_memory_gib": "much"}, "spec_gpu_memory_gib must be a positive number, but is 'much'"),
        ({"gpu": "H1000", "table": TABLE}, r"'H1000' is not in the table \(GB300, "),
        ({"method": "medusa"}, "'medusa' is not known"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(SpecDecodeError, match=words):
        fit(DEEPSEEK_V3, **options)


def test_weights_of_the_files_win_over_the_estimate():
    found = fit(LLAMA_8B, weights={"parameters": 8030261248, "bytes": 16060556376})
    assert found["weight_bytes"] == {
        "value": 16060556376, "unit": "bytes", "source": "weights", "rule": "size of the weight files"
    }  # fmt: skip
    assert fit(LLAMA_8B)["weight_bytes"]["source"] == "config.json"


def test_disk_and_speed_of_the_capture():
    found = fit(LLAMA_8B, gpu="H100", num_gpus=1, context=8192, table=TABLE, rows=50000, row_tokens=1024)
    values = {name: figure["value"] for name, figure in found.items()}
    assert values["feature_bytes_per_token"] == 4 * 4096 * 2
    assert values["feature_bytes"] == 50000 * 1024 * 4 * 4096 * 2
    assert values["capture_tokens_per_hour"] == pytest.approx(3600 * 9.89e14 * 0.3 / (2 * 8.03e9), rel=0.01)
    assert values["features_per_hour"] == values["capture_tokens_per_hour"] // 1024
    dflash = fit(LLAMA_8B, "dflash", layers="1,8,15,22,29")
    assert dflash["feature_bytes_per_token"]["value"] == 5 * 4096 * 2
    assert dflash["features_per_hour"]["value"] is None and dflash["features_per_hour"]["rule"].startswith("not derived")


def test_summary_says_what_is_known():
    known = fit(LLAMA_8B, gpu="H100", num_gpus=1, context=8192, table=TABLE, rows=50000)
    assert summary(known).startswith("weights 16.1 GB, features about 1677.7 GB, tensor-parallel size 1 (estimate), about ")
    assert summary(fit(LLAMA_8B)) == "weights 16.1 GB, features about 0.0 GB"


def test_every_accelerator_has_its_memory():
    assert {key for key, peaks in TABLE["ceilings"].items() if not 4e10 < float(peaks["memory_bytes"]) < 4e11} == set()
    usable = fit(LLAMA_8B, gpu="L40S", table=TABLE, context=4096)["gpu_usable_bytes"]
    assert usable["value"] == int(48e9 * 0.92) and "NVIDIA L40S" in usable["source"]
    assert fit(LLAMA_8B, gpu="L40S", gpu_memory_gib=44, table=TABLE)["gpu_usable_bytes"]["value"] == int(44 * GIB * 0.92)


@given(
    st.sampled_from([LLAMA_8B, QWEN3_30B_A3B, DEEPSEEK_V3]),
    st.sampled_from(["eagle3", "dflash"]),
    st.floats(1, 400),
    st.integers(1, 72),
    st.integers(1, 200000),
    st.integers(1, 64),
)
def test_a_split_is_valid_and_fits_or_is_refused(config, method, memory, gpus, context, requests):
    try:
        found = fit(config, method, gpu_memory_gib=memory, num_gpus=gpus, context=context, requests=requests)
    except SpecDecodeError as error:
        assert "needs about" in str(error)
        return
    size = found["tp_size"]["value"]
    assert 1 <= size <= gpus and config["num_attention_heads"] % size == 0
    assert found["gpu_bytes"]["value"] <= found["gpu_usable_bytes"]["value"]
    assert all(set(figure) == {"value", "unit", "source", "rule"} and figure["unit"] for figure in found.values())


@pytest.mark.parametrize(
    ("arguments", "context"),
    [(["--max-model-len", "4096"], 4096), (["--max-model-len=512"], 512), (["--enforce-eager"], 0), ([], 0)],
)
def test_context_of_the_servers_flags(arguments, context):
    assert experiment._context(arguments) == context
