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
import urllib.parse
from collections.abc import Iterable
from typing import Any

from .errors import SpecDecodeError

COUNTERS: dict[str, str] = {
    "vllm:spec_decode_num_drafts": "drafts",  # not counted before vLLM 0.9
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generation_tokens",
    "vllm:request_success": "requests",
}
GAUGES: dict[str, str] = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting"}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
#: newest name first: a server that exports two names of one histogram is read by the first
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "tpot": ("vllm:request_time_per_output_token_seconds",),
    # One observation for each engine output, so under speculation no time per token, whatever the older name says.
    "itl": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "ttft": ("vllm:time_to_first_token_seconds",),
    "e2e": ("vllm:e2e_request_latency_seconds",),
    "decode": ("vllm:request_decode_time_seconds",),
    "output_tokens": ("vllm:request_generation_tokens",),
}
#: histograms whose window is reported, as ``<name>_s``
LATENCIES = ("tpot", "itl", "ttft", "e2e")
HISTOGRAM_NAMES = frozenset(name for names in HISTOGRAMS.values() for name in names)
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
    #: requests running and waiting at that moment
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)


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
                "gauges": engine.gauges,
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
                    dict(item.get("gauges", {})),
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
    for engine in engines.values():
        _name_histograms(engine)
    if not any(engine.counters for engine in engines.values()):
        raise SpecDecodeError(
            f"{url} has no metrics of a vLLM model.", "Check the address: it must be the /metrics of a vLLM server."
        )
    return Snapshot(url, scraped_at, start, engines)


@dataclasses.dataclass(frozen=True)
class Access:
    """How an HTTP server is reached; the token never shows in an error or a representation."""

    token: str = dataclasses.field(default="", repr=False)
    ca_path: str = ""
    verify: bool = True
    timeout_s: float = 10.0

    def get(self, address: str, **query: str) -> Any:
        """The answer of a GET, raised for its status."""
        import requests

        with requests.Session() as session:
            # No proxy leads to this machine, and none needs to know the token.
            session.trust_env = not on_this_machine(address)
            answer = session.get(
                address,
                params=query,
                headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
                timeout=self.timeout_s,
                verify=(self.ca_path or True) if self.verify else False,
            )
        answer.raise_for_status()
        return answer


def on_this_machine(address: str) -> bool:
    """Whether an address leads to the machine itself."""
    return urllib.parse.urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")


def scrape(url: str, access: Access | None = None) -> Snapshot:
    """Fetch and parse one ``/metrics`` endpoint; ``url`` may leave the path out."""
    address = url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/metrics"
    try:
        answer = (access or Access()).get(address)
    except OSError as error:  # what requests raises, a certificate's file that is not there included
        raise SpecDecodeError(
            f"{address} could not be scraped: {short(error)}.",
            "Check that the server runs, that the address is right, and the token and certificates that it asks for.",
        ) from error
    return parse(answer.text, address, time.time())


def window(
    before: Snapshot,
    after: Snapshot,
    *,
    model_name: str = "",
    driven: int | None = None,
    speculative: bool = True,
    num_speculative_tokens: int | None = None,
) -> dict[str, Any]:
    """What happened between two snapshots of one endpoint, summed over its engines; see :func:`compare`."""
    total: dict[str, Any] = compare(
        [before],
        [after],
        model_name=model_name,
        driven=driven,
        speculative=speculative,
        num_speculative_tokens=num_speculative_tokens,
    )["total"]
    return total


def compare(
    before: list[Snapshot],
    after: list[Snapshot],
    *,
    model_name: str = "",
    driven: int | None = None,
    speculative: bool = True,
    num_speculative_tokens: int | None = None,
) -> dict[str, Any]:
    """What happened between the snapshots: ``engines`` and ``windows`` (an endpoint each) alone, ``total`` of all.

    ``driven`` is how many requests were sent to all endpoints in the window: more than that, or a server that is busy
    at an end of the window, is foreign traffic. With ``speculative`` false, drafts are not asked for and the
    acceptance figures are ``None``. ``num_speculative_tokens`` stands in for the count of drafts that vLLM before 0.9
    lacks: every draft is then taken to have had that many tokens.
    """
    pairs = _paired(before, after)
    model = _the_model([snapshot for _old, snapshot in pairs], model_name)
    engines: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    everything: list[Engine] = []
    for old, new in pairs:
        own = _own_deltas(old, new, model)
        for delta in own.values():
            _count_drafts(delta, num_speculative_tokens)
        if driven is not None:
            _refuse_busy(old, new)
        for number, delta in own.items():
            engines.append(
                {"url": new.url, "engine": number, **_figures(delta, f"{new.url} engine {number}", model, speculative)}
            )
        total = _sum(list(own.values()))
        windows.append(
            {
                "url": new.url,
                "engines": len(own),
                "seconds": new.scraped_at - old.scraped_at,
                "restart_evidence": "counters" if new.process_start is None else "counters and process start",
                **_figures(total, new.url, model, speculative),
            }
        )
        everything += own.values()
    total = _sum(everything)
    where = ", ".join(window["url"] for window in windows)
    if driven is not None:
        _refuse_more_than_driven(total, driven, where)
    if speculative and not total.counters.get("drafts"):
        raise _no_drafts(total, where)
    return {
        "engines": engines,
        "windows": windows,
        "total": {
            "engines": len(engines),
            "seconds": max(window["seconds"] for window in windows),
            "restart_evidence": min(window["restart_evidence"] for window in windows),
            **_figures(total, where, model, speculative),
        },
    }


def _figures(total: Engine, where: str, model: str, speculative: bool) -> dict[str, Any]:
    """Everything that one set of summed counters tells. An engine that served nothing need not have drafted."""
    served = total.counters.get("generation_tokens", 0.0) > 0
    return {
        "model_name": model,
        "requests": total.counters.get("requests", 0.0),
        "prompt_tokens": total.counters.get("prompt_tokens", 0.0),
        "generation_tokens": total.counters.get("generation_tokens", 0.0),
        **{f"{short}_s": summary(total.histograms[short]) for short in LATENCIES if short in total.histograms},
        "tpot_of_sums_s": tpot_of_sums(total),
        **acceptance(total, where, required=speculative and served),
    }


def tpot_of_sums(total: Engine) -> float | None:
    """Decode time of all finished requests over their tokens after the first: a TPOT for vLLM without its histogram."""
    decode, tokens = total.histograms.get("decode"), total.histograms.get("output_tokens")
    if decode is None or tokens is None or tokens["sum"] <= tokens["count"]:
        return None
    return float(decode["sum"] / (tokens["sum"] - tokens["count"]))


def acceptance(total: Engine, where: str, *, required: bool = True) -> dict[str, Any]:
    """Acceptance figures from summed counters.

    Acceptance length = 1 + accepted tokens / drafts: the bonus token is counted, and sums are divided, never
    averages averaged. The conditional rate at position i is accepted(i) / accepted(i-1), drafts standing for i = -1.
    """
    drafts = total.counters.get("drafts")
    if not drafts:
        if required:
            raise _no_drafts(total, where)
        return {
            "acceptance_length": None, "acceptance_per_position": [], "conditional_acceptance": [],
            "draft_acceptance_rate": None, "drafts": 0, "draft_tokens": 0.0, "accepted_tokens": 0.0,
            "accepted_per_position": [],
        }  # fmt: skip
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
        "accepted_per_position": counts,
    }


def _no_drafts(total: Engine, where: str) -> SpecDecodeError:
    if "drafts" in total.counters:
        what = "drafted nothing in the window"
    elif "draft_tokens" in total.counters:
        return SpecDecodeError(
            f"{where} counts draft tokens, but no drafts, as vLLM before 0.9 does.",
            "Name num_speculative_tokens, or serve with a newer vLLM.",
        )
    else:
        what = "has no speculative-decoding metrics"
    return SpecDecodeError(
        f"{where} {what}.", "Check that it was started with --speculative-config and that requests were served."
    )


def _count_drafts(delta: Engine, num_speculative_tokens: int | None) -> None:
    if num_speculative_tokens and "drafts" not in delta.counters and "draft_tokens" in delta.counters:
        delta.counters["drafts"] = delta.counters["draft_tokens"] / num_speculative_tokens


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
    elif plain in COUNTERS:
        short = COUNTERS[plain]
        engine.counters[short] = engine.counters.get(short, 0.0) + value
    elif name in GAUGES:
        engine.gauges[GAUGES[name]] = engine.gauges.get(GAUGES[name], 0.0) + value
    else:
        base, _separator, part = name.rpartition("_")
        if base not in HISTOGRAM_NAMES or part not in ("sum", "count", "bucket"):
            return
        histogram = engine.histograms.setdefault(base, {"sum": 0.0, "count": 0.0, "buckets": {}})
        if part == "bucket":
            bound = float(labels["le"])
            histogram["buckets"][bound] = histogram["buckets"].get(bound, 0.0) + value
        else:
            histogram[part] += value


def _name_histograms(engine: Engine) -> None:
    """From the exported names to ours; of two names for one histogram, the newer."""
    engine.histograms = {
        short: next(engine.histograms[name] for name in names if name in engine.histograms)
        for short, names in HISTOGRAMS.items()
        if any(name in engine.histograms for name in names)
    }


def _histogram_from(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "buckets": {float(bound): count for bound, count in value["buckets"].items()}}


def _paired(before: list[Snapshot], after: list[Snapshot]) -> list[tuple[Snapshot, Snapshot]]:
    """The two snapshots of each endpoint, whichever order they came in."""
    old = {snapshot.url: snapshot for snapshot in before}
    new = {snapshot.url: snapshot for snapshot in after}
    if set(old) != set(new) or len(old) != len(before) or len(new) != len(after):
        raise SpecDecodeError(
            f"The snapshots from before are of {', '.join(sorted(old)) or 'no endpoint'},"
            f" those from after of {', '.join(sorted(new)) or 'no endpoint'}.",
            "Take both of the same endpoints, each once.",
        )
    return [(old[url], new[url]) for url in sorted(new)]


def _the_model(after: list[Snapshot], model_name: str) -> str:
    """The one model that was driven: the named one, or the only one that every endpoint serves."""
    found = ""
    for snapshot in after:
        models = {model for model, _engine in snapshot.engines}
        name = model_name or (next(iter(models)) if len(models) == 1 else "")
        if not name or name not in models:
            raise SpecDecodeError(
                f"{snapshot.url} serves {', '.join(sorted(models))}, not {model_name or 'one model only'}.", "Name the model."
            )
        if found and name != found:
            raise SpecDecodeError(f"The endpoints serve different models: {found} and {name}.", "Measure one model at a time.")
        found = name
    return found


def _own_deltas(before: Snapshot, after: Snapshot, model: str) -> dict[str, Engine]:
    """What each engine of ``model`` counted, after every reason not to trust the window was looked for."""
    if None not in (before.process_start, after.process_start) and before.process_start != after.process_start:
        raise _restarted(after.url, "its process started anew")
    if set(before.engines) != set(after.engines):
        missing = ", ".join("/".join(key) for key in sorted(set(before.engines) ^ set(after.engines)))
        raise SpecDecodeError(
            f"Engines of {after.url} appeared or vanished in the window: {missing}.", "Measure again once it is steady."
        )
    deltas = {key: _delta(before.engines[key], after.engines[key], after.url) for key in sorted(after.engines)}
    others = [delta for (name, _engine), delta in deltas.items() if name != model]
    requests = sum(delta.counters.get("requests", 0.0) for delta in others)
    tokens = sum(delta.counters.get("generation_tokens", 0.0) for delta in others)
    if requests or tokens:
        raise SpecDecodeError(
            f"{after.url} served {requests:.0f} requests ({tokens:.0f} tokens) for another model than {model} in the window.",
            "Measure without other traffic.",
        )
    return {number: delta for (name, number), delta in deltas.items() if name == model}


def _refuse_busy(before: Snapshot, after: Snapshot) -> None:
    for snapshot, end in ((before, "start"), (after, "end")):
        busy = sum(sum(engine.gauges.values()) for engine in snapshot.engines.values())
        if busy:
            raise SpecDecodeError(
                f"{snapshot.url} had {busy:.0f} requests running or waiting at the {end} of the window.",
                "Measure without other traffic, and only once every driven request has ended.",
            )


def _refuse_more_than_driven(total: Engine, driven: int, where: str) -> None:
    counts = {
        "finished": total.counters.get("requests", 0.0),
        # A request that others began and did not finish is traffic, too.
        "began": total.histograms.get("ttft", {}).get("count", 0.0),
    }
    for what, count in counts.items():
        if count > driven:
            raise SpecDecodeError(
                f"{where} {what} {count:.0f} requests in the window, but only {driven} were driven.",
                "Measure without other traffic.",
            )


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


def short(error: Exception) -> str:
    """The first line of an error, for a sentence."""
    return str(error).splitlines()[0][:200].rstrip(".")
