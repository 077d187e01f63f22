#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Convert a SpecForge EAGLE3 checkpoint to a draft that vLLM loads.

vLLM's layer id k means "the state after k layers", SpecForge's i "the output of layer i, counted from 0":
the served ids are the captured ones plus one. They stand at the config's top level, the only place that
both of vLLM's model runners read alike.
"""

from __future__ import annotations

from typing import Any

from draft_conversion import Converted, Draft, Shape, arguments, attention_and_mlp, check_tensors, convert
from spec_decode.layers import served_aux_layers
from spec_decode.program import run

#: SpecForge's option says "norm before the LM head", vLLM's reads it as "feed the normed state back".
DROPPED_KEYS = ("eagle_config", "auto_map", "norm_output")


def eagle3(draft: Draft, layers: list[int]) -> Converted:
    config = {key: value for key, value in draft.config.items() if key not in DROPPED_KEYS}
    config["eagle_aux_hidden_state_layer_ids"] = served = served_aux_layers(layers, "eagle3")
    vocabulary = config["vocab_size"]
    tensors = {name: tensor for name, tensor in draft.tensors.items() if name != "t2d"}
    if config.setdefault("draft_vocab_size", vocabulary) == vocabulary:
        tensors.pop("d2t", None)  # vLLM has no such parameter then and refuses the file
    problems = check_tensors(tensors, expected_tensors(config, layers), {})
    if "d2t" in tensors and not problems:
        problems += mapping_problems(tensors["d2t"].tolist(), vocabulary)
    return Converted(Draft(config, tensors), layers, served, problems)


def expected_tensors(config: dict[str, Any], layers: list[int]) -> dict[str, Shape]:
    """Every tensor of an EAGLE3 draft, by the names of SpecForge's export, which vLLM maps to its own."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    smaller = config.get("draft_vocab_size", vocabulary)
    expected: dict[str, Shape] = {
        "fc.weight": (hidden, len(layers) * config.get("target_hidden_size", hidden)),
        "embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (smaller, hidden),
        "norm.weight": (hidden,),
        "midlayer.hidden_norm.weight": (hidden,),
        **attention_and_mlp("midlayer", config, 2 * hidden),
    }
    if smaller != vocabulary:
        expected["d2t"] = (smaller,)
    return expected


def mapping_problems(offsets: list[int], vocabulary: int) -> list[str]:
    """``d2t`` holds offsets: target id = draft id + offset. The ids must be distinct and in the vocabulary."""
    ids = [index + offset for index, offset in enumerate(offsets)]
    problems = []
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        problems.append(f"d2t maps to ids from {min(ids)} to {max(ids)}, outside the vocabulary of {vocabulary}")
    if len(set(ids)) != len(ids):
        problems.append(f"d2t maps {len(ids)} draft ids to only {len(set(ids))} target ids")
    return problems


if __name__ == "__main__":
    run(lambda: convert(arguments(__doc__.splitlines()[0]), "eagle3", eagle3))
