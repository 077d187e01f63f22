# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What surrounds a decision: contexts, speed of light, levers, diagnoses, freshness, plots, and where evidence is read."""

from __future__ import annotations

import copy
import json
import math
import os
import pathlib
from xml.etree import ElementTree

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    context,
    evidence,
    gates,
    levers,
    model_shape,
    plots,
    report,
    sol,
    verdict,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.tests.unit.measurements import (
    HEALTHY,
    RIGHT_LAYERS,
    WIN,
    judge,
    measurement,
    trial,
)
from hypothesis import given
from hypothesis import strategies as st

CEILINGS = yaml.safe_load((pathlib.Path(__file__).parent.parent.parent / "configs/sol-ceilings.yaml").read_text())
CONFIG = {"num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 512}


def swept(k, standing, tpot, rates, found=None):
    """A measurement with a further K in the same session."""
    found = found or measurement(*WIN)
    name = f"trained-k{k}"
    found["arms"][name] = {
        "speculative_config": {"method": "eagle3", "num_speculative_tokens": k},
        "num_speculative_tokens": k, "sweep": True, "resolved": dict(found["arms"]["trained"]["resolved"]),
    }  # fmt: skip
    for number, (before, after) in enumerate(zip(standing, tpot), 1):
        for arm, value, each in (("standing", before, ()), (name, after, rates)):
            found["trials"].append({**trial(arm, 100 * k + number, value, each), "purpose": "sweep"})
    return found


# Contexts


def test_context_survives_a_round_trip_and_lacks_nothing():
    stored = judge(measurement(*WIN))["context"]["trained"]
    assert context.Context.from_dict(stored, "it").as_dict() == stored
    assert stored["grounding"]["ceiling"] == sol.NO_CEILING and stored["grounding"]["percent_of_sol"] is None


@given(st.sampled_from([(s, f) for s, kind in context.SECTIONS.items() for f in kind.__dataclass_fields__]), st.booleans())
def test_number_with_a_hole_in_its_context_is_refused(place, drop):
    section, field = place
    stored = copy.deepcopy(judge(measurement(*WIN))["context"]["trained"])
    if drop:
        del stored[section][field]
    else:
        stored[section][field] = None
        if f"{section}.{field}" in context.MAY_BE_NONE:
            return
    with pytest.raises(SpecDecodeError, match=f"has no whole context: {section}.{field} is unknown"):
        context.Context.from_dict(stored, "this number")


def test_hole_in_a_context_names_what_hid_the_field():
    found = measurement(*WIN)
    found["arms"]["trained"]["resolved"]["expert_parallel"] = None
    with pytest.raises(SpecDecodeError, match="unknown. The server must tell its resolved configuration"):
        judge(found)
    found["arms"]["trained"]["problem"] = "http://a/server_info answered HTTP 500"
    with pytest.raises(SpecDecodeError, match="expert is unknown, for http://a/server_info answered HTTP 500. Mend that"):
        judge(found)


def test_every_number_of_a_sweep_has_a_context_of_its_own():
    found = judge(swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5)))
    (point,) = found["shapes"][0]["sweep"]
    assert set(point["context"]) == set(point["arms"]) == {"standing", "trained-k5"}
    assert point["context"]["trained-k5"]["serving"]["speculative_config"]["num_speculative_tokens"] == 5
    assert point["context"]["trained-k5"]["grounding"]["tpot_ms_mean"] == 2.0
    del point["context"]["trained-k5"]
    with pytest.raises(SpecDecodeError, match="trained-k5 arm's numbers at concurrency 1 has no whole context"):
        context.check_numbers(found)


def test_sweep_whose_server_differs_is_refused_or_named():
    found = swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5))
    found["arms"]["trained-k5"]["differences"] = [
        {"field": "x.y", "values": {"standing": 1, "trained-k5": 2}, "follows_from_speculation": False},
        {"field": "x.cudagraph_capture_sizes", "values": {}, "follows_from_speculation": True},
    ]
    named = [reason for reason in judge(found)["reasons"] if "x." in reason]
    assert named == ["the trained-k5 arm's server differs from the standing one in x.y: {'standing': 1, 'trained-k5': 2}"]
    found["arms"]["trained-k5"]["resolved"]["max_num_seqs"] = 8
    with pytest.raises(SpecDecodeError, match="standing and trained-k5 arms cannot be compared.*max_num_seqs: 4 and 8"):
        judge(found)


def test_sweep_has_its_share_of_the_speed_of_light_and_its_row():
    found = swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5))
    found["hardware"]["name"] = "NVIDIA H100 80GB HBM3"
    found["plan"]["target"]["bytes"] = 10_000_000_000
    result = judge(found, ceilings=CEILINGS, target_config=CONFIG, convert={**RIGHT_LAYERS, "parameters": 100_000_000})
    (point,) = result["shapes"][0]["sweep"]
    # Five drafting passes, and 4.5 tokens a step.
    assert point["speed_of_light"]["trained-k5"]["bytes_per_accepted_token"] == pytest.approx((1e10 + 5 * 2e8 + 70 * 5120) / 4.5)
    rows = {row["arm"]: row for row in report.arm_rows(result)}
    assert list(rows) == ["standing", "trained", "trained-k5", "beside it"]
    assert [row["speedup"] for row in rows.values()] == ["–", "2.00", "2.50", "–"]
    assert rows["trained-k5"]["sol"] == f"{point['speed_of_light']['trained-k5']['percent']:.1f}" != "–"
    assert rows["trained-k5"]["per_position"] == "0.90 0.80 0.70 0.60 0.50"


def test_measurement_that_was_gone_on_with_is_as_old_as_its_last_trial():
    found = measurement(*WIN)
    assert judge(found)["measured_at"] == found["finished_at"]
    for number, each in enumerate(found["trials"]):
        each["started_at"] = f"2025-12-0{number + 1}T00:00:00+00:00"
    assert judge(found)["measured_at"] == "2025-12-06T00:00:00+00:00"


def test_result_with_a_bare_number_is_refused():
    found = judge(measurement(*WIN))
    del found["shapes"][0]["context"]["standing"]
    with pytest.raises(SpecDecodeError, match="standing arm's numbers at concurrency 1 has no whole context"):
        context.check_numbers(found)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("max_num_seqs", 8, "serving.max_num_seqs: 4 and 8"),
        ("kv_cache_dtype", "fp8", "identity.kv_cache_dtype: auto and fp8"),
        ("tensor_parallel", 2, "parallelism.tensor: 1 and 2"),
        ("version", "0.31.0", "stack.version: 0.32.0 and 0.31.0"),
        ("enforce_eager", True, "serving.enforce_eager: False and True"),
    ],
)
def test_comparison_beyond_the_tested_factor_is_refused(field, value, name):
    found = measurement(*WIN)
    found["arms"]["trained"]["resolved"][field] = value
    with pytest.raises(SpecDecodeError, match=f"cannot be compared, for they differ in more .*{name}"):
        judge(found)


def test_what_follows_from_speculation_is_no_reason_against():
    found = measurement(*WIN)
    found["differences"] = [{"field": "cudagraph_capture_sizes", "values": {}, "follows_from_speculation": True}]
    assert judge(found)["tier"] == "VERDICT"


# Speed of light


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100-PCIE"), ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("NVIDIA GB200", "GB200"), ("NVIDIA GB300", "GB300"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIE"),
        ("NVIDIA-H100-80GB-HBM3", "H100"), ("NVIDIA-H100-PCIe", "H100-PCIE"), ("NVIDIA-H100-NVL", "H100-NVL"),
    ],
)  # fmt: skip
def test_hardware_by_the_name_that_it_gives_itself(name, key):
    found = sol.ceiling_for(name, CEILINGS)
    assert found is not None and found[0] == key and found[1]["source"]


def test_cpu_has_no_ceiling_unless_one_was_measured():
    assert sol.ceiling_for("Intel(R) Xeon(R) Processor", CEILINGS) is None
    assert sol.ceiling_for("NVIDIA GH200 480GB", CEILINGS) is None, "it is no H200"
    own = {"key": "bench-1", "memory_bandwidth_bytes_per_s": 5e10, "source": "STREAM triad"}
    assert sol.ceiling_for("Intel(R) Xeon(R) Processor", CEILINGS, own) == ("bench-1", own)
    with pytest.raises(SpecDecodeError, match="spec_sol_ceiling lacks source"):
        sol.ceiling_for("x", CEILINGS, {**own, "source": ""})


def test_share_of_the_speed_of_light_by_hand():
    found = measurement(*WIN)
    found["hardware"]["name"] = "NVIDIA H100 80GB HBM3"
    found["plan"]["target"]["bytes"] = 10_000_000_000
    result = judge(found, ceilings=CEILINGS, target_config=CONFIG, convert={**RIGHT_LAYERS, "parameters": 100_000_000})
    # Without speculation: weights and 20 + 100 / 2 tokens of KV cache, 2 * 10 * 2 * 64 * 2 bytes each.
    standing = result["shapes"][0]["speed_of_light"]["standing"]
    assert standing["tpot_ms_at_sol"] == pytest.approx(1e3 * (1e10 + 70 * 5120) / 3.35e12)
    assert standing["percent"] == pytest.approx(100 * standing["tpot_ms_at_sol"] / 5.0)
    # With it: three drafting passes more, and 3.4 tokens a step.
    trained = result["shapes"][0]["speed_of_light"]["trained"]
    assert trained["bytes_per_accepted_token"] == pytest.approx((1e10 + 3 * 2e8 + 70 * 5120) / 3.4)
    assert result["context"]["trained"]["grounding"]["ceiling"] == "H100"
    assert result["context"]["trained"]["grounding"]["percent_of_sol"] == round(trained["percent"], 2)


def test_experts_have_no_share_that_could_be_wrong():
    parts = sol.traffic({"bytes": 1}, {**CONFIG, "num_experts": 64}, {"kv_cache_dtype": "auto", "dtype": "bfloat16"}, None, None)
    assert parts["weight_bytes"] is None and sol.share({}, {}, 1, parts, 1.0) is None


def test_latent_attention_caches_its_latent():
    config = {**CONFIG, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert model_shape.kv_bytes_per_token(config, "auto", "torch.bfloat16") == 10 * 576 * 2
    assert model_shape.kv_bytes_per_token(config, "fp8", "torch.bfloat16") == 10 * 576


@pytest.mark.parametrize(
    ("profile", "level"),
    [(None, "L2"), ({"kernels": ["a.ncu-rep"]}, "L2"), ({"dcgm": ["m"]}, "L3"), ({"dcgm": ["m"], "kernels": ["a"]}, "L4")],
)
def test_rigor_is_never_above_the_evidence(profile, level):
    assert sol.rigor(profile)[0] == level


# Levers


def test_two_values_of_k_give_the_cost_of_a_position():
    found = judge(swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5)))["shapes"][0]["draft_lengths"]
    # r(3) = 2.5 * 3.4 / 5 = 1.7, r(5) = 2.0 * 4.5 / 5 = 1.8
    assert (found["v0"], found["c"]) == (pytest.approx(1.55), pytest.approx(0.05))
    assert found["best"]["k"] == 7 and found["best"]["tpot_ms"] == pytest.approx(5.0 / found["best"]["speedup"])


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0.5, 4)), min_size=2, max_size=6), st.floats(0.5, 2), st.floats(0, 0.5))
def test_fit_of_a_line_is_that_line(points, v0, c):
    exact = [(k, v0 + c * k) for k, _noise in points]
    fitted = levers.fit_step_cost(exact)
    if len({k for k, _cost in exact}) < 2:
        assert fitted is None
    else:
        assert fitted == (pytest.approx(v0, abs=1e-6), pytest.approx(c, abs=1e-6))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8).map(lambda r: sorted(r, reverse=True)), st.integers(1, 12))
def test_acceptance_length_grows_with_k_and_never_beyond_it(rates, k):
    assert 1 < levers.acceptance_length(rates, k) <= levers.acceptance_length(rates, k + 1) <= k + 2


def test_gap_between_training_and_serving_names_its_position():
    lever = next(x for x in judge(measurement(*WIN, rates=(0.85, 0.4, 0.3)))["next_levers"] if x["id"] == "data")
    assert "position 2: 0.85 in training, 0.47 served" in lever["expected"]


def test_frontier_is_ranked_and_each_lever_says_how_it_is_tested():
    found = judge(measurement(*WIN))["next_levers"]
    assert [lever["unlock"] for lever in found] == sorted((lever["unlock"] for lever in found), reverse=True)
    assert all(lever["id"] and lever["gate"] and lever["cost"] and lever["expected"] for lever in found)


def test_refuted_lever_is_kept_with_its_reason_and_not_proposed_again():
    first = judge(measurement(*WIN))
    assert any(lever["id"] == "k=4" for lever in first["next_levers"])
    longer = judge(measurement([5.0, 5.1, 5.0], [2.5, 2.6, 2.5], rates=(0.9, 0.8, 0.7, 0.1)), ledger=first["levers"])
    entry = next(x for x in longer["levers"]["levers"] if x["id"] == "k=4")
    assert entry["status"] == "refuted" and "K = 4 now and 3 before" in entry["reason"]
    third = judge(measurement([5.0, 5.1, 5.2], [2.5, 2.6, 2.5]), ledger=longer["levers"])
    assert "k=4" not in {lever["id"] for lever in third["next_levers"]}
    # Another draft may do better at K = 4: what was refuted is open again.
    other = measurement([5.0, 5.1, 5.2], [2.5, 2.6, 2.5])
    other["draft"]["sha"] = "another"
    assert "k=4" in {lever["id"] for lever in judge(other, ledger=longer["levers"])["next_levers"]}


def test_served_k_is_settled_at_every_concurrency_that_both_runs_measured():
    """Worse under load and no better without any: the first concurrency alone would not tell."""
    before = judge(at_loads([5.0, 5.1, 5.2], [2.5, 2.6, 2.5], [2.5, 2.6, 2.5], (0.9, 0.8, 0.7)))
    found = judge(at_loads([5.0, 5.1, 5.2], [2.0, 2.1, 2.0], [4.0, 4.1, 4.0], (0.9, 0.8, 0.7, 0.6)), ledger=before["levers"])
    lever = next(each for each in found["levers"]["levers"] if each["id"] == "k=4")
    assert (lever["status"], lever["worse_at"]) == ("mixed", [8])
    assert "better at concurrency 1, speed-up 2.50 and 2.00" in lever["reason"]
    assert "worse at concurrency 8, speed-up 1.25 and 2.00" in lever["reason"]
    # Whoever serves four now is led back, and no further.
    assert "k=5" not in {each["id"] for each in found["next_levers"]} and "k=3" in {each["id"] for each in found["next_levers"]}


def test_k_is_not_settled_by_a_concurrency_of_the_same_number():
    rates = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    before = judge(at_loads([5.0, 5.1, 5.2], [2.5, 2.6, 2.5], [2.5, 2.6, 2.5], rates))
    assert "k=8" in {each["id"] for each in before["next_levers"]}
    found = judge(at_loads([5.0, 5.1, 5.2], [2.4, 2.6, 2.5], [6.0, 6.1, 6.2], rates), ledger=before["levers"])
    assert next(each for each in found["levers"]["levers"] if each["id"] == "k=8")["status"] == "open"


def test_served_k_stays_open_where_no_load_was_measured_with_both():
    before = judge(measurement(*WIN))
    other = measurement(*WIN, rates=(0.9, 0.8, 0.7, 0.6))
    other["plan"]["concurrencies"] = [8]
    for each in other["trials"]:
        each["concurrency"] = each["client"]["in_flight"] = 8
    found = judge(other, ledger=before["levers"])
    assert next(each for each in found["levers"]["levers"] if each["id"] == "k=4")["status"] == "open"


def at_loads(standing, alone, loaded, rates):
    """TPOT of the trained arm at concurrency 1 and at 8."""
    found, busy = measurement(standing, alone, rates=rates), measurement(standing, loaded, rates=rates)
    found["plan"]["concurrencies"] = [1, 8]
    found["trials"] += [{**each, "concurrency": 8, "client": {**each["client"], "in_flight": 8}} for each in busy["trials"]]
    return found


def test_judging_the_same_measurement_twice_changes_nothing():
    first = judge(measurement(*WIN))
    assert judge(measurement(*WIN), ledger=first["levers"]) == first


def lever_of(found, name):
    return next(x for x in judge(found)["levers"]["levers"] if x["id"] == name)


def test_sweep_settles_its_own_levers():
    assert lever_of(swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5)), "k=5")["status"] == "proved"
    assert lever_of(swept(2, [5.0] * 3, [2.9] * 3, (0.9, 0.8)), "k=2")["status"] == "refuted"


def worse_under_load():
    """K = 5 beside 3: faster at concurrency 1, slower at 8."""
    found = swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5))
    found["plan"]["concurrencies"] = [1, 8]
    loaded = swept(5, [6.0] * 3, [4.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5), measurement([6.0, 6.1, 6.2], [3.0, 3.1, 3.0]))
    found["trials"] += [{**each, "concurrency": 8, "client": {**each["client"], "in_flight": 8}} for each in loaded["trials"]]
    return found


def test_larger_k_that_loses_under_load_is_mixed_and_not_proposed_again():
    found = worse_under_load()
    lever = lever_of(found, "k=5")
    assert lever["status"] == "mixed"
    assert "better at concurrency 1, speed-up 2.50 and 2.00" in lever["reason"]
    assert "worse at concurrency 8, speed-up 1.50 and 2.00" in lever["reason"]
    settled = judge(found)["levers"]
    later = judge(measurement(*WIN, rates=(0.9, 0.8, 0.7, 0.6)), ledger=settled)
    assert "k=5" not in {each["id"] for each in later["next_levers"]}


def test_k_beyond_one_that_is_worse_under_load_is_not_proposed():
    # The fitted cost of a position favours a K of seven at concurrency 1, while five loses at 8.
    found = swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5))
    assert "k=7" in {each["id"] for each in judge(found)["next_levers"]}
    assert not {each["id"] for each in judge(worse_under_load())["next_levers"]} & {"k=5", "k=7"}


def test_k_whose_tpot_is_no_lower_is_not_proved_by_a_slower_standing_arm():
    """Recorded on a GPU: the machine's pace changed between the two, for the standing arm more than for speculation."""
    found = measurement([1.69, 1.89, 2.02, 1.84, 1.88], [0.94, 1.02, 0.91, 0.96, 0.83], rates=(0.9, 0.88, 0.85))
    found = swept(4, [2.36, 2.48, 2.11, 2.64, 2.21], [1.02, 1.00, 0.94, 1.00, 0.89], (0.9, 0.86, 0.84, 0.82), found)
    lever = lever_of(found, "k=4")
    assert (lever["status"], lever["unlock"] > 1.2) == ("refuted", True)
    assert "no difference shown at concurrency 1, speed-up 2.48 and 1.92" in lever["reason"]


# Diagnoses


def test_wrong_k_is_said_where_another_k_wins():
    slow = measurement([5.0, 5.0, 5.0], [5.6, 5.6, 5.6], rates=(0.7, 0.3, 0.1, 0.0, 0.0))
    found = judge(swept(1, [5.0] * 3, [4.0] * 3, (0.7,), slow))
    assert (found["decision"], found["cause"]) == ("do_not_ship", "wrong_k")
    assert "K = 1 gives a speed-up of 1.25, measured" in found["diagnosis"]


def test_win_at_one_load_and_loss_at_another_is_the_wrong_regime():
    found = measurement(*WIN)
    found["plan"]["concurrencies"] = [1, 8]
    for pair in (1, 2, 3):
        found["trials"] += [
            trial("standing", pair, 5.0, concurrency=8),
            trial("trained", pair, 8.0, (0.9, 0.8, 0.7), concurrency=8),
        ]
    result = judge(found)
    assert (result["decision"], result["cause"]) == ("do_not_ship", "wrong_regime")
    assert "wins at concurrency 1 and loses at 8" in result["diagnosis"]


def test_win_that_breaks_a_guardrail_at_another_load_is_no_loss_there():
    found = at_loads([5.0] * 3, [3.0] * 3, [3.0] * 3, (0.9, 0.8, 0.7))
    for each in found["trials"]:
        if (each["arm"], each["concurrency"]) == ("trained", 8):
            each["client"] = {**each["client"], "ttft_ms": {**each["client"]["ttft_ms"], "p99": 1e6}}
    result = judge(found)
    assert (result["decision"], result["cause"]) == ("do_not_ship", "guardrail")
    assert result["diagnosis"].startswith("It wins at concurrency 1. At 8: It is faster, but breaks a guardrail")


@pytest.mark.parametrize(("block", "proposed"), [(5, {"k=4", "k=2"}), (4, {"k=2"})])
def test_k_beyond_dflashs_block_is_not_proposed(block, proposed):
    found = judge(measurement(*WIN, rates=(0.9, 0.8, 0.7)), draft_config={"block_size": block})
    assert {each["id"] for each in found["next_levers"] if each["id"].startswith("k=")} == proposed
    curve = judge(swept(2, [5.0] * 3, [2.9] * 3, (0.9, 0.8)), draft_config={"block_size": block})
    assert [point["k"] for point in curve["shapes"][0]["draft_lengths"]["curve"]] == list(range(1, block))


@pytest.mark.parametrize(
    ("urls", "served_on", "known"),
    [
        (("http://a:8000", "http://b:8000"), {}, False),
        (("http://a:8000", "http://a:8001"), {}, False),
        (("http://a:8000", "http://a:8001"), {"node": "a"}, True),
        (("http://127.0.0.1:1", "http://localhost:2"), {}, True),
    ],
)
def test_servers_elsewhere_are_on_one_node_only_if_somebody_says_so(urls, served_on, known):
    found = measurement(*WIN)
    found["plan"]["served_on"] = served_on
    for name, url in zip(("standing", "trained"), urls):
        found["arms"][name]["url"] = url
    result = judge(found)
    assert (result["tier"] == "VERDICT") is known
    assert any("served elsewhere" in reason for reason in result["tier_reasons"]) is not known


def looking_up(found, arm, share_of_steps):
    """Prompt lookup, which drafts on a share of the steps only."""
    found["arms"][arm]["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 3}
    for each in (each for each in found["trials"] if each["arm"] == arm):
        each["engine"]["itl_s"]["count"] = each["engine"]["drafts"] / share_of_steps
    return found


def test_what_lookup_accepts_of_a_draft_is_not_what_it_yields_a_step():
    found = looking_up(measurement(*WIN, rates=(0.7, 0.5, 0.4), base_rates=(0.9, 0.9, 0.9)), "standing", 0.2)
    result = judge(found)
    assert result["decision"] == "ship"
    standing = result["shapes"][0]["arms"]["standing"]
    assert (standing["acceptance_length"], standing["tokens_per_step"]) == (pytest.approx(3.7), pytest.approx(1.54))
    assert any("tokens a step 2.60 against the standing arm's 1.54" in reason for reason in result["reasons"])


def test_step_cost_of_lookup_counts_the_steps_without_a_draft():
    """Recorded on a GPU: 373 drafts on 1856 steps, at concurrency 1."""
    found = looking_up(measurement([2.73] * 3, [6.51] * 3, rates=(0.40, 0.18, 0.11)), "trained", 373 / 1856)
    shape = judge(found, train=None, convert=None, dataset=None)["shapes"][0]
    assert shape["step_cost"] == pytest.approx(6.51 / 2.73 * (1 + 0.69 * 373 / 1856))
    assert shape["draft_lengths"]["points"][0]["acceptance_length"] == shape["arms"]["trained"]["tokens_per_step"]


def test_lookup_that_finds_nothing_is_not_called_untrained():
    found = measurement([5.0] * 3, [6.0] * 3, rates=(0.05, 0.0))
    found["arms"]["trained"]["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 2}
    result = judge(found, train=None, convert=None, dataset=None)
    assert (result["decision"], result["cause"], result["tier"]) == ("do_not_ship", "nothing_to_copy", "VERDICT")


def test_untrained_draft_of_unknown_origin():
    found = judge(measurement([5.0] * 3, [5.0] * 3, rates=(0.02, 0.0)), train=None, convert=None)
    assert (found["decision"], found["cause"]) == ("do_not_ship", "not_learned")


def test_cheaper_but_less_accepted_than_the_standing_draft():
    found = judge(measurement([5.0] * 3, [4.0] * 3, rates=(0.6, 0.3, 0.1), base_rates=(0.9, 0.8, 0.7)), train=None)
    assert (found["decision"], found["cause"]) == ("do_not_ship", "fewer_accepted")


@pytest.mark.parametrize("served", [[1, 7, 12], [3, 9, 14], None])
def test_layers_shifted_by_one_are_caught_from_the_served_config(served):
    config = {} if served is None else {"eagle_aux_hidden_state_layer_ids": served}
    convert = {
        **RIGHT_LAYERS, "problems": [], "loads": True, "draft_dir": "/d", "sha": "s",
        "tensors": [], "parameters": 1,
    }  # fmt: skip
    red = gates.evaluate("artifact", {"convert": convert, "draft_config": config, "capture": {"layers": [1, 7, 12]}})
    assert not red.passed and "which vLLM's eagle_aux_hidden_state_layer_ids calls [2, 8, 13]" in red.reasons[0]
    assert verdict.judge(measurement(*WIN), convert=convert, draft_config=config)["cause"] == "layers"
    good = {"eagle_aux_hidden_state_layer_ids": [2, 8, 13]}
    assert gates.evaluate("artifact", {"convert": convert, "draft_config": good}).passed


def test_dflash_layers_are_compared_in_their_own_convention():
    convert = {"method": "dflash", "layers_captured": [1, 7], "layers_served": [1, 7]}
    right, wrong = ({"dflash_config": {"target_layer_ids": ids}} for ids in ([1, 7], [2, 8]))
    assert verdict.judge(measurement(*WIN), convert=convert, draft_config=right)["decision"] == "ship"
    assert verdict.judge(measurement(*WIN), convert=convert, draft_config=wrong)["cause"] == "layers"


# Guardrails


def test_changed_greedy_answers_keep_it_back():
    found = measurement(*WIN)
    for each in found["trials"]:
        each["texts"] = ["x", "z" if each["arm"] == "trained" else "y"]
    result = judge(found)
    assert result["decision"] == "inconclusive" and any("50% of greedy answers differ" in r for r in result["reasons"])


def test_answers_that_differ_within_an_arm_as_well_are_the_machine_s_doing():
    found = measurement(*WIN)
    for number, each in enumerate(found["trials"]):
        each["texts"] = ["x", f"y{number}"]
    assert judge(found)["decision"] == "ship"


def test_impossible_acceptance_is_not_believed():
    assert judge(measurement(*WIN, rates=(0.5, 0.8, 0.7)))["decision"] == "inconclusive"


def test_five_pairs_bring_a_p_value_and_an_interval():
    found = judge(measurement([5.0, 5.1, 5.0, 5.05, 5.0], [2.5, 2.6, 2.5, 2.5, 2.55]))
    shape = found["shapes"][0]
    assert found["tier"] == "VERDICT" and found["decision"] == "ship"
    assert shape["p_value"] == pytest.approx(1 / 32) and 1.9 < shape["interval"][0] <= shape["interval"][1] < 2.1
    assert any("p = 0.031 for a win, 95 % interval" in reason for reason in found["reasons"])


def test_extra_trials_of_the_standing_arm_add_to_the_noise():
    quiet, noisy = measurement(*WIN), measurement(*WIN)
    for number, value in enumerate((3.0, 6.0, 9.0), 50):
        noisy["trials"].append({**trial("standing", number, value), "purpose": "noise"})
    floors = [judge(found)["shapes"][0]["noise_floor"] for found in (quiet, noisy)]
    assert floors[1] > 5 * floors[0] and judge(noisy)["shapes"][0]["noise_trials"] == 3


# Freshness and promotion


FACTS = {"draft_sha": "d", "target_sha": "t", "hardware": "H", "vllm": "0.32.0"}


def test_fresh_verdict_is_not_stale():
    assert verdict.stale(judge(measurement(*WIN)), FACTS) == []
    assert verdict.stale(judge(measurement(*WIN)), {**FACTS, "vllm": "0.32.0+cu130"}) == []


@pytest.mark.parametrize("name", FACTS)
def test_each_changed_fact_makes_a_verdict_stale(name):
    found = judge(measurement(*WIN))
    assert verdict.stale(found, {**FACTS, name: "other"}) == [f"{name} was {FACTS[name]} and is other now"]
    assert verdict.stale(found, {**FACTS, name: None})[0].startswith(f"nothing tells what {name} is now")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"decision": "do_not_ship"}, "the decision is do not ship, not ship"),
        ({"tier": "DRAFT", "tier_reasons": ["measured on a CPU"]}, "it is a DRAFT, not a VERDICT: measured on a CPU"),
    ],
)
def test_promotion_needs_a_verdict_that_says_ship(change, words):
    result = gates.evaluate("promotion", {"verdict": {**judge(measurement(*WIN)), **change}, "facts": FACTS})
    assert result.passed == (not words) and (not words or words in result.reasons[0])
    assert result.figures["previous"] is None and result.figures["speculative_config"]["method"] == "eagle3"


def test_verdict_on_an_earlier_measurement_promotes_nothing():
    """A later one that could not be judged leaves the file of the verdict as it was."""
    judged, later = judge(measurement(*WIN)), measurement([5.0, 5.1, 5.0], [6.0, 6.1, 6.0])
    assert gates.evaluate("promotion", {"verdict": judged, "facts": FACTS, "measurement": measurement(*WIN)}).passed
    red = gates.evaluate("promotion", {"verdict": judged, "facts": FACTS, "measurement": later})
    assert red.reasons == ["what was measured last is not what it judged"]


def test_verdict_against_a_draft_that_was_replaced_promotes_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = measurement(*WIN, base_rates=(0.4, 0.2, 0.1))
    found["arms"]["standing"] |= {
        "speculative_config": {"method": "eagle3", "model": str(tmp_path)}, "draft_sha": evidence.draft_sha(str(tmp_path)),
    }  # fmt: skip
    given = {"verdict": judge(found), "facts": {"hardware": "H", "vllm": "0.32.0", "target_sha": "t"}}
    assert "standing" not in "; ".join(gates.evaluate("promotion", evidence.gather("promotion", given)).reasons)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    reasons = gates.evaluate("promotion", evidence.gather("promotion", given)).reasons
    assert any(reason.startswith("standing_draft_sha was ") for reason in reasons)


def test_promotion_of_another_artifact_is_refused(tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"weights")
    found = measurement(*WIN)
    found["draft"]["sha"] = evidence.draft_sha(str(draft))
    found["arms"]["trained"]["speculative_config"]["model"] = str(draft)
    given = {"verdict": judge(found), "facts": {"hardware": "H", "vllm": "0.32.0", "target_sha": "t", "draft_sha": "claimed"}}
    assert gates.evaluate("promotion", evidence.gather("promotion", given)).passed
    (draft / "model.safetensors").write_bytes(b"other weights")
    red = gates.evaluate("promotion", evidence.gather("promotion", given))
    assert not red.passed and red.reasons[0].startswith("draft_sha was ")


def measured_on_kubernetes(folder):
    """What a promotion reads after a measurement on Kubernetes, and the draft that the pods served a copy of."""
    draft = folder / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"weights")
    sha = evidence.draft_sha(str(draft))
    found = measurement(*WIN)
    found["draft"]["sha"] = sha
    found["hardware"]["name"] = "NVIDIA-H100-80GB-HBM3"
    for name, config in (("standing", None), ("trained", found["arms"]["trained"]["speculative_config"])):
        found["arms"][name]["image"] = "vllm/vllm-openai:v0.32.0"
        if config:
            config["model"] = f"/models/target/speculator/tiny/{sha}"
    facts = {"hardware": "NVIDIA H100 80GB HBM3", "vllm": "0.32.0", "target_sha": "t", "image": "vllm/vllm-openai:v0.32.0"}
    return draft, {
        "verdict": judge(found), "facts": facts, "experiment": {"slug": "tiny"}, "draft": {"draft_dir": str(draft), "sha": sha},
    }  # fmt: skip


def test_verdict_of_kubernetes_is_promoted_while_the_draft_that_was_staged_is_the_same(tmp_path):
    draft, given = measured_on_kubernetes(tmp_path)
    assert given["verdict"]["expiry"]["holds_for"]["image"] == "vllm/vllm-openai:v0.32.0"
    result = gates.evaluate("promotion", evidence.gather("promotion", given))
    assert result.passed, result.reasons
    (draft / "model.safetensors").write_bytes(b"other weights")
    assert gates.evaluate("promotion", evidence.gather("promotion", given)).reasons[0].startswith("draft_sha was ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft": {"draft_dir": "/elsewhere", "sha": "0123"}}, "nothing tells what draft_sha is now"),
        ({"draft": None}, "nothing tells what draft_sha is now"),
        ({"experiment": {"slug": "other"}}, "nothing tells what draft_sha is now"),
        ({"facts": {"hardware": "NVIDIA H200"}}, "hardware was NVIDIA-H100-80GB-HBM3 and is NVIDIA H200 now"),
        ({"facts": {"image": None}}, "nothing tells what image is now; it was vllm/vllm-openai:v0.32.0"),
        ({"facts": {"image": "vllm/vllm-openai:v0.33.0"}}, "image was vllm/vllm-openai:v0.32.0 and is vllm/vllm-openai:v0.33.0"),
    ],
)
def test_verdict_of_kubernetes_is_stale_where_something_differs(tmp_path, change, words):
    _draft, given = measured_on_kubernetes(tmp_path)
    changed = {**given, **change, "facts": {**given["facts"], **change.get("facts", {})}}
    result = gates.evaluate("promotion", evidence.gather("promotion", changed))
    assert not result.passed and words in " ".join(result.reasons)


def test_promotion_without_a_whole_verdict_is_one_sentence():
    with pytest.raises(SpecDecodeError, match="The verdict lacks 'verdict'"):
        evidence.gather("promotion", {"facts": {}})


# Evidence


def test_training_curve_is_found_below_the_bundle_and_thinned(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "train").mkdir()
    rows = [{"step": n, "loss": 1.0 / n, "acc_0": 0.5, "lr": 1.0} for n in range(1, 1001)]
    (tmp_path / "train/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')
    (tmp_path / "results/train.json").write_text(json.dumps({"metrics_path": "train/metrics.jsonl"}))
    found = evidence.gather("acceptance", {"train": str(tmp_path / "results/train.json")})
    curve = found["train"]["curve"]
    assert len(curve) == 200 and set(curve[0]) == {"step", "loss", "acc_0"}


def test_public_draft_has_a_share_of_the_speed_of_light_by_the_size_of_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    found = measurement(*WIN)
    found["hardware"]["name"], found["plan"]["target"]["bytes"] = "NVIDIA H100 80GB HBM3", 10_000_000_000
    found["arms"]["trained"]["speculative_config"]["model"] = str(tmp_path)
    given = evidence.gather("acceptance", {"acceptance": found, "ceilings": CEILINGS, "target_config": CONFIG})
    light = gates.evaluate("acceptance", given).figures["shapes"][0]["speed_of_light"]["trained"]
    assert light["draft_bytes"] == 1000 and light["draft_passes"] == 3
    found["arms"]["trained"]["speculative_config"]["model"] = "/in/a/pod"
    assert evidence.gather("acceptance", {"acceptance": found})["draft_bytes"] is None


def test_profile_counts_only_if_it_is_one_and_of_that_time(tmp_path):
    metrics, kernels = tmp_path / "dcgm.txt", tmp_path / "run.ncu-rep"
    metrics.write_text('DCGM_FI_PROF_DRAM_ACTIVE{gpu="0"} 0.61\n')
    kernels.write_text("x")
    profile = {"dcgm": [str(metrics)], "kernels": [str(kernels)]}
    for path in (metrics, kernels):
        os.utime(path, (1_767_225_700, 1_767_225_700))
    window = ("2026-01-01T00:00:00+00:00", "2026-01-01T00:10:00+00:00")
    assert sol.rigor(evidence.captured(profile, window))[0] == "L4"
    with pytest.raises(SpecDecodeError, match="outside the measurement"):
        evidence.captured(profile, ("2026-02-01T00:00:00+00:00", "2026-02-01T00:10:00+00:00"))
    metrics.write_text("nothing of the kind\n")
    with pytest.raises(SpecDecodeError, match="holds no metrics of the DCGM exporter"):
        evidence.captured(profile, window)
    with pytest.raises(SpecDecodeError, match="is missing or empty"):
        evidence.captured({"dcgm": [str(tmp_path / "none")]}, window)


# Plots


def test_plots_are_whole_svg_that_stays_inside_its_frame():
    found = swept(5, [5.0] * 3, [2.0] * 3, (0.9, 0.8, 0.7, 0.6, 0.5))
    curve = [{"step": n, "loss": 5.0 / n, "acc_0": 1 - 1 / n} for n in range(1, 30)]
    shown = plots.figures(judge(found, train={**HEALTHY, "curve": curve}))
    assert [figure["caption"].partition(",")[0] for figure in shown] == [
        "Accepted by position", "TPOT of each trial", "Speed-up against K", "Training: loss", "Training: accuracy by position"
    ]  # fmt: skip
    for figure in shown:
        root = ElementTree.fromstring(figure["svg"])
        for node in root.iter():
            for key in ("x", "cx", "x1", "x2"):
                assert 0 <= float(node.get(key, 0)) <= plots.WIDTH
            for key in ("y", "cy", "y1", "y2"):
                assert 0 <= float(node.get(key, 0)) <= plots.HEIGHT


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_ticks_enclose_the_range(low, span):
    ticks = plots._ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 * max(1, abs(low)) and ticks[-1] >= low + span - 1e-6 * max(1, abs(low + span))
    assert 2 <= len(ticks) <= 9 and all(math.isfinite(tick) for tick in ticks)


def test_names_are_escaped_in_plots():
    svg = plots.chart("<b>", [plots.Series("a & b", [(1, 2)])], x_label="<", y_label=">")
    assert "<b>" not in svg.replace("&lt;b&gt;", "") and "a &amp; b" in svg
