# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Does target and draft fit, on how many GPUs, and how long does the capture take: estimates. Private to the collection.

Every figure carries its unit, its source and its rule. What is not known stays ``None`` and says what is missing; a
tensor-parallel size that the user gives wins over the estimate, but must be one that vLLM can split the model by.
"""

from __future__ import annotations

import re
from typing import Any

from .draft_config import EXPLICIT, METHODS, draft_config
from .errors import SpecDecodeError
from .layers import as_layers
from .model_shape import (
    Shape,
    active_parameters,
    draft_parameters,
    kv_values_per_token,
    parameters,
    shape_of,
    tensor_parallel_sizes,
)

GIB = 1 << 30
#: what vLLM takes of a device's memory by default (0.32: ``gpu_memory_utilization``)
MEMORY_UTILISATION = 0.92
#: vLLM's defaults for a server on a large GPU: tokens of a step and requests in flight (0.32)
BATCHED_TOKENS, BATCHED_REQUESTS = 8192, 1024
#: CUDA context, collectives' buffers and graphs of one device: an allowance
OVERHEAD_BYTES = 2 * GIB
#: bytes of a trained parameter: bfloat16 weight and gradient, float32 master copy, gradient and AdamW's two moments
TRAINING_BYTES = 2 + 2 + 4 + 4 + 8
#: share of the peak that a prefill of whole rows reaches: an assumption
PREFILL_UTILISATION = 0.3
WIDTH = 2  # of bfloat16
DTYPE_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def fit(
    config: dict[str, Any],
    method: str = "eagle3",
    *,
    layers: Any = None,
    draft: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    dtype: str = "BF16",
    gpu: str = "",
    gpu_memory_gib: Any = "",
    num_gpus: Any = "",
    tp_size: Any = "",
    table: dict[str, Any] | None = None,
    rows: int = 0,
    row_tokens: int = 1024,
    context: int = 0,
    requests: int = 1,
    request_tokens: int = 0,
) -> dict[str, dict[str, Any]]:
    """Figure → ``{value, unit, source, rule}``.

    ``draft`` is the rendered draft config, ``weights`` the ``{parameters, bytes}`` of the target's files; both are
    derived from the config where they are not given. ``table`` holds accelerators' peaks by hardware token.
    """
    if method not in METHODS:
        raise SpecDecodeError(f"The method {method!r} is not known.", f"Choose one of {', '.join(METHODS)}.")
    shape = shape_of(config)
    read = as_layers(layers) if layers else None
    if draft is None:
        # The mask token changes no size.
        draft = {name: field.value for name, field in draft_config(config, method, layers=read, mask_token_id=0).items()}
    states = len(read or _read_layers(draft, method)) + (method == "eagle3")
    device = _device(gpu, gpu_memory_gib, table or {})
    found = _Figures()
    _model(found, shape, weights, dtype)
    _draft(found, draft, method)
    longest = min(context, shape.longest) if context else shape.longest
    kv_tokens = max(longest, requests * min(longest, request_tokens or longest))
    found.set(
        "kv_tokens", kv_tokens, "tokens", "settings",
        f"one whole context of {longest} tokens, which the server insists on, or {requests} requests at once, whichever is more",
    )  # fmt: skip
    _memory(found, shape, config, device, _count(num_gpus, "spec_num_gpus"), _count(tp_size, "spec_tp_size"))
    _capture(found, shape, states, rows, row_tokens, device)
    return found.all


def summary(figures: dict[str, dict[str, Any]]) -> str:
    """The figures that matter most, in a sentence."""
    values = {name: figure["value"] for name, figure in figures.items()}
    words = [f"weights {values['weight_bytes'] / 1e9:.1f} GB", f"features about {values['feature_bytes'] / 1e9:.1f} GB"]
    if values["tp_size"]:
        words.append(f"tensor-parallel size {values['tp_size']} ({figures['tp_size']['source']})")
    if values["features_per_hour"]:
        words.append(f"about {values['features_per_hour']} rows captured an hour")
    return ", ".join(words)


def feature_bytes_per_token(states: int, hidden: int) -> int:
    """Disk for one token's features: the captured states, in bfloat16."""
    return states * hidden * WIDTH


def capture_rate(flops: float, parameters: float) -> float:
    """Tokens a second that a device of that many FLOP/s captures.

    A forward pass takes 2 FLOPs for each active parameter and token (Kaplan et al. 2020, section 2.1).
    """
    return flops * PREFILL_UTILISATION / (2 * parameters)


def _read_layers(draft: dict[str, Any], method: str) -> list[int]:
    part, key = {
        "eagle3": ("eagle_config", "eagle_aux_hidden_state_layer_ids"), "dflash": ("dflash_config", "target_layer_ids"),
    }[method]  # fmt: skip
    return list(draft[part][key])


class _Figures:
    """Figures as they are found."""

    def __init__(self) -> None:
        self.all: dict[str, dict[str, Any]] = {}

    def set(self, name: str, value: Any, unit: str, source: str, rule: str) -> Any:
        self.all[name] = {"value": value, "unit": unit, "source": source, "rule": rule}
        return value

    def __getitem__(self, name: str) -> Any:
        return self.all[name]["value"]


def _count(value: Any, name: str) -> int:
    """A whole number of the user's; 0 if it was left empty."""
    if value in (None, ""):
        return 0
    if not re.fullmatch(r"[1-9][0-9]*", str(value)):
        raise SpecDecodeError(f"{name} must be a positive whole number, but is {value!r}.", f"Mend {name}.")
    return int(value)


def _device(gpu: str, memory: Any, table: dict[str, Any]) -> dict[str, Any]:
    """Memory and peak of one device: ``{bytes, flops, source}``, with ``None`` for what is not known."""
    known = table.get("ceilings", {})
    entry = {key.lower(): peaks for key, peaks in known.items()}.get(gpu.lower()) if gpu else {}
    if entry is None:
        raise SpecDecodeError(
            f"The accelerator {gpu!r} is not in the table ({', '.join(known)}).",
            "Choose one of them as spec_gpu, or leave it empty and give spec_gpu_memory_gib.",
        )
    # YAML reads 8.0e10 as a text.
    figures = {name: float(entry[key]) for name, key in (("bytes", "memory_bytes"), ("flops", "bf16_flops")) if key in entry}
    found = {"bytes": None, "flops": None, "source": entry.get("source", ""), **figures}
    if memory not in (None, ""):
        try:
            gib = float(memory)
        except (TypeError, ValueError):
            gib = 0.0
        if not gib > 0:
            raise SpecDecodeError(f"spec_gpu_memory_gib must be a positive number, but is {memory!r}.", "Mend it.")
        found["bytes"] = gib * GIB
    return found


def _model(found: _Figures, shape: Shape, weights: dict[str, Any] | None, dtype: str) -> None:
    if weights:
        total = found.set("parameters", weights["parameters"], "parameters", "weights", "sum over the tensors' shapes")
        found.set("weight_bytes", weights["bytes"], "bytes", "weights", "size of the weight files")
    else:
        rule = "embeddings + layers × (attention projections + MLPs or experts); norms and biases are left out"
        total = found.set("parameters", parameters(shape), "parameters", "config.json", rule)
        width = DTYPE_WIDTHS.get(dtype, WIDTH)
        found.set("weight_bytes", total * width, "bytes", "config.json", f"parameters × {width} ({dtype})")
    rule = "all parameters" if not shape.experts else (
        f"parameters − layers with experts × ({shape.experts} − {shape.experts_per_token}) × 3 × hidden × expert's width"
    )  # fmt: skip
    found.set("active_parameters", active_parameters(shape, total), "parameters", "config.json", rule)
    rule = (
        f"{shape.attention_layers} layers × (kv_lora_rank + qk_rope_head_dim) × 2 bytes, on every GPU"
        if shape.latent
        else f"2 × {shape.attention_layers} attention layers × {shape.kv_heads} key-value heads × {shape.head_size} × 2 bytes"
    )
    found.set("kv_bytes_per_token", kv_values_per_token(shape) * WIDTH, "bytes", "config.json", rule)


def _draft(found: _Figures, draft: dict[str, Any], method: str) -> None:
    trained, _shared = draft_parameters(draft, method)
    found.set("draft_parameters", trained, "parameters", "draft config", "all that is trained; the token embedding is shared")
    found.set("draft_bytes", trained * WIDTH, "bytes", "draft config", "draft_parameters × 2 (bfloat16)")
    heads = draft["num_key_value_heads"] * draft["head_dim"]
    found.set(
        "draft_kv_bytes_per_token", 2 * draft["num_hidden_layers"] * heads * WIDTH, "bytes", "draft config",
        "2 × layers × key-value heads × head_dim × 2 bytes",
    )  # fmt: skip
    table = draft["vocab_size"] * draft["hidden_size"] * WIDTH
    found.set(
        "draft_training_bytes", trained * TRAINING_BYTES + 2 * table, "bytes", "draft config",
        f"draft_parameters × {TRAINING_BYTES} (bfloat16 weight and gradient, float32 copy, gradient and AdamW's moments)"
        " + the target's embedding and LM head; activations grow with batch and length and are not in it",
    )  # fmt: skip


def _memory(found: _Figures, shape: Shape, config: dict[str, Any], device: dict[str, Any], gpus: int, given: int) -> None:
    block = _quantisation_block(config)
    most = gpus or max(given, 64)
    sizes = tensor_parallel_sizes(shape, most, block)
    found.set(
        "tp_sizes", sizes, "GPUs", "config.json",
        f"up to {most}: divide {shape.heads} heads; divide {1 if shape.latent else shape.kv_heads} key-value heads or are a"
        " multiple of them (then replicated); divide the MLPs" + (f" in blocks of {block}" if block else ""),
    )  # fmt: skip
    if given and given not in sizes:
        raise SpecDecodeError(
            f"spec_tp_size {given} cannot split this target on {most} GPUs; possible are {', '.join(map(str, sizes)) or 'none'}"
            f" ({found.all['tp_sizes']['rule']}).",
            "Mend spec_tp_size or spec_num_gpus.",
        )
    needs = {size: _device_bytes(found, shape, size) for size in sizes}
    usable = int(device["bytes"] * MEMORY_UTILISATION) if device["bytes"] else None
    found.set(
        "gpu_usable_bytes", usable, "bytes", device["source"] or "spec_gpu_memory_gib",
        f"memory of one GPU × {MEMORY_UTILISATION} (vLLM's default)" if usable else "spec_gpu and spec_gpu_memory_gib are empty",
    )  # fmt: skip
    fitting = [size for size in sizes if usable and needs[size] <= usable]
    if given:
        chosen: int | None = found.set("tp_size", given, "GPUs", *EXPLICIT)
    elif usable is None:
        chosen = found.set("tp_size", None, "GPUs", "none", "not derived: spec_gpu and spec_gpu_memory_gib are empty")
    elif fitting:
        chosen = found.set(
            "tp_size", fitting[0], "GPUs", "estimate", "the smallest of tp_sizes that fits one GPU's usable memory"
        )
    else:
        best = sizes[-1] if sizes else 1
        raise SpecDecodeError(
            f"The target needs about {needs.get(best, 0) / GIB:.1f} GiB on each of {best} GPUs, but one has"
            f" {usable / GIB:.1f} GiB usable.",
            "Give more or larger GPUs (spec_num_gpus, spec_gpu), a shorter --max-model-len in spec_server_arguments, or, if you"
            " know that it fits, spec_tp_size.",
        )
    found.set(
        "gpu_bytes", needs.get(chosen) if chosen else needs.get(1), "bytes", "estimate",
        "of one GPU at tp_size (1 if not derived): (weights + draft) / tp_size + kv_tokens' cache of target and draft"
        f" + activations of {BATCHED_TOKENS} tokens + logits of {BATCHED_REQUESTS} requests + {OVERHEAD_BYTES // GIB} GiB;"
        " vLLM measures it itself at start",
    )  # fmt: skip


def _device_bytes(found: _Figures, shape: Shape, size: int) -> int:
    kv_heads = max(1, shape.kv_heads // size)
    cache = kv_values_per_token(shape, kv_heads) * WIDTH + found["draft_kv_bytes_per_token"]
    widest = shape.expert_inner * shape.experts_per_token if shape.experts else shape.inner
    activations = BATCHED_TOKENS * (4 * shape.hidden + 3 * widest // size) * WIDTH
    logits = BATCHED_REQUESTS * shape.vocabulary * (WIDTH + 4)
    weights = (found["weight_bytes"] + found["draft_bytes"]) // size
    return int(weights + found["kv_tokens"] * cache) + activations + logits + OVERHEAD_BYTES


def _quantisation_block(config: dict[str, Any]) -> int:
    """Rows of a block-wise quantisation's block, 0 without one."""
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    return int(block[0]) if isinstance(block, list) and block and isinstance(block[0], int) else 0


def _capture(found: _Figures, shape: Shape, states: int, rows: int, row_tokens: int, device: dict[str, Any]) -> None:
    each = found.set(
        "feature_bytes_per_token", feature_bytes_per_token(states, shape.hidden), "bytes", "config.json",
        f"{states} states × hidden_size {shape.hidden} × 2 bytes",
    )  # fmt: skip
    rule = f"{rows} rows × {row_tokens} tokens (half of the longest row) × feature_bytes_per_token"
    found.set("feature_bytes", rows * row_tokens * each, "bytes", "settings", rule)
    gpus = found["tp_size"]
    tokens = None
    missing = "not derived: spec_gpu is empty, or no tp_size is known"
    rule = (
        f"3600 × tp_size × peak FLOP/s × {PREFILL_UTILISATION} / (2 × active_parameters): a forward pass takes 2 FLOPs for each"
        f" parameter and token (Kaplan et al. 2020, section 2.1); {PREFILL_UTILISATION} of the peak is an assumption"
    )
    if device["flops"] and gpus:
        tokens = int(3600 * capture_rate(gpus * float(device["flops"]), found["active_parameters"]))
    source = device["source"] if tokens else "none"
    found.set("capture_tokens_per_hour", tokens, "tokens/hour", source, rule if tokens else missing)
    per_hour = tokens // row_tokens if tokens else None
    found.set(
        "features_per_hour", per_hour, "rows/hour", source, f"capture_tokens_per_hour / {row_tokens}" if tokens else missing
    )
    found.set(
        "feature_bytes_per_second", tokens * each // 3600 if tokens else None, "bytes/s", source,
        "what the disk must write to keep up" if tokens else missing,
    )  # fmt: skip
