# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Promotion and rollback: what is recorded, and what becomes of a deployment's arguments."""

from __future__ import annotations

import json
import re

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import promotion
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

OLD, NEW = {"method": "mtp", "num_speculative_tokens": 3}, {"method": "eagle3", "num_speculative_tokens": 4, "model": "/d"}
FIGURES = {"speculative_config": NEW, "previous": OLD, "measurement": "m1", "measured_at": "t", "holds_for": {}}


def deployment(*arguments, name="vllm", command=()):
    containers = [{"name": name, "command": list(command), "args": list(arguments)}, {"name": "proxy"}]
    return {"metadata": {"name": "standing"}, "spec": {"template": {"spec": {"containers": containers}}}}


def serving(config):
    return {"name": "vllm", "arguments": [], "speculative_config": config}


def test_promotion_and_rollback_are_each_other_s_inverse():
    promoted = promotion.record(FIGURES, None, serving(OLD))
    assert promotion.standing_config(promoted) == NEW
    back = promotion.rolled_back(promoted, serving(NEW))
    assert promotion.standing_config(back) == OLD and promotion.rolled_back(back, serving(OLD)) == back
    assert promotion.rolled_back(promoted, None) == back, "without a deployment to change only files are written"


def test_promoting_twice_records_the_same():
    once = promotion.record(FIGURES, None, serving(OLD))
    assert promotion.record(FIGURES, once, serving(NEW)) == once


def test_deployment_that_serves_something_else_is_left_alone():
    with pytest.raises(SpecDecodeError, match='serves with no speculation, but the verdict compared against {"method": "mtp"'):
        promotion.record(FIGURES, None, serving(None))


@pytest.mark.parametrize("live", [None, {**NEW, "num_speculative_tokens": 5}])
def test_deployment_that_was_changed_since_the_promotion_is_not_rolled_back(live):
    promoted = promotion.record(FIGURES, None, serving(OLD))
    with pytest.raises(SpecDecodeError, match="which is neither the promoted .* nor what stood before it, .*: roll that back"):
        promotion.rolled_back(promoted, serving(live))


@pytest.mark.parametrize("known", [None, {}, {"state": "something"}])
def test_nothing_to_roll_back(known):
    with pytest.raises(SpecDecodeError, match="Nothing was promoted from this experiment"):
        promotion.rolled_back(known, None)


@pytest.mark.parametrize("option", ["--speculative-config", "--speculative_config", "--speculative_config=", "-sc", "-sc="])
def test_config_of_a_deployment_is_found_and_replaced(option):
    written = [option + json.dumps(OLD)] if option.endswith("=") else [option, json.dumps(OLD)]
    found = promotion.find_container(deployment("--model", "/m", *written, "--port", "80"), "vllm")
    assert found["speculative_config"] == OLD
    changed = promotion.arguments_with(found, NEW)
    assert changed[:4] == ["--model", "/m", "--port", "80"] and json.loads(changed[5]) == NEW and len(changed) == 6
    assert promotion.arguments_with(found, None) == ["--model", "/m", "--port", "80"]


#: what resembles an option that is looked for, and is none
PLAIN = ["--config-format", "--specialize-active-lora", "-scale", "--hf_overrides={}", "serve", "bash", "a b", "-tp", "my_sc"]


def plain(word):
    name = word.partition("=")[0].replace("_", "-")
    return not name.startswith(("--spec", "-sc.")) and name not in ("-sc", "--config")


@given(st.lists(st.text(max_size=8).filter(plain) | st.sampled_from(PLAIN), max_size=6))
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
        (deployment("exec vllm  serve /m"), "vllm", "inside a longer word"),
        (deployment("exec python3 -m vllm.entrypoints.cli.main --speculative_config {}"), "vllm", "inside a longer word"),
        (deployment("-c", "serve", command=["/bin/bash"]), "vllm", "runs a shell (/bin/bash) in its command"),
        (deployment("$0", command=["env", "sh", "-c"]), "vllm", "runs a shell (sh) in its command"),
        (deployment(command=["vllm", "serve", "/m", "-sc", "{}"]), "vllm", "passes --speculative-config in its command"),
        (deployment("--config", "/etc/vllm.yaml"), "vllm", "takes arguments from a file (--config)"),
        (deployment(command=["vllm", "serve", "--config=/etc/vllm.yaml"]), "vllm", "takes arguments from a file (--config)"),
        (deployment("--spec-method", "mtp"), "vllm", "passes --spec-method, so that"),
        (deployment("--spec_tokens=3"), "vllm", "passes --spec_tokens, so that"),
        (deployment("--speculative-config.method", "mtp"), "vllm", "passes --speculative-config.method, so that"),
        (deployment("-sc.method=mtp"), "vllm", "passes -sc.method, so that"),
        (deployment("--speculative-conf", "{}"), "vllm", "passes --speculative-conf, so that"),
        (deployment("--speculative-config", "not json"), "vllm", "has no single --speculative-config"),
        (deployment("--speculative-config={}", "--speculative-config={}"), "vllm", "has no single --speculative-config"),
        (deployment("-sc={}", "--speculative_config", "{}"), "vllm", "has no single --speculative-config"),
        (deployment("-sc"), "vllm", "has no single --speculative-config"),
    ],
)
def test_deployment_that_cannot_be_changed_safely_is_refused(given_, name, words):
    with pytest.raises(SpecDecodeError, match=re.escape(words)):
        promotion.find_container(given_, name)
