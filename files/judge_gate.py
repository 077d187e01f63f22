#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Judge a phase's work at the end of its own job. A red gate ends it with status 3, and Slurm starts nothing that needs it."""

from __future__ import annotations

import argparse
import json
import sys

from spec_decode import gates
from spec_decode.files import read_json_object
from spec_decode.program import run

#: exit status of a red gate; the work itself is done, and judged again by the play that attaches
RED = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", required=True, choices=sorted(gates.GATES))
    parser.add_argument("--evidence", required=True, help="JSON: paths of result files by name")
    parser.add_argument("--thresholds", default="{}", help="JSON: limits that override the gate's defaults")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    evidence = {name: read_json_object(path, f"{name} result") for name, path in json.loads(options.evidence).items()}
    found = gates.evaluate(options.gate, evidence, json.loads(options.thresholds))
    if not found.passed:
        print(found.message(options.gate), flush=True)
        sys.exit(RED)
    print(f"the {options.gate} gate is green", flush=True)


if __name__ == "__main__":
    run(main)
