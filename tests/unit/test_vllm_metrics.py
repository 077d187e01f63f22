# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""vLLM's counters: arithmetic by hand, and every reason not to trust a window."""

from __future__ import annotations

import json
import math

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import vllm_metrics as vm
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

URL = "http://server/metrics"


def text(drafts=0, accepted=(0, 0, 0), requests=0, start=100.0, model="m", engine="0", suffix="_total", tpot=()):
    labels = f'engine="{engine}",model_name="{model}"'
    lines = [f"process_start_time_seconds {start}"]
    counters = {
        "vllm:spec_decode_num_drafts": drafts,
        "vllm:spec_decode_num_draft_tokens": drafts * len(accepted),
        "vllm:spec_decode_num_accepted_tokens": sum(accepted),
    }
    lines += [f"{name}{suffix}{{{labels}}} {value}" for name, value in counters.items()]
    lines += [
        f'vllm:spec_decode_num_accepted_tokens_per_pos{suffix}{{{labels},position="{place}"}} {value}'
        for place, value in enumerate(accepted)
    ]
    lines.append(f'vllm:request_success{suffix}{{{labels},finished_reason="stop"}} {requests}')
    name = "vllm:request_time_per_output_token_seconds"
    for bound in ("0.005", "0.01", "+Inf"):
        count = sum(value <= float(bound) for value in tpot)
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}')
    lines += [f"{name}_sum{{{labels}}} {sum(tpot)}", f"{name}_count{{{labels}}} {len(tpot)}"]
    return "\n".join(lines) + "\n"


def snapshot(*texts, at=0.0, **fields):
    return vm.parse("".join(texts) or text(**fields), URL, at)


def test_acceptance_is_a_ratio_of_sums_with_the_bonus_token():
    before = snapshot(drafts=10, accepted=(5, 4, 1), requests=2)
    after = snapshot(drafts=110, accepted=(95, 84, 61), requests=12, at=3.0)
    found = vm.window(before, after, driven=10)
    assert found["acceptance_length"] == pytest.approx(1 + 230 / 100)
    assert found["acceptance_per_position"] == pytest.approx([0.9, 0.8, 0.6])
    assert found["conditional_acceptance"] == pytest.approx([0.9, 80 / 90, 60 / 80])
    assert found["draft_acceptance_rate"] == pytest.approx(230 / 300)
    assert (found["requests"], found["seconds"], found["engines"]) == (10, 3.0, 1)


def test_engines_are_summed_before_dividing():
    before = snapshot(text(engine="0"), text(engine="1"))
    after = snapshot(text(drafts=100, accepted=(90, 0, 0), engine="0"), text(drafts=300, accepted=(30, 0, 0), engine="1"))
    found = vm.window(before, after)
    assert found["acceptance_length"] == pytest.approx(1 + 120 / 400) and found["engines"] == 2


def test_older_names_without_total():
    found = vm.window(snapshot(suffix=""), snapshot(drafts=10, accepted=(5, 5, 5), suffix=""))
    assert found["acceptance_length"] == pytest.approx(2.5)


def test_several_endpoints_combine_as_sums():
    one = vm.window(snapshot(), snapshot(drafts=100, accepted=(90, 0, 0)))
    two = vm.window(snapshot(), snapshot(drafts=300, accepted=(30, 0, 0)))
    assert vm.combine([one, two])["acceptance_length"] == pytest.approx(1 + 120 / 400)


def test_histogram_window_and_quantiles():
    before = snapshot(tpot=(0.002,))
    after = snapshot(tpot=(0.002, 0.004, 0.004, 0.008, 0.008))
    found = vm.window(before, after, speculative=False)["tpot_s"]
    assert found["count"] == 4 and found["mean"] == pytest.approx(0.006)
    assert found["p50"] == pytest.approx(0.005)


@given(st.lists(st.floats(0.0001, 9), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_quantile_lies_in_the_bucket_of_the_true_one(values, q):
    bounds = [0.01, 0.1, 1.0, 10.0, math.inf]
    buckets = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
    found = vm.quantile(buckets, q)
    true = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    upper = next(bound for bound in bounds if true <= bound)
    lower = ([0.0, *bounds])[bounds.index(upper)]
    assert lower - 1e-12 <= found <= upper + 1e-12


def test_no_speculation_has_no_acceptance():
    found = vm.window(snapshot(), snapshot(requests=3), speculative=False)
    assert found["acceptance_length"] is None and found["drafts"] == 0


@pytest.mark.parametrize(
    ("before", "after", "options", "words"),
    [
        ({"drafts": 10}, {"drafts": 5}, {}, "restarted in the window: its counter of drafts fell from 10 to 5"),
        ({"start": 1.0}, {"start": 2.0, "drafts": 5}, {}, "restarted in the window: its process started anew"),
        ({}, {"requests": 5}, {}, "drafted nothing in the window"),
        ({}, {"drafts": 5, "requests": 5}, {"driven": 4}, "finished 5 requests in the window, but only 4 were driven"),
        ({}, {"drafts": 5}, {"model_name": "other"}, "serves m, not other"),
    ],
)
def test_windows_that_cannot_be_trusted(before, after, options, words):
    with pytest.raises(SpecDecodeError, match=words):
        vm.window(snapshot(**before), snapshot(**after), **options)


def test_traffic_for_another_model_is_refused():
    before = snapshot(text(model="m"), text(model="n"))
    after = snapshot(text(drafts=5, accepted=(5, 0, 0), model="m"), text(requests=2, model="n"))
    with pytest.raises(SpecDecodeError, match="served 2 requests for another model than m"):
        vm.window(before, after, model_name="m")


def test_engines_that_vanish_are_refused():
    with pytest.raises(SpecDecodeError, match="appeared or vanished in the window: m/1"):
        vm.window(snapshot(text(engine="0"), text(engine="1")), snapshot(text(engine="0")))


def test_metrics_of_something_else():
    with pytest.raises(SpecDecodeError, match="has no metrics of a vLLM model"):
        snapshot("up 1\n")
    with pytest.raises(SpecDecodeError, match="did not answer in Prometheus' text format"):
        snapshot("<html>busy</html>\n")


def test_server_without_speculation_metrics():
    bare = 'vllm:request_success_total{engine="0",model_name="m"} 1\n'
    with pytest.raises(SpecDecodeError, match="has no speculative-decoding metrics"):
        vm.window(snapshot(bare), snapshot(bare))


def test_snapshots_survive_being_stored():
    before, after = snapshot(tpot=(0.001,)), snapshot(drafts=9, accepted=(9, 3, 0), requests=3, tpot=(0.001, 0.2))
    stored = [vm.Snapshot.from_dict(json.loads(json.dumps(item.as_dict(), allow_nan=False))) for item in (before, after)]
    assert vm.window(*stored) == vm.window(before, after)
    with pytest.raises(SpecDecodeError, match="no snapshot of prom_acceptance"):
        vm.Snapshot.from_dict({"url": URL})


def test_unreachable_server():
    with pytest.raises(SpecDecodeError, match="could not be scraped"):
        vm.scrape("http://127.0.0.1:9", timeout_s=1)
