#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Capture a target's hidden states with SpecForge's ``prepare_hidden_states.py`` through SGLang, and verify them.

The script is for targets that one process cannot hold. What it leaves is not to be trusted as it stands: its writes are
not atomic, a sample with NaN is dropped with only a printed line, rows are shuffled, short rows are padded to the longest
of their batch, and with data parallelism a row may be written twice in the place of another. So every file is read,
recognised by its tokens as one conversation of the data set, checked and cut to its length; unreadable ones are removed
and captured anew. The manifest and the result are those of ``capture_hidden_states.py``, and one gate judges both.

On several nodes this program runs once on each; the first alone prepares and verifies.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import time
from typing import Any

import torch
from capture_hidden_states import capture_identity, capture_parser, save
from chat_format import ChatFormat, Rendered
from draft_conversion import target_tensor
from spec_decode import features
from spec_decode.checkpoint import read_target
from spec_decode.errors import SpecDecodeError
from spec_decode.files import read_json_object, write_link
from spec_decode.nodes import Nodes
from spec_decode.program import PhaseResult, run
from spec_decode.progress import Progress
from spec_decode.target_config import HIDDEN_NAMES, first, language_model

READERS = 8
PROBE_SAMPLES = 4
#: each method's tensors: name → how many hidden states wide it is, "n" for the aux layers
TENSORS: dict[str, dict[str, str]] = {
    "eagle3": {"hidden_state": "1", "aux_hidden_state": "n"},
    "dflash": {"hidden_states": "n"},
}
Tokens = tuple[int, ...]


def arguments() -> argparse.Namespace:
    parser = capture_parser(__doc__.splitlines()[0])
    parser.add_argument("--command", required=True, help="JSON: script, arguments, processes_per_node")
    return parser.parse_args()


def without_padding(ids: list[int]) -> Tokens:
    """Token ids without zeros at the end, which a batch's padding may have added."""
    length = len(ids)
    while length and ids[length - 1] == 0:
        length -= 1
    return tuple(ids[:length])


class Expected:
    """The conversations that must be captured, found again by their tokens."""

    def __init__(self, rows: list[Rendered], method: str) -> None:
        eligible = [row for row in rows if method != "dflash" or row.trains(method)]
        self.ineligible = len(rows) - len(eligible)
        self.count = len(eligible)
        self._rows: dict[Tokens, list[Rendered]] = {}
        for row in eligible:
            self._rows.setdefault(without_padding(row.input_ids.tolist()), []).append(row)
        self._seen: dict[Tokens, int] = {}

    def claim(self, tokens: Tokens) -> Rendered | None:
        """The row of these tokens, unless as many files as rows hold them already."""
        rows, number = self._rows.get(tokens, []), self._seen.get(tokens, 0)
        if number >= len(rows):
            return None
        self._seen[tokens] = number + 1
        return rows[number]


class Features:
    """The files that SpecForge wrote, recognised and checked one by one."""

    def __init__(self, store: features.Store, method: str, hidden_size: int, layers: int) -> None:
        self.store, self._method = store, method
        self._widths = {name: hidden_size * (layers if width == "n" else 1) for name, width in TENSORS[method].items()}
        self.shape_errors: list[str] = []
        self.nonfinite = 0

    def files(self) -> dict[int, str]:
        """Sample number → file."""
        found = {}
        for path in pathlib.Path(self.store.folder).glob("rows_*/data_*.ckpt"):
            match = re.fullmatch(r"data_(\d+)\.ckpt", path.name)
            if match:
                found[int(match[1])] = str(path)
        return found

    def sweep(self, expected: Expected) -> dict[int, features.Entry]:
        """Verify every file and list it. What cannot be read or repeats another row is removed."""
        self.shape_errors, self.nonfinite = [], 0
        files = sorted(self.files().items())
        entries: dict[int, features.Entry] = {}
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            for (index, path), record in zip(files, pool.map(lambda item: read(item[1]), files)):
                row = expected.claim(without_padding(record["input_ids"].tolist())) if record else None
                if record is None or row is None:
                    words = "is not readable" if record is None else "holds no conversation of the data, or one captured already"
                    print(f"{path} {words}: removed", flush=True)
                    os.unlink(path)
                    continue
                entries[index] = self._checked(index, path, record, row)
        self.store.replace(entries)
        return entries

    def _checked(self, index: int, path: str, record: dict[str, torch.Tensor], row: Rendered) -> features.Entry:
        length, finite, cut = len(row.input_ids), True, {"input_ids": row.input_ids, "loss_mask": row.loss_mask}
        for name, width in self._widths.items():
            tensor = record.get(name)
            if (
                tensor is None
                or tensor.dim() != 3
                or tensor.shape[0] != 1
                or tensor.shape[1] < length
                or tensor.shape[2] != width
            ):
                shape = "missing" if tensor is None else str(list(tensor.shape))
                self.shape_errors.append(f"data_{index}: {name} is {shape} instead of [1, {length}, {width}]")
                return features.Entry(length, os.path.getsize(path), False)
            cut[name] = tensor[:, :length].clone()
            finite = finite and bool(torch.isfinite(cut[name]).all())
        self.nonfinite += not finite
        if not torch.equal(record["loss_mask"].reshape(-1)[:length].long(), row.loss_mask.long()):
            self.shape_errors.append(f"data_{index}: its loss mask is not that of the chat template")
        padded = record["input_ids"].numel() != length
        return features.Entry(length, save(cut, path) if padded else os.path.getsize(path), finite)


def read(path: str) -> dict[str, torch.Tensor] | None:
    """One file's tensors, or ``None`` if it is not whole."""
    try:
        record = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    whole = isinstance(record, dict) and {"input_ids", "loss_mask"} <= set(record)
    return {**record, "input_ids": record["input_ids"].reshape(-1)} if whole else None


def probe(options: argparse.Namespace, store: features.Store, indices: list[int]) -> dict[str, Any]:
    """What can be told without the whole target: its LM head on the last state must often name the text's next token.

    On text that the target wrote itself it nearly always does; states of another layer or model never do.
    """
    agree = positions = 0
    if options.method == "eagle3" and indices:
        target = read_target(options.target_model_path)
        head = target_tensor(options.target_model_path, target.lm_head_key).float()
        for index in indices:
            stored = torch.load(store.path(index), weights_only=True)
            supervised = stored["loss_mask"][1:].bool()
            named = (stored["hidden_state"][0, :-1][supervised].float() @ head.T).argmax(-1)
            agree += int((named == stored["input_ids"][1:][supervised]).sum())
            positions += int(supervised.sum())
    return {
        "samples": indices,
        "next_token_agreement": agree / positions if positions else None,
        "lm_head_argmax_agreement": None,
        "aux_max_abs_diff": None,
        "tolerance": None,
        "unit": "share of supervised positions where the LM head on the captured last state names the next token",
    }


def cached_by_content(arguments_: list[str], data: str, identity: str) -> list[str]:
    """The script's arguments with its data and its cache in a folder of this identity.

    The script knows what it cached by the data's path and the template's name: rows that changed at the same path would
    be captured as they were.
    """
    found = list(arguments_)
    cache = found.index("--cache-dir") + 1
    folder = os.path.join(found[cache], identity[:12])
    rows = os.path.join(folder, "train.jsonl")
    found[cache] = folder
    found[found.index("--data-path") + 1] = rows
    write_link(rows, os.path.abspath(os.path.join(data, "train.jsonl")))
    return found


def capture(command: dict[str, Any], options: argparse.Namespace, nodes: Nodes) -> None:
    """SpecForge's script under ``torchrun``, its output passed through."""
    if not os.path.isfile(command["script"]):
        raise SpecDecodeError(
            f"SpecForge's script {command['script']} does not exist here.",
            "Set spec_specforge_source to a checkout of SpecForge that this node sees.",
        )
    wrapper = os.path.join(os.path.dirname(os.path.abspath(__file__)), "specforge_script.py")
    template = ["--chat-template", options.chat_template, "--chat-template-file", options.chat_template_file]
    code = subprocess.run(
        [*nodes.torchrun(sys.executable, int(command["processes_per_node"])), wrapper, *template, command["script"],
         *command["arguments"]], check=False,
    ).returncode  # fmt: skip
    if code:
        print(f"error: SpecForge's capture ended with exit code {code}.", flush=True)
        sys.exit(128 - code if code < 0 else 1)  # not a refusal: another attempt goes on from the files that are whole


def main() -> None:
    options = arguments()
    result = PhaseResult("capture", options.result)
    nodes = Nodes.from_environment(os.environ)
    command = read_json_object(options.command, "capture command")
    layers = [int(layer) for layer in options.aux_layers.split(",")]
    chat = ChatFormat(options.target_model_path, options.chat_template, options.chat_template_file, options.max_length)
    identity = capture_identity(options, layers, chat, "sglang")
    command["arguments"] = cached_by_content(command["arguments"], options.data, identity)
    if not nodes.first:
        capture(command, options, nodes)  # waits at the rendezvous until the first node is ready
        return
    progress = Progress()
    with open(os.path.join(options.data, "train.jsonl"), encoding="utf-8") as stream:
        rows = [chat.render(json.loads(line)["conversations"]) for line in stream]
    hidden_size = int(first(language_model(read_target(options.target_model_path).config), HIDDEN_NAMES))
    store = features.Store(options.output, identity)
    store.resume()
    found = Features(store, options.method, hidden_size, len(layers))
    progress.update("verifying what an earlier attempt captured")
    resumed = len(found.sweep(Expected(rows, options.method)))
    expected = Expected(rows, options.method)
    seconds = 0.0
    if resumed < expected.count:
        progress.update(f"capturing {expected.count - resumed} of {expected.count} samples through SGLang")
        started = time.monotonic()
        capture(command, options, nodes)
        seconds = time.monotonic() - started
    progress.update("verifying every sample")
    entries = found.sweep(expected)
    everything = store.verify(expected.count)
    tokens = sum(entry.tokens for entry in everything.values())
    chosen = sorted(everything)[:: max(1, len(everything) // PROBE_SAMPLES)][:PROBE_SAMPLES]
    checked = probe(options, store, [] if found.shape_errors else chosen)
    store.seal(
        {
            "method": options.method,
            "layers": layers,
            "hidden_size": hidden_size,
            "dtype": "bfloat16",
            "max_length": options.max_length,
        },
        everything,
    )
    result.complete(
        {
            "backend": "sglang",
            "samples": {"expected": expected.count, "written": len(everything)},
            "left_out_by_trainer": expected.ineligible,
            "misnumbered": len(entries) - len(everything),
            "layers": layers,
            "expected_layers": layers,
            "hidden_size": hidden_size,
            "dtype": "bfloat16",
            "nonfinite": found.nonfinite,
            "shape_errors": found.shape_errors,
            "tokens": tokens,
            "bytes": sum(entry.bytes for entry in everything.values()),
            "probe": checked,
            "throughput": {
                "tokens": tokens if seconds else 0,
                "seconds": round(seconds, 3),
                "tokens_per_s": round(tokens / seconds, 1) if seconds and not resumed else None,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "resumed_samples": resumed,
            },
        }
    )


if __name__ == "__main__":
    run(main)
