# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for ``vllm serve``: takes its flags, streams made-up answers at a known pace, faster where it speculates."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "support"))

from stub_server import Answer, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("target")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--speculative-config", type=json.loads, default={})
    options, _others = parser.parse_known_args()
    draft = options.speculative_config.get("model", options.target)
    for folder in (options.target, draft):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            sys.exit(f"ValueError: {folder} holds no config.json")
    asyncio.run(
        serve(Answer(options.served_model_name, 13, 3 if draft != options.target else 1, 0.006), options.port, options.host)
    )


if __name__ == "__main__":
    main()
