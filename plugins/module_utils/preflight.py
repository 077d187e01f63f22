# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks before any expensive work. Each says what it found and, if red, what to do. Private to the collection."""

from __future__ import annotations

import os
import shutil
from typing import Any

from .conversations import LAYOUTS
from .errors import SpecDecodeError
from .files import read_json_object
from .fit import feature_bytes_per_token


def checks(
    plan: dict[str, Any],
    engine: dict[str, Any],
    *,
    chat_template: str,
    chat_template_file: str,
    work_dir: str,
    sources: list[dict[str, Any]],
    rows: int,
    max_length: int,
    temperature: float,
) -> list[dict[str, Any]]:
    """All checks of a planned experiment, green ones included."""
    found = [_engine(engine), _template(engine, chat_template, chat_template_file), _own_template(plan)]
    found.extend(_source(source) for source in sources)
    if not sources:
        found.append(_check("data", False, "no data source is given", "Set scaffold_sources."))
    found.append(_work_dir(work_dir))
    found.append(_disk(plan, work_dir, rows, max_length))
    found.append(_sampling(engine, temperature))
    return found


def feature_bytes(plan: dict[str, Any], tokens: int) -> int:
    """Disk for the features of ``tokens``: (aux layers + last state for EAGLE3) × hidden size × 2 bytes each."""
    states: int = len(plan["values"]["aux_layers"]) + (plan["method"] == "eagle3")
    return tokens * feature_bytes_per_token(states, int(plan["target"]["hidden_size"]))


def _check(name: str, ok: bool, reason: str, remedy: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "reason": reason, "remedy": "" if ok else remedy}


def _engine(engine: dict[str, Any]) -> dict[str, Any]:
    versions = engine["versions"]
    missing = [name for name in ("torch", "vllm", "specforge", "transformers") if not versions.get(name)]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    reason = f"{', '.join(missing)} not installed (found {shown or 'nothing'})" if missing else shown
    return _check("engine", not missing, reason, "Run make setup, or install what is missing in the engine's Python.")


def _template(engine: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    if file:
        try:
            fields = read_json_object(file, "chat template file")
        except SpecDecodeError as error:
            return _check("chat template", False, str(error), "Mend chat_template_file.")
        missing = [key for key in ("assistant_header", "user_header", "end_of_turn_token") if not fields.get(key)]
        return _check(
            "chat template", not missing, f"{file} lacks {', '.join(missing)}" if missing else f"{name} from {file}",
            "Write all of SpecForge's ChatTemplate fields that the target's turns need.",
        )  # fmt: skip
    known = engine["templates"]
    return _check(
        "chat template",
        name in known,
        f"{name} is registered in SpecForge" if name in known else f"{name!r} is not one of {', '.join(known)}",
        "Choose a registered chat_template, or describe your own in chat_template_file.",
    )


def _own_template(plan: dict[str, Any]) -> dict[str, Any]:
    has = plan["target"]["has_chat_template"]
    return _check(
        "target's chat template", has, "the tokenizer has one" if has else "the tokenizer has none",
        "Put the model's chat_template.jinja into the target folder: the server renders prompts with it.",
    )  # fmt: skip


def _source(source: dict[str, Any]) -> dict[str, Any]:
    path, layout = str(source.get("path", "")), source.get("layout", "auto")
    if layout not in LAYOUTS:
        return _check("data", False, f"layout {layout!r} of {path} is not one of {', '.join(LAYOUTS)}", "Mend scaffold_sources.")
    there = os.path.isfile(path) and os.path.getsize(path) > 0
    return _check("data", there, f"{path}" if there else f"{path or 'a source'} is missing or empty", "Check scaffold_sources.")


def _work_dir(path: str) -> dict[str, Any]:
    place = _existing(path)
    ok = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
    return _check("work folder", ok, path if ok else f"{path} cannot be written", "Choose another scaffold_work_dir.")


def _disk(plan: dict[str, Any], path: str, rows: int, max_length: int) -> dict[str, Any]:
    # Rows are seldom full; half of the longest length is a cautious mean.
    needed = feature_bytes(plan, rows * max_length // 2)
    free = shutil.disk_usage(_existing(path)).free
    return _check(
        "disk", needed < free,
        f"features need about {needed / 1e9:.1f} GB ({rows} rows of about {max_length // 2} tokens), {free / 1e9:.1f} GB free",
        "Free space, choose another scaffold_work_dir, or lower scaffold_train_rows.",
    )  # fmt: skip


def _sampling(engine: dict[str, Any], temperature: float) -> dict[str, Any]:
    version = engine["versions"].get("vllm") or ""
    broken = temperature > 0 and version.startswith("0.32.0+cpu")
    return _check(
        "sampling", not broken,
        f"temperature {temperature:g}" + (f": vLLM {version} garbles sampled text under speculation" if broken else ""),
        "Set scaffold_temperature to 0.",
    )  # fmt: skip


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    current = os.path.abspath(path)
    while not os.path.exists(current):
        current = os.path.dirname(current)
    return current
