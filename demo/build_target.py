#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build the demonstration's target: a small chat LLM, trained here from scratch, and its data.

Leaves ``<out>/`` as a user's checkpoint folder would be (config.json, sharded safetensors, tokenizer with chat
template) and, beside it, ``data/`` with one source in ShareGPT's layout and one in UltraChat's. Its size is a matter of
arguments, and a file can hold them: ``build_target.py @demo/gpu_target.args`` is the one for a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time

import torch
from corpus import conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

END, START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS_SEED, DATA_SEED = 1, 7


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], fromfile_prefix_chars="@")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--data", required=True, help="folder for the two data sources")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--conversations", type=int, default=20000)
    parser.add_argument("--rows", type=int, default=2000, help="rows of each of the two data sources")
    parser.add_argument("--most-exchanges", type=int, default=1, help="questions and answers of the longest conversations")
    return parser.parse_args()


def tokenizer_for(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's turn markers and a mask token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, START, TURN_END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=TURN_END, pad_token=END, mask_token=MASK, additional_special_tokens=[START]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_for(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden_size,
            intermediate_size=3 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=max(1, options.heads // 2),
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            rope_theta=10000.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids[B,T]`` and ``labels[B,T]`` (-100 on padding), padded on the right."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = labels[index, : len(row)] = torch.tensor(row)
    return input_ids, labels


def train(model: Qwen3ForCausalLM, rows: list[list[int]], options: argparse.Namespace, pad: int) -> float:
    """Cosine schedule over ``steps`` batches; returns the mean loss of the last ten."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    started, losses = time.monotonic(), []
    device = next(model.parameters()).device
    model.train()
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 20)
        rate = options.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Right-padded and causal: padding is never attended to by a real token.
        input_ids, labels = padded(rng.sample(rows, options.batch_size), pad)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=input_ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 9 or step + 1 == options.steps:
            passed = time.monotonic() - started
            left = passed / (step + 1) * (options.steps - step - 1)
            print(f"  target: step {step + 1}/{options.steps} · loss {losses[-1]:.2f} · {left:.0f} s left", flush=True)
    return sum(losses[-10:]) / len(losses[-10:])


def write_sources(folder: str, rows: int, most_exchanges: int) -> None:
    """The data of the demonstration, in the two layouts that users bring."""
    os.makedirs(folder, exist_ok=True)
    found = list(conversations(2 * rows, DATA_SEED, most_exchanges))
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {
            "id": f"s{index}",
            "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns],
        }
        for index, turns in enumerate(found[:rows])
    ]
    with open(os.path.join(folder, "sharegpt.json"), "w", encoding="utf-8") as stream:
        json.dump(sharegpt, stream, indent=0)
    with open(os.path.join(folder, "ultrachat.jsonl"), "w", encoding="utf-8") as stream:
        for index, turns in enumerate(found[rows:]):
            stream.write(json.dumps({"prompt": turns[0]["content"], "prompt_id": f"u{index}", "messages": turns}) + "\n")


def main() -> None:
    options = arguments()
    if os.path.exists(options.out):
        sys.exit(f"error: {options.out} is there already. Remove it, or give another folder.")
    started = time.monotonic()
    write_sources(options.data, options.rows, options.most_exchanges)
    corpus = list(conversations(options.conversations, CORPUS_SEED, options.most_exchanges))
    tokenizer = tokenizer_for([turn["content"] for turns in corpus for turn in turns], options.vocabulary)
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in corpus]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    model = model_for(options, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"  target: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {options.layers} layers",
        flush=True,
    )
    loss = train(model, rows, options, tokenizer.pad_token_id)
    model = model.eval().to(torch.bfloat16).cpu()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    staging = f"{options.out}.part"
    shutil.rmtree(staging, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    # A few shards at any size: checkpoints in one file are not what users of large models have.
    model.save_pretrained(staging, max_shard_size=max(8_000_000, sum(p.nbytes for p in model.parameters()) // 4))
    tokenizer.save_pretrained(staging)
    os.replace(staging, options.out)
    print(f"  target: loss {loss:.2f}, {time.monotonic() - started:.0f} s, in {options.out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
