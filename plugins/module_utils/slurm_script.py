# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The batch script that runs a user's script under Slurm, and the directives of that script. Private to the collection."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .errors import SpecDecodeError

DIRECTIVE = "#SBATCH"

#: Runs inside the job, around the user's script, which stays untouched. Everything variable arrives as an argument.
#: The claim is a symbolic link, made at once or not at all on every file system, whose target is the id of the job that
#: does the work: of several jobs that a lost reply may have made of one submission, the others leave.
WRAPPER = """
claim=$1; exit_note=$2; count=$3; shift 3
verify=("${@:1:$count}"); shift "$count"
me=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
if ! said=$(ln -sT "$me" "$claim" 2>&1); then
  owner=$(readlink "$claim")
  if [ -z "$owner" ]; then
    echo "job $me: cannot claim the work, so it is not begun: $said" >&2
    exit 1
  fi
  if [ "$owner" != "$me" ]; then
    echo "job $me: this work belongs to job $owner; leaving it alone"
    exit 0
  fi
fi
rm -f "$exit_note"
echo "--- job $me restart ${SLURM_RESTART_COUNT:-0} on $(hostname) at $(date -u +%FT%TZ)"

# What Slurm sends to the batch script alone, as a warning before the time limit, is passed on.
"$@" &
child=$!
interrupted=
for name in TERM INT HUP QUIT USR1 USR2; do trap "interrupted=1; kill -s $name $child 2>/dev/null || true" "$name"; done
while :; do
  interrupted=
  wait "$child"; code=$?
  [ -n "$interrupted" ] || break  # else it was the wait that ended
done
if [ "$code" -eq 0 ] && [ "$count" -gt 0 ]; then
  "${verify[@]}"; code=$?
fi
printf '{"exit_code": %d, "job_id": "%s"}\\n' "$code" "$me" > "$exit_note.$me" && mv "$exit_note.$me" "$exit_note"
exit "$code"
"""

#: short options of sbatch that matter here
_SHORT = {
    "A": "account", "C": "constraint", "D": "chdir", "G": "gpus", "J": "job-name", "M": "clusters", "N": "nodes", "a": "array",
    "c": "cpus-per-task", "d": "dependency", "e": "error", "n": "ntasks", "o": "output", "p": "partition", "q": "qos",
    "t": "time", "w": "nodelist", "x": "exclude",
}  # fmt: skip

#: variables from which sbatch takes an option that serving has to be kept safe from; they win over the script's directives
_VARIABLES = {"SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos", "SBATCH_EXCLUSIVE": "exclusive"}


def directives(script: str) -> list[str]:
    """The ``#SBATCH`` lines that Slurm would obey: those before the first command."""
    found = []
    for line in script.split("\n"):  # as Slurm does: a line ends at nothing else
        if line.startswith(DIRECTIVE):
            found.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return found


def without_directives(script: bytes) -> bytes:
    """A script's text as far as it says what is done; its ``#SBATCH`` lines say where."""
    return b"".join(line for line in script.splitlines(keepends=True) if not line.startswith(DIRECTIVE.encode()))


def options_of(script: str) -> dict[str, str]:
    """The directives of a script as options by their long names; a later one wins."""
    found: dict[str, str] = {}
    for line in directives(script):
        try:
            words = shlex.split(line[len(DIRECTIVE) :], comments=True)
        except ValueError as error:
            raise SpecDecodeError(f"The directive {line!r} cannot be read: {error}.", "Mend its quotes.") from error
        while words:
            name, value = _option(words.pop(0))
            if not value and words and not words[0].startswith("-"):
                value = words.pop(0)
            found[name] = value
    return found


def options_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Options that sbatch would take from these variables, unless its command line says otherwise."""
    return {option: environment[name] for name, option in _VARIABLES.items() if name in environment}


def wrapper(script: str) -> str:
    """The batch script for a user's script: its directives, then what runs inside the job."""
    return "\n".join(["#!/bin/bash", *directives(script)]) + "\n" + WRAPPER


def option(name: str, value: Any) -> str:
    """One option of sbatch on its command line."""
    return f"--{name}" if value is True else f"--{name}={value}"


def _option(word: str) -> tuple[str, str]:
    if word.startswith("--"):
        name, _equals, value = word[2:].partition("=")
        return name, value
    return _SHORT.get(word[1:2], word[1:2]), word[2:].lstrip("=")
