# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""vLLM's counters: arithmetic by hand, and every reason not to trust a window."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import vllm_metrics as vm
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

DATA = pathlib.Path(__file__).parent / "data"
URL = "http://server/metrics"


def text(drafts=0, accepted=(0, 0, 0), requests=0, start=100.0, model="m", engine="0", suffix="_total", tpot=(), tokens=0,
         running=0, began=None):  # fmt: skip
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
    lines.append(f"vllm:generation_tokens{suffix}{{{labels}}} {tokens}")
    lines.append(f"vllm:num_requests_running{{{labels}}} {running}")
    if began is not None:
        lines.append(f"vllm:time_to_first_token_seconds_count{{{labels}}} {began}")
    name = "vllm:request_time_per_output_token_seconds"
    for bound in ("0.005", "0.01", "+Inf"):
        count = sum(value <= float(bound) for value in tpot)
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {count}')
    lines += [f"{name}_sum{{{labels}}} {sum(tpot)}", f"{name}_count{{{labels}}} {len(tpot)}"]
    return "\n".join(lines) + "\n"


def snapshot(*texts, at=0.0, **fields):
    return vm.parse("".join(texts) or text(**fields), URL, at)


def at(url, content):
    return vm.parse(content, url, 0.0)


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
    before = [at("a", text()), at("b", text())]
    after = [
        at("b", text(drafts=300, accepted=(30, 0, 0), tpot=(0.008,))),
        at("a", text(drafts=100, accepted=(90, 0, 0), tpot=(0.004,))),
    ]
    found = vm.compare(before, after)
    assert found["total"]["acceptance_length"] == pytest.approx(1 + 120 / 400)
    assert found["total"]["tpot_s"]["mean"] == pytest.approx(0.006)
    assert [window["url"] for window in found["windows"]] == ["a", "b"]
    assert [engine["acceptance_length"] for engine in found["engines"]] == [pytest.approx(1.9), pytest.approx(1.1)]


def test_driven_requests_are_counted_over_all_endpoints():
    before, after = [at("a", text()), at("b", text())], [at("a", text(drafts=1, requests=3)), at("b", text(drafts=1, requests=3))]
    assert vm.compare(before, after, driven=6)["total"]["requests"] == 6
    with pytest.raises(SpecDecodeError, match="a, b finished 6 requests in the window, but only 5 were driven"):
        vm.compare(before, after, driven=5)


def test_snapshots_of_other_endpoints_or_models():
    with pytest.raises(SpecDecodeError, match="from before are of a, those from after of a, b"):
        vm.compare([at("a", text())], [at("a", text()), at("b", text())])
    with pytest.raises(SpecDecodeError, match="different models: m and n"):
        vm.compare([at("a", text()), at("b", text(model="n"))], [at("a", text()), at("b", text(model="n"))])


def test_engine_that_served_but_did_not_draft_is_refused_and_an_idle_one_is_not():
    def engines(tokens):
        return text(drafts=9, accepted=(9, 0, 0), tokens=50) + text(engine="1", tokens=tokens)

    before = snapshot(text() + text(engine="1"))
    assert vm.compare([before], [snapshot(engines(0))])["engines"][1]["acceptance_length"] is None
    with pytest.raises(SpecDecodeError, match="engine 1 drafted nothing in the window"):
        vm.compare([before], [snapshot(engines(7))])


def test_of_two_names_of_one_histogram_the_newer_is_read():
    labels = 'engine="0",model_name="m"'
    both = "".join(
        f'{name}_bucket{{{labels},le="+Inf"}} {count}\n{name}_sum{{{labels}}} {count}\n{name}_count{{{labels}}} {count}\n'
        for name, count in (("vllm:time_per_output_token_seconds", 7), ("vllm:inter_token_latency_seconds", 4))
    )
    assert vm.window(snapshot(), snapshot(text() + both), speculative=False)["itl_s"]["count"] == 4
    old = both.splitlines(keepends=True)[:3]
    assert vm.window(snapshot(), snapshot(text() + "".join(old)), speculative=False)["itl_s"]["count"] == 7


def test_vllm_that_does_not_count_drafts():
    def old(tokens, accepted):
        labels = '{engine="0",model_name="m"}'
        return snapshot(f"vllm:spec_decode_num_draft_tokens_total{labels} {tokens}\n"
                        f"vllm:spec_decode_num_accepted_tokens_total{labels} {accepted}\n")  # fmt: skip

    with pytest.raises(SpecDecodeError, match=r"counts draft tokens, but no drafts, .* Name num_speculative_tokens"):
        vm.window(old(0, 0), old(30, 12))
    found = vm.window(old(0, 0), old(30, 12), num_speculative_tokens=3)
    assert found["acceptance_length"] == pytest.approx(1 + 12 / 10) and found["acceptance_per_position"] == []


def test_tpot_of_a_vllm_without_its_histogram():
    labels = 'engine="0",model_name="m"'
    more = "".join(
        f'{name}_bucket{{{labels},le="+Inf"}} 4\n{name}_sum{{{labels}}} {total}\n{name}_count{{{labels}}} 4\n'
        for name, total in (("vllm:request_decode_time_seconds", 1.2), ("vllm:request_generation_tokens", 124))
    )
    found = vm.window(snapshot(), snapshot(text() + more), speculative=False)
    assert found["tpot_of_sums_s"] == pytest.approx(1.2 / 120)
    assert vm.window(snapshot(), snapshot(), speculative=False)["tpot_of_sums_s"] is None


counts = st.integers(0, 1000)


@st.composite
def growing(draw):
    """Three moments of two engines whose counters only grow, each position accepted at most as often as the one before."""
    moments = []
    state = [[0, [0, 0, 0], 0] for _number in range(2)]
    for _number in range(3):
        for engine in state:
            drafts = draw(counts) + 1
            engine[0] += drafts
            for place in range(3):
                drafts = draw(st.integers(0, drafts))
                engine[1][place] += drafts
            engine[2] += draw(counts)
        moments.append("".join(text(e[0], tuple(e[1]), e[2], engine=str(n)) for n, e in enumerate(state)))
    return [snapshot(moment, at=float(number)) for number, moment in enumerate(moments)]


@given(growing())
def test_windows_in_a_row_add_up_to_the_whole(moments):
    first, second, whole = (vm.window(moments[a], moments[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    for name in ("drafts", "draft_tokens", "accepted_tokens", "requests"):
        assert first[name] + second[name] == whole[name]
    lengths = sorted((first["acceptance_length"], second["acceptance_length"]))
    assert lengths[0] - 1e-9 <= whole["acceptance_length"] <= lengths[1] + 1e-9


@given(growing())
def test_acceptance_is_consistent_with_its_positions(moments):
    found = vm.compare(moments[:1], moments[2:])
    total = found["total"]
    assert total["acceptance_length"] == pytest.approx(1 + sum(total["acceptance_per_position"]))
    assert 1 <= total["acceptance_length"] <= 1 + len(total["acceptance_per_position"])
    assert total["acceptance_per_position"] == sorted(total["acceptance_per_position"], reverse=True)
    assert all(0 <= rate <= 1 for rate in total["conditional_acceptance"])
    assert sum(engine["drafts"] for engine in found["engines"]) == total["drafts"]
    # A ratio of sums, so it does not depend on how the sums are split.
    weighted = sum(engine["acceptance_length"] * engine["drafts"] for engine in found["engines"]) / total["drafts"]
    assert total["acceptance_length"] == pytest.approx(weighted)


@given(growing(), st.integers(0, 1), st.sampled_from(["drafts", "requests"]))
def test_any_counter_that_falls_is_a_restart(moments, number, name):
    later = vm.Snapshot.from_dict(moments[2].as_dict())
    later.engines["m", str(number)].counters[name] = moments[0].engines["m", str(number)].counters[name] - 1
    with pytest.raises(SpecDecodeError, match=f"restarted in the window: its counter of {name} fell"):
        vm.window(moments[0], later)


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
        ({}, {"drafts": 5, "requests": 4, "began": 5}, {"driven": 4}, "began 5 requests in the window, but only 4 were driven"),
        ({"running": 1}, {"drafts": 5}, {"driven": 4}, "had 1 requests running or waiting at the start of the window"),
        ({}, {"drafts": 5, "running": 2}, {"driven": 4}, "had 2 requests running or waiting at the end of the window"),
        ({}, {"drafts": 5}, {"model_name": "other"}, "serves m, not other"),
    ],
)
def test_windows_that_cannot_be_trusted(before, after, options, words):
    with pytest.raises(SpecDecodeError, match=words):
        vm.window(snapshot(**before), snapshot(**after), **options)


def test_traffic_for_another_model_is_refused():
    before = snapshot(text(model="m"), text(model="n"))
    after = snapshot(text(drafts=5, accepted=(5, 0, 0), model="m"), text(requests=2, model="n"))
    with pytest.raises(SpecDecodeError, match=r"served 2 requests \(0 tokens\) for another model than m"):
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
        vm.scrape("http://127.0.0.1:9", vm.Access(timeout_s=1))


def recorded(moment):
    """As a vLLM 0.32 with ngram and K = 3 exported it, around three requests of 40 tokens each."""
    return vm.parse((DATA / f"vllm-0.32-ngram-{moment}.txt").read_text(), URL, 0.0)


def test_recorded_window():
    found = vm.window(recorded("before"), recorded("after"), driven=3, model_name="small")
    assert (found["requests"], found["generation_tokens"], found["prompt_tokens"]) == (3, 120, 54)
    assert (found["drafts"], found["draft_tokens"], found["accepted_per_position"]) == (14, 42, [3, 3, 3])
    assert found["acceptance_length"] == pytest.approx(1 + 9 / 14)
    assert (found["tpot_s"]["count"], found["ttft_s"]["count"], found["e2e_s"]["count"]) == (3, 3, 3)
    # Of 117 tokens after the first ones, 9 came in one output with another.
    assert found["itl_s"]["count"] == 108 and found["itl_s"]["mean"] > found["tpot_s"]["mean"]
    assert found["tpot_of_sums_s"] == pytest.approx(found["tpot_s"]["mean"])
    with pytest.raises(SpecDecodeError, match="finished 3 requests in the window, but only 2 were driven"):
        vm.window(recorded("before"), recorded("after"), driven=2)
    with pytest.raises(SpecDecodeError, match="fell from"):
        vm.window(recorded("after"), recorded("before"))
