# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a verdict that says ship to the standing deployment's new speculative config, and back. Pure; private."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from .errors import SpecDecodeError

OPTION = "--speculative-config"
#: vLLM's short name of it
SHORT = re.compile(r"^-sc(?=\.|$)")
#: what sets the same in another way: --spec-method and the like, one key of the object, an option's name cut short
OTHERWISE = re.compile(r"--spec(?!ialize)")
SHELLS = frozenset(("ash", "bash", "dash", "ksh", "sh", "zsh"))
PROMOTED, ROLLED_BACK = "promoted", "rolled back"


def record(figures: dict[str, Any], known: dict[str, Any] | None, deployment: dict[str, Any] | None) -> dict[str, Any]:
    """What a promotion records: the new config, and the old one that a rollback restores.

    ``figures`` are the promotion gate's, ``known`` the record of an earlier promotion of this experiment, and
    ``deployment`` what ``find_container`` found of the live one, if it is to be changed.
    """
    new, previous = figures["speculative_config"], figures["previous"]
    if deployment is not None:
        live = deployment["speculative_config"]
        if live not in (new, previous):
            raise SpecDecodeError(
                f"The standing deployment serves with {_text(live)}, but the verdict compared against {_text(previous)}.",
                "Measure against what is served: set spec_standing_config to it, and validate again.",
            )
    promoted = {**figures, "state": PROMOTED, "previous": previous}
    if known and known["measurement"] == promoted["measurement"] and known["state"] == PROMOTED:
        promoted["previous"] = known["previous"]
    return promoted


def rolled_back(known: dict[str, Any] | None, deployment: dict[str, Any] | None) -> dict[str, Any]:
    """The record after a rollback; refused when nothing was promoted, or something else is served since.

    ``deployment`` is what ``find_container`` found of the live one, if it is to be changed.
    """
    if not known or known.get("state") not in (PROMOTED, ROLLED_BACK):
        raise SpecDecodeError(
            "Nothing was promoted from this experiment, so there is nothing to roll back.",
            "Check the name of the experiment and its results/promotion.json.",
        )
    if deployment is not None:
        live, promoted, previous = deployment["speculative_config"], known["speculative_config"], known["previous"]
        if live not in (promoted, previous):
            raise SpecDecodeError(
                f"The standing deployment serves with {_text(live)}, which is neither the promoted {_text(promoted)}"
                f" nor what stood before it, {_text(previous)}.",
                "Someone changed it since: roll that back where it was done, or leave promote_apply out to get the files alone.",
            )
    return {**known, "state": ROLLED_BACK}


def standing_config(promotion: dict[str, Any]) -> dict[str, Any] | None:
    """The config that the standing deployment is to have, by its promotion record."""
    config: dict[str, Any] | None = promotion["speculative_config" if promotion["state"] == PROMOTED else "previous"]
    return config


def find_container(deployment: dict[str, Any], name: str) -> dict[str, Any]:
    """The container of a Kubernetes Deployment that serves: its name, arguments and speculative config."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    chosen = [each for each in containers if each["name"] == name] if name else containers
    whose = f"Deployment {deployment['metadata']['name']}"
    if len(chosen) != 1:
        raise SpecDecodeError(
            f"{whose} has containers {', '.join(each['name'] for each in containers)}, of which {len(chosen)} fit {name!r}.",
            "Name the serving one as promote_container.",
        )
    command, arguments = chosen[0].get("command") or [], chosen[0].get("args") or []
    if why := _unreadable(command, arguments):
        raise SpecDecodeError(
            f"{whose} {why}, so that its speculative config cannot be told and replaced safely.",
            f"Give each of vLLM's arguments as an item of its own in args, the draft as one {OPTION} with a JSON object.",
        )
    return {"name": chosen[0]["name"], "arguments": arguments, "speculative_config": _config_in(arguments, whose)}


def _unreadable(command: list[str], arguments: list[str]) -> str:
    """Why a container's words do not tell what vLLM gets; empty if they do."""
    for word in command:
        if os.path.basename(word) in SHELLS:
            return f"runs a shell ({word}) in its command"
        if _option(word) == OPTION:
            return f"passes {OPTION} in its command, which is not changed"
    for word in [*command, *arguments]:
        name, plain = _option(word), " ".join(word.replace("_", "-").split())
        if name == "--config":
            return "takes arguments from a file (--config)"
        if name != OPTION and OTHERWISE.match(name):
            return f"passes {word.partition('=')[0]}"
        if name != OPTION and (OPTION in plain or "vllm serve" in plain):
            return "passes vLLM's arguments inside a longer word, as a shell's script does"
    return ""


def _option(word: str) -> str:
    """The option that a word names, as vLLM reads it: underscores are hyphens."""
    return SHORT.sub(OPTION, word.partition("=")[0].replace("_", "-"))


def _config_in(arguments: list[str], whose: str) -> dict[str, Any] | None:
    found = []
    for word, after in zip(arguments, [*arguments[1:], ""]):
        if _option(word) == OPTION:
            _name, sign, value = word.partition("=")
            found.append(value if sign else after)
    if not found:
        return None
    try:
        config = json.loads(found[-1])
    except ValueError:
        config = None
    if len(found) > 1 or not isinstance(config, dict):
        raise SpecDecodeError(f"{whose} has no single {OPTION} with a JSON object: {found}.", "Mend the deployment's args.")
    return config


def arguments_with(container: dict[str, Any], config: dict[str, Any] | None) -> list[str]:
    """The container's arguments with this speculative config in place of its own, or without any."""
    kept: list[str] = []
    skip = False
    for word in container["arguments"]:
        if skip:
            skip = False
        elif _option(word) == OPTION:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept if config is None else [*kept, OPTION, json.dumps(config, sort_keys=True)]


def _text(config: dict[str, Any] | None) -> str:
    return json.dumps(config, sort_keys=True) if config else "no speculation"
