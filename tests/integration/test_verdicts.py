# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drafts that lose, measured on a real vLLM: each is not shipped, and for the right reason.

One small draft is trained, then spoiled: its weights shuffled, its layers taken from the wrong end of the target, or
shifted by one. Prompt lookup that loses goes through the public playbook.
"""

from __future__ import annotations

import array
import copy
import json
import os
import pathlib
import random
import shutil
import struct
import subprocess

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import evidence, gates

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"
LIMIT_S = 900
#: a draft of this size learns a little in a minute: what counts as healthy is set by what it reached
SETTINGS = {
    "chat_template": "qwen",
    "spec_poll_interval": 1,
    "spec_train_rows": 160,
    "spec_eval_rows": 12,
    "spec_max_new_tokens": 60,
    "spec_train_steps": 60,
    "spec_thresholds": {"training": {"min_accuracy": 0.1}},
    "spec_prompts": 6,
    "spec_max_tokens": 40,
    "spec_warmup": 2,
}
FLAGS = [
    "--max-model-len=512", "--max-num-seqs=4", "--max-num-batched-tokens=512", "--dtype=bfloat16", "--no-enable-prefix-caching",
    "--enforce-eager", "--gpu-memory-utilization=0.2",
]  # fmt: skip
#: matches any repeated token and drafts far on: almost all of it is verified for nothing, of a long prompt so much that a
#: busy machine's noise cannot hide the loss
NGRAM = {"method": "ngram", "num_speculative_tokens": 120, "prompt_lookup_max": 1, "prompt_lookup_min": 1}


def play(playbook, check=True, **settings):
    answer = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), f"playbooks/{playbook}.yml", "-i", "inventories/local",
         "-e", json.dumps({**SETTINGS, **settings})],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert not check or answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    return answer.stdout


def site(built):
    return {"target": str(built.target), "spec_work_dir": str(built.work), "spec_verdicts_dir": str(built.work / "host_vars")}


@pytest.fixture(scope="module")
def bundle_of_draft(built):
    """The loop's own draft, where it was trained before in these tests; else one trained now."""
    found = built.work / "loop-test/spec-decode"
    if not (found / "results/draft.json").exists():
        play("train_draft", **site(built), method="eagle3", experiment="verdict-test", spec_stop_phase="convert")
        found = built.work / "verdict-test/spec-decode"
    return found


def results(folder, *phases):
    return {phase: str(folder / "results" / f"{phase}.json") for phase in phases}


def spoiled(draft, place, layers=None, shuffle=False):
    """A copy of a draft with other layer ids in its config, or with each tensor's values in another order."""
    shutil.copytree(draft, place)
    config = json.loads((place / "config.json").read_text())
    if layers:
        config["eagle_aux_hidden_state_layer_ids"] = layers
        (place / "config.json").write_text(json.dumps(config))
    if shuffle:
        file = place / "model.safetensors"
        content = bytearray(file.read_bytes())
        start = 8 + struct.unpack("<Q", content[:8])[0]
        rng = random.Random(0)
        for name, tensor in json.loads(content[8:start]).items():
            if name == "__metadata__" or len(tensor["shape"]) < 2 or name == "embed_tokens.weight":
                continue
            first, last = (start + offset for offset in tensor["data_offsets"])
            values = array.array("H", bytes(content[first:last]))
            rng.shuffle(values)
            content[first:last] = values.tobytes()
        file.write_bytes(content)
    return str(place)


@pytest.fixture(scope="module")
def measured(built, bundle, bundle_of_draft, tmp_path_factory):
    """The spoiled drafts against no speculation, all in one session in ABBA order."""
    folder = tmp_path_factory.mktemp("measured")
    draft = json.loads((bundle_of_draft / "results/draft.json").read_text())["draft_dir"]
    drafts = {
        "shuffled": spoiled(draft, folder / "shuffled", shuffle=True),
        "wrong-end": spoiled(draft, folder / "wrong-end", layers=[5, 6, 7]),
    }
    arms = [{"name": "standing", "speculative_config": None}]
    arms += [
        {"name": name, "speculative_config": {"method": "eagle3", "num_speculative_tokens": 3, "model": path}}
        for name, path in drafts.items()
    ]
    target = {"path": str(built.target), "sha": "t", "bytes": 1}
    plan = {
        "model": "small", "target": target, "prompts": {"path": str(bundle_of_draft / "data/eval.jsonl"), "count": 6},
        "max_tokens": 40, "temperature": 0.0, "seed": 7, "warmup": 2, "trials": 3, "concurrencies": [1], "ports": [0, 0, 0],
        "startup_timeout_s": 300, "server_arguments": FLAGS, "server_environment": {"VLLM_NO_USAGE_STATS": "1"}, "arms": arms,
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    subprocess.run(
        [str(ENGINE), str(bundle / "measure_arms.py"), "--plan", str(folder / "plan.json"), "--out", str(folder / "out.json")],
        check=True, timeout=LIMIT_S,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    return json.loads((folder / "out.json").read_text())


def judged(measured, name, given, **thresholds):
    """The gate's verdict on one of the session's drafts."""
    one = copy.deepcopy(measured)
    one["arms"] = {"standing": one["arms"]["standing"], "trained": one["arms"][name]}
    one["trials"] = [
        {**trial, "arm": "trained" if trial["arm"] == name else "standing"}
        for trial in one["trials"]
        if trial["arm"] in ("standing", name)
    ]
    found = gates.evaluate("acceptance", evidence.gather("acceptance", {**given, "acceptance": one}), thresholds)
    assert found.passed, found.reasons
    return found.figures


def test_shuffled_weights_are_a_mismatch_of_training_and_serving(measured, bundle_of_draft):
    reached = json.loads((bundle_of_draft / "results/train.json").read_text())["last"]["accs"][0]
    verdict = judged(measured, "shuffled", results(bundle_of_draft, "train", "convert", "dataset"), healthy_accuracy=reached)
    assert (verdict["decision"], verdict["cause"]) == ("do_not_ship", "train_serve_mismatch"), verdict["reasons"]
    assert verdict["arms"]["trained"]["acceptance_per_position"][0] < 0.15
    assert verdict["greedy_outputs_equal"], "a bad draft costs time, never answers"


def test_layers_of_the_wrong_end_are_named(measured, bundle_of_draft):
    verdict = judged(measured, "wrong-end", results(bundle_of_draft, "train", "convert", "dataset"))
    assert (verdict["decision"], verdict["cause"]) == ("do_not_ship", "layers"), verdict["reasons"]
    assert "the served draft's config says [5, 6, 7]" in verdict["diagnosis"]


def test_layers_shifted_by_one_are_caught_without_measuring(bundle_of_draft, tmp_path):
    convert = json.loads((bundle_of_draft / "results/convert.json").read_text())
    given = results(bundle_of_draft, "capture")
    assert gates.evaluate("artifact", evidence.gather("artifact", {**given, "convert": convert})).passed
    captured = convert["layers_captured"]
    shifted = {**convert, "draft_dir": spoiled(convert["draft_dir"], tmp_path / "shifted", layers=captured)}
    red = gates.evaluate("artifact", evidence.gather("artifact", {**given, "convert": shifted}))
    assert not red.passed and f"but the served draft's config says {captured}" in red.reasons[0]


@pytest.fixture(scope="module")
def lookup(built, bundle_of_draft):
    """Prompt lookup by the public playbook, at two concurrencies and with a further K: its bundle, and what was printed."""
    rows = [json.loads(line) for line in (bundle_of_draft / "data/eval.jsonl").read_text().splitlines()]
    said = " ".join(turn["content"] for row in rows for turn in row["conversations"])
    long = [{"conversations": [{"role": "user", "content": said[30 * row : 30 * row + 700]}]} for row in range(12)]
    (built.work / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in long))
    settings = {
        "experiment": "lookup", "spec_candidate": NGRAM, "spec_prompts_file": str(built.work / "long.jsonl"),
        "spec_concurrencies": [1, 2], "spec_sweep_k": [2], "spec_aa_trials": 0, "spec_prompts": 12,
        "spec_sol_ceiling": {"key": "test", "memory_bandwidth_bytes_per_s": 1e10, "source": "made up"},
    }  # fmt: skip
    output = play("validate_draft", **site(built), **settings)
    return built.work / "lookup/spec-decode", " ".join(output.split())


def test_prompt_lookup_that_loses_goes_through_the_public_playbook(built, lookup):
    found, output = lookup
    verdict = json.loads((found / "results/verdict.json").read_text())
    assert (verdict["decision"], verdict["tier"]) == ("do_not_ship", "DRAFT"), verdict["reasons"]
    # A much shorter draft may be worth its cost.
    assert verdict["cause"] in ("draft_too_slow", "nothing_to_copy", "wrong_k") and verdict["diagnosis"] in output
    assert "<svg" in (found / "report.html").read_text() and "method=eagle3" in (found / "results/levers.json").read_text()
    refused = play("promote_draft", check=False, **site(built), experiment="lookup")
    assert "the decision is do not ship, not ship" in " ".join(refused.split())
    assert not list(found.glob("deploy/standing-*")), "nothing may be written for a draft that lost"


def test_every_k_at_every_concurrency_has_its_own_shape(lookup):
    found, output = lookup
    verdict = json.loads((found / "results/verdict.json").read_text())
    assert [shape["concurrency"] for shape in verdict["shapes"]] == [1, 2]
    for shape in verdict["shapes"]:
        (point,) = shape["sweep"]
        measured = {**shape["context"], "trained-k2": point["context"]["trained-k2"]}
        assert {context["workload"]["concurrency"] for context in measured.values()} == {shape["concurrency"]}
        assert [context["serving"]["speculative_config"] for context in measured.values()] == [
            "none", NGRAM, {**NGRAM, "num_speculative_tokens": 2},
        ]  # fmt: skip
        assert all(0 < context["grounding"]["percent_of_sol"] < 100 for context in measured.values())
        # A busy machine may leave a pair void.
        assert len(point["rates"]) == 2 and 1 <= len(point["speedup_pairs"]) <= 3 and point["differences"] == []
    for report in (found / "report.md").read_text(), (found / "report.html").read_text():
        assert report.count("ngram K=2") == 2 and report.count("standing beside trained-k2") == 2
    assert output.count("ngram K=2") == 2
    (settled,) = [lever for lever in verdict["levers"]["levers"] if lever["id"] == "k=2"]
    assert settled["status"] in ("proved", "mixed", "refuted") and settled["gate"] == "this run's sweep"
