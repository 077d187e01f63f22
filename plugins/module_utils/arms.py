# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which arms a plan asks for, and in which order their trials are taken. Pure; private to the collection."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from .errors import SpecDecodeError

#: what a plan may leave out, and what it then means
OPTIONAL: dict[str, Any] = {
    "aa_trials": 0,
    "sweep_num_speculative_tokens": [],
    "resident": "auto",
    "device_metrics": "",
    "server_arguments": [],
    "server_environment": {},
    "ports": [],
}
REQUIRED = ("model", "target", "prompts", "max_tokens", "temperature", "seed", "warmup", "trials", "concurrencies",
            "startup_timeout_s", "arms")  # fmt: skip
WHOLE_NUMBERS = ("trials", "aa_trials", "max_tokens", "warmup")
LISTS_OF_NUMBERS = ("concurrencies", "sweep_num_speculative_tokens")
#: vLLM's default share of a GPU's memory, and how much all resident servers together may take
MEMORY_SHARE, MOST_MEMORY = 0.9, 0.95
MEMORY_FLAG = re.compile(r"^--gpu[-_]memory[-_]utilization(?:=(.*))?$")
CACHE_FLAG = re.compile(r"^--kv[-_]cache[-_]memory[-_]bytes(=|$)")
#: prompts for each request in flight that keep a trial's end, where the slots run empty, short beside the whole
PROMPTS_PER_SLOT = 5
NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration that is measured."""

    name: str
    speculative_config: dict[str, Any] | None
    #: address of a server that runs already; nothing is started for it then
    url: str = ""
    #: start-up log of that server, for the configuration that it does not tell otherwise
    log: str = ""
    port: int = 0
    sweep: bool = False

    @property
    def num_speculative_tokens(self) -> int | None:
        return (self.speculative_config or {}).get("num_speculative_tokens")


@dataclasses.dataclass(frozen=True)
class Step:
    """One trial to take, and the arms whose servers are to be up for it."""

    arm: str
    pair: int
    concurrency: int
    purpose: str
    up: tuple[str, ...]

    @property
    def named(self) -> dict[str, Any]:
        """What a trial says of itself."""
        return {"arm": self.arm, "pair": self.pair, "concurrency": self.concurrency, "purpose": self.purpose}

    @property
    def key(self) -> tuple[Any, ...]:
        return key_of(self.named)

    @property
    def group(self) -> tuple[int, int]:
        """What must be whole to be of use: a pair at its concurrency, or an extra trial."""
        return self.concurrency, self.pair


def key_of(trial: dict[str, Any]) -> tuple[Any, ...]:
    """What names one trial of a measurement."""
    return tuple(trial[name] for name in ("arm", "pair", "concurrency", "purpose"))


def complete(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with everything that it left out, refused if it cannot be measured."""
    lacks = [name for name in REQUIRED if name not in plan]
    if lacks:
        raise SpecDecodeError(f"The measurement plan lacks {', '.join(lacks)}.", "See docs/measuring.md for its keys.")
    whole = {**OPTIONAL, **plan}
    _check_kinds(whole)
    names = [arm["name"] for arm in whole["arms"]]
    if not names or len(set(names)) < len(names) or not all(NAME.match(name) for name in names):
        raise SpecDecodeError(
            f"The plan's arms {names} must have different names of lower-case letters, digits and hyphens, at least one."
        )
    if whole["trials"] < 1 or not whole["concurrencies"] or min(whole["concurrencies"]) < 1 or whole["max_tokens"] < 2:
        raise SpecDecodeError("Measuring needs at least one trial, one request in flight and two tokens an answer.")
    for name in LISTS_OF_NUMBERS:
        if len(set(whole[name])) < len(whole[name]):
            raise SpecDecodeError(f"The plan's {name} {whole[name]} name one value twice.", "Name each once.")
    if per_slot(whole) < 1:
        raise SpecDecodeError("A trial needs at least one prompt for each request in flight.", "Mend prompts.per_slot.")
    if whole["resident"] not in ("auto", True, False):
        raise SpecDecodeError(f"The plan's resident is {whole['resident']!r}, but must be auto, true or false.")
    return whole


def _check_kinds(plan: dict[str, Any]) -> None:
    """Plans are written by hand, too."""
    wrong = [(name, plan[name], "a whole number") for name in WHOLE_NUMBERS if not _whole(plan[name])]
    for name in LISTS_OF_NUMBERS:
        if not isinstance(plan[name], list) or not all(map(_whole, plan[name])):
            wrong.append((name, plan[name], "a list of whole numbers"))
    prompts = plan["prompts"]
    if not isinstance(prompts, dict) or not isinstance(prompts.get("path"), str) or not _whole(prompts.get("count")):
        wrong.append(("prompts", prompts, "{path: a file, count: a whole number}"))
    if not isinstance(plan["target"], dict) or not isinstance(plan["target"].get("path"), str):
        wrong.append(("target", plan["target"], "{path: a folder}"))
    arms_of = plan["arms"]
    if not isinstance(arms_of, list) or not all(isinstance(arm, dict) and isinstance(arm.get("name"), str) for arm in arms_of):
        wrong.append(("arms", arms_of, "a list of {name: a text, ...}"))
    if wrong:
        name, value, wanted = wrong[0]
        raise SpecDecodeError(f"The plan's {name} is {value!r}, but must be {wanted}.", "See docs/measuring.md for its keys.")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def prompts_wanted(plan: dict[str, Any], concurrency: int) -> int:
    """How many prompts a trial takes, where there are that many: as the plan says, or more to keep all slots busy."""
    return int(max(plan["prompts"]["count"], per_slot(plan) * concurrency))


def per_slot(plan: dict[str, Any]) -> int:
    """How many prompts a trial takes at least for each request in flight."""
    return int(plan["prompts"].get("per_slot", PROMPTS_PER_SLOT))


def warming(plan: dict[str, Any], concurrency: int) -> int:
    """How many prompts warm a server up: as the plan says, or as many as are in flight, lest it meet so many the first time."""
    return int(max(plan["warmup"], concurrency)) if plan["warmup"] else 0


def most_prompts(plan: dict[str, Any]) -> int:
    """How many prompts the largest trial of the plan takes."""
    return prompts_wanted(plan, max(plan["concurrencies"]))


def arms(plan: dict[str, Any], draft: dict[str, Any]) -> dict[str, Arm]:
    """The plan's arms by name, the baseline first, and one for each further K of the sweep."""
    ports = [*plan["ports"], *[0] * len(plan["arms"])]
    made = {
        arm["name"]: Arm(
            arm["name"],
            _speculative_config(arm, draft),
            str(arm.get("url", "")).rstrip("/"),
            arm.get("log", ""),
            port,
        )
        for arm, port in zip(plan["arms"], ports)
    }
    for tokens in plan["sweep_num_speculative_tokens"]:
        swept = _swept(list(made.values()))
        if tokens != swept.num_speculative_tokens:
            config = {**(swept.speculative_config or {}), "num_speculative_tokens": tokens}
            name = f"{swept.name}-k{tokens}"
            made[name] = Arm(name, config, sweep=True)
    return made


def _swept(made: list[Arm]) -> Arm:
    """The arm whose K is varied: the last that speculates."""
    for arm in reversed([arm for arm in made[1:] if not arm.sweep]):
        if arm.speculative_config and arm.url:
            raise SpecDecodeError(
                f"K cannot be swept for the {arm.name} arm, whose server runs already at {arm.url}.",
                "Leave sweep_num_speculative_tokens empty, or let the arm be started.",
            )
        if arm.speculative_config:
            return arm
    raise SpecDecodeError("There is no arm with speculation whose K could be swept.", "Leave the sweep empty.")


def _speculative_config(arm: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any] | None:
    config = arm.get("speculative_config")
    if not config:
        return None
    if config.get("model") == "{draft}":
        if not draft:
            raise SpecDecodeError(
                f"The {arm['name']} arm serves the staged draft, but none is given.", "Give the draft, or name a model's path."
            )
        return {**config, "model": draft["draft_dir"]}
    return dict(config)


def resident(plan: dict[str, Any], accelerator: str) -> bool:
    """Whether both servers of a comparison stay up. If not, one is stopped before the other starts."""
    if plan["resident"] != "auto":
        return bool(plan["resident"])
    if accelerator == "cpu":
        return True
    return 2 * memory_share(plan["server_arguments"]) <= MOST_MEMORY


def memory_share(server_arguments: list[str]) -> float:
    """The share of a GPU's memory that one server takes."""
    share = MEMORY_SHARE
    for place, argument in enumerate(server_arguments):
        found = MEMORY_FLAG.match(argument)
        if found:
            text = found[1] if found[1] is not None else (server_arguments[place + 1 : place + 2] or [""])[0]
            try:
                share = float(text)
            except ValueError:
                raise SpecDecodeError(f"{text!r} is no share of memory for --gpu-memory-utilization.") from None
    return share


def memory_is_given(server_arguments: list[str]) -> bool:
    """Whether each server is told the size of its KV cache, so that none has to find out how much memory is left."""
    return any(CACHE_FLAG.match(argument) for argument in server_arguments)


def schedule(plan: dict[str, Any], made: dict[str, Arm], stay: bool) -> list[Step]:
    """Every trial in its order.

    ABBA: a pair holds each arm once, and who goes first alternates, so that a drift of the machine touches both alike.
    With resident servers each concurrency is one block. Otherwise the concurrencies are taken while a server is up, and
    servers change once a pair. Extra trials of the baseline (A/A) stand where it was measured just before or is next.
    """
    names = [name for name, arm in made.items() if not arm.sweep]
    trials, extra = plan["trials"], plan["aa_trials"]
    blocks = [[concurrency] for concurrency in plan["concurrencies"]] if stay else [list(plan["concurrencies"])]
    steps: list[Step] = []
    for block in blocks:
        steps += _ordered(names, block, range(1, trials + 1), range(trials + 1, trials + extra + 1), "compare", stay)
    for name, k in ((name, arm.num_speculative_tokens or 0) for name, arm in made.items() if arm.sweep):
        # Numbered by K, so that they are the same pairs whatever else is swept.
        first = trials + extra + 1 + k * trials
        for block in blocks:
            steps += _ordered([names[0], name], block, range(first, first + trials), range(0), "sweep", stay)
    return steps


def _ordered(names: list[str], block: list[int], pairs: range, extras: range, purpose: str, stay: bool) -> list[Step]:
    slots = len(pairs) // 2 + 1
    steps: list[Step] = []

    def take(name: str, pair: int, why: str) -> None:
        up = tuple(names) if stay else (name,)
        steps.extend(Step(name, pair, concurrency, why, up) for concurrency in block)

    for place in range(len(pairs) + 1):
        if place % 2 == 0:
            # Here the baseline was last, or comes next.
            for number in extras[place // 2 :: slots]:
                take(names[0], number, "noise")
        if place < len(pairs):
            for name in names if place % 2 == 0 else names[::-1]:
                take(name, pairs[place], purpose)
    return steps


def remaining(steps: list[Step], trials: list[dict[str, Any]]) -> tuple[list[Step], list[dict[str, Any]]]:
    """The steps still to take, and the trials to keep: of a pair that is not whole, neither side counts."""
    measured = {key_of(trial) for trial in trials}
    broken = {step.group for step in steps if step.key not in measured}
    kept = {step.key for step in steps if step.group not in broken}
    return [step for step in steps if step.group in broken], [trial for trial in trials if key_of(trial) in kept]
