# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gates: green evidence, each way of being red, and evidence that is missing."""

from __future__ import annotations

import copy

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import gates
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

GREEN = {
    "preflight": {"preflight": {"checks": [{"name": "disk", "ok": True, "reason": "1 GB free", "remedy": ""}]}},
    "dataset": {
        "dataset": {
            "counts": {"train": 100, "eval": 10}, "expected": {"train": 100, "eval": 10}, "rows_failed": 0,
            "empty_masks": 0, "overlap_train_eval": 0, "mask_outside_assistant": 0, "supervised_span": "It is 7.",
            "tokens": 1000, "supervised_tokens": 700,
        }
    },
    "capture": {
        "capture": {
            "samples": {"expected": 100, "written": 100}, "layers": [1, 7, 12], "nonfinite": 0, "shape_errors": [],
            "tokens": 1000, "bytes": 4096, "throughput": {"tokens_per_s": 10.0},
            "probe": {
                "samples": [0, 1], "tolerance": 0.05, "lm_head_argmax_agreement": 1.0, "aux_max_abs_diff": 0.001,
            },
        }
    },
    "training": {
        "train": {
            "steps": 400, "max_steps": 400, "nonfinite_steps": 0, "first": {"loss": 5.0, "acc_0": 0.2},
            "last": {"loss": 1.0, "acc_0": 0.9},
        }
    },
    "artifact": {
        "convert": {
            "method": "eagle3", "problems": [], "loads": True,
            "layers_captured": [1, 7, 12], "layers_served": [2, 8, 13], "draft_dir": "/d", "sha": "s", "tensors": [1],
            "parameters": 5,
        }
    },
    "overfit": {
        "train": {"last": {"loss": 0.1, "accs": [1.0, 0.99, 0.97]}},
        "acceptance": {
            "trials": [{"arm": "trained", "void": "", "engine": {"draft_tokens": 100, "accepted_tokens": 96}}],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("gate", sorted(GREEN))
def test_green_evidence_passes(gate):
    found = gates.evaluate(gate, GREEN[gate])
    assert found.passed and not found.reasons and found.figures


RED = [
    ("overfit", ("train", "last", "accs"), [0.6, 0.3], "did not learn its one sample: accuracy 0.30"),
    (
        "overfit",
        ("acceptance", "trials", 0, "engine", "accepted_tokens"),
        5,
        "knows its one sample (accuracy 0.97), but the server accepts only 5% of it",
    ),
    ("overfit", ("acceptance", "trials", 0, "void"), "foreign traffic", "accepts only 0% of it"),
    ("capture", ("capture", "probe", "next_token_agreement"), 0.01, "names the text's next token in only 1.0% of positions"),
    ("preflight", ("preflight", "checks", 0, "ok"), False, "disk: 1 GB free"),
    ("preflight", ("preflight", "checks"), [], "nothing was checked"),
    ("dataset", ("dataset", "counts", "train"), 99, "99 train rows instead of 100"),
    ("dataset", ("dataset", "rows_failed"), 3, "3 rows do not render"),
    ("dataset", ("dataset", "empty_masks"), 1, "1 rows have an empty loss mask"),
    ("dataset", ("dataset", "overlap_train_eval"), 2, "2 eval prompts are in the training data"),
    ("dataset", ("dataset", "mask_outside_assistant"), 1, "not just the assistant's words"),
    ("dataset", ("dataset", "supervised_span"), " \n", "covers no text at all"),
    ("capture", ("capture", "samples", "written"), 99, "99 of 100 samples"),
    ("capture", ("capture", "nonfinite"), 1, "1 samples hold NaN"),
    ("capture", ("capture", "shape_errors"), ["data_3: aux (5, 8)"], "the first data_3: aux"),
    ("capture", ("capture", "probe", "samples"), [], "looked at no sample"),
    ("capture", ("capture", "probe", "lm_head_argmax_agreement"), 0.5, "in 50.0% of positions"),
    ("capture", ("capture", "probe", "aux_max_abs_diff"), 0.2, "differ from the target's own by 0.200"),
    ("training", ("train", "steps"), 200, "stopped at step 200 of 400"),
    ("training", ("train", "nonfinite_steps"), 1, "1 logged steps hold NaN"),
    ("training", ("train", "last", "loss"), 0.0, "the loss did not fall"),
    ("training", ("train", "last", "loss"), 6.0, "the loss did not fall: 5.000 at first, 6.000 at last"),
    ("training", ("train", "last", "acc_0"), 0.02, "first position is 0.02, below 0.5"),
    ("artifact", ("convert", "problems"), ["tensor fc.weight [8, 24] is missing"], "fc.weight"),
    ("artifact", ("convert", "loads"), False, "nothing tried to load the draft"),
    ("artifact", ("convert", "layers_served"), [1, 7, 12], "but served on [1, 7, 12]"),
]


@pytest.mark.parametrize(("gate", "path", "value", "words"), RED)
def test_red_evidence_says_why_and_what_to_do(gate, path, value, words):
    evidence = copy.deepcopy(GREEN[gate])
    place = evidence
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = gates.evaluate(gate, evidence)
    assert not found.passed
    assert any(words in reason for reason in found.reasons), found.reasons
    assert words in found.message(gate) and "Next:" in found.message(gate)


@pytest.mark.parametrize("gate", [*sorted(GREEN), "acceptance"])
def test_missing_evidence_is_red_not_an_error(gate):
    found = gates.evaluate(gate, {})
    assert not found.passed and found.reasons[0].startswith("the evidence lacks")


def test_capture_at_other_layers_is_red():
    found = gates.evaluate("capture", GREEN["capture"], {"layers": [2, 8, 13]})
    assert found.reasons == ["captured at layers [1, 7, 12] instead of [2, 8, 13]"]


def test_thresholds_are_the_users():
    assert not gates.evaluate("training", GREEN["training"], {"min_accuracy": 0.95}).passed


def test_dflash_has_one_accuracy():
    evidence = copy.deepcopy(GREEN["training"])
    evidence["train"]["last"] = {"loss": 1.0, "acc": 0.8}
    assert gates.evaluate("training", evidence).figures["accuracy"] == 0.8


def test_unknown_gate():
    with pytest.raises(SpecDecodeError, match="no gate 'vibes'"):
        gates.evaluate("vibes", {})


def test_threshold_that_no_gate_knows_or_that_is_no_number_is_refused():
    with pytest.raises(SpecDecodeError, match="spec_thresholds.training has 'min_acuracy'.* Its thresholds: min_accuracy"):
        gates.evaluate("training", {}, {"min_acuracy": 0.9})
    with pytest.raises(SpecDecodeError, match="spec_thresholds.acceptance.min_trials is 'five', but must be a number"):
        gates.evaluate("acceptance", {}, {"min_trials": "five"})
    # What a template made of a number is one.
    assert gates.limits("acceptance", {"min_trials": "5"})["min_trials"] == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acceptence": {"min_trials": 5}}, "spec_thresholds has 'acceptence', which is no gate. The gates: acceptance, "),
        (
            {"acceptance": {"min_trails": 5}},
            "spec_thresholds.acceptance has 'min_trails', which the acceptance gate does not know",
        ),
        ({"acceptance": [5]}, r"spec_thresholds.acceptance is \[5\], but must hold thresholds by name"),
    ],
)
def test_mistyped_threshold_stops_every_gate_not_its_own_alone(given, words):
    with pytest.raises(SpecDecodeError, match=words):
        gates.thresholds_of(given, "dataset")


def test_thresholds_of_one_gate_are_taken_out_of_those_of_all():
    given = {"dataset": {}, "acceptance": {"min_trials": 7}, "training": None}
    assert [gates.thresholds_of(given, gate) for gate in ("dataset", "acceptance", "training", "capture")] == [
        {}, {"min_trials": 7}, {}, {},
    ]  # fmt: skip
