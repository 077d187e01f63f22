#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Capture a target's hidden states through transformers, in SpecForge's offline contract.

One file a conversation, ``rows_<g>-<g+2000>/data_<i>.ckpt``, written whole or not at all:

* EAGLE3: ``input_ids[T]``, ``loss_mask[T]``, ``hidden_state[1,T,H]`` (what the LM head reads),
  ``aux_hidden_state[1,T,n*H]`` (the residual stream after each chosen layer, counted from 0)
* DFlash: ``input_ids[T]``, ``loss_mask[T]``, ``hidden_states[1,T,n*H]``

A killed capture goes on with the conversations that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from chat_format import ChatFormat, Rendered
from spec_decode import features
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, sha256_value
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress
from transformers import AutoModelForCausalLM

PROBE_SAMPLES = 4


def capture_parser(description: str) -> argparse.ArgumentParser:
    """What every capture is told, whatever computes the states."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--target-model-path", required=True)
    parser.add_argument("--method", choices=("eagle3", "dflash"), required=True)
    parser.add_argument("--aux-layers", required=True, help="ids of decoder layers counted from 0, such as 1,7,12")
    parser.add_argument("--chat-template", required=True)
    parser.add_argument("--chat-template-file", default="")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and manifest.json")
    parser.add_argument("--output", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    return parser


def arguments() -> argparse.Namespace:
    parser = capture_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest relative error that the probe allows")
    return parser.parse_args()


def capture_identity(options: argparse.Namespace, layers: list[int], chat: ChatFormat, *backend: str) -> str:
    """Changes with whatever the features depend on."""
    manifest = read_json_object(os.path.join(options.data, "manifest.json"), "data set manifest")
    target = os.environ.get("TARGET_SHA", "")
    return sha256_value(
        [manifest["sha256"]["train"], chat.template_sha, layers, options.method, options.max_length, target, *backend]
    )


class Target:
    """The target model with hooks on the chosen decoder layers and on what its LM head reads."""

    def __init__(self, path: str, layers: list[int]) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            # What is left for the CPU are copies of one conversation each. More threads only wait for each other, and
            # beside another program that is busy they wait twenty times as long as the copies take.
            torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(self.device).eval()
        self.layers = layers
        text = self.model.config.get_text_config()
        self.hidden_size = int(text.hidden_size)
        self._states: dict[int, torch.Tensor] = {}
        blocks = self._decoder_layers(int(text.num_hidden_layers))
        for layer in layers:
            blocks[layer].register_forward_hook(self._keep(layer))
        self._last: torch.Tensor | None = None
        self.head = self.model.get_output_embeddings()

    def _decoder_layers(self, count: int) -> torch.nn.ModuleList:
        found = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count and name.endswith("layers")
        ]
        if len(found) != 1:
            raise SpecDecodeError(
                f"The target has {len(found)} lists of {count} decoder layers named 'layers'; exactly one was expected.",
                "Use the SGLang capture backend for this architecture.",
            )
        return found[0]

    def _keep(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(last[B,T,H], aux[B,T,n*H])`` of right-padded ``input_ids[B,T]``."""
        decoder = self.model.get_decoder()
        last = decoder(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
        ).last_hidden_state
        aux = torch.cat([self._states[layer] for layer in self.layers], dim=-1)
        return last.cpu(), aux.cpu()

    def reference(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(logits[T,V], aux[T,n*H])`` of one sequence by the model's own outputs, without the hooks."""
        output = self.model(input_ids=input_ids[None].to(self.device), use_cache=False, output_hidden_states=True)
        aux = torch.cat([output.hidden_states[layer + 1][0] for layer in self.layers], dim=-1)
        return output.logits[0].float().cpu(), aux.cpu()


def record(method: str, rendered: Rendered, last: torch.Tensor, aux: torch.Tensor) -> dict[str, torch.Tensor]:
    """One file's tensors. The clones matter: a view would store the whole batch."""
    common = {"input_ids": rendered.input_ids, "loss_mask": rendered.loss_mask}
    if method == "eagle3":
        return {**common, "hidden_state": last[None].clone(), "aux_hidden_state": aux[None].clone()}
    return {**common, "hidden_states": aux[None].clone()}


def save(value: dict[str, torch.Tensor], path: str) -> int:
    """Write a file whole or not at all; returns its size in bytes."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.part"
    torch.save(value, temporary)
    size = os.path.getsize(temporary)
    os.replace(temporary, path)
    return size


def batches(samples: dict[int, Rendered], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, of at most ``budget`` tokens with the padding."""
    batch: list[int] = []
    for index in sorted(samples, key=lambda index: len(samples[index].input_ids)):
        length = len(samples[index].input_ids)
        if batch and length * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(samples: dict[int, Rendered], batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids[B,T]`` and ``attention_mask[B,T]``, padded on the right."""
    longest = max(len(samples[index].input_ids) for index in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, index in enumerate(batch):
        length = len(samples[index].input_ids)
        input_ids[row, :length] = samples[index].input_ids
        mask[row, :length] = 1
    return input_ids, mask


def check_space(output: str, tokens: int, width: int) -> int:
    """Bytes that the features will take; refuses when the disk does not hold them."""
    needed = int(tokens * width * 2 * 1.05)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise SpecDecodeError(
            f"The features of {tokens} tokens need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {output}.",
            "Free space, choose another spec_work_dir, or lower spec_train_rows or spec_max_length.",
        )
    return needed


def probe(target: Target, method: str, store: features.Store, indices: list[int], tolerance: float) -> dict[str, Any]:
    """Compare stored states with ones computed another way.

    The LM head on the stored last state must name the target's own next tokens, and the stored aux states
    must equal those that the model itself reports. Errors are relative to the root mean square of the values.
    """
    worst_head, worst_aux, agree, positions = 0.0, 0.0, 0, 0
    for index in indices:
        stored = torch.load(store.path(index), weights_only=True)
        logits, aux = target.reference(stored["input_ids"])
        if method == "eagle3":
            again = target.head(stored["hidden_state"][0].to(target.device)).float().cpu()
            worst_head = max(worst_head, relative_error(again, logits))
            close = logits.gather(1, again.argmax(-1, keepdim=True))[:, 0] >= logits.max(-1).values - tolerance * logits.std()
            agree += int(close.sum())
            positions += len(close)
        name = "aux_hidden_state" if method == "eagle3" else "hidden_states"
        worst_aux = max(worst_aux, relative_error(stored[name][0].float(), aux.float()))
    return {
        "samples": indices,
        "lm_head_max_abs_diff": worst_head if method == "eagle3" else None,
        "lm_head_argmax_agreement": agree / positions if positions else None,
        "aux_max_abs_diff": worst_aux,
        "tolerance": tolerance,
        "unit": "root mean square error relative to the root mean square of the values",
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def main() -> None:
    options = arguments()
    result = PhaseResult("capture", options.result)
    progress = Progress()
    layers = [int(layer) for layer in options.aux_layers.split(",")]
    chat = ChatFormat(options.target_model_path, options.chat_template, options.chat_template_file, options.max_length)
    with open(os.path.join(options.data, "train.jsonl"), encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    progress.update(f"rendering {len(rows)} conversations", 0, len(rows))
    samples = {index: chat.render(row["conversations"]) for index, row in enumerate(rows)}
    target = Target(options.target_model_path, layers)
    store = features.Store(options.output, capture_identity(options, layers, chat))
    written = store.resume()
    missing = {index: sample for index, sample in samples.items() if index not in written}
    width = target.hidden_size * (len(layers) + (options.method == "eagle3"))
    check_space(store.folder, sum(len(sample.input_ids) for sample in missing.values()), width)

    nonfinite, shape_errors = 0, []
    started, tokens_done = time.monotonic(), 0
    with torch.inference_mode(), store.writing() as index_file:
        for batch in batches(missing, options.batch_tokens):
            input_ids, mask = padded(missing, batch)
            last, aux = target.states(input_ids, mask)
            for row, index in enumerate(batch):
                length = len(missing[index].input_ids)
                one_last, one_aux = last[row, :length], aux[row, :length]
                finite = bool(torch.isfinite(one_last).all() and torch.isfinite(one_aux).all())
                nonfinite += not finite
                if one_aux.shape != (length, target.hidden_size * len(layers)):
                    shape_errors.append(f"data_{index}: aux {tuple(one_aux.shape)}")
                size = save(record(options.method, missing[index], one_last, one_aux), store.path(index))
                index_file.add(index, length, size, finite)
            index_file.flush()
            tokens_done += int(mask.sum())
            done = len(written) + index_file.count
            rate = tokens_done / (time.monotonic() - started)
            progress.update(f"{done}/{len(rows)} samples · {rate:.0f} tokens/s", done, len(rows))
        seconds = time.monotonic() - started
        everything = store.verify(len(rows))
        chosen = sorted(samples)[:: max(1, len(samples) // PROBE_SAMPLES)][:PROBE_SAMPLES]
        found = probe(target, options.method, store, chosen, options.tolerance)
    nonfinite += sum(not entry.finite for index, entry in everything.items() if index in written)
    store.seal(
        {
            "method": options.method,
            "layers": layers,
            "hidden_size": target.hidden_size,
            "dtype": "bfloat16",
            "max_length": options.max_length,
        },
        everything,
    )
    result.complete(
        {
            "samples": {"expected": len(rows), "written": len(everything)},
            "layers": layers,
            "expected_layers": layers,
            "hidden_size": target.hidden_size,
            "dtype": "bfloat16",
            "nonfinite": nonfinite,
            "shape_errors": shape_errors,
            "tokens": sum(entry.tokens for entry in everything.values()),
            "bytes": sum(entry.bytes for entry in everything.values()),
            "probe": found,
            "throughput": {
                "tokens": tokens_done,
                "seconds": round(seconds, 3),
                "tokens_per_s": round(tokens_done / seconds, 1) if tokens_done else None,
                "device": torch.cuda.get_device_name() if target.device == "cuda" else "cpu",
                "resumed_samples": len(written),
            },
        }
    )


if __name__ == "__main__":
    run(main)
