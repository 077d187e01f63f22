#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Convert a SpecForge DFlash checkpoint to a draft that vLLM loads.

For DFlash vLLM adds the one to the layer ids itself, so they are served as they were captured. Embeddings and
LM head are the target's own and are shared with it at load.
"""

from __future__ import annotations

from typing import Any

from draft_conversion import Converted, Draft, Shape, arguments, attention_and_mlp, check_tensors, convert
from spec_decode.layers import served_aux_layers
from spec_decode.program import run


def dflash(draft: Draft, layers: list[int]) -> Converted:
    config = {key: value for key, value in draft.config.items() if key != "auto_map"}
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors = {name: tensor for name, tensor in draft.tensors.items() if name != "t2d"}
    optional = {"embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    problems = check_tensors(tensors, expected_tensors(config, layers), optional)
    block = config["dflash_config"]
    served = served_aux_layers(block["target_layer_ids"], "dflash")
    if block["target_layer_ids"] != layers:
        problems.append(f"dflash_config names layers {block['target_layer_ids']}, but {layers} were captured")
    if not 0 <= block["mask_token_id"] < vocabulary:
        problems.append(f"the mask token {block['mask_token_id']} lies outside the vocabulary of {vocabulary}")
    return Converted(Draft(config, tensors), layers, served, problems)


def expected_tensors(config: dict[str, Any], layers: list[int]) -> dict[str, Shape]:
    """Every tensor of a DFlash draft that is its own."""
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    expected: dict[str, Shape] = {
        "fc.weight": (hidden, len(layers) * config.get("target_hidden_size", hidden)),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        prefix = f"layers.{index}"
        expected |= attention_and_mlp(prefix, config, hidden)
        expected |= {f"{prefix}.self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    return expected


if __name__ == "__main__":
    run(lambda: convert(arguments(__doc__.splitlines()[0]), "dflash", dflash))
