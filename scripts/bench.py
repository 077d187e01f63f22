#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run benchmarks and print what they found as one JSON document, every figure with its context.

A benchmark is a module of scripts/benchmarks with a function measured(); the file's name is the benchmark's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys

NAMES = sorted(path.stem for path in (pathlib.Path(__file__).resolve().parent / "benchmarks").glob("*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which, of {', '.join(NAMES)}; all if none is named")
    wanted = parser.parse_args().names or NAMES
    unknown = sorted(set(wanted) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    print(json.dumps({name: importlib.import_module(f"benchmarks.{name}").measured() for name in wanted}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
