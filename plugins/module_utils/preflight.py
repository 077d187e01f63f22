# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks before any expensive work. Each says what it found and, if red, what to do. Private to the collection.

What cannot be checked is red. Where only a person can know better than a check, one named setting confirms it.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import shutil
import textwrap
from typing import Any

from . import site_facts
from .conversations import LAYOUTS
from .errors import SpecDecodeError
from .files import read_json, read_json_object
from .fit import PREFILL_UTILISATION, WIDTH, capture_rate, feature_bytes_per_token
from .inspection import ANSWER
from .launchers import SCRIPTS, resources
from .specforge import BACKENDS, chosen_interface
from .waiting import clock

#: versions that this collection is known to work with: from, and up to but without
KNOWN_GOOD: dict[str, tuple[str, str]] = {
    "specforge": ("0.2.0", "0.4"),
    "vllm": ("0.32", "0.33"),
    "transformers": ("5.8", "5.20"),
    "torch": ("2.11", "2.14"),
}
#: The trainer's capture calls into SGLang's insides, so that only the release that it pins is known to work.
SGLANG_KNOWN_GOOD = ("0.5.14", "0.5.15")
#: Where SGLang is not installed here: the architectures whose classes in that release can be told which layers' states to
#: keep, for EAGLE3 and, of those, for DFlash too.
SGLANG_0_5_14_EAGLE3 = frozenset(
    {
        "ApertusForCausalLM", "BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
        "ExaoneMoEForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Glm4MoeForCausalLM",
        "LongcatFlashForCausalLM", "Llama4ForConditionalGeneration", "Qwen2ForCausalLM",
        "Qwen2_5_VLForConditionalGeneration", "Qwen2MoeForCausalLM", "SarvamMoEForCausalLM",
    }
)  # fmt: skip
SGLANG_0_5_14_BOTH = frozenset(
    {
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration", "GlmMoeDsaForCausalLM", "Glm4MoeLiteForCausalLM", "GptOssForCausalLM",
        "InternLM3ForCausalLM", "IQuestCoderForCausalLM", "KimiK25ForConditionalGeneration", "LlamaForCausalLM",
        "Llama4ForCausalLM", "MiniMaxM2ForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM",
        "MistralLarge3ForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
        "Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
        "TeleFLMForCausalLM",
    }
)  # fmt: skip
#: Without a measured rate, the time is estimated for one such GPU; its peak in dense BF16.
REFERENCE_GPU, REFERENCE_FLOPS = "H100", 989e12


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the user asked for, as far as the checks look at it."""

    chat_template: str
    chat_template_file: str
    work_dir: str
    sources: list[dict[str, Any]]
    rows: int
    max_length: int
    temperature: float
    trainer_interface: str = "auto"
    capture_backend: str = "transformers"
    specforge_source: str = ""
    executor: str = "local"
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)
    slurm_phases: dict[str, Any] = dataclasses.field(default_factory=dict)
    slurm_cluster: str = ""
    confirm_target_architecture: bool = False
    confirm_shared_work_dir: bool = False
    confirmed_versions: dict[str, str] = dataclasses.field(default_factory=dict)


def checks(plan: dict[str, Any], engine: dict[str, Any], **asked: Any) -> list[dict[str, Any]]:
    """All checks of a planned experiment, green ones included. ``asked`` are the fields of :class:`Asked`."""
    wanted = Asked(**asked)
    found = [_target(plan), _engine(engine), _versions(engine, wanted), _trainer(plan, engine, wanted)]
    found += [_capture_backend(plan, engine, wanted), _serving(plan, engine, wanted)]
    found += [_template(engine, wanted), _own_template(plan, engine, wanted)]
    found += [_source(source) for source in wanted.sources]
    if not wanted.sources:
        found.append(_check("data", False, "no data source is given", "Set spec_sources."))
    found += [_work_dir(wanted.work_dir), _disk(plan, wanted), _time(plan, wanted)]
    if wanted.executor == "slurm":
        found += _slurm(wanted)
    found.append(_sampling(engine, wanted.temperature))
    return found


def table(found: list[dict[str, Any]], width: int = 72) -> list[str]:
    """The checks as lines of that width: with what a callback indents them by, they fit a terminal of 80 columns."""
    lines = []
    for check in found:
        words = check["reason"] + (f" → {check['remedy']}" if check["remedy"] else "")
        first, *rest = textwrap.wrap(words, width - 30, break_on_hyphens=False) or [""]
        lines.append(f"{'ok ' if check['ok'] else 'RED'} {check['name']:<24.24}  {first}")
        lines += [" " * 30 + line for line in rest]
    red = sum(not check["ok"] for check in found)
    return [*lines, f"{len(found)} checks, {red} red" if red else f"{len(found)} checks, all green"]


def feature_bytes(plan: dict[str, Any], tokens: int) -> int:
    """Disk for the features of ``tokens``: (aux layers + last state for EAGLE3) × hidden size × 2 bytes each."""
    hidden_size: int = plan["target"]["hidden_size"]
    return tokens * feature_bytes_per_token(_states(plan), hidden_size)


def _states(plan: dict[str, Any]) -> int:
    layers: list[int] = plan["values"]["aux_layers"]
    return len(layers) + (1 if plan["method"] == "eagle3" else 0)


def _check(name: str, ok: bool, reason: str, remedy: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "reason": reason, "remedy": "" if ok else remedy}


def _target(plan: dict[str, Any]) -> dict[str, Any]:
    """Reading the target refuses what is missing, half-copied or quantised for serving; here it is stated back."""
    target = plan["target"]
    return _check(
        "target", True,
        f"{target.get('architecture', 'unknown')}, {target.get('parameters', 0) / 1e6:.1f} M parameters in"
        f" {target.get('dtype', 'unknown')}, whole: index, shards and headers agree",
    )  # fmt: skip


def _engine(engine: dict[str, Any]) -> dict[str, Any]:
    versions = engine["versions"]
    missing = [name for name in ("torch", "vllm", "specforge", "transformers") if not versions.get(name)]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    reason = f"{', '.join(missing)} not installed (found {shown or 'nothing'})" if missing else shown
    return _check("engine", not missing, reason, "Run make setup, or install what is missing in the engine's Python.")


def _versions(engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    ranges = {**KNOWN_GOOD, **({"sglang": SGLANG_KNOWN_GOOD} if asked.capture_backend == "sglang" else {})}
    strange = [
        f"{name} {version} (known good: {first} up to {end})"
        for name, (first, end) in ranges.items()
        if (version := engine["versions"].get(name))
        and not _number(first) <= _number(version) < _number(end)
        and asked.confirmed_versions.get(name) != version
    ]
    return _check(
        "versions", not strange, "; ".join(strange) or "trainer and server are known to work together",
        "Install versions inside these ranges, or run the loop at a small scale and then confirm yours by name, for example"
        " spec_confirmed_versions: {vllm: 0.34.0}.",
    )  # fmt: skip


def _number(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def _trainer(plan: dict[str, Any], engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    try:
        interface = chosen_interface(asked.trainer_interface, engine.get("specforge_interface", ""))
    except SpecDecodeError as error:
        return _check("trainer", False, error.message, error.remedy)
    if interface == "scripts" and plan["method"] == "dflash":
        return _check(
            "trainer", False, "SpecForge's scripts cannot train DFlash from captured features",
            "Install SpecForge of 2026-07-14 or later, or choose method=eagle3.",
        )  # fmt: skip
    needs = ["train_eagle3.py"] if interface == "scripts" else []
    needs += ["prepare_hidden_states.py"] if asked.capture_backend == "sglang" else []
    missing = [name for name in needs if not os.path.isfile(os.path.join(asked.specforge_source, "scripts", name))]
    place = asked.specforge_source or "spec_specforge_source, which is not set"
    return _check(
        "trainer", not missing,
        f"{', '.join(missing)} not found in the scripts of {place}" if missing else f"SpecForge's {interface} interface",
        "Set spec_specforge_source to a checkout of SpecForge of the installed version.",
    )  # fmt: skip


def _capture_backend(plan: dict[str, Any], engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    name, backend, method = "capture backend", asked.capture_backend, plan["method"]
    architecture = plan["target"].get("architecture", "unknown")
    if backend not in BACKENDS:
        return _check(name, False, f"{backend!r} is not one of {', '.join(BACKENDS)}", "Mend spec_capture_backend.")
    found = engine.get("models", {}).get(backend)
    if backend == "transformers":
        ok = bool(found and found["registered"])
        words = "loads" if ok else "does not load" if found else "is not installed and cannot say whether it loads"
        return _check(
            name, ok, f"transformers {words} {architecture}",
            "Install a transformers that knows the architecture, or set spec_capture_backend: sglang.",
        )  # fmt: skip
    if found:
        ok, source = bool(found[method]), f"SGLang {engine['versions'].get('sglang')}"
    else:
        ok = architecture in SGLANG_0_5_14_BOTH or (method == "eagle3" and architecture in SGLANG_0_5_14_EAGLE3)
        source = "SGLang 0.5.14, by a table, for it is not installed here,"
    return _check(
        name, ok, f"{source} can {'' if ok else 'not '}be told to keep the states of {architecture} for {method}",
        "Set spec_capture_backend: transformers, or install an SGLang that can.",
    )  # fmt: skip


def _serving(plan: dict[str, Any], engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    architecture = plan["target"].get("architecture", "unknown")
    found = engine.get("models", {}).get("vllm")
    if asked.confirm_target_architecture:
        return _check("serving", True, f"{architecture}: confirmed by spec_confirm_target_architecture")
    remedy = (
        "Start the serving image with any EAGLE3 draft for this target; if it loads, set spec_confirm_target_architecture: true."
    )
    if not found:
        return _check("serving", False, f"no vLLM here to ask whether it serves drafts for {architecture}", remedy)
    through = "" if found["class"] == architecture else f" (as {found['class'] or 'nothing'})"
    declared = "declares" if found["eagle3"] else "does not declare"
    return _check(
        "serving", bool(found["eagle3"]),
        f"vLLM {engine['versions'].get('vllm')} {declared} the interface for hidden states for {architecture}{through}", remedy,
    )  # fmt: skip


def _template(engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    name, file = asked.chat_template, asked.chat_template_file
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


def _own_template(plan: dict[str, Any], engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The target's own template renders a conversation in which SpecForge's finds the assistant's words."""
    name = "target's chat template"
    if not plan["target"]["has_chat_template"]:
        return _check(
            name, False, "the tokenizer has none",
            "Put the model's chat_template.jinja into the target folder: the server renders prompts with it.",
        )  # fmt: skip
    found = engine.get("rendering")
    if found is None:
        return _check(name, False, "nothing rendered it", "Check the engine's Python.")
    if found["error"]:
        return _check(name, False, f"it does not render a conversation: {found['error']}", "Mend the target's chat template.")
    fields = _template_fields(engine, asked)
    header, end = fields.get("assistant_header") or "", fields.get("end_of_turn_token") or ""
    if fields.get("parser_type", "general") == "openai-harmony" or not header:
        return _check(name, ANSWER in found["text"], "it renders a conversation", "Mend the target's chat template.")
    before, _answer, after = found["text"].partition(ANSWER)
    fits = header.strip() in before and end.strip() in after
    return _check(
        name, fits and bool(after or not end.strip()),
        f"{asked.chat_template} finds the assistant's words in what it renders" if fits
        else f"what it renders does not hold {asked.chat_template}'s {header!r} before the answer and {end!r} after it",
        "Choose the chat_template of the target's family, or describe the target's own in chat_template_file.",
    )  # fmt: skip


def _template_fields(engine: dict[str, Any], asked: Asked) -> dict[str, Any]:
    if not asked.chat_template_file:
        found: dict[str, Any] = engine.get("template_fields", {}).get(asked.chat_template, {})
        return found
    try:
        return read_json_object(asked.chat_template_file, "chat template file")
    except SpecDecodeError:
        return {}  # the check of the chat template says so


def _source(source: dict[str, Any]) -> dict[str, Any]:
    path, layout = str(source.get("path", "")), source.get("layout", "auto")
    if layout not in LAYOUTS:
        return _check("data", False, f"layout {layout!r} of {path} is not one of {', '.join(LAYOUTS)}", "Mend spec_sources.")
    there = os.path.isfile(path) and os.path.getsize(path) > 0
    return _check("data", there, f"{path}" if there else f"{path or 'a source'} is missing or empty", "Check spec_sources.")


def _work_dir(path: str) -> dict[str, Any]:
    place = site_facts.existing(path)
    ok = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
    return _check("work folder", ok, path if ok else f"{path} cannot be written", "Choose another spec_work_dir.")


def _tokens(asked: Asked) -> int:
    # Rows are seldom full; half of the longest length is a cautious mean.
    return asked.rows * (asked.max_length // 2)


def _disk(plan: dict[str, Any], asked: Asked) -> dict[str, Any]:
    needed = feature_bytes(plan, _tokens(asked))
    free = shutil.disk_usage(site_facts.existing(asked.work_dir)).free
    return _check(
        "disk", needed < free,
        f"{asked.rows} rows × {asked.max_length // 2} tokens × {_states(plan)} states × {plan['target']['hidden_size']}"
        f" × {WIDTH} bytes = {needed / 1e9:.1f} GB of features, {free / 1e9:.1f} GB free",
        "Free space, choose another spec_work_dir, or lower spec_train_rows.",
    )  # fmt: skip


def _time(plan: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """An estimate to plan with: never red."""
    tokens, rate = _tokens(asked), _measured_rate(asked.work_dir, plan["target"].get("sha", ""))
    if rate:
        return _check(
            "capture time", True, f"about {clock(tokens / rate)} for {tokens} tokens, at {rate:.0f} tokens/s as measured"
        )
    seconds = tokens / capture_rate(REFERENCE_FLOPS, float(plan["target"]["parameters"]))
    return _check(
        "capture time", True,
        f"about {clock(seconds)} of one {REFERENCE_GPU} (2 × parameters × {tokens} tokens at {PREFILL_UTILISATION:.0%} of"
        f" {REFERENCE_FLOPS / 1e12:.0f} TFLOP/s; nothing measured yet)",
    )  # fmt: skip


def _measured_rate(work_dir: str, sha: str) -> float:
    """Tokens a second of the newest capture of this very target below the work folder; 0 if there is none."""
    newest, rate = 0.0, 0.0
    for path in glob.glob(os.path.join(glob.escape(work_dir), "*", "spec-decode", "results", "capture.json")):
        try:
            experiment = read_json(os.path.join(os.path.dirname(path), "..", "experiment.json"))
            found = read_json(path)["throughput"]["tokens_per_s"]
            same = experiment["target"]["sha"] == sha
        except (SpecDecodeError, KeyError, TypeError):
            continue  # another version's: it says nothing about this one
        if found and same and os.path.getmtime(path) > newest:
            newest, rate = os.path.getmtime(path), float(found)
    return rate


def _slurm(asked: Asked) -> list[dict[str, Any]]:
    """Whether the cluster can run the jobs, and whether its nodes see the work folder."""
    found, nodes = [], []
    try:
        jobs = [resources(asked.slurm, asked.slurm_phases, phase) for phase in SCRIPTS]
    except SpecDecodeError as error:
        return [_check("nodes", False, error.message, error.remedy)]
    wanted = max(int(job["nodes"]) for job in jobs)
    for partition in sorted({str(job.get("partition") or "") for job in jobs}):
        listed, fault = site_facts.slurm_nodes(partition, asked.slurm_cluster)
        nodes += listed
        usable, idle = sum(node.usable for node in listed), sum(node.idle for node in listed)
        name = f"partition {partition}" if partition else "the cluster"
        reason = fault or f"{name}: {usable} of {len(listed)} nodes take jobs, {idle} idle" + ("" if idle else ": jobs will wait")
        found.append(
            _check(
                "nodes", not fault and usable >= wanted, reason,
                f"Run this on a login node of the cluster, and choose a partition with at least {wanted} usable nodes"
                " (spec_slurm.partition).",
            )
        )  # fmt: skip
    kind = site_facts.file_system(asked.work_dir)
    here = site_facts.all_here(nodes)
    shared = here or site_facts.is_shared(kind)
    confirmed = asked.confirm_shared_work_dir and not shared
    ending = ": confirmed by spec_confirm_shared_work_dir" if confirmed else "" if shared else ", which nodes seldom share"
    reason = "every node is this machine" if here else f"{asked.work_dir} is on {kind}"
    found.append(
        _check(
            "shared work folder", shared or confirmed,
            reason + ending,
            "Choose a spec_work_dir that all nodes mount, or set spec_confirm_shared_work_dir: true if they do.",
        )
    )  # fmt: skip
    return found


def _sampling(engine: dict[str, Any], temperature: float) -> dict[str, Any]:
    version = engine["versions"].get("vllm") or ""
    broken = temperature > 0 and version.startswith("0.32.0+cpu")
    return _check(
        "sampling", not broken,
        f"temperature {temperature:g}" + (f": vLLM {version} garbles sampled text under speculation" if broken else ""),
        "Set spec_temperature to 0.",
    )  # fmt: skip
