# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Promotion and rollback: what is recorded, and what becomes of a deployment's arguments."""

from __future__ import annotations

import json

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import promotion
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

OLD, NEW = {"method": "mtp", "num_speculative_tokens": 3}, {"method": "eagle3", "num_speculative_tokens": 4, "model": "/d"}
FIGURES = {"speculative_config": NEW, "previous": OLD, "measurement": "m1", "measured_at": "t", "holds_for": {}}


def deployment(*arguments, name="vllm"):
    containers = [{"name": name, "args": list(arguments)}, {"name": "proxy"}]
    return {"metadata": {"name": "standing"}, "spec": {"template": {"spec": {"containers": containers}}}}


def serving(config):
    return {"name": "vllm", "arguments": [], "speculative_config": config}


def test_promotion_and_rollback_are_each_other_s_inverse():
    promoted = promotion.record(FIGURES, None, serving(OLD))
    assert promotion.standing_config(promoted) == NEW
    back = promotion.rolled_back(promoted)
    assert promotion.standing_config(back) == OLD and promotion.rolled_back(back) == back


def test_promoting_twice_records_the_same():
    once = promotion.record(FIGURES, None, serving(OLD))
    assert promotion.record(FIGURES, once, serving(NEW)) == once


def test_deployment_that_serves_something_else_is_left_alone():
    with pytest.raises(SpecDecodeError, match='serves with no speculation, but the verdict compared against {"method": "mtp"'):
        promotion.record(FIGURES, None, serving(None))


@pytest.mark.parametrize("known", [None, {}, {"state": "something"}])
def test_nothing_to_roll_back(known):
    with pytest.raises(SpecDecodeError, match="Nothing was promoted from this experiment"):
        promotion.rolled_back(known)


@pytest.mark.parametrize("written", [["--speculative-config", json.dumps(OLD)], [f"--speculative-config={json.dumps(OLD)}"]])
def test_config_of_a_deployment_is_found_and_replaced(written):
    found = promotion.find_container(deployment("--model", "/m", *written, "--port", "80"), "vllm")
    assert found["speculative_config"] == OLD
    changed = promotion.arguments_with(found, NEW)
    assert changed[:4] == ["--model", "/m", "--port", "80"] and json.loads(changed[5]) == NEW and len(changed) == 6
    assert promotion.arguments_with(found, None) == ["--model", "/m", "--port", "80"]


@given(st.lists(st.text(max_size=8).filter(lambda word: "--speculative-config" not in word), max_size=6))
def test_other_arguments_are_never_touched(words):
    found = promotion.find_container(deployment(*words), "vllm")
    changed = {**found, "arguments": promotion.arguments_with(found, NEW)}
    assert promotion.arguments_with(changed, None) == words
    assert promotion.find_container(deployment(*changed["arguments"]), "vllm")["speculative_config"] == NEW


@pytest.mark.parametrize(
    ("given_", "name", "words"),
    [
        (deployment(), "other", "of which 0 fit 'other'"),
        (deployment(), "", "of which 2 fit ''"),
        (deployment("exec vllm serve /m --speculative-config '{}'"), "vllm", "inside a longer word"),
        (deployment("--speculative-config", "not json"), "vllm", "has no single --speculative-config"),
        (deployment("--speculative-config={}", "--speculative-config={}"), "vllm", "has no single --speculative-config"),
    ],
)
def test_deployment_that_cannot_be_changed_safely_is_refused(given_, name, words):
    with pytest.raises(SpecDecodeError, match=words):
        promotion.find_container(given_, name)
