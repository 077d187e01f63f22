#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Load a draft in vLLM, with the flags that will serve it, and stop: exit status 0 if it loads."""

from __future__ import annotations

import argparse
import json
import os

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # As in all phases by hand: the variable may name another place than the one that the bundle was rendered with.
    target = os.environ.get("TARGET_MODEL_PATH")
    parser.add_argument("--target-model-path", default=target, required=not target)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--speculative-config", required=True, help="JSON without the draft's path")
    parser.add_argument("--server-arguments", required=True, help="JSON list of vLLM flags")
    options = parser.parse_args()
    speculative = {**json.loads(options.speculative_config), "model": options.draft}
    flags = [
        "--model", options.target_model_path, *json.loads(options.server_arguments),
        "--speculative-config", json.dumps(speculative),
    ]  # fmt: skip
    # In one process an error in the loader is this program's own error, with its own message last.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine_parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    LLMEngine.from_engine_args(EngineArgs.from_cli_args(engine_parser.parse_args(flags)))
    print("the draft loads")


if __name__ == "__main__":
    main()
