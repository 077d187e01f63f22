#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a checkpoint without a trained weight, written without an engine: enough for whatever only reads them."""

from __future__ import annotations

import json
import pathlib
import struct
import sys

CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def write_target(folder: pathlib.Path) -> None:
    """The files of a checkpoint, with weights of zeros: enough to derive from, in check mode."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 8, "hidden_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 16, "vocab_size": 12,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 3, "content": "<|mask|>"}]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    shapes = {"model.embed_tokens.weight": [12, 8], "lm_head.weight": [12, 8]}
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
        end += 2 * rows * columns
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_conversations(path: pathlib.Path) -> pathlib.Path:
    """Forty short conversations in ShareGPT's layout."""
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    path.write_text(json.dumps([{"conversations": turns}] * 40))
    return path


if __name__ == "__main__":
    write_target(pathlib.Path(sys.argv[1]))
    write_conversations(pathlib.Path(sys.argv[1]) / "conversations.json")
