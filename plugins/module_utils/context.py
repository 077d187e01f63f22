# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The context that every measured number carries. Private to the collection."""

from __future__ import annotations

from typing import Any

from .errors import SpecDecodeError

#: fields that may be unknown to a server, with what the report then says
MAY_BE_NONE = frozenset({"quantization"})


def descriptor(acceptance: dict[str, Any], arm: str, figures: dict[str, Any], concurrency: int) -> dict[str, Any]:
    """Identity, parallelism, serving configuration, workload, regime, stack and grounding of one arm's numbers.

    Raises :class:`SpecDecodeError` when a part is missing: a number without its context must not leave the project.
    """
    plan, resolved = acceptance["plan"], acceptance["arms"][arm]["resolved"]
    hardware = acceptance["hardware"]
    found = {
        "identity": {
            "model": plan["model"],
            "path": plan["target"]["path"],
            "hardware": hardware["name"],
            "hardware_count": hardware["count"],
            "quantization": resolved["quantization"],
            "dtype": resolved["dtype"],
            "kv_cache_dtype": resolved["kv_cache_dtype"],
        },
        "parallelism": {
            "tensor": resolved["tensor_parallel"],
            "data": resolved["data_parallel"],
            "pipeline": resolved["pipeline_parallel"],
            "expert": resolved["expert_parallel"],
        },
        "serving": {
            "speculative_config": acceptance["arms"][arm]["speculative_config"] or "none",
            "max_num_seqs": resolved["max_num_seqs"],
            "max_num_batched_tokens": resolved["max_num_batched_tokens"],
            "gpu_memory_utilization": resolved["gpu_memory_utilization"],
            "max_model_len": resolved["max_model_len"],
            "cudagraph_mode": resolved["cudagraph_mode"],
            "enforce_eager": resolved["enforce_eager"],
            "async_scheduling": resolved["async_scheduling"],
            "prefix_caching": resolved["prefix_caching"],
        },
        "workload": {
            "dataset": plan["prompts"]["path"],
            "prompts": plan["prompts"]["count"],
            "input_tokens_mean": round(figures["input_tokens_mean"], 1),
            "output_tokens_mean": round(figures["output_tokens_mean"], 1),
            "max_tokens": plan["max_tokens"],
            "temperature": plan["temperature"],
            "concurrency": concurrency,
        },
        "regime": {"warm": plan["warmup"] > 0, "tier": "latency" if concurrency == 1 else "throughput"},
        "stack": {"engine": "vLLM", "version": resolved["version"], "client": "dflash_vllm_eval.py"},
        "grounding": {
            "trials": len(figures["tpot_ms"]["trials"]),
            "same_node": acceptance["node"],
            "baseline": "standing",
            "rigor": "L1",
        },
    }
    for section, fields in found.items():
        for name, value in fields.items():
            if value is None and name not in MAY_BE_NONE:
                raise SpecDecodeError(
                    f"The {arm} arm's {section}.{name} is unknown, so its numbers have no whole context.",
                    "The server must tell its resolved configuration (VLLM_SERVER_DEV_MODE=1).",
                )
    return found
