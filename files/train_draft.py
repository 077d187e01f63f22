#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Train a draft with SpecForge from captured features, from the newest complete checkpoint on.

Metrics of every logged step stand in ``metrics.jsonl`` beside the checkpoints while it runs. On several nodes this
program runs once on each: all start the trainer, the first alone prepares and writes results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import torch
import yaml
from spec_decode import checkpoints, features
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, sha256_value, write_json, write_text
from spec_decode.nodes import Nodes
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress
from spec_decode.target_view import trainer_view
from spec_decode.training_log import CliLog, ScriptsLog, TrainingLog
from spec_decode.waiting import clock
from transformers import AutoConfig

#: PyTorch from 2.11 on prefers cuDNN's attention on Hopper, whose gradient is NaN where the keys' number leaves 64 on
#: division by 128, a mask is given and a row is masked whole, as DFlash's anchors are: pytorch/pytorch#196678
ENVIRONMENT = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="SpecForge's run configuration, or script and arguments")
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--aux-layers", required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--output", required=True, help="folder for checkpoints and metrics")
    parser.add_argument("--result", required=True)
    return parser.parse_args()


class Metrics:
    """``metrics.jsonl``: one line a logged step, a resumed run continuing where its checkpoint was taken."""

    def __init__(self, path: str, resumed_at: int) -> None:
        self.path = path
        self.steps = [row for row in self._read() if row["step"] <= resumed_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.steps))

    def add(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        row = {key: value if math.isfinite(value) else None for key, value in {"step": step, **values}.items()}
        self.steps.append(row)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        return row

    def _read(self) -> list[dict[str, Any]]:
        rows = []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as stream:
                for line in stream:
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError:
                        break  # the line that was being written when the job was killed
        return rows


def headline(row: dict[str, Any]) -> str:
    """The figures that a person watches: first-position accuracy and loss."""
    parts = [f"{name} {row[name]:.2f}" for name in ("acc_0", "acc", "loss") if isinstance(row.get(name), float)]
    return " · ".join(parts[:1] + parts[-1:])


class CliTrainer:
    """``specforge train`` with a typed run configuration."""

    def __init__(self, path: str, config: dict[str, Any], places: dict[str, str], nodes: Nodes) -> None:
        self._path, self._places, self._nodes = path, places, nodes

    def command(self, resume_from: str | None) -> tuple[list[str], dict[str, str]]:
        overrides = {
            "model.target_model_path": self._places["target"],
            "data.hidden_states_path": self._places["features"],
            "data.cache_dir": self._places["cache"],
            "output_dir": self._places["output"],
            **({"training.resume_from": resume_from} if resume_from else {}),
        }
        arguments_ = ["train", "--config", self._path]
        if self._nodes.count > 1:
            overrides["deployment.trainer.master_addr"] = self._nodes.address
            overrides["deployment.trainer.master_port"] = str(self._nodes.port)
            arguments_ += ["--node-rank", str(self._nodes.rank)]
        arguments_ += [f"{key}={value}" for key, value in overrides.items()]
        if torch.cuda.is_available():
            return [sys.executable, "-m", "specforge.cli", *arguments_], {}
        launcher = os.path.join(os.path.dirname(os.path.abspath(__file__)), "specforge_cpu.py")
        return [sys.executable, launcher, *arguments_], {"TORCHDYNAMO_DISABLE": "1"}

    def log(self) -> TrainingLog:
        return CliLog()

    @staticmethod
    def draft_config(config: dict[str, Any]) -> str:
        """Where the draft's own config stands."""
        return str(config["model"]["draft_model_config"])


class ScriptsTrainer:
    """``scripts/train_eagle3.py``, which resumes by itself from the highest checkpoint: only whole ones may be there."""

    def __init__(self, path: str, config: dict[str, Any], places: dict[str, str], nodes: Nodes) -> None:
        self._config, self._places, self._nodes = config, places, nodes
        if not os.path.isfile(config["script"]):
            raise SpecDecodeError(
                f"SpecForge's script {config['script']} does not exist here.",
                "Set spec_specforge_source to a checkout of SpecForge that this node sees.",
            )

    def command(self, resume_from: str | None) -> tuple[list[str], dict[str, str]]:
        filled = {f"{{{name}}}": path for name, path in self._places.items()}
        arguments_ = [filled.get(argument, argument) for argument in self._config["arguments"]]
        processes = int(self._config["deployment"]["trainer"]["nproc_per_node"])
        return [*self._nodes.torchrun(sys.executable, processes), self._config["script"], *arguments_], {}

    def log(self) -> TrainingLog:
        return ScriptsLog(int(self._config["training"]["ttt_length"]))

    @staticmethod
    def draft_config(config: dict[str, Any]) -> str:
        """Where the draft's own config stands."""
        return str(config["arguments"][config["arguments"].index("--draft-model-config") + 1])


TRAINERS: dict[str, type[CliTrainer] | type[ScriptsTrainer]] = {"cli": CliTrainer, "scripts": ScriptsTrainer}


def text_part(target: str) -> dict[str, Any] | None:
    """The language model's part of a multimodal target's config; nothing if the config is that of a language model.

    SpecForge reads the LM head's sizes for EAGLE3 at the config's top level alone.
    """
    config = AutoConfig.from_pretrained(target)
    text = config.get_text_config()
    return None if text is config else text.to_dict()


def train(
    command: list[str], environment: dict[str, str], log: TrainingLog, metrics: Metrics | None, total: int, first: int
) -> int | None:
    """Run the trainer to its end, following its steps; its output passes through to this program's.

    Stops at the first logged loss that is no finite number, and returns its step: SpecForge skips no such step, so that
    its weights are lost for good.
    """
    progress = Progress()
    started, seen = time.monotonic(), first
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**ENVIRONMENT, **os.environ, **environment, "PYTHONUNBUFFERED": "1"},
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    assert process.stdout is not None
    for line in process.stdout:
        found = log.feed(line)
        if not found or metrics is None:
            print(line, end="", flush=True)
            continue
        seen = found[0]
        row = metrics.add(*found)
        if row.get("loss", 0.0) is None:
            stop(process)
            return seen
        left = (time.monotonic() - started) / max(1, seen - first) * (total - seen)
        progress.update(f"step {seen}/{total} · {headline(row)} · {clock(left)} left", seen, total)
    code = process.wait()
    if code:
        # Not a refusal: another attempt may get further, from the newest checkpoint.
        print(f"error: SpecForge's training ended with exit code {code} after step {seen} of {total}.", flush=True)
        sys.exit(128 - code if code < 0 else 1)
    return None


def stop(process: subprocess.Popen[str]) -> None:
    """End the trainer, and wait until it writes no more."""
    process.terminate()
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def forget(output: str, run_id: str, steps: list[dict[str, Any]]) -> SpecDecodeError:
    """Remove the checkpoints that may hold lost weights, and say what happened; ``steps`` are all that were logged.

    Kept is a checkpoint whose weights gave a finite loss later.
    """
    sound = next((row for row in reversed(steps) if row.get("loss") is not None), {"step": 0})
    for path in checkpoints.all_of(output, run_id):
        if checkpoints.step_of(path) >= sound["step"]:
            shutil.rmtree(path)
    before = f"{sound['loss']:.3f} at step {sound['step']}" if sound["step"] else "none was before it"
    return SpecDecodeError(
        f"The training was stopped: SpecForge's loss is no finite number at step {steps[-1]['step']} ({before}), and its"
        " weights cannot recover from that.",
        "Lower learning_rate in spec_training, or give it another attention_backend. More: docs/runbook.md#training",
    )


def main() -> None:
    options = arguments()
    result = PhaseResult("train", options.result)
    nodes = Nodes.from_environment(os.environ)
    with open(options.config, encoding="utf-8") as stream:
        config = yaml.safe_load(stream)
    manifest = features.check_sealed(options.features)
    layers = [int(layer) for layer in options.aux_layers.split(",")]
    if manifest["layers"] != layers:
        raise SpecDecodeError(
            f"The features in {options.features} were captured at layers {manifest['layers']},"
            f" but the draft is to be trained on layers {layers}.",
            "Capture again with the same AUX_LAYERS.",
        )
    generation = TRAINERS[config.get("interface", "cli")]
    # Its content, not its path alone: another mask token or block size at the same place is another draft.
    draft = read_json_object(generation.draft_config(config), "draft's config")
    identity = sha256_value([config, draft, manifest])[:12]
    text = text_part(options.target_model_path) if config["training"]["strategy"] == "eagle3" else None
    output = os.path.join(options.output, identity)
    os.makedirs(output, exist_ok=True)
    places = {
        "target": trainer_view(options.target_model_path, os.path.join(options.output, "target"), text),
        "features": os.path.abspath(options.features),
        "cache": os.path.join(output, "cache"),
        "output": output,
    }
    trainer = generation(options.config, config, places, nodes)
    newest, refused = checkpoints.newest_complete(output, config["run_id"])
    if nodes.first:
        for path, reason in refused:
            print(f"not resumed from {path}: {reason}", flush=True)
            shutil.rmtree(path)
    first = checkpoints.step_of(newest) if newest else 0
    if newest:
        print(f"resuming from {newest}", flush=True)
    total = int(config["training"]["max_steps"])
    metrics = Metrics(os.path.join(output, "metrics.jsonl"), first) if nodes.first else None
    if first < total:
        command, environment = trainer.command(newest)
        if train(command, environment, trainer.log(), metrics, total, first) is not None and metrics is not None:
            raise forget(output, config["run_id"], metrics.steps)
    if metrics is None:
        return  # the first node writes the results
    newest, _refused = checkpoints.newest_complete(output, config["run_id"])
    if newest is None or not metrics.steps:
        raise SpecDecodeError(
            f"SpecForge ended, but left no complete checkpoint or no metrics in {output}.",
            "Check that training.log_interval and training.max_steps fit the data.",
        )
    for other in sorted(os.listdir(options.output)):
        if other not in (identity, "target", "manifest.json"):
            shutil.rmtree(os.path.join(options.output, other))  # trained on other inputs: it is not this draft
    # What conversion depends on, and nothing that differs between two runs of the same training.
    write_json(
        os.path.join(options.output, "manifest.json"),
        {"identity": identity, "steps": checkpoints.step_of(newest), "checkpoint": newest},
    )
    window = max(1, len(metrics.steps) // 10)
    result.complete(
        {
            "method": config["training"]["strategy"],
            "steps": checkpoints.step_of(newest),
            "max_steps": total,
            "resumed_at": first,
            "metrics_path": metrics.path,
            "first": mean(metrics.steps[:window]),
            "last": mean(metrics.steps[-window:]),
            "nonfinite_steps": sum(any(value is None for value in row.values()) for row in metrics.steps),
            "checkpoint": newest,
            "layers": layers,
            "training": config["training"],
            "features": manifest,
            "trainer": version("specforge"),
        }
    )


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over a few logged steps, per position where the method has several."""
    keys = [key for key in rows[-1] if key in ("loss", "acc") or key.startswith(("acc_", "ploss_"))]
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in keys}
    means = {key: sum(found) / len(found) for key, found in values.items() if found}
    accuracies = [means[key] for key in sorted(means) if key.startswith("acc_")]
    return {**means, "accs": accuracies, "logged_steps": len(rows)}


def version(package: str) -> str:
    from importlib import metadata

    return f"{package} {metadata.version(package)}" if importlib.util.find_spec(package) else package


if __name__ == "__main__":
    run(main)
