#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one of SpecForge's scripts with the chat template of this experiment.

A template of the user's own is registered first. And the template's system prompt is left out, which SpecForge would
put before every conversation that has none, so that rows are rendered exactly as they will be served.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from chat_format import register_template
from spec_decode.program import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chat-template", required=True)
    parser.add_argument("--chat-template-file", default="")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    register_template(options.chat_template, options.chat_template_file)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(options.script)))
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    run(main)
