# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From a verdict that says ship to the standing deployment's new speculative config, and back. Pure; private."""

from __future__ import annotations

import json
from typing import Any

from .errors import SpecDecodeError

OPTION = "--speculative-config"
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


def rolled_back(known: dict[str, Any] | None) -> dict[str, Any]:
    """The record after a rollback; refused when nothing was promoted."""
    if not known or known.get("state") not in (PROMOTED, ROLLED_BACK):
        raise SpecDecodeError(
            "Nothing was promoted from this experiment, so there is nothing to roll back.",
            "Check the name of the experiment and its results/promotion.json.",
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
    arguments = chosen[0].get("args") or []
    if any(OPTION in word and word != OPTION and not word.startswith(f"{OPTION}=") for word in arguments):
        raise SpecDecodeError(
            f"{whose} passes {OPTION} inside a longer word, as a shell's script does.",
            "Give each of vLLM's arguments as an item of its own in args, so that one can be replaced safely.",
        )
    return {"name": chosen[0]["name"], "arguments": arguments, "speculative_config": _config_in(arguments, whose)}


def _config_in(arguments: list[str], whose: str) -> dict[str, Any] | None:
    found = [word.partition("=")[2] for word in arguments if word.startswith(f"{OPTION}=")]
    found += [after for word, after in zip(arguments, [*arguments[1:], ""]) if word == OPTION]
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
        if skip or word.startswith(f"{OPTION}="):
            skip = False
        elif word == OPTION:
            skip = True
        else:
            kept.append(word)
    return kept if config is None else [*kept, OPTION, json.dumps(config, sort_keys=True)]


def _text(config: dict[str, Any] | None) -> str:
    return json.dumps(config, sort_keys=True) if config else "no speculation"
