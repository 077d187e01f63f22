# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verdicts on made-up measurements whose right answer is known."""

from __future__ import annotations

import copy
import itertools
import json
import pathlib

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import report, statistics, verdict
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.tests.unit.measurements import RIGHT_LAYERS, WIN, judge, measurement, trial
from hypothesis import given
from hypothesis import strategies as st


def test_clear_win_is_a_verdict_to_ship():
    found = judge(measurement(*WIN))
    assert (found["decision"], found["tier"], found["tier_reasons"]) == ("ship", "VERDICT", [])
    assert found["speedup_tpot"] == pytest.approx(2.0, abs=0.05)
    assert found["arms"]["trained"]["acceptance_length"] == pytest.approx(3.4)
    assert found["context"]["trained"]["grounding"]["baseline"] == "standing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["hardware"].update(kind="cpu"), "measured on a CPU"),
        (lambda m: m["arms"]["trained"]["resolved"].update(cudagraph_mode="PIECEWISE"), "different CUDA graph modes"),
        (lambda m: [a["resolved"].update(cudagraph_mode="NONE") for a in m["arms"].values()], "CUDA graphs are off"),
        (lambda m: [a["resolved"].update(enforce_eager=True) for a in m["arms"].values()], "served eagerly: standing, trained"),
        (lambda m: m.update(trials=[t for t in m["trials"] if t["pair"] < 3]), "2 usable trials an arm, fewer than 3"),
        (
            lambda m: [t["client"].update(in_flight=0.7) for t in m["trials"] if t["arm"] == "trained"],
            "concurrency 1 was not held: 0.7 requests were in flight on average; measure with more prompts",
        ),
        (lambda m: m["differences"].append({"field": "x.y", "values": {"standing": 1}}), "the servers differ in x.y"),
    ],
)
def test_what_keeps_a_win_a_draft(change, words):
    found = measurement(*WIN)
    change(found)
    result = judge(found)
    assert result["tier"] == "DRAFT" and any(words in reason for reason in result["tier_reasons"])


def test_context_says_how_many_prompts_each_shape_had():
    found = measurement(*WIN)
    for pair in (1, 2, 3):
        found["trials"] += [
            trial("standing", pair, 5.0, (), 8, requests=40),
            trial("trained", pair, 2.5, (0.9, 0.8), 8, requests=40),
        ]
    found["plan"]["concurrencies"] = [1, 8]
    shapes = judge(found)["shapes"]
    assert [shape["context"]["trained"]["workload"]["prompts"] for shape in shapes] == [16, 40]


def test_prompts_must_be_proven_held_out():
    assert judge(measurement(*WIN), dataset=None)["tier"] == "DRAFT"
    assert judge(measurement(*WIN), dataset={"overlap_train_eval": 2})["tier"] == "DRAFT"
    stated = judge(measurement(*WIN), dataset={"overlap_train_eval": 0, "stated": "asked after it was published"})
    assert stated["tier"] == "VERDICT" and stated["prompts_held_out"] == "as stated: asked after it was published"


def test_clear_loss_is_not_shipped_and_called_too_slow():
    found = judge(measurement([5.0, 5.1, 5.0], [6.0, 6.1, 6.0], rates=(0.6, 0.3, 0.1)))
    assert found["decision"] == "do_not_ship" and "too slow for what it saves" in found["diagnosis"]


def test_near_zero_acceptance_with_healthy_training_is_a_mismatch():
    found = judge(measurement([5.0, 5.0, 5.0], [7.0, 7.0, 7.0], rates=(0.02, 0.0, 0.0)))
    assert found["decision"] == "do_not_ship" and found["diagnosis"].startswith("Train/serve mismatch")


def test_wrong_layers_are_caught_without_the_counters():
    shifted = {**RIGHT_LAYERS, "layers_served": [1, 7, 12]}
    found = judge(measurement(*WIN), convert=shifted)
    assert (
        found["decision"] == "do_not_ship" and "trained on layers [1, 7, 12]" in found["diagnosis"] and found["cause"] == "layers"
    )


def test_win_within_the_noise_is_inconclusive():
    found = judge(measurement([5.0, 5.5, 5.0], [4.8, 5.2, 4.9], rates=(0.5, 0.1, 0.0)))
    assert found["decision"] == "inconclusive"


def test_one_pair_that_disagrees_is_inconclusive():
    assert judge(measurement([5.0, 5.0, 5.0], [4.0, 4.0, 5.1]))["decision"] == "inconclusive"


def test_impossible_speedup_is_not_believed():
    found = judge(measurement([9.0, 9.0, 9.0], [1.0, 1.0, 1.0]))
    assert found["decision"] != "ship" and any("impossible" in reason for reason in found["reasons"])


def test_acceptance_alone_is_no_win():
    assert judge(measurement([5.0, 5.0, 5.0], [5.0, 5.0, 5.0]))["decision"] != "ship"


def test_failed_requests_keep_it_back():
    found = measurement(*WIN)
    found["trials"][-1]["client"]["errors"] = 1
    assert judge(found)["decision"] == "inconclusive"


def test_against_a_speculating_baseline_the_acceptance_must_win_too():
    better = measurement(*WIN, base_rates=(0.5, 0.2, 0.1))
    assert judge(better)["decision"] == "ship"
    worse = measurement(*WIN, rates=(0.4, 0.1, 0.1), base_rates=(0.9, 0.8, 0.7))
    assert judge(worse)["decision"] == "do_not_ship"


def test_void_trials_are_left_out_and_named():
    found = measurement(*WIN)
    found["trials"][0]["void"] = "the client and the server disagree"
    result = judge(found)
    assert result["tier"] == "DRAFT" and any("trial 1 of the standing arm is void" in reason for reason in result["reasons"])
    for item in found["trials"]:
        item["void"] = "busy"
    with pytest.raises(SpecDecodeError, match="No pair of trials at concurrency 1 can be used"):
        judge(found)


def test_number_without_context_cannot_leave():
    found = measurement(*WIN)
    found["arms"]["trained"]["resolved"]["max_num_seqs"] = None
    with pytest.raises(SpecDecodeError, match=r"serving.max_num_seqs is unknown"):
        judge(found)


def test_loads_that_disagree_are_not_shipped():
    found = measurement(*WIN)
    found["plan"]["concurrencies"] = [1, 8]
    found["trials"] += [trial("standing", p, 5.0, concurrency=8) for p in (1, 2, 3)]
    found["trials"] += [trial("trained", p, 8.0, (0.1, 0.0, 0.0), concurrency=8) for p in (1, 2, 3)]
    result = judge(found)
    assert result["decision"] == "do_not_ship" and [shape["concurrency"] for shape in result["shapes"]] == [1, 8]


def test_every_result_names_the_next_lever():
    levers = judge(measurement(*WIN))["next_levers"]
    assert {"K = 4 instead of 3", "K = 2 instead of 3"} < {lever["lever"] for lever in levers}
    assert all(lever["expected"] and lever["gate"] and lever["cost"] for lever in levers)


def test_judging_does_not_touch_the_evidence():
    found = measurement(*WIN)
    kept = copy.deepcopy(found)
    judge(found)
    assert found == kept


def test_one_sample_stands_above_another():
    assert statistics.stands_above([2.0, 2.1, 2.2], [1.7, 1.8, 1.9])
    assert not statistics.stands_above([2.0, 2.1, 1.9], [1.7, 1.8, 1.95])
    assert not statistics.stands_above([9.0, 9.1], [1.0, 1.1]), "two values tell nothing"
    assert not statistics.stands_above([2.0] * 9, [2.0] * 9), "what is equal is not above"


@given(st.lists(st.integers(0, 9), min_size=3, max_size=5), st.lists(st.integers(0, 9), min_size=3, max_size=5))
def test_rank_sum_is_exact(upper, lower):
    """Against every way to deal the ranks out, counted one by one."""
    ranks = range(len(upper) + len(lower))
    inversions = sum(high <= low for high in upper for low in lower)
    deals = [
        sum(high < low for high in chosen for low in ranks if low not in chosen)
        for chosen in itertools.combinations(ranks, len(upper))
    ]
    share = sum(each <= inversions for each in deals) / len(deals)
    assert statistics.stands_above(upper, lower) == (share <= 0.05)


def test_sign_test_and_interval():
    assert statistics.sign_test([2.0] * 4) is None
    assert statistics.sign_test([2.0] * 5) == pytest.approx(1 / 32)
    assert statistics.sign_test([2.0] * 4 + [0.5]) == pytest.approx(6 / 32)
    low, high = statistics.bootstrap_interval([1.9, 2.0, 2.1, 2.0, 2.2])
    assert 1.9 <= low <= 2.0 <= high <= 2.2


def test_draft_of_the_demonstration_is_ship_worthy():
    """A recorded run of the demonstration: EAGLE3, K = 3, on two cores; see the measurement's own context."""
    recorded = json.loads((pathlib.Path(__file__).parent / "data/demo_win.json").read_text())
    found = verdict.judge(recorded.pop("acceptance"), **recorded)
    assert (found["decision"], found["tier"]) == ("ship", "DRAFT")
    assert found["tier_reasons"][0] == "measured on a CPU, where there are no CUDA graphs"
    assert found["speedup_tpot"] == pytest.approx(2.04, abs=0.01) and found["shapes"][0]["texts_equal"]
    assert found["arms"]["trained"]["acceptance_length"] == pytest.approx(3.66, abs=0.01)


def test_recorded_win_with_its_arms_exchanged_is_a_loss():
    recorded = json.loads((pathlib.Path(__file__).parent / "data/demo_win.json").read_text())
    acceptance = recorded["acceptance"]
    other = {"standing": "trained", "trained": "standing"}
    acceptance["arms"] = {name: acceptance["arms"][other[name]] for name in other}
    for each in acceptance["trials"]:
        each["arm"] = other[each["arm"]]
    assert verdict.judge(acceptance)["decision"] == "do_not_ship"


def test_words_of_a_verdict_read_at_80_columns():
    found = judge(measurement([15.0, 15.1, 15.0], [12.5, 12.6, 12.5], kind="cpu"))
    found["shapes"][0]["sweep"] = [
        {"arm": "trained-k5", "k": 5, "speedup": 1.0,
         "arms": {"standing": found["arms"]["standing"], "trained-k5": found["arms"]["trained"]},
         "context": {"standing": found["context"]["standing"], "trained-k5": found["context"]["trained"]}},
    ]  # fmt: skip
    lines = report.verdict_table(found)
    assert any(line.startswith("trained-k5") for line in lines)
    assert max(map(len, lines)) <= 72, "a callback indents them"
    said = " ".join(" ".join(lines).split())
    assert all(reason in said for reason in (*found["reasons"], *found["tier_reasons"]))
