# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The context that every measured number carries, as types. Private to the collection.

A number without its whole context does not enter a result, and two numbers are compared only when their contexts
agree in everything but the factor under test.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .errors import SpecDecodeError

#: fields that may be ``None``: no quantisation; and no share of a ceiling where the hardware's is not known
MAY_BE_NONE = frozenset({"identity.quantization", "grounding.percent_of_sol", "stack.image"})
#: what a comparison of arms tests, and what vLLM derives from it without being asked
TESTED = frozenset({"serving.speculative_config"})
FOLLOWS = frozenset({"serving.cudagraph_mode", "serving.async_scheduling"})
#: outcomes of a trial rather than its conditions; the gate has limits of its own for them
MEASURED = frozenset(
    {"workload.input_tokens_mean", "workload.output_tokens_mean", "grounding.percent_of_sol", "grounding.tpot_ms_mean",
     "grounding.tpot_ms_std", "grounding.trials"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Identity:
    model: str
    path: str
    hardware: str
    hardware_count: int
    quantization: str | None
    dtype: str
    kv_cache_dtype: str


@dataclasses.dataclass(frozen=True)
class Parallelism:
    tensor: int
    data: int
    pipeline: int
    expert: bool


@dataclasses.dataclass(frozen=True)
class Serving:
    speculative_config: Any
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    max_model_len: int
    cudagraph_mode: str
    enforce_eager: bool
    async_scheduling: bool
    prefix_caching: bool


@dataclasses.dataclass(frozen=True)
class Workload:
    dataset: str
    prompts: int
    input_tokens_mean: float
    output_tokens_mean: float
    max_tokens: int
    temperature: float
    concurrency: int


@dataclasses.dataclass(frozen=True)
class Regime:
    warm: bool
    tier: str


@dataclasses.dataclass(frozen=True)
class Stack:
    engine: str
    version: str
    image: str | None
    client: str


@dataclasses.dataclass(frozen=True)
class Grounding:
    trials: int
    tpot_ms_mean: float
    tpot_ms_std: float
    same_node: str
    baseline: str
    percent_of_sol: float | None
    ceiling: str
    rigor: str


@dataclasses.dataclass(frozen=True)
class Context:
    """Identity, parallelism, serving configuration, workload, regime, stack and grounding of one number."""

    identity: Identity
    parallelism: Parallelism
    serving: Serving
    workload: Workload
    regime: Regime
    stack: Stack
    grounding: Grounding

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """Values by ``section.field``."""
        return {f"{section}.{name}": value for section, fields in self.as_dict().items() for name, value in fields.items()}

    @classmethod
    def from_dict(cls, value: Any, whose: str, problem: str = "") -> Context:
        """A stored context, refused unless every field is there and known; ``problem`` is why a field may be missing."""
        if not isinstance(value, dict):
            raise _incomplete(whose, "context")
        sections: dict[str, Any] = {}
        for section in dataclasses.fields(cls):
            kind = SECTIONS[section.name]
            found = value.get(section.name)
            if not isinstance(found, dict):
                raise _incomplete(whose, section.name)
            for field in dataclasses.fields(kind):
                name = f"{section.name}.{field.name}"
                if field.name not in found or (found[field.name] is None and name not in MAY_BE_NONE):
                    raise _incomplete(whose, name, problem)
            unknown = sorted(set(found) - {field.name for field in dataclasses.fields(kind)})
            if unknown:
                raise SpecDecodeError(f"The context of {whose} has a field that is not known: {section.name}.{unknown[0]}.")
            sections[section.name] = kind(**found)
        return cls(**sections)


SECTIONS: dict[str, Any] = {
    "identity": Identity, "parallelism": Parallelism, "serving": Serving, "workload": Workload, "regime": Regime,
    "stack": Stack, "grounding": Grounding,
}  # fmt: skip


def _incomplete(whose: str, name: str, problem: str = "") -> SpecDecodeError:
    return SpecDecodeError(
        f"{whose[0].upper()}{whose[1:]} has no whole context: {name} is unknown{f', for {problem}' if problem else ''}.",
        "Mend that (the server's log names the cause), then measure again."
        if problem
        else "The server must tell its resolved configuration (VLLM_SERVER_DEV_MODE=1).",
    )


def descriptor(
    acceptance: dict[str, Any], arm: str, figures: dict[str, Any], concurrency: int, ground: dict[str, Any]
) -> Context:
    """The context of one arm's numbers at one concurrency; ``ground`` holds its %SoL, ceiling and rigor."""
    plan, resolved = acceptance["plan"], acceptance["arms"][arm]["resolved"]
    hardware, tpot = acceptance["hardware"], figures["tpot_ms"]
    serving = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "max_model_len", "cudagraph_mode",
               "enforce_eager", "async_scheduling", "prefix_caching")  # fmt: skip
    parallel = {name: resolved.get(f"{name}_parallel") for name in ("tensor", "data", "pipeline", "expert")}
    found = {
        "identity": {
            "model": plan["model"],
            "path": plan["target"]["path"],
            "hardware": hardware["name"],
            "hardware_count": hardware["count"],
            **{name: resolved.get(name) for name in ("quantization", "dtype", "kv_cache_dtype")},
        },
        "parallelism": parallel,
        "serving": {
            "speculative_config": acceptance["arms"][arm]["speculative_config"] or "none",
            **{name: resolved.get(name) for name in serving},
        },
        "workload": {
            "dataset": plan["prompts"]["path"],
            "prompts": figures["prompts"],
            "input_tokens_mean": round(figures["input_tokens_mean"], 1),
            "output_tokens_mean": round(figures["output_tokens_mean"], 1),
            "max_tokens": plan["max_tokens"],
            "temperature": plan["temperature"],
            "concurrency": concurrency,
        },
        "regime": {"warm": plan["warmup"] > 0, "tier": "latency" if concurrency == 1 else "throughput"},
        "stack": {
            "engine": "vLLM",
            "version": resolved.get("version"),
            "image": image_of(acceptance, arm),
            "client": "dflash_vllm_eval.py",
        },
        "grounding": {
            "trials": len(tpot["trials"]),
            "tpot_ms_mean": round(tpot["mean"], 4),
            "tpot_ms_std": round(tpot["std"], 4),
            "same_node": acceptance["node"],
            "baseline": "standing",
            **ground,
        },
    }
    whose = f"the {arm} arm's numbers at concurrency {concurrency}"
    return Context.from_dict(found, whose, acceptance["arms"][arm].get("problem", ""))


def image_of(acceptance: dict[str, Any], arm: str) -> str | None:
    """The container image that an arm was served from, where it was one."""
    image = acceptance["arms"][arm].get("image") or acceptance["plan"].get("served_on", {}).get("image")
    return str(image) if image else None


def mismatch(one: Context, other: Context) -> list[str]:
    """What two contexts differ in besides the tested factor and what follows from it."""
    left, right = one.flat(), other.flat()
    ignored = TESTED | FOLLOWS | MEASURED
    return [f"{name}: {left[name]} and {right[name]}" for name in left if name not in ignored and left[name] != right[name]]


def check_comparable(contexts: dict[str, Context]) -> None:
    """Refuse to compare numbers whose contexts differ elsewhere than in the tested factor."""
    (first, one), *others = contexts.items()
    for name, other in others:
        differs = mismatch(one, other)
        if differs:
            raise SpecDecodeError(
                f"The {first} and {name} arms cannot be compared, for they differ in more than the speculative config:"
                f" {'; '.join(differs)}.",
                "Serve both with the same flags on the same hardware, then measure again.",
            )


def check_numbers(document: dict[str, Any]) -> None:
    """Refuse a result in which some arm's figures stand without their own whole context."""
    for shape in document["shapes"]:
        for measured in (shape, *shape["sweep"]):
            for arm in measured["arms"]:
                whose = f"the {arm} arm's numbers at concurrency {shape['concurrency']}"
                Context.from_dict(measured.get("context", {}).get(arm), whose)
