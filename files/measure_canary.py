#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure arms that are served elsewhere: as measure_arms.py, and with each server's whole resolved configuration.

Arms that take turns on one node are measured in several sessions, whose configurations are compared afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

import measure_arms
from spec_decode import resolved
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, write_json
from spec_decode.framing import frame
from spec_decode.program import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", required=True, help="JSON as of measure_arms.py, each arm with its url")
    parser.add_argument("--out", required=True)
    parser.add_argument("--print", action="store_true", help="print the result too: a pod's log outlives its disk")
    options = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    plan = read_json_object(options.plan, "measurement plan")
    before = f"{options.out}.measured"
    sys.argv = ["measure_arms.py", "--plan", options.plan, "--out", before]
    measure_arms.main()
    measured = {**read_json_object(before, "measurement"), "configs": {arm["name"]: configuration(arm) for arm in plan["arms"]}}
    write_json(options.out, measured)
    if options.print:
        print(frame(measured), flush=True)


def configuration(arm: dict[str, Any]) -> dict[str, Any]:
    """What the arm's server resolved its configuration to, flat."""
    url = f"{arm['url']}/server_info?config_format=json"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return resolved.flatten(json.load(answer))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise SpecDecodeError(
            f"The {arm['name']} arm's server does not tell its resolved configuration at {url}: {error}.",
            "It must run with VLLM_SERVER_DEV_MODE=1.",
        ) from error


if __name__ == "__main__":
    run(main)
