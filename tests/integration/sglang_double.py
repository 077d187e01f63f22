# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for SpecForge's ``prepare_hidden_states.py`` where SGLang cannot run: transformers computes the states.

All else is the script's own way, faults included: SpecForge's data set with its shuffle, rows padded to the longest of their
batch, what was cached for a path taken for its content, existing files skipped, files written in place. ``DOUBLE_FAULTS``
asks for a sample that is dropped for its NaN (``nan``) or a file that is cut off by a kill (``cut``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib

import torch
from datasets import Dataset
from specforge.data.preprocessing import build_eagle3_dataset
from specforge.utils import safe_conversations_generator
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("target-model-path", "strategy", "draft-model-config", "data-path", "output-path", "cache-dir", "chat-template"):
        parser.add_argument(f"--{flag}", required=True)
    for flag in ("max-length", "batch-size", "tp-size", "file-group-size", "build-dataset-num-proc", "num-io-threads"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    options = parser.parse_args()
    faults = os.environ.get("DOUBLE_FAULTS", "").split(",")
    layers = json.loads(pathlib.Path(options.draft_model_config).read_text())["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    rows = Dataset.from_generator(
        safe_conversations_generator, gen_kwargs={"file_path": options.data_path},
        cache_dir=str(pathlib.Path(__file__).resolve().parent.parent / "cache/hf_dataset"),
    )  # fmt: skip
    known_by = f"{options.data_path}-{options.max_length}-{options.chat_template}-{options.target_model_path}"
    data = build_eagle3_dataset(
        rows, AutoTokenizer.from_pretrained(options.target_model_path), options.chat_template, options.max_length, num_proc=1,
        cache_dir=os.path.join(options.cache_dir, "processed_dataset"), cache_key=hashlib.md5(known_by.encode()).hexdigest(),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.target_model_path, dtype=torch.bfloat16).eval()
    folder = pathlib.Path(options.output_path, f"rows_0-{options.file_group_size}")
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(data), options.batch_size):
        batch = [data[index] for index in range(start, min(start + options.batch_size, len(data)))]
        longest = max(item["input_ids"].shape[1] for item in batch)
        for offset, item in enumerate(batch):
            index = start + offset
            file = folder / f"data_{index}.ckpt"
            if file.exists() or (index == 7 and "nan" in faults):
                continue
            padding = (0, longest - item["input_ids"].shape[1])
            ids, mask = (torch.nn.functional.pad(item[name][0], padding) for name in ("input_ids", "loss_mask"))
            with torch.inference_mode():
                output = model(input_ids=ids[None], output_hidden_states=True)
            states = output.hidden_states
            aux = torch.cat([states[layer + 1] for layer in layers], dim=-1)
            record = {"input_ids": ids, "loss_mask": mask, "hidden_state": states[-1].clone(), "aux_hidden_state": aux.clone()}
            torch.save(record, file)
            if index == 5 and "cut" in faults:
                os.truncate(file, 1000)
                raise SystemExit("killed while writing")


if __name__ == "__main__":
    main()
