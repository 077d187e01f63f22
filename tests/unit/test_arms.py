# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which arms a plan asks for, and the order of their trials."""

from __future__ import annotations

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import arms
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

DRAFT = {"draft_dir": "/drafts/a"}


def plan(**changes):
    return arms.complete(
        {
            "model": "m", "target": {"path": "/t"}, "prompts": {"path": "p", "count": 1}, "max_tokens": 8, "temperature": 0.0,
            "seed": 0, "warmup": 1, "trials": 3, "concurrencies": [1], "startup_timeout_s": 9,
            "arms": [
                {"name": "standing", "speculative_config": None},
                {"name": "trained", "speculative_config": {"method": "eagle3", "model": "{draft}", "num_speculative_tokens": 3}},
            ],
            **changes,
        }
    )  # fmt: skip


def taken(stay=True, **changes):
    whole = plan(**changes)
    return arms.schedule(whole, arms.arms(whole, DRAFT), stay)


def test_pairs_alternate_who_goes_first():
    assert [(step.arm, step.pair) for step in taken()] == [
        ("standing", 1), ("trained", 1), ("trained", 2), ("standing", 2), ("standing", 3), ("trained", 3),
    ]  # fmt: skip
    assert {step.up for step in taken()} == {("standing", "trained")}


def test_extra_trials_of_the_baseline_stand_beside_its_own():
    steps = [(step.arm[0], step.purpose) for step in taken(trials=4, aa_trials=3)]
    assert steps == [
        ("s", "noise"), ("s", "compare"), ("t", "compare"), ("t", "compare"), ("s", "compare"), ("s", "noise"),
        ("s", "compare"), ("t", "compare"), ("t", "compare"), ("s", "compare"), ("s", "noise"),
    ]  # fmt: skip


def test_trial_has_prompts_enough_to_keep_its_slots_busy():
    assert [arms.prompts_wanted(plan(prompts={"path": "p", "count": 16}), requests) for requests in (1, 3, 4, 32)] == [
        16,
        16,
        20,
        160,
    ]
    longer = plan(prompts={"path": "p", "count": 16, "per_slot": 10}, concurrencies=[1, 8])
    assert arms.prompts_wanted(longer, 8) == arms.most_prompts(longer) == 80
    with pytest.raises(SpecDecodeError, match="at least one prompt for each request in flight. Mend prompts.per_slot"):
        plan(prompts={"path": "p", "count": 16, "per_slot": 0})


def test_server_is_warmed_up_with_as_many_requests_as_it_will_serve():
    assert [arms.warming(plan(warmup=8), requests) for requests in (1, 8, 32)] == [8, 8, 32]
    assert arms.warming(plan(warmup=0), 32) == 0


def test_servers_that_do_not_fit_together_change_once_a_pair():
    steps = taken(stay=False, aa_trials=2, concurrencies=[1, 4])
    starts = [step.arm for before, step in zip([None, *steps], steps) if before is None or before.up != step.up]
    assert starts == ["standing", "trained", "standing", "trained"]
    assert all(step.up == (step.arm,) for step in steps)
    assert [(step.pair, step.concurrency) for step in steps[:4]] == [(4, 1), (4, 4), (1, 1), (1, 4)]


def test_sweep_makes_an_arm_for_every_other_k():
    whole = plan(sweep_num_speculative_tokens=[2, 3, 5], concurrencies=[1, 2])
    made = arms.arms(whole, DRAFT)
    assert list(made) == ["standing", "trained", "trained-k2", "trained-k5"]
    assert made["trained-k5"].speculative_config == {"method": "eagle3", "model": "/drafts/a", "num_speculative_tokens": 5}
    swept = [step for step in arms.schedule(whole, made, True) if step.purpose == "sweep"]
    assert {step.up for step in swept} == {("standing", "trained-k2"), ("standing", "trained-k5")}
    # Three pairs of the comparison come first; a K keeps its numbers whatever else is swept.
    assert {step.pair for step in swept if "trained-k5" in step.up} == {19, 20, 21}
    alone = plan(sweep_num_speculative_tokens=[5], concurrencies=[1, 2])
    others = arms.schedule(alone, arms.arms(alone, DRAFT), True)
    assert {step.key for step in others} <= {step.key for step in arms.schedule(whole, made, True)}


@given(
    st.integers(1, 7), st.integers(0, 6), st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(1, 9), max_size=3, unique=True), st.booleans(),
)  # fmt: skip
def test_every_trial_is_taken_once_and_pairs_are_whole(trials, extra, concurrencies, sweep, stay):
    steps = taken(stay, trials=trials, aa_trials=extra, concurrencies=concurrencies, sweep_num_speculative_tokens=sweep)
    assert len({step.key for step in steps}) == len(steps)
    others = len(set(sweep) - {3})
    assert len(steps) == len(concurrencies) * (2 * trials * (1 + others) + extra)
    for step in steps:
        same = [other.arm for other in steps if other.group == step.group]
        assert same == ["standing"] if step.purpose == "noise" else sorted(same)[0] == "standing" and len(set(same)) == 2
        assert step.arm in step.up


@given(st.integers(1, 5), st.integers(0, 3), st.data())
def test_what_a_kill_left_is_completed_by_whole_pairs(trials, extra, data):
    steps = taken(trials=trials, aa_trials=extra)
    done = [step.named for step in steps[: data.draw(st.integers(0, len(steps)))]]
    missing, kept = arms.remaining(steps, [*done, {**steps[0].named, "arm": "of an older plan"}])
    assert sorted(map(str, [*kept, *(step.named for step in missing)])) == sorted(str(step.named) for step in steps)
    assert not {(trial["concurrency"], trial["pair"]) for trial in kept} & {step.group for step in missing}


@pytest.mark.parametrize(
    ("flags", "accelerator", "resident", "stays"),
    [
        ([], "cpu", "auto", True),
        ([], "gpu", "auto", False),
        (["--gpu-memory-utilization=0.45"], "gpu", "auto", True),
        (["--gpu-memory-utilization", "0.6"], "gpu", "auto", False),
        (["--gpu_memory_utilization=0.4"], "gpu", "auto", True),
        ([], "gpu", True, True),
        ([], "cpu", False, False),
    ],
)
def test_servers_stay_up_where_both_fit(flags, accelerator, resident, stays):
    assert arms.resident(plan(server_arguments=flags, resident=resident), accelerator) is stays


def test_arm_that_runs_already():
    whole = plan(arms=[{"name": "standing", "url": "http://a:8000/", "log": "/log"}, {"name": "trained", "url": "http://b:8000"}])
    made = arms.arms(whole, {})
    assert (made["standing"].url, made["standing"].log, made["trained"].url) == ("http://a:8000", "/log", "http://b:8000")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trials": 0}, "at least one trial"),
        ({"concurrencies": []}, "at least one trial"),
        ({"resident": "perhaps"}, "must be auto, true or false"),
        ({"arms": []}, "at least one"),
        ({"arms": [{"name": "../x"}, {"name": "b"}]}, "lower-case letters, digits and hyphens"),
        ({"trials": "3"}, "The plan's trials is '3', but must be a whole number"),
        ({"concurrencies": 8}, "concurrencies is 8, but must be a list of whole numbers"),
        ({"concurrencies": [1, 8, 1]}, r"concurrencies \[1, 8, 1\] name one value twice"),
        ({"prompts": {"path": "p"}}, "prompts is .*, but must be {path: a file, count: a whole number}"),
        ({"target": "/t"}, "target is '/t', but must be {path: a folder}"),
        ({"arms": [{"speculative_config": None}]}, "arms is .*, but must be a list of {name: a text"),
    ],
)
def test_plan_that_cannot_be_measured(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        plan(**changes)


def test_plan_without_its_keys():
    with pytest.raises(SpecDecodeError, match="lacks model, target, "):
        arms.complete({"arms": []})


def test_arms_that_cannot_be_made():
    with pytest.raises(SpecDecodeError, match="serves the staged draft, but none is given"):
        arms.arms(plan(), {})
    silent = [{"name": "standing"}, {"name": "other"}]
    with pytest.raises(SpecDecodeError, match="no arm with speculation whose K could be swept"):
        arms.arms(plan(arms=silent, sweep_num_speculative_tokens=[2]), {})
    running = [{"name": "standing"}, {"name": "trained", "url": "http://b", "speculative_config": {"method": "ngram"}}]
    with pytest.raises(SpecDecodeError, match="whose server runs already at http://b"):
        arms.arms(plan(arms=running, sweep_num_speculative_tokens=[2]), {})
    with pytest.raises(SpecDecodeError, match="'most' is no share of memory"):
        arms.memory_share(["--gpu-memory-utilization=most"])
