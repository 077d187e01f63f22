# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a running vLLM server resolved its configuration to, and where two servers differ. Private to the collection."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any, NamedTuple

from .errors import SpecDecodeError
from .files import read_text_or_none
from .vllm_metrics import Access, short

#: the fields that shape a measurement, by the names that the reports use
ESSENTIALS = {
    "dtype": "model_config.dtype",
    "quantization": "model_config.quantization",
    "max_model_len": "model_config.max_model_len",
    "enforce_eager": "model_config.enforce_eager",
    "cudagraph_mode": "compilation_config.cudagraph_mode",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "prefix_caching": "cache_config.enable_prefix_caching",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "tensor_parallel": "parallel_config.tensor_parallel_size",
    "pipeline_parallel": "parallel_config.pipeline_parallel_size",
    "data_parallel": "parallel_config.data_parallel_size",
    "expert_parallel": "parallel_config.enable_expert_parallel",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "async_scheduling": "scheduler_config.async_scheduling",
    "version": "version",
}
#: vLLM's CUDAGraphMode by value, as its JSON has it
CUDAGRAPH_MODES = {
    "0": "NONE", "1": "PIECEWISE", "2": "FULL", "[2, 0]": "FULL_DECODE_ONLY", "[2, 1]": "FULL_AND_PIECEWISE",
}  # fmt: skip
#: differ between two starts of the very same server, and shape nothing
SAYS_NOTHING = re.compile(
    r"(^|[._])(instance_id|port|port_list|ip|cache_dir|debug_dump_path|compilation_time|static_forward_context|traced_files)(\.|$)"
)
#: the speculative config itself, or the room that vLLM makes for the draft's tokens and weights
SPECULATION = (
    "speculative_config.",
    "num_lookahead_tokens",
    "max_num_scheduled_tokens",
    "num_gpu_blocks",
    "kv_cache_size_tokens",
    "kv_cache_max_concurrency",
)
#: under the speculative config, copies of the two models' whole configurations
COPIES = re.compile(r"^speculative_config\.(draft|target)_\w+_config\.")
#: what vLLM sizes by the tokens of one step or sets from asynchronous scheduling, and no flag makes equal. Neither the
#: mode of CUDA graphs nor asynchronous scheduling itself is one of these.
FOLLOWS = (
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "compile_sizes",
    "compile_ranges",
    "disable_nccl_for_dp_synchronization",
)
#: the fields of the start-up log's line about the configuration, by their places in /server_info
LOG_FIELDS = {
    "dtype": "model_config.dtype",
    "max_seq_len": "model_config.max_model_len",
    "quantization": "model_config.quantization",
    "enforce_eager": "model_config.enforce_eager",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
    "pipeline_parallel_size": "parallel_config.pipeline_parallel_size",
    "data_parallel_size": "parallel_config.data_parallel_size",
}
#: those of the arguments that were given, which the line about the configuration leaves out
LOG_ARGUMENTS = {
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "enable_expert_parallel": "parallel_config.enable_expert_parallel",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "async_scheduling": "scheduler_config.async_scheduling",
}
#: those whose default is the same in every vLLM: not among the arguments that were given, they have it
LOG_DEFAULTS = {"parallel_config.enable_expert_parallel": False}
NOT_FOUND, FAILED = 404, 500
#: longest wait for /server_info, in seconds
INFO_S = 60.0
CONFIGURATION = re.compile(r"Initializing a V1 LLM engine \(v(?P<version>[^)]+)\) with config: (?P<config>.*)")
ARGUMENTS = re.compile(r"non-default args: (?P<arguments>\{.*\})")
BATCHED = re.compile(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)")
ASYNCHRONOUS = re.compile(r"Asynchronous scheduling is (enabled|disabled)")
GRAPH_MODE = re.compile(r"['\"]?cudagraph_mode['\"]?\s*[:=]\s*(?:<CUDAGraphMode\.(\w+)|(\[[^\]]*\]|\d+))")


class Resolved(NamedTuple):
    """What a running server told of its configuration."""

    #: flat, ``section.field`` → value
    config: dict[str, Any]
    #: where that was read: ``server_info``, ``log`` or ``nothing``
    source: str
    #: why /server_info, which tells all of it, did not; empty where it did, or is not served at all
    problem: str = ""


def of_running(url: str, access: Access | None = None, log: str = "") -> Resolved:
    """A running server's flat configuration.

    ``/server_info`` exists with VLLM_SERVER_DEV_MODE=1. Without it, or where it fails, ``log`` is the server's start-up
    log, where there is one at hand.
    """
    access = access or Access()
    version = _get(url, "/version", access)[0].get("version")
    # Before it answers for the first time, vLLM runs a dozen programs to describe the machine.
    info, problem = _get(url, "/server_info", dataclasses.replace(access, timeout_s=INFO_S), config_format="json")
    if isinstance(info.get("vllm_config"), dict):
        return Resolved({**flatten(info), "version": version}, "server_info")
    text = read_text_or_none(log) if log else None
    if text is None and isinstance(info.get("vllm_config"), str):
        # Older versions know no other format here than that of the log's line, which tells less than a whole log.
        return Resolved({**_from_line(info["vllm_config"]), "version": version}, "server_info")
    if text is not None:
        return Resolved({**from_log(text), "version": version}, "log", problem)
    return Resolved({"version": version}, "nothing", problem)


def _get(url: str, path: str, access: Access, **query: str) -> tuple[dict[str, Any], str]:
    """One answer of the server, empty where it has no such page; and what is wrong with the page where it has one."""
    import requests

    try:
        found = access.get(f"{url}{path}", **query).json()
    except requests.HTTPError as error:
        return {}, _why(f"{url}{path}", error.response.status_code)
    except (OSError, ValueError) as error:
        raise SpecDecodeError(
            f"{url}{path} could not be read: {short(error)}.", "Check that a vLLM server runs at this address."
        ) from error
    return (found if isinstance(found, dict) else {}), ""


def _why(page: str, status: int) -> str:
    """What a page's status says of the server; nothing where it just has no such page."""
    if status == NOT_FOUND:
        return ""
    words = f"{page} answered HTTP {status}"
    # It runs programs to describe the machine, and does not expect that looking for one could be forbidden.
    return f"{words}, as where the server's PATH names a folder that its user may not enter" if status == FAILED else words


def from_log(text: str) -> dict[str, Any]:
    """What a server's start-up log tells of its configuration, by the names of /server_info.

    vLLM logs neither its defaults for batching nor for memory: such a field that was not given is absent here.
    """
    configuration = _last(CONFIGURATION, text)
    if configuration is None:
        raise SpecDecodeError(
            "The log holds no line of vLLM about its configuration ('Initializing a V1 LLM engine').",
            "Give the log from the server's start on.",
        )
    found = {"version": configuration["version"], **_from_line(configuration["config"])}
    arguments = _last(ARGUMENTS, text)
    given = _value(arguments["arguments"]) if arguments else {}
    if arguments and isinstance(given, dict):
        found.update(LOG_DEFAULTS)
        found.update({field: given[name] for name, field in LOG_ARGUMENTS.items() if name in given})
    if batched := _last(BATCHED, text):
        found["scheduler_config.max_num_batched_tokens"] = int(batched[1])
    if asynchronous := _last(ASYNCHRONOUS, text):
        found["scheduler_config.async_scheduling"] = asynchronous[1] == "enabled"
    return found


def _from_line(line: str) -> dict[str, Any]:
    """The fields of vLLM's own text of its configuration."""
    found: dict[str, Any] = {}
    for name, field in LOG_FIELDS.items():
        value = re.search(rf"(?:^|, ){name}=([^,]*)", line)
        if value:
            found[field] = _value(value[1])
    mode = GRAPH_MODE.search(line)
    if mode:
        found["compilation_config.cudagraph_mode"] = mode[1] or mode[2]
    return found


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match: a log that was written on holds earlier starts, too."""
    return next(reversed(list(pattern.finditer(text))), None)


def _value(text: str) -> Any:
    """A Python literal as it is written, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as ``section.field`` → value; the outermost ``vllm_config`` is taken off."""
    if not prefix and isinstance(value, dict) and isinstance(value.get("vllm_config"), dict):
        value = value["vllm_config"]
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def essentials(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every number's context names; ``None`` where the server does not tell."""
    found = {name: config.get(path) for name, path in ESSENTIALS.items()}
    mode = found["cudagraph_mode"]
    return {**found, "cudagraph_mode": CUDAGRAPH_MODES.get(re.sub(r",\s*", ", ", str(mode)), mode)}


def differences(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every field in which the servers differ, other than the speculative config and what says nothing."""
    return [
        {**found, "follows_from_speculation": any(part in found["field"] for part in FOLLOWS)}
        for found in _unequal(configs)
        if not _is_speculation(found["field"])
    ]


def of_starts(arm: str, changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences between two starts of one arm, named so that they are not taken for differences between arms."""
    return [{**each, "field": f"{each['field']} of the {arm} arm's starts"} for each in changed]


def speculative_differences(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields of the speculative config itself, as the servers resolved it."""
    return [found for found in _unequal(configs) if _is_speculation(found["field"]) and not COPIES.match(found["field"])]


def contradiction(config: dict[str, Any], planned: dict[str, Any] | None) -> str:
    """Where a server speculates otherwise than an arm is meant to; empty where it does not, or does not tell."""
    tokens, method = (config.get(f"speculative_config.{name}") for name in ("num_speculative_tokens", "method"))
    if not planned:
        return f"it drafts {tokens} tokens by {method}, and should not speculate" if tokens else ""
    if "speculative_config" in config and config["speculative_config"] is None:
        return "it does not speculate"
    wanted = planned.get("num_speculative_tokens")
    if tokens is not None and wanted is not None and tokens != wanted:
        return f"it drafts {tokens} tokens, and should draft {wanted}"
    # Of layers of the target's own the server names the kind, whatever it was called.
    named = planned.get("method")
    if method is not None and named is not None and method != named and not (method.endswith("mtp") and named.endswith("mtp")):
        return f"it drafts by {method}, and should by {named}"
    return ""


def _is_speculation(field: str) -> bool:
    return field == "speculative_config" or any(part in field for part in SPECULATION)


def _unequal(configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    fields = sorted({field for config in configs.values() for field in config})
    found = []
    for field in fields:
        if SAYS_NOTHING.search(field):
            continue
        values = {name: config.get(field) for name, config in configs.items()}
        if len({repr(value) for value in values.values()}) > 1:
            found.append({"field": field, "values": values})
    return found


def comparable(configs: dict[str, dict[str, Any]], sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Configurations by the fields that all of them could tell: a log tells fewer than /server_info, under other words."""
    if len(set(sources.values())) == 1:
        return configs
    return {name: essentials(config) for name, config in configs.items()}
