#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Capture and training on a GPU against their floors.

A floor is the time that the work cannot be done under: its operations over the rate of the device's matrix units, its
bytes over the rate of what moves them, both rates measured on the same device. Three commands, run with the engine's
Python: ``ceilings`` measures the rates, ``sample`` writes the GPU's utilisation to a file until it is stopped,
``table`` sets an experiment's results against them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

SAMPLE_FIELDS = ("utilization.gpu", "utilization.memory", "memory.used", "power.draw")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("ceilings", help="measure what this device and this folder can do")
    each.add_argument("--folder", type=pathlib.Path, required=True, help="where features would be written")
    each.add_argument("--out", type=pathlib.Path, required=True)
    each = commands.add_parser("sample", help="write the GPU's utilisation, a line a sample, until stopped")
    each.add_argument("--out", type=pathlib.Path, required=True)
    each.add_argument("--every-ms", type=int, default=100)
    each = commands.add_parser("table", help="an experiment's capture and training against the ceilings")
    each.add_argument("--bundle", type=pathlib.Path, required=True, help="the experiment's spec-decode folder")
    each.add_argument("--ceilings", type=pathlib.Path, required=True)
    each.add_argument("--samples", type=pathlib.Path)
    each.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if options.command == "ceilings":
        write(options.out, ceilings(options.folder))
    elif options.command == "sample":
        sample(options.out, options.every_ms)
    else:
        write(options.out, table(options.bundle, read(options.ceilings), options.samples))


def ceilings(folder: pathlib.Path) -> dict[str, Any]:
    """Measured rates, each the median of several runs on fresh random data."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, side = (4 * GIB, 8192) if device == "cuda" else (GIB // 8, 512)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _side in range(2))
    product = torch.empty_like(left)
    host = torch.empty(size // 8, dtype=torch.uint8)
    pinned = host.pin_memory() if device == "cuda" else host
    part = source[: size // 8]
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "copy_bytes_per_s": 2 * size / seconds(lambda: target.copy_(source), torch, device),
        "bf16_flops": 2 * side**3 / seconds(lambda: torch.matmul(left, right, out=product), torch, device),
        "to_host_bytes_per_s": len(part) / seconds(lambda: part.to("cpu", copy=True), torch, device),
        "to_pinned_host_bytes_per_s": len(part) / seconds(lambda: pinned.copy_(part), torch, device),
        "file_bytes_per_s": file_rate(folder, torch),
    }
    return found


def seconds(work: Any, torch: Any, device: str) -> float:
    """Median time of one call. On a GPU the host's clock is read only when the device is done."""
    times = []
    for number in range(13):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:  # the first ones load modules and warm up
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def file_rate(folder: pathlib.Path, torch: Any) -> float:
    """Bytes a second of whole files of the size of a conversation's features, written as the capture writes them."""
    value = {"hidden_state": torch.randn(1, 256, 4096).to(torch.bfloat16)}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        started, written = time.perf_counter(), 0
        for number in range(200):
            path = os.path.join(place, f"{number}.ckpt")
            torch.save(value, path)
            written += os.path.getsize(path)
        return written / (time.perf_counter() - started)


def sample(out: pathlib.Path, every_ms: int) -> None:
    """One line a sample: seconds since the epoch, then nvidia-smi's figures, by the host's own clock."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SAMPLE_FIELDS)}", "--format=csv,noheader,nounits", f"-lms={every_ms}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with out.open("w", encoding="utf-8", buffering=1) as stream:
            for line in process.stdout:
                stream.write(f"{time.time():.3f}, {line.strip()}\n")
    finally:
        process.terminate()


def table(bundle: pathlib.Path, rates: dict[str, Any], samples: pathlib.Path | None) -> dict[str, Any]:
    """Floors and measured times of both phases, with what each was counted from."""
    experiment = read(bundle / "experiment.json")
    capture, training = read(bundle / "results/capture.json"), read(bundle / "results/train.json")
    convert = read(bundle / "results/convert.json")
    target = read(pathlib.Path(experiment["target"]["path"]) / "config.json")
    draft = read(bundle / f"configs/{experiment['slug']}-{experiment['method']}.json")
    with open(bundle / training["metrics_path"], encoding="utf-8") as stream:
        steps = [json.loads(line) for line in stream]
    lines = samples.read_text(encoding="utf-8").splitlines() if samples else []
    return {
        "method": experiment["method"],
        "ceilings": rates,
        "capture": {
            **capture_floor(capture, decoder_parameters(experiment["target"]["parameters"], target), rates),
            "utilisation": utilisation(lines, *window(capture)),
        },
        "training": {
            **training_floor(training, convert["tensors"], steps, target, draft, rates),
            "utilisation": utilisation(lines, *window(training)),
        },
    }


def decoder_parameters(parameters: int, target: dict[str, Any]) -> int:
    """Parameters that every token is multiplied with up to the last hidden state: neither embedding nor head."""
    tables = 1 if target.get("tie_word_embeddings") else 2
    return int(parameters - tables * target["vocab_size"] * target["hidden_size"])


def capture_floor(capture: dict[str, Any], parameters: int, rates: dict[str, Any]) -> dict[str, Any]:
    """One forward pass over every token; every feature crosses to the host and into a file once. Attention is left out."""
    measured = capture["throughput"]
    flops = 2 * parameters * measured["tokens"]
    moved = capture["bytes"] * measured["tokens"] / capture["tokens"]
    parts = {
        "matrix_s": flops / rates["bf16_flops"],
        "to_host_s": moved / rates["to_host_bytes_per_s"],
        "file_s": moved / rates["file_bytes_per_s"],
    }
    return against(measured["seconds"], parts, {"flops": flops, "bytes": moved, "tokens_per_s": measured["tokens_per_s"]})


def training_floor(
    training: dict[str, Any],
    tensors: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    target: dict[str, Any],
    draft: dict[str, Any],
    rates: dict[str, Any],
) -> dict[str, Any]:
    """One optimizer step: forward and backward through the draft's matrices, and the optimizer's traffic.

    Of DFlash, the anchors' blocks pass through the draft; of EAGLE3, every token as often as the training unrolls, and
    once through the target's head, which says what is right. Attention and padding are left out, so the true floor is
    higher, never lower.
    """
    config = training["training"]
    sizes = {item["name"]: math.prod(item["shape"]) for item in tensors if len(item["shape"]) == 2}
    head = draft_head(sizes, target)
    fusion = sum(size for name, size in sizes.items() if name.split(".")[0] == "fc")
    blocks = sum(size for name, size in sizes.items() if name.startswith(("midlayer.", "layers.")))
    samples = config["batch_size"]
    tokens = samples * training["features"]["tokens"] / training["features"]["samples"]
    if training["method"] == "eagle3":
        passes = config["ttt_length"]
        flops = tokens * (6 * (passes * (blocks + head) + fusion) + 2 * target["hidden_size"] * target["vocab_size"])
    else:
        positions = samples * config["num_anchors"] * draft["block_size"]
        flops = 6 * (positions * (blocks + head) + tokens * fusion)
    trained = blocks + fusion + (head if training["method"] == "eagle3" else 0)
    # AdamW on fp32 master copies reads and writes the copy and two moments, reads the gradient, writes bf16 weights.
    moved = trained * (3 * 8 + 2 + 2)
    warm = steps[len(steps) // 3 :]
    found = {
        name: statistics.median(row[f"perf/{name}"] for row in warm)
        for name in ("optimizer_step_time_s", "data_wait_time_s", "train_compute_time_s")
    }
    parts = {"matrix_s": flops / rates["bf16_flops"], "optimizer_s": moved / rates["copy_bytes_per_s"]}
    counted = {"flops": flops, "bytes": moved, "tokens_per_step": tokens, "trained_parameters": trained}
    return {**against(found["optimizer_step_time_s"], parts, counted), **found}


def draft_head(sizes: dict[str, int], target: dict[str, Any]) -> int:
    """The draft's own head, else the target's, which it then uses."""
    return sizes.get("lm_head.weight", target["hidden_size"] * target["vocab_size"])


def against(measured: float, parts: dict[str, float], counted: dict[str, Any]) -> dict[str, Any]:
    floor = max(parts.values())
    return {"measured_s": measured, "floor_s": floor, "share_of_floor": floor / measured, "parts": parts, "counted": counted}


def window(result: dict[str, Any]) -> tuple[float, float]:
    """From when to when a phase's program ran, in seconds since the epoch."""
    end = datetime.datetime.fromisoformat(result["finished_at"].replace("Z", "+00:00")).timestamp()
    return end - result["duration_s"], end


def utilisation(lines: list[str], start: float, end: float) -> dict[str, Any] | None:
    """Means over the samples in a window, and the share of them in which a kernel ran; ``None`` without samples."""
    rows = [[float(cell) for cell in line.split(",")] for line in lines if line.count(",") == len(SAMPLE_FIELDS)]
    rows = [row for row in rows if start <= row[0] <= end]
    if not rows:
        return None
    return {
        "samples": len(rows),
        "gpu_percent_mean": statistics.fmean(row[1] for row in rows),
        "gpu_percent_max": max(row[1] for row in rows),
        "samples_with_a_kernel": sum(row[1] > 0 for row in rows) / len(rows),
        "memory_percent_mean": statistics.fmean(row[2] for row in rows),
        "memory_used_mib_max": max(row[3] for row in rows),
        "power_w_mean": statistics.fmean(row[4] for row in rows),
    }


def read(path: pathlib.Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: pathlib.Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    sys.exit(main())
