#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure arms that are served elsewhere: as measure_arms.py, and with each server's whole resolved configuration.

Arms that take turns on one node are measured in several sessions, whose configurations are compared afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys

import measure_arms
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
    before = f"{options.out}.measured"
    sys.argv = ["measure_arms.py", "--plan", options.plan, "--out", before]
    measure_arms.main()
    measured = read_json_object(before, "measurement")
    measured["configs"] = {name: seen["config"] for name, seen in measured.pop("seen").items()}
    write_json(options.out, measured)
    if options.print:
        print(frame(measured), flush=True)


if __name__ == "__main__":
    run(main)
