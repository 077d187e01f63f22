#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Load a draft of the right shape with random weights in the serving vLLM: wiring errors show before training.

It passes through the same conversion as the trained draft, and the same gate judges it.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import convert_dflash_to_vllm as dflash
import convert_eagle3_to_vllm as eagle3
import torch
from draft_conversion import Draft, load, write_draft
from spec_decode.files import read_json_object
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress


def random_draft(draft: Draft, shapes: dict[str, tuple[int, ...]]) -> Draft:
    """``draft`` with small random weights; its vocabulary is the first part of the target's."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if name == "d2t":
            draft.tensors[name] = torch.zeros(shape, dtype=torch.int64)
        else:
            draft.tensors[name] = (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft-config", required=True)
    parser.add_argument("--method", choices=("eagle3", "dflash"), required=True)
    parser.add_argument("--aux-layers", required=True)
    parser.add_argument("--load-check", required=True, help="JSON list: command that loads a draft; {draft} is replaced")
    parser.add_argument("--result", required=True)
    options = parser.parse_args()
    result = PhaseResult("untrained", options.result)
    layers = [int(layer) for layer in options.aux_layers.split(",")]
    converter = {"eagle3": eagle3, "dflash": dflash}[options.method]
    config = read_json_object(options.draft_config, "draft config")
    draft = random_draft(Draft(config, {}), converter.expected_tensors(config, layers))
    converted = getattr(converter, options.method)(draft, layers)
    with tempfile.TemporaryDirectory(prefix=".untrained-", dir=os.path.dirname(os.path.abspath(options.result))) as folder:
        place = os.path.join(folder, "draft")
        write_draft(converted.draft, place)
        loads = not converted.problems and load(options.load_check, place, Progress())
    result.complete(
        {
            "method": options.method,
            "draft_dir": "",
            "sha": "",
            "layers_captured": converted.layers_captured,
            "layers_served": converted.layers_served,
            "tensors": sorted(converted.draft.tensors),
            "problems": converted.problems,
            "loads": loads,
            "parameters": sum(tensor.numel() for tensor in converted.draft.tensors.values()),
        }
    )


if __name__ == "__main__":
    run(main)
