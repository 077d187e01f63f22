# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Snapshots of vLLM's counters from a Prometheus server's past. Private to the collection.

Two instants alone would hide what happened between them. So the server is also asked whether a counter was reset, a
process started anew, a scrape failed or a target came and went in between.
"""

from __future__ import annotations

import datetime
import math

from .errors import SpecDecodeError
from .vllm_metrics import START_TIME, Access, Snapshot, from_samples, short

#: the labels that Prometheus gives a scraped target; together they name the endpoint
TARGET_LABELS = ("namespace", "pod", "job", "instance")
Sample = tuple[str, dict[str, str], float]


def window_snapshots(
    address: str, start: str, end: str, selector: str, access: Access | None = None
) -> tuple[list[Snapshot], list[Snapshot]]:
    """The snapshots at ``start`` and at ``end`` of every target that ``selector`` chooses; what lies between is checked."""
    first, last = instant(start), instant(end)
    if last <= first:
        raise SpecDecodeError(
            f"The range ends at {end}, which is not after its start at {start}.", "Give an end after the start."
        )
    server = _Server(address, access or Access())
    labels = selector.strip().removeprefix("{").removesuffix("}").strip().rstrip(",")
    span = f"[{math.ceil(last - first)}s]"
    _refuse_failed_scrapes(server, labels, span, last)
    before, after = _targets(server, labels, first), _targets(server, labels, last)
    _refuse_coming_and_going(server, labels, span, last, set(before), set(after))
    _refuse_restarts(server, labels, span, last)
    return _snapshots(before, first), _snapshots(after, last)


def instant(text: str) -> float:
    """Seconds since the epoch, from such a number or a time of RFC 3339."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan  # no number; a date then
    if math.isfinite(seconds):
        return seconds
    try:
        found = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise SpecDecodeError(
            f"{text!r} is no time.", "Give seconds since the epoch, or a date with its zone such as 2026-01-31T12:00:00Z."
        )
    return found.timestamp()


class _Server:
    """Prometheus' HTTP API, as far as it is needed here."""

    def __init__(self, address: str, access: Access) -> None:
        self._url = f"{address.rstrip('/')}/api/v1/query"
        self._access = access

    def query(self, expression: str, at: float) -> list[Sample]:
        try:
            document = self._access.get(self._url, query=expression, time=f"{at:.3f}").json()
        except (OSError, ValueError) as error:
            raise SpecDecodeError(
                f"{self._url} did not answer {expression}: {_reason(error)}.",
                "Check the address of the Prometheus server, the selector, the token and the certificates.",
            ) from error
        try:
            if document["status"] != "success" or document["data"]["resultType"] != "vector":
                raise SpecDecodeError(
                    f"{self._url} refused {expression}: {document.get('error', 'no vector came back')}.", "Check the selector."
                )
            return [
                (item["metric"].get("__name__", ""), item["metric"], float(item["value"][1]))
                for item in document["data"]["result"]
            ]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise SpecDecodeError(
                f"{self._url} did not answer as Prometheus does ({type(error).__name__}: {error}).", "Check the address."
            ) from error


def _reason(error: Exception) -> str:
    """What went wrong; Prometheus explains a bad query in the answer's body."""
    response = getattr(error, "response", None)
    try:
        return str(response.json()["error"]) if response is not None else short(error)
    except (ValueError, KeyError, TypeError):
        return short(error)


def _target(labels: dict[str, str]) -> str:
    return ",".join(f"{name}={labels[name]}" for name in TARGET_LABELS if name in labels)


def _selected(name: str, labels: str) -> str:
    return f"{name}{{{labels}}}"


def _targets(server: _Server, labels: str, at: float) -> dict[str, list[Sample]]:
    """The samples of every target that serves a vLLM model; another exporter of the same job is none of ours."""
    matcher = ",".join(part for part in (f'__name__=~"vllm:.+|{START_TIME}"', labels) if part)
    by_target: dict[str, list[Sample]] = {}
    for sample in server.query(f"{{{matcher}}}", at):
        by_target.setdefault(_target(sample[1]), []).append(sample)
    return {target: samples for target, samples in by_target.items() if any("model_name" in sample[1] for sample in samples)}


def _snapshots(targets: dict[str, list[Sample]], at: float) -> list[Snapshot]:
    return [from_samples(samples, target, at) for target, samples in sorted(targets.items())]


def _refuse_failed_scrapes(server: _Server, labels: str, span: str, at: float) -> None:
    lowest = server.query(f"min_over_time({_selected('up', labels)}{span})", at)
    if not lowest:
        raise SpecDecodeError(
            f"No scrape target matches {{{labels}}} in the range.",
            "The selector must name labels of targets, such as job, instance, namespace or pod; the model goes to model_name.",
        )
    failed = sorted(_target(metric) for _name, metric, value in lowest if value < 1)
    if failed:
        raise SpecDecodeError(
            f"A scrape of {'; '.join(failed)} failed in the range.", "Choose a range in which every scrape succeeded."
        )


def _refuse_coming_and_going(server: _Server, labels: str, span: str, at: float, before: set[str], after: set[str]) -> None:
    seen = {
        _target(metric)
        for _name, metric, _value in server.query(f"count_over_time({_selected('vllm:num_requests_running', labels)}{span})", at)
    }
    unsteady = sorted((before ^ after) | (seen - before))
    if unsteady:
        raise SpecDecodeError(
            f"Targets appeared or vanished in the range: {'; '.join(unsteady)}.", "Choose a range in which they are steady."
        )
    if not after:
        raise SpecDecodeError(
            f"No target of {{{labels}}} has metrics of a vLLM model.", "Check the selector, and that the range is still kept."
        )


def _refuse_restarts(server: _Server, labels: str, span: str, at: float) -> None:
    for expression in (
        f"changes({_selected(START_TIME, labels)}{span})",
        f"resets({_selected('vllm:prompt_tokens_total', labels)}{span})",
        f"resets({_selected('vllm:generation_tokens_total', labels)}{span})",
    ):
        moved = sorted({_target(metric) for _name, metric, value in server.query(expression, at) if value})
        if moved:
            raise SpecDecodeError(
                f"{'; '.join(moved)} restarted in the range: {expression} is not 0.", "Choose a range without a restart."
            )
