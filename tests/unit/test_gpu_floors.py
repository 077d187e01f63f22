# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Floors of capture and training, on figures small enough to count by hand."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATES = {"bf16_flops": 1e6, "copy_bytes_per_s": 1e5, "to_host_bytes_per_s": 1e4, "file_bytes_per_s": 5e3}
TARGET = {"vocab_size": 10, "hidden_size": 4}
ROW = {"perf/optimizer_step_time_s": 2.0, "perf/data_wait_time_s": 0.5, "perf/train_compute_time_s": 1.5}


def load():
    spec = importlib.util.spec_from_file_location("gpu_floors", ROOT / "scripts/benchmarks/gpu_floors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


floors = load()


def test_every_token_passes_the_decoder_once_and_its_features_reach_a_file_once():
    capture = {"tokens": 200, "bytes": 4000, "throughput": {"tokens": 100, "seconds": 4.0, "tokens_per_s": 25.0}}
    found = floors.capture_floor(capture, 1000, RATES)
    # Half of the tokens were captured by an earlier, interrupted run: half of the bytes count.
    assert found["counted"] == {"flops": 200_000, "bytes": 2000, "tokens_per_s": 25.0}
    assert found["parts"] == {"matrix_s": 0.2, "to_host_s": 0.2, "file_s": 0.4}
    assert found["floor_s"] == 0.4
    assert found["share_of_floor"] == pytest.approx(0.1)


@pytest.mark.parametrize(("tied", "left"), [(True, 960), (False, 920)])
def test_embedding_and_head_are_no_part_of_the_decoder(tied, left):
    assert floors.decoder_parameters(1000, {**TARGET, "tie_word_embeddings": tied}) == left


def test_eagle3_passes_every_token_as_often_as_the_training_unrolls():
    training = {
        "method": "eagle3",
        "training": {"batch_size": 2, "ttt_length": 3},
        "features": {"tokens": 50, "samples": 10},
    }
    tensors = [
        {"name": "fc.weight", "shape": [4, 12]},
        {"name": "midlayer.mlp.up_proj.weight", "shape": [5, 4]},
        {"name": "midlayer.hidden_norm.weight", "shape": [4]},
        {"name": "lm_head.weight", "shape": [10, 4]},
        {"name": "embed_tokens.weight", "shape": [10, 4]},
    ]
    found = floors.training_floor(training, tensors, [{"perf/x": 0}, ROW, ROW], TARGET, {}, RATES)
    assert found["counted"]["tokens_per_step"] == 10
    assert found["counted"]["flops"] == 10 * (6 * (3 * (20 + 40) + 48) + 2 * 40)
    assert found["counted"]["trained_parameters"] == 108
    assert found["measured_s"] == 2.0
    assert found["data_wait_time_s"] == 0.5


def test_dflash_passes_the_anchors_blocks_and_uses_the_targets_head():
    training = {
        "method": "dflash",
        "training": {"batch_size": 2, "num_anchors": 3},
        "features": {"tokens": 50, "samples": 10},
    }
    tensors = [{"name": "fc.weight", "shape": [4, 12]}, {"name": "layers.0.mlp.up_proj.weight", "shape": [5, 4]}]
    found = floors.training_floor(training, tensors, [ROW] * 3, TARGET, {"block_size": 8}, RATES)
    assert found["counted"]["flops"] == 6 * (2 * 3 * 8 * (20 + 40) + 10 * 48)
    assert found["counted"]["trained_parameters"] == 68


def test_only_samples_of_the_phase_count():
    result = {"finished_at": "2026-11-24T22:00:10+00:00", "duration_s": 4.0}
    start, end = floors.window(result)
    lines = [f"{end - age:.3f}, {busy}, 10, 2048, 300.5" for age, busy in ((9, 100), (3, 0), (1, 50), (-1, 100))]
    found = floors.utilisation([*lines, "1, not whole"], start, end)
    assert found == {
        "samples": 2,
        "gpu_percent_mean": 25.0,
        "gpu_percent_max": 50.0,
        "samples_with_a_kernel": 0.5,
        "memory_percent_mean": 10.0,
        "memory_used_mib_max": 2048.0,
        "power_w_mean": 300.5,
    }
    assert floors.utilisation([], start, end) is None
