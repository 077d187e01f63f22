# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The run configuration of ``specforge train``. Private to the collection.

SpecForge's defaults changed between its generations, so every value that shapes the training is written out.
"""

from __future__ import annotations

from typing import Any

from .errors import SpecDecodeError

#: Values of the worked recipes, where the user gives none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "eagle3": {
        "batch_size": 1, "learning_rate": 1e-4, "warmup_ratio": 0.015, "max_grad_norm": 0.5, "ttt_length": 7,
        "num_epochs": 10, "seed": 0,
    },
    "dflash": {
        "batch_size": 1, "learning_rate": 6e-4, "warmup_ratio": 0.04, "max_grad_norm": 1.0, "num_anchors": 512,
        "loss_decay_gamma": 7.0, "num_epochs": 6, "seed": 42,
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "attention_backend": "flex_attention", "fsdp_sharding": "SHARD_GRAD_OP", "save_interval": 1000, "log_interval": 50,
    "max_checkpoints": 3,
}  # fmt: skip


def run_config(
    plan: dict[str, Any],
    *,
    run_id: str,
    draft_config: str,
    features: str,
    output: str,
    chat_template: str,
    max_length: int,
    max_steps: int,
    training: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The typed configuration for offline training on captured features.

    ``training`` overrides single values of the section of that name, ``trainer`` those of ``deployment.trainer``.
    """
    method = plan["method"]
    if max_steps < 1:
        raise SpecDecodeError(f"Training needs at least one step, not {max_steps}.", "Mend scaffold_train_steps.")
    values = {**COMMON, **DEFAULTS[method], **(training or {})}
    if not values["save_interval"]:
        raise SpecDecodeError(
            "A save_interval of 0 keeps only the last checkpoint, so that a preempted training would start over.",
            "Give a number of steps.",
        )
    return {
        "run_id": run_id,
        "output_dir": output,
        "model": {
            "target_model_path": plan["target"]["path"],
            "draft_model_config": draft_config,
            "torch_dtype": "bfloat16",
            "embedding_key": plan["values"]["embedding_key"],
            "lm_head_key": plan["values"]["lm_head_key"],
            # DFlash reads its layers from the draft config alone and refuses a second source.
            **({"aux_hidden_state_layer_ids": plan["values"]["aux_layers"]} if method == "eagle3" else {}),
        },
        "data": {
            "hidden_states_path": features,
            "max_length": max_length,
            "chat_template": chat_template,
            "dataloader_num_workers": 0,
        },
        "training": {"strategy": method, "max_steps": max_steps, **values},
        "tracking": {"report_to": "none"},
        "deployment": {"mode": "local_colocated", "trainer": {"nnodes": 1, "nproc_per_node": 1, **(trainer or {})}},
    }
