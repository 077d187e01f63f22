# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a running vLLM server resolved its configuration to, and where two servers differ. Private to the collection."""

from __future__ import annotations

from typing import Any

#: the fields that shape a measurement, by the names that the reports use
ESSENTIALS = {
    "dtype": "model_config.dtype",
    "quantization": "model_config.quantization",
    "max_model_len": "model_config.max_model_len",
    "enforce_eager": "model_config.enforce_eager",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "prefix_caching": "cache_config.enable_prefix_caching",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "tensor_parallel": "parallel_config.tensor_parallel_size",
    "pipeline_parallel": "parallel_config.pipeline_parallel_size",
    "data_parallel": "parallel_config.data_parallel_size",
    "expert_parallel": "parallel_config.enable_expert_parallel",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "async_scheduling": "scheduler_config.async_scheduling",
    "version": "version",
}
#: vLLM's CUDAGraphMode by value, as its JSON has it
CUDAGRAPH_MODES = {
    "0": "NONE", "1": "PIECEWISE", "2": "FULL", "[2, 0]": "FULL_DECODE_ONLY", "[2, 1]": "FULL_AND_PIECEWISE",
}  # fmt: skip
#: differ between two starts of the very same server, or follow from speculation and memory left, and shape nothing alone
IGNORED = (
    "instance_id",
    "speculative_config",
    "num_gpu_blocks",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
    "port",
    "_ip",
    "cache_dir",
    "debug_dump_path",
    "compilation_time",
    "encoder_compilation_time",
    "static_forward_context",
    "num_lookahead_tokens",
    "max_num_scheduled_tokens",
    "traced_files",
)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as ``section.field`` → value; the outermost ``vllm_config`` is taken off."""
    if not prefix and isinstance(value, dict) and isinstance(value.get("vllm_config"), dict):
        value = value["vllm_config"]
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def essentials(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every number's context names; ``None`` where the server does not tell."""
    found = {name: config.get(path) for name, path in ESSENTIALS.items()}
    mode = found["cudagraph_mode"]
    return {**found, "cudagraph_mode": CUDAGRAPH_MODES.get(str(mode), mode)}


def differences(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every field in which the servers differ, other than the speculative config and what says nothing."""
    names = list(configs)
    fields = sorted({field for config in configs.values() for field in config})
    found = []
    for field in fields:
        if any(part in field for part in IGNORED):
            continue
        values = {name: configs[name].get(field) for name in names}
        if len({repr(value) for value in values.values()}) > 1:
            found.append({"field": field, "values": values})
    return found
