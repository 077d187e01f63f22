# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Made-up measurements for the tests of the verdict."""

from __future__ import annotations

from ansible_collections.inference.spec_decode.plugins.module_utils import verdict

RESOLVED = {
    "dtype": "torch.bfloat16", "quantization": None, "max_model_len": 512, "enforce_eager": False,
    "cudagraph_mode": "FULL_AND_PIECEWISE", "kv_cache_dtype": "auto", "prefix_caching": False,
    "gpu_memory_utilization": 0.9, "tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 1,
    "expert_parallel": False, "max_num_seqs": 4, "max_num_batched_tokens": 512, "async_scheduling": True,
    "version": "0.32.0",
}  # fmt: skip
HELD_OUT = {"overlap_train_eval": 0}
HEALTHY = {"last": {"accs": [0.9, 0.85, 0.8]}}
RIGHT_LAYERS = {"method": "eagle3", "layers_captured": [1, 7, 12], "layers_served": [2, 8, 13]}


def trial(arm, pair, tpot, rates=(), concurrency=1, **client):
    drafts = 1000.0 if rates else 0
    return {
        "arm": arm,
        "pair": pair,
        "concurrency": concurrency,
        "void": "",
        "texts": ["x", "y"],
        "client": {
            "tpot_ms": {"median": tpot, "mean": tpot},
            "ttft_ms": {"median": 20.0, "p99": 30.0},
            "output_tokens_per_s": 1000 / tpot,
            "output_tokens": {"mean": 100.0},
            "input_tokens": {"mean": 20.0},
            "requests": 16,
            "errors": 0,
            "in_flight": 0.98 * concurrency,
            **client,
        },
        "engine": {
            "drafts": drafts,
            "accepted_tokens": drafts * sum(rates),
            "acceptance_per_position": list(rates),
            "itl_s": {"mean": tpot / 1e3, "count": drafts or 1000.0},
        },
    }


def measurement(standing, trained, rates=(0.9, 0.8, 0.7), base_rates=(), kind="gpu"):
    trials = []
    for pair, (before, after) in enumerate(zip(standing, trained), 1):
        both = [trial("standing", pair, before, base_rates), trial("trained", pair, after, rates)]
        trials += both if pair % 2 else both[::-1]
    return {
        "finished_at": "2026-01-01T00:00:00+00:00",
        "plan": {
            "model": "m", "target": {"path": "/m", "sha": "t"}, "prompts": {"path": "eval.jsonl", "count": 16},
            "max_tokens": 100, "temperature": 0.0, "warmup": 4, "concurrencies": [1],
        },
        "draft": {"sha": "d"},
        "arms": {
            "standing": {"speculative_config": None, "resolved": dict(RESOLVED)},
            "trained": {"speculative_config": {"method": "eagle3", "num_speculative_tokens": 3}, "resolved": dict(RESOLVED)},
        },
        "differences": [],
        "node": "n1",
        "hardware": {"kind": kind, "name": "H", "count": 1},
        "trials": trials,
    }  # fmt: skip


def judge(found, **given):
    return verdict.judge(found, **{"train": HEALTHY, "convert": RIGHT_LAYERS, "dataset": HELD_OUT, **given})


WIN = ([5.0, 5.1, 5.0], [2.5, 2.6, 2.5])
