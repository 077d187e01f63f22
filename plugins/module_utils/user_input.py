# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What users give, checked before it reaches a shell, a file or a process list. Private to the collection."""

from __future__ import annotations

import os
import re
from typing import Any

from .errors import SpecDecodeError

#: names of environment variables, which a shell script cannot quote
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: variables and flags that would put a secret where others can read it
SECRET = re.compile(r"TOKEN(?!S|I)|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
SECRET_FLAG = re.compile(r"--(?:api|hf)[-_](?:key|token)(?:=|$)")


def text(value: Any, setting: str) -> str:
    """The value as a text that files and environments can hold."""
    found = str(value)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise SpecDecodeError(f"{setting} is {found!r}, which is no valid UTF-8.", "Rename it.") from None
    if "\0" in found:
        raise SpecDecodeError(f"{setting} is {found!r}, which holds a NUL character.", "Take it out.")
    return found


def path(value: Any, setting: str) -> str:
    """An absolute path, without detours: jobs start in other folders than the play does."""
    found = text(value, setting)
    if not os.path.isabs(found):
        raise SpecDecodeError(
            f"{setting} is {found!r}, which is no absolute path: jobs start in other folders than the play does.",
            "Write it from the root folder on.",
        )
    return os.path.normpath(found)


def variables(given: dict[str, Any], setting: str, *, stated: bool = True) -> dict[str, str]:
    """Environment variables as texts. Where they are ``stated`` in a bundle a secret is refused: others can read it."""
    for name in map(str, given):
        if not VARIABLE.fullmatch(name):
            raise SpecDecodeError(f"{name!r} is no name of an environment variable.", f"Mend {setting}.")
        if stated and SECRET.search(name):
            raise SpecDecodeError(
                f"{name} in {setting} looks like a secret, which would stand in the bundle for others to read.",
                "Set it in the environment that the play runs in, or of the login host, which jobs inherit; or name a file that"
                " holds it, such as HF_HOME. Servers on Kubernetes take it from spec_canary_secrets.",
            )
    return {str(name): text(value, f"{name} in {setting}") for name, value in given.items()}


def secrets_in(given: Any) -> set[str]:
    """The values of whatever is named like a secret, at any depth."""
    if isinstance(given, dict):
        named = {str(value) for name, value in given.items() if SECRET.search(str(name)) and isinstance(value, str)}
        return named.union(*map(secrets_in, given.values()))
    return set().union(*map(secrets_in, given)) if isinstance(given, list) else set()


def arguments(given: list[Any], setting: str) -> list[str]:
    """A program's arguments as texts. A secret is refused: process lists show them to everyone on the machine."""
    for argument in map(str, given):
        if SECRET_FLAG.match(argument):
            raise SpecDecodeError(
                f"{argument.partition('=')[0]} in {setting} would stand in the bundle and in process lists for others to read.",
                "Leave it out: the measurement talks to its own servers on this machine alone.",
            )
    return [text(argument, setting) for argument in given]
