# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""SpecForge's two interfaces behind one: the run configuration and the command lines. Private to the collection.

The *scripts* generation (until 2026-07-13) trains with ``scripts/train_*.py``, the *cli* generation (since) with
``specforge train`` and a typed run configuration. Defaults changed between them, so every value that shapes the
training is written out, and both train alike. Unit tests hold each command against the flags of its generation.
"""

from __future__ import annotations

import shlex
from typing import Any

from .errors import SpecDecodeError

INTERFACES = ("auto", "cli", "scripts")
BACKENDS = ("transformers", "sglang")

#: Values of the worked recipes, where the user gives none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "eagle3": {
        "batch_size": 1, "learning_rate": 1e-4, "warmup_ratio": 0.015, "max_grad_norm": 0.5, "ttt_length": 7,
        "num_epochs": 10, "seed": 0, "kl_scale": 1.0, "kl_decay": 3.0,
    },
    "dflash": {
        "batch_size": 1, "learning_rate": 6e-4, "warmup_ratio": 0.04, "max_grad_norm": 1.0, "num_anchors": 512,
        "loss_decay_gamma": 7.0, "loss_type": "dflash", "num_epochs": 6, "seed": 42,
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "attention_backend": "flex_attention", "fsdp_sharding": "SHARD_GRAD_OP", "save_interval": 1000, "log_interval": 50,
    "max_checkpoints": 3, "accumulation_steps": 1, "dist_timeout": 30, "eval_interval": 0,
}  # fmt: skip

#: What a training value is called in the scripts; a value of another name is one that the scripts cannot set.
_SHARED_FLAGS = (
    "batch_size", "learning_rate", "warmup_ratio", "max_grad_norm", "num_epochs", "seed", "attention_backend",
    "save_interval", "log_interval", "dist_timeout",
)  # fmt: skip
SCRIPT_FLAGS: dict[str, dict[str, str]] = {
    "eagle3": {
        **{
            name: f"--{name.replace('_', '-')}" for name in (*_SHARED_FLAGS, "ttt_length", "kl_scale", "kl_decay", "lk_loss_type")
        },
        "accumulation_steps": "--draft-accumulation-steps",
    },
    "dflash": {
        name: f"--{name.replace('_', '-')}"
        for name in (*_SHARED_FLAGS, "num_anchors", "loss_decay_gamma", "loss_type", "dpace_alpha", "accumulation_steps")
    },
}
#: What the scripts do without being told, by value: any other value needs the other generation.
SCRIPTS_DO: dict[str, Any] = {"fsdp_sharding": "SHARD_GRAD_OP", "eval_interval": 0, "max_checkpoints": None}


def chosen_interface(wanted: str, installed: str) -> str:
    """``cli`` or ``scripts``; ``auto`` takes what the engine has installed."""
    if wanted not in INTERFACES:
        raise SpecDecodeError(
            f"The trainer interface {wanted!r} is not known.", f"Set spec_trainer_interface to one of {', '.join(INTERFACES)}."
        )
    if wanted != "auto":
        return wanted
    if installed not in ("cli", "scripts"):
        raise SpecDecodeError(
            "The engine's Python has no SpecForge, so that spec_trainer_interface: auto has nothing to ask.",
            "Install SpecForge there, or set spec_trainer_interface to cli or scripts.",
        )
    return installed


def training_values(method: str, max_steps: int, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """All values of a training: the recipes' own, then the user's."""
    if max_steps < 1:
        raise SpecDecodeError(f"Training needs at least one step, not {max_steps}.", "Mend spec_train_steps.")
    values = {**COMMON, **DEFAULTS[method], **(given or {})}
    if not values["save_interval"]:
        raise SpecDecodeError(
            "A save_interval of 0 keeps only the last checkpoint, so that a preempted training would start over.",
            "Give a number of steps.",
        )
    return values


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
    """The typed configuration of ``specforge train`` for offline training on captured features.

    ``training`` overrides single values of the section of that name, ``trainer`` those of ``deployment.trainer``.
    """
    method = plan["method"]
    values = training_values(method, max_steps, training)
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
        "training": {"strategy": method, "max_steps": max_steps, "total_steps": max_steps, **values},
        "tracking": {"report_to": "none"},
        "deployment": {"mode": "local_colocated", "trainer": {"nnodes": 1, "nproc_per_node": 1, **(trainer or {})}},
    }


def script_config(
    plan: dict[str, Any],
    *,
    run_id: str,
    source: str,
    draft_config: str,
    data: str,
    chat_template: str,
    max_length: int,
    max_steps: int,
    training: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What :func:`run_config` is to the other generation: the script with its arguments, and the values they say.

    ``{target}``, ``{features}``, ``{output}`` and ``{cache}`` are filled in where the training runs.
    """
    method = plan["method"]
    values = training_values(method, max_steps, training)
    arguments = {
        "eagle3": train_eagle3_arguments,
        "dflash": train_dflash_arguments,
    }[method](plan, values, draft_config, data, chat_template, max_length, max_steps)
    script = script_path(source, f"train_{method}.py")
    if method == "dflash":
        raise SpecDecodeError(
            "SpecForge's scripts generation cannot train DFlash from captured features: its train_dflash.py is online only.",
            "Install SpecForge of 2026-07-14 or later and set spec_trainer_interface: cli, or choose method=eagle3."
            f" To train it online by hand: torchrun {shlex.join([script, *arguments])}",
        )
    return {
        "interface": "scripts",
        "run_id": run_id,
        "script": script,
        "arguments": arguments,
        "training": {"strategy": method, "max_steps": max_steps, "total_steps": max_steps, **values},
        "deployment": {"trainer": {"nnodes": 1, "nproc_per_node": 1, **(trainer or {})}},
    }


def train_eagle3_arguments(
    plan: dict[str, Any], values: dict[str, Any], draft_config: str, data: str, chat_template: str, max_length: int, steps: int
) -> list[str]:
    """Arguments of ``scripts/train_eagle3.py`` for offline training."""
    return [
        "--target-model-path", "{target}", "--draft-model-config", draft_config,
        "--embedding-key", plan["values"]["embedding_key"], "--lm-head-key", plan["values"]["lm_head_key"],
        "--train-data-path", data, "--train-hidden-states-path", "{features}",
        "--chat-template", chat_template, "--max-length", str(max_length), "--dataloader-num-workers", "0",
        "--max-num-steps", str(steps), "--total-steps", str(steps),
        *_value_flags("eagle3", values), "--tp-size", "1", "--report-to", "none",
        "--cache-dir", "{cache}", "--output-dir", "{output}", "--resume",
    ]  # fmt: skip


def train_dflash_arguments(
    plan: dict[str, Any], values: dict[str, Any], draft_config: str, data: str, chat_template: str, max_length: int, steps: int
) -> list[str]:
    """Arguments of ``scripts/train_dflash.py``, which is online only; it counts epochs and knows no number of steps."""
    config = plan["draft_configs"]["dflash"]
    return [
        "--target-model-path", plan["target"]["path"], "--target-model-backend", "hf", "--draft-config-path", draft_config,
        "--block-size", str(config["block_size"]), "--num-draft-layers", str(config["num_hidden_layers"]),
        "--mask-token-id", str(config["dflash_config"]["mask_token_id"]),
        "--embedding-key", plan["values"]["embedding_key"], "--lm-head-key", plan["values"]["lm_head_key"],
        "--train-data-path", data, "--chat-template", chat_template, "--max-length", str(max_length),
        *_value_flags("dflash", values), "--tp-size", "1", "--report-to", "none", "--output-dir", "train", "--resume",
    ]  # fmt: skip


def _value_flags(method: str, values: dict[str, Any]) -> list[str]:
    """Training values as flags; one that the scripts cannot express is refused, never dropped."""
    flags: list[str] = []
    for name, value in values.items():
        if name in SCRIPT_FLAGS[method]:
            flags += [SCRIPT_FLAGS[method][name], str(value)]
        elif name not in SCRIPTS_DO or SCRIPTS_DO[name] not in (None, value):
            raise SpecDecodeError(
                f"SpecForge's scripts generation has no way to set {name} = {value!r} in the training of {method}.",
                f"Leave {name} out of spec_training.{method}, or set spec_trainer_interface: cli.",
            )
    return flags


def capture_arguments(
    interface: str,
    plan: dict[str, Any],
    *,
    draft_config: str,
    data: str,
    output: str,
    cache: str,
    chat_template: str,
    max_length: int,
    batch_size: int,
    tensor_parallel: int,
    trust_remote_code: bool = False,
) -> list[str]:
    """Arguments of ``scripts/prepare_hidden_states.py``, which captures through SGLang."""
    method, layers = plan["method"], plan["values"]["aux_layers"]
    if interface == "cli":
        # The two flags for the layers are gone there: they come from the draft config.
        own = ["--strategy", method, "--draft-model-config", draft_config]
    elif method == "eagle3":
        own = ["--enable-aux-hidden-states", "--aux-hidden-states-layers", ",".join(map(str, layers))]
    else:
        raise SpecDecodeError(
            "SpecForge's scripts generation captures features for EAGLE3 only.",
            "Set spec_trainer_interface: cli with a SpecForge of 2026-07-14 or later, or spec_capture_backend: transformers.",
        )
    return [
        "--target-model-path", plan["target"]["path"], *own, *(["--trust-remote-code"] if trust_remote_code else []),
        "--data-path", data, "--output-path", output, "--cache-dir", cache, "--chat-template", chat_template,
        "--max-length", str(max_length), "--batch-size", str(batch_size), "--tp-size", str(tensor_parallel),
        # As wide a group of files as our own capture's, so that both leave one layout.
        "--file-group-size", "2000", "--build-dataset-num-proc", "8", "--num-io-threads", "4",
    ]  # fmt: skip


def prepare_data_arguments(
    dataset: str, output: str, *, data_path: str = "", sample_size: int = 0, split_eval: bool = False
) -> list[str]:
    """Arguments of ``scripts/prepare_data.py``, alike in both generations: one data set a run, skipped if the output exists."""
    return [
        "--dataset", dataset, "--output-path", output,
        *(["--data-path", data_path] if data_path else []),
        *(["--sample-size", str(sample_size)] if sample_size else []),
        *(["--split-eval"] if split_eval else []),
    ]  # fmt: skip


def by_hand(
    interface: str, source: str, capture: list[str], train: str, *, output: str, sample_size: int, script: dict[str, Any] | None
) -> dict[str, Any]:
    """The experiment in SpecForge's own commands, for those who know it. ``train`` is its run configuration's path."""
    place = source.rstrip("/") or "SpecForge"
    training = (
        ["specforge", "train", "--config", train] if script is None else ["torchrun", script["script"], *script["arguments"]]
    )
    return {
        "interface": interface,
        "prepare_data": [
            "python", f"{place}/scripts/prepare_data.py",
            *prepare_data_arguments("sharegpt", output, sample_size=sample_size),
        ],
        "prepare_hidden_states": ["torchrun", f"{place}/scripts/prepare_hidden_states.py", *capture],
        "train": training,
    }  # fmt: skip


def script_path(source: str, name: str) -> str:
    """A script in SpecForge's source tree; the installed package does not hold them."""
    if not source:
        raise SpecDecodeError(
            f"SpecForge's {name} stands in its source tree, not in the installed package.",
            "Set spec_specforge_source to a checkout of SpecForge of the installed version.",
        )
    return f"{source.rstrip('/')}/scripts/{name}"
