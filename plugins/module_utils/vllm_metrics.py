# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A window of vLLM's own counters: what was drafted, accepted and served between two snapshots. Private to the collection.

Names follow vLLM 0.8 to 0.32; a counter may or may not end in ``_total``. What cannot be trusted is an error:
a restart, a vanished engine, another model's traffic, more requests than were driven, no drafts at all.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

from .errors import SpecDecodeError

COUNTERS: dict[str, tuple[str, ...]] = {
    "drafts": ("vllm:spec_decode_num_drafts",),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "prompt_tokens": ("vllm:prompt_tokens",),
    "generation_tokens": ("vllm:generation_tokens",),
    "requests": ("vllm:request_success",),
}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "tpot": ("vllm:request_time_per_output_token_seconds",),
    # Renamed in vLLM: one observation for each engine output, so under speculation no time per token.
    "itl": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "ttft": ("vllm:time_to_first_token_seconds",),
    "e2e": ("vllm:e2e_request_latency_seconds",),
}
START_TIME = "process_start_time_seconds"
QUANTILES = (0.5, 0.9, 0.99)
Key = tuple[str, str]


@dataclasses.dataclass
class Engine:
    """The counters of one ``(model_name, engine)`` at one moment."""

    counters: dict[str, float] = dataclasses.field(default_factory=dict)
    per_position: dict[int, float] = dataclasses.field(default_factory=dict)
    #: name → {"sum", "count", "buckets": {upper bound: cumulative count}}
    histograms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Snapshot:
    """One scrape of one endpoint; ``as_dict`` and ``from_dict`` make it a fact that can be stored."""

    url: str
    scraped_at: float
    process_start: float | None
    engines: dict[Key, Engine]

    def as_dict(self) -> dict[str, Any]:
        engines = [
            {
                "model_name": model,
                "engine": number,
                "counters": engine.counters,
                "per_position": engine.per_position,
                "histograms": {
                    # Bounds as text: JSON has no infinity.
                    name: {**histogram, "buckets": {str(bound): n for bound, n in histogram["buckets"].items()}}
                    for name, histogram in engine.histograms.items()
                },
            }
            for (model, number), engine in sorted(self.engines.items())
        ]
        return {
            "url": self.url, "scraped_at": self.scraped_at, "process_start": self.process_start, "engines": engines,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Snapshot:
        try:
            engines = {
                (item["model_name"], item["engine"]): Engine(
                    dict(item["counters"]),
                    {int(position): count for position, count in item["per_position"].items()},
                    {name: _histogram_from(histogram) for name, histogram in item["histograms"].items()},
                )
                for item in value["engines"]
            }
            return cls(value["url"], float(value["scraped_at"]), value["process_start"], engines)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpecDecodeError(
                f"This is no snapshot of prom_acceptance ({type(error).__name__}: {error}).",
                "Store the module's result as it is.",
            ) from error


def parse(text: str, url: str, scraped_at: float) -> Snapshot:
    """A snapshot from the text of ``/metrics``."""
    from prometheus_client.parser import text_string_to_metric_families

    samples: list[tuple[str, dict[str, str], float]] = []
    try:
        for family in text_string_to_metric_families(text):
            samples.extend((sample.name, sample.labels, sample.value) for sample in family.samples)
    except ValueError as error:
        raise SpecDecodeError(
            f"{url} did not answer in Prometheus' text format: {error}.", "Check that it is a vLLM server's /metrics."
        ) from error
    return from_samples(samples, url, scraped_at)


def from_samples(samples: Iterable[tuple[str, dict[str, str], float]], url: str, scraped_at: float) -> Snapshot:
    """A snapshot from ``(name, labels, value)`` samples, whichever way they came."""
    start: float | None = None
    engines: dict[Key, Engine] = {}
    for name, labels, value in samples:
        if name == START_TIME:
            start = value
        if "model_name" not in labels:
            continue
        engine = engines.setdefault((labels["model_name"], labels.get("engine", "0")), Engine())
        _add(engine, name, labels, value)
    if not engines:
        raise SpecDecodeError(
            f"{url} has no metrics of a vLLM model.", "Check the address: it must be the /metrics of a vLLM server."
        )
    return Snapshot(url, scraped_at, start, engines)


def scrape(url: str, *, token: str = "", ca_path: str = "", verify: bool = True, timeout_s: float = 10.0) -> Snapshot:
    """Fetch and parse one ``/metrics`` endpoint; ``url`` may leave the path out."""
    import requests

    address = url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/metrics"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(address, headers=headers, timeout=timeout_s, verify=(ca_path or True) if verify else False)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise SpecDecodeError(
            f"{address} could not be scraped: {_short(error)}.", "Check that the server runs and the address is right."
        ) from error
    return parse(answer.text, address, time.time())


def window(
    before: Snapshot, after: Snapshot, *, model_name: str = "", driven: int | None = None, speculative: bool = True
) -> dict[str, Any]:
    """What happened between two snapshots of one endpoint, summed over its engines.

    ``driven`` is how many requests were sent in the window: more than that is foreign traffic. With
    ``speculative`` false, drafts are not asked for and the acceptance figures are ``None``.
    """
    _check_same_server(before, after)
    models = {model for model, _engine in after.engines}
    name = model_name or (next(iter(models)) if len(models) == 1 else "")
    if not name or name not in models:
        raise SpecDecodeError(
            f"{after.url} serves {', '.join(sorted(models))}, not {model_name or 'one model only'}.", "Name the model."
        )
    if set(before.engines) != set(after.engines):
        missing = ", ".join("/".join(key) for key in set(before.engines) ^ set(after.engines))
        raise SpecDecodeError(
            f"Engines of {after.url} appeared or vanished in the window: {missing}.", "Measure again once it is steady."
        )
    deltas = {key: _delta(before.engines[key], after.engines[key], after.url) for key in after.engines}
    foreign = sum(delta.counters.get("requests", 0) for (model, _engine), delta in deltas.items() if model != name)
    if foreign:
        raise SpecDecodeError(
            f"{after.url} served {foreign:.0f} requests for another model than {name} in the window.",
            "Measure without other traffic.",
        )
    own = [delta for (model, _engine), delta in sorted(deltas.items()) if model == name]
    total = _sum(own)
    requests_seen = total.counters.get("requests", 0.0)
    if driven is not None and requests_seen > driven:
        raise SpecDecodeError(
            f"{after.url} finished {requests_seen:.0f} requests in the window, but only {driven} were driven.",
            "Measure without other traffic.",
        )
    figures = {
        "model_name": name,
        "engines": len(own),
        "seconds": after.scraped_at - before.scraped_at,
        "requests": requests_seen,
        "prompt_tokens": total.counters.get("prompt_tokens", 0.0),
        "generation_tokens": total.counters.get("generation_tokens", 0.0),
        **{f"{short}_s": summary(total.histograms[short]) for short in HISTOGRAMS if short in total.histograms},
    }
    return {**figures, **acceptance(total, after.url, required=speculative)}


def acceptance(total: Engine, url: str, *, required: bool = True) -> dict[str, Any]:
    """Acceptance figures from summed counters.

    Acceptance length = 1 + accepted tokens / drafts: the bonus token is counted, and sums are divided, never
    averages averaged. The conditional rate at position i is accepted(i) / accepted(i-1), drafts standing for i = -1.
    """
    drafts = total.counters.get("drafts")
    if not drafts:
        if required:
            what = "has no speculative-decoding metrics" if drafts is None else "drafted nothing in the window"
            raise SpecDecodeError(
                f"{url} {what}.", "Check that it was started with --speculative-config and that requests were served."
            )
        return {"acceptance_length": None, "acceptance_per_position": [], "conditional_acceptance": [],
                "draft_acceptance_rate": None, "drafts": 0}  # fmt: skip
    accepted = total.counters["accepted_tokens"]
    counts = [count for _position, count in sorted(total.per_position.items())]
    previous = [drafts, *counts[:-1]]
    draft_tokens = total.counters.get("draft_tokens", 0.0)
    return {
        "acceptance_length": 1 + accepted / drafts,
        "acceptance_per_position": [count / drafts for count in counts],
        "conditional_acceptance": [count / last if last else 0.0 for count, last in zip(counts, previous)],
        "draft_acceptance_rate": accepted / draft_tokens if draft_tokens else None,
        "drafts": drafts,
        "draft_tokens": draft_tokens,
        "accepted_tokens": accepted,
    }


def combine(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance over several windows or endpoints: again sums divided by sums."""
    total = Engine()
    for item in windows:
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            total.counters[name] = total.counters.get(name, 0.0) + item.get(name, 0)
        for position, rate in enumerate(item["acceptance_per_position"]):
            total.per_position[position] = total.per_position.get(position, 0.0) + rate * item["drafts"]
    return acceptance(total, "the windows together", required=False)


def summary(histogram: dict[str, Any]) -> dict[str, Any]:
    """Count, mean and interpolated quantiles of a histogram's window; seconds."""
    count = histogram["count"]
    quantiles = {f"p{int(q * 100)}": quantile(histogram["buckets"], q) for q in QUANTILES}
    return {"count": count, "mean": histogram["sum"] / count if count else None, **quantiles}


def quantile(buckets: dict[float, float], q: float) -> float | None:
    """The q-quantile by linear interpolation inside its bucket, as Prometheus' ``histogram_quantile`` has it."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = q * buckets[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if math.isinf(bound):
                return lower
            inside = buckets[bound] - below
            return lower + (bound - lower) * ((rank - below) / inside if inside else 1.0)
        lower, below = bound, buckets[bound]
    return lower


def _add(engine: Engine, name: str, labels: dict[str, str], value: float) -> None:
    plain = name.removesuffix("_total")
    if plain == PER_POSITION:
        position = int(labels["position"])
        engine.per_position[position] = engine.per_position.get(position, 0.0) + value
        return
    for short, names in COUNTERS.items():
        if plain in names:
            engine.counters[short] = engine.counters.get(short, 0.0) + value
            return
    for short, names in HISTOGRAMS.items():
        for candidate in names:
            if name in (f"{candidate}_sum", f"{candidate}_count", f"{candidate}_bucket"):
                histogram = engine.histograms.setdefault(short, {"sum": 0.0, "count": 0.0, "buckets": {}})
                part = name[len(candidate) + 1 :]
                if part == "bucket":
                    bound = float(labels["le"])
                    histogram["buckets"][bound] = histogram["buckets"].get(bound, 0.0) + value
                else:
                    histogram[part] += value
                return


def _histogram_from(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "buckets": {float(bound): count for bound, count in value["buckets"].items()}}


def _check_same_server(before: Snapshot, after: Snapshot) -> None:
    if before.url != after.url:
        raise SpecDecodeError(f"The snapshots are of two servers: {before.url} and {after.url}.", "Pair them rightly.")
    if None not in (before.process_start, after.process_start) and before.process_start != after.process_start:
        raise _restarted(after.url, "its process started anew")


def _restarted(url: str, reason: str) -> SpecDecodeError:
    return SpecDecodeError(f"{url} restarted in the window: {reason}.", "Measure again.")


def _delta(before: Engine, after: Engine, url: str) -> Engine:
    delta = Engine()
    for name, value in after.counters.items():
        delta.counters[name] = _grown(before.counters.get(name, 0.0), value, name, url)
    for position, value in after.per_position.items():
        delta.per_position[position] = _grown(before.per_position.get(position, 0.0), value, f"position {position}", url)
    for name, histogram in after.histograms.items():
        old = before.histograms.get(name, {"sum": 0.0, "count": 0.0, "buckets": {}})
        delta.histograms[name] = {
            "sum": histogram["sum"] - old["sum"],
            "count": _grown(old["count"], histogram["count"], name, url),
            "buckets": {bound: count - old["buckets"].get(bound, 0.0) for bound, count in histogram["buckets"].items()},
        }
    vanished = set(before.counters) - set(after.counters)
    if vanished:
        raise _restarted(url, f"the counters of {', '.join(sorted(vanished))} are gone")
    return delta


def _grown(before: float, after: float, name: str, url: str) -> float:
    if after < before:
        raise _restarted(url, f"its counter of {name} fell from {before:g} to {after:g}")
    return after - before


def _sum(engines: list[Engine]) -> Engine:
    total = Engine()
    for engine in engines:
        for name, value in engine.counters.items():
            total.counters[name] = total.counters.get(name, 0.0) + value
        for position, value in engine.per_position.items():
            total.per_position[position] = total.per_position.get(position, 0.0) + value
        for name, histogram in engine.histograms.items():
            into = total.histograms.setdefault(name, {"sum": 0.0, "count": 0.0, "buckets": {}})
            into["sum"] += histogram["sum"]
            into["count"] += histogram["count"]
            for bound, count in histogram["buckets"].items():
                into["buckets"][bound] = into["buckets"].get(bound, 0.0) + count
    return total


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200].rstrip(".")
