# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a SpecForge export to a draft folder that vLLM loads: what both methods have in common.

A converter names every tensor that it expects, with its shape. What is missing, unexpected or of another
shape is a problem of the result, never a silent skip.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from engine_log import error_lines
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spec_decode import runbook
from spec_decode.checkpoint import read_target
from spec_decode.checkpoints import is_of_scripts
from spec_decode.draft_config import width_problem
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, sha256_folder, tail, write_json
from spec_decode.program import PhaseResult
from spec_decode.progress import Progress

Shape = tuple[int, ...]


@dataclasses.dataclass
class Draft:
    """An exported draft: its config and its tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclasses.dataclass
class Converted:
    """A draft ready for vLLM, the layers in each convention, and what is wrong with it."""

    draft: Draft
    layers_captured: list[int]
    layers_served: list[int]
    problems: list[str]


Converter = Callable[[Draft, list[int]], Converted]


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--training", required=True, help="training's result file, which names the checkpoint")
    parser.add_argument("--draft-config", required=True)
    parser.add_argument("--aux-layers", required=True, help="layer ids that the features were captured at")
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--embedding-key", default="model.embed_tokens.weight")
    parser.add_argument("--drafts", required=True, help="folder to stage <sha>/ in")
    parser.add_argument("--load-check", default="", help="JSON list: command that loads a draft; {draft} is replaced")
    parser.add_argument("--result", required=True)
    return parser.parse_args()


def convert(options: argparse.Namespace, method: str, converter: Converter) -> None:
    """Export, convert, check, stage under the checksum of the content, and write the result."""
    result = PhaseResult("convert", options.result)
    progress = Progress()
    layers = [int(layer) for layer in options.aux_layers.split(",")]
    checkpoint = read_json_object(options.training, "training result")["checkpoint"]
    os.makedirs(options.drafts, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=options.drafts) as staging:
        progress.update("exporting the checkpoint")
        exported = export(options, checkpoint, method, os.path.join(staging, "export"))
        converted = converter(exported, layers)
        target = read_json_object(os.path.join(options.target_model_path, "config.json"), "target's config")
        narrow = width_problem(converted.draft.config, target)
        # What other problems there are follows from this one.
        converted.problems[:0] = [f"{narrow}: it was trained for another target"] if narrow else []
        folder = os.path.join(staging, "draft")
        write_draft(converted.draft, folder)
        sha = sha256_folder(folder)[:16]
        place = os.path.join(options.drafts, sha)
        loads = not converted.problems and load(options.load_check, folder, progress)
        if not converted.problems and not os.path.isdir(place):
            os.replace(folder, place)
    served = {
        "method": method,
        "draft_dir": place,
        "sha": sha,
        "layers_captured": converted.layers_captured,
        "layers_served": converted.layers_served,
    }
    # What measuring depends on, and nothing that differs between two conversions of the same checkpoint.
    write_json(os.path.join(os.path.dirname(options.result), "draft.json"), served)
    result.complete(
        {
            **served,
            "tensors": [
                {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
                for name, tensor in sorted(converted.draft.tensors.items())
            ],
            "problems": converted.problems,
            "loads": loads,
            "checkpoint": checkpoint,
            "parameters": sum(tensor.numel() for tensor in converted.draft.tensors.values()),
        }
    )


def export(options: argparse.Namespace, checkpoint: str, method: str, folder: str) -> Draft:
    """A checkpoint in the Hugging Face layout: SpecForge's export, or what its scripts wrote in that layout at once."""
    if is_of_scripts(checkpoint):
        tensors = load_file(os.path.join(checkpoint, "model.safetensors"))
        # The scripts leave the frozen embeddings out; the draft's are the target's.
        tensors["embed_tokens.weight"] = target_tensor(options.target_model_path, options.embedding_key)
        return Draft(read_json_object(os.path.join(checkpoint, "config.json"), "draft config"), tensors)
    command = [
        sys.executable, "-m", "specforge.cli", "export", "--to", "hf", "--checkpoint", checkpoint,
        "--draft-config", options.draft_config, "--output-dir", folder,
    ]  # fmt: skip
    if method == "eagle3":
        command += ["--embedding-source", options.target_model_path, "--embedding-key", options.embedding_key]
        mapping = vocabulary_mapping(checkpoint, options.draft_config)
        if mapping:
            command += ["--vocab-mapping", mapping]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        last = " ".join(process.stderr.strip().splitlines()[-1:])
        raise SpecDecodeError(
            f"SpecForge could not export {checkpoint}: {last}",
            "Check that the draft config is the one that was trained.",
        )
    return Draft(
        read_json_object(os.path.join(folder, "config.json"), "exported draft config"),
        load_file(os.path.join(folder, "model.safetensors")),
    )


def target_tensor(path: str, name: str) -> torch.Tensor:
    """One of the target's tensors."""
    file = read_target(path).weight_map.get(name)
    if file is None:
        raise SpecDecodeError(f"The target {path} has no tensor {name}.", "Set embedding_key to the name of its embeddings.")
    with safe_open(os.path.join(path, file), framework="pt") as tensors:
        return tensors.get_tensor(name)


def vocabulary_mapping(checkpoint: str, draft_config: str) -> str:
    """SpecForge's file that maps the draft's vocabulary, if the draft's is smaller than the target's."""
    config = read_json_object(draft_config, "draft config")
    if config.get("draft_vocab_size", config["vocab_size"]) == config["vocab_size"]:
        return ""
    folder = os.path.join(os.path.dirname(checkpoint), "cache", "vocab_mapping")
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if len(found) != 1:
        raise SpecDecodeError(
            f"Expected one vocabulary mapping in {folder}, found {len(found)}.",
            "Train again: the mapping is written at the start of training.",
        )
    return os.path.join(folder, found[0])


def check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, Shape], optional: dict[str, Shape]) -> list[str]:
    """Every difference between the tensors found and those that the loader will ask for."""
    problems = [f"tensor {name} {list(shape)} is missing" for name, shape in expected.items() if name not in tensors]
    for name, tensor in sorted(tensors.items()):
        shape = expected.get(name, optional.get(name))
        if shape is None:
            problems.append(f"tensor {name} {list(tensor.shape)} is not one that the loader knows")
        elif tuple(tensor.shape) != shape:
            problems.append(f"tensor {name} has shape {list(tensor.shape)} instead of {list(shape)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"tensor {name} holds values that are not finite")
    return problems


def attention_and_mlp(prefix: str, config: dict[str, Any], inputs: int) -> dict[str, Shape]:
    """Shapes of one decoder layer whose attention reads ``inputs`` features a token."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        f"{prefix}.self_attn.q_proj.weight": (queries, inputs),
        f"{prefix}.self_attn.k_proj.weight": (keys, inputs),
        f"{prefix}.self_attn.v_proj.weight": (keys, inputs),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def write_draft(draft: Draft, folder: str) -> None:
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), draft.config)
    tensors = {name: tensor.contiguous() for name, tensor in draft.tensors.items()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def load(template: str, folder: str, progress: Progress) -> bool:
    """Whether the serving engine loaded the draft; ``False`` only where nothing is to load it.

    A draft that does not load is refused by an error and not told in a result: the cause may be the engine or the
    machine, which no result depends on, so that the same conversion must be tried again once it is mended.
    """
    if not template:
        return False
    progress.update("loading the draft in vLLM")
    command = [folder if part == "{draft}" else part for part in json.loads(template)]
    log = os.path.join(os.path.dirname(folder), "load.log")
    with open(log, "w", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = tail(log, 200)
        print("\n".join(last), flush=True)
        raise SpecDecodeError(
            f"vLLM does not load the draft: {' / '.join(error_lines(log) or last[-3:])}",
            "Mend what it names, the engine's packages, other programs on the device or the draft config, and run again."
            f" {runbook.more('artifact')}",
        )
    return True
