# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers and flags of an experiment's settings: before 2.19 Ansible's templates hand them over as texts. Private."""

from __future__ import annotations

from typing import Any

from .errors import SpecDecodeError

WHOLE, REAL, FLAG = "a whole number", "a number", "true or false"
#: section and name of a setting → its kind; settings that are texts, lists or mappings arrive as they are
KINDS: dict[tuple[str, ...], str] = {
    **{(name,): WHOLE for name in ("seed", "capture_tensor_parallel", "capture_batch_tokens", "train_steps")},
    **{(name,): FLAG for name in ("untrained_check", "one_sample")},
    **{("job", name): WHOLE for name in ("attempts", "poll_interval")},
    **{("dataset", name): WHOLE for name in ("train", "eval", "max_length", "seed", "regenerate_batch_size", "max_new_tokens")},
    ("dataset", "regenerate"): FLAG,
    ("dataset", "max_dropped_fraction"): REAL,
    **{
        ("serving", name): WHOLE
        for name in ("prompts", "prompts_per_slot", "max_tokens", "trials", "aa_trials", "warmup", "startup_timeout_s")
    },
    ("serving", "temperature"): REAL,
}


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with every number and flag as one."""
    found: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in given.items()}
    for place, kind in KINDS.items():
        inside = found if len(place) == 1 else found.get(place[0], {})
        if isinstance(inside.get(place[-1]), str):
            inside[place[-1]] = _read(inside[place[-1]], kind, ".".join(place))
    # either a flag, or a word
    if found.get("serving", {}).get("resident") in ("True", "False"):
        found["serving"]["resident"] = found["serving"]["resident"] == "True"
    return found


def _read(text: str, kind: str, name: str) -> Any:
    try:
        if kind == WHOLE:
            return int(text)
        if kind == REAL:
            return float(text)
        return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise SpecDecodeError(f"The setting {name} must be {kind}, but is {text!r}.", "Mend it.") from None
