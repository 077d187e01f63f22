# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Speed of light: how close a measured decode comes to what the memory allows, and how rigorous the evidence is.

Decoding is bound by memory traffic (Pope et al. 2022, "Efficiently Scaling Transformer Inference", section 2). One
step of a server with c requests in flight reads the target's weights once, the draft's weights once a drafting pass,
and every request's KV cache, and yields c·τ tokens, τ being the tokens a step (of a draft head, the acceptance length):

    bytes per accepted token = (weights + passes · draft + c · KV bytes a token · context) / (c · τ)

At full bandwidth B a request's token thus takes c · bytes per accepted token / B, the TPOT at the speed of light;
%SoL is that over the measured TPOT. Activations, the draft's own cache and collectives are left out: the true figure
is higher, never lower. A mixture of experts reads a part of its weights that no config tells: it has no figure.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .errors import SpecDecodeError
from .hardware import plain_name
from .model_shape import kv_bytes_per_token

#: what stands in a context where no ceiling is known
NO_CEILING = "none known for this hardware"


def ceiling_for(hardware: str, table: dict[str, Any], own: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]] | None:
    """The key and the peaks of this hardware: the user's own measured ones, else the table's."""
    if own:
        missing = [name for name in ("key", "memory_bandwidth_bytes_per_s", "source") if not own.get(name)]
        if missing or not 0 < float(own["memory_bandwidth_bytes_per_s"]) < math.inf:
            raise SpecDecodeError(
                f"The ceiling in spec_sol_ceiling lacks {' and '.join(missing) or 'a bandwidth above zero'}.",
                "Give key, memory_bandwidth_bytes_per_s and source (how it was measured).",
            )
        return str(own["key"]), own
    for key, peaks in table.get("ceilings", {}).items():
        if re.search(peaks["match"], plain_name(hardware)):
            return str(key), peaks
    return None


def traffic(
    target: dict[str, Any], config: dict[str, Any] | None, resolved: dict[str, Any], speculative: Any, draft_bytes: int | None
) -> dict[str, Any]:
    """What one step reads, part by part; ``None`` for a part that is not known."""
    text = (config or {}).get("text_config") or config or {}
    experts = any(text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    speculates = isinstance(speculative, dict)
    # EAGLE drafts token by token, a DFlash block comes in one pass; prompt lookup has no weights at all.
    passes = int(speculative.get("num_speculative_tokens") or 0) if speculates else 0
    if speculates and speculative.get("method") == "dflash":
        passes = 1
    weightless = not speculates or str(speculative.get("method")).startswith(("ngram", "suffix"))
    return {
        "weight_bytes": None if experts else target.get("bytes"),
        "draft_bytes": 0 if weightless else draft_bytes,
        "draft_passes": passes,
        "kv_bytes_per_token": kv_bytes_per_token(config, resolved["kv_cache_dtype"], resolved["dtype"]) if config else None,
    }


def share(
    arm: dict[str, Any], resolved: dict[str, Any], concurrency: float, facts: dict[str, Any], bandwidth: float
) -> dict[str, Any] | None:
    """%SoL of an arm's decode with everything it rests on; ``None`` where a part is unknown.

    ``facts`` is what :func:`traffic` returned.
    """
    if any(facts.get(name) is None for name in ("weight_bytes", "draft_bytes", "draft_passes", "kv_bytes_per_token")):
        return None
    # Each replica reads its own weights, for its share of the requests.
    concurrency = concurrency / int(resolved["data_parallel"])
    devices = int(resolved["tensor_parallel"]) * int(resolved["pipeline_parallel"])
    context = arm["input_tokens_mean"] + arm["output_tokens_mean"] / 2
    step = (
        facts["weight_bytes"] + facts["draft_passes"] * facts["draft_bytes"] + concurrency * facts["kv_bytes_per_token"] * context
    )
    tpot_ms = 1e3 * step / (bandwidth * devices) / arm["tokens_per_step"]
    return {
        **{name: facts[name] for name in ("weight_bytes", "draft_bytes", "draft_passes", "kv_bytes_per_token")},
        "context_tokens": context,
        "bytes_per_accepted_token": step / (concurrency * arm["tokens_per_step"]),
        "devices": devices,
        "tpot_ms_at_sol": tpot_ms,
        "percent": 100 * tpot_ms / arm["tpot_ms"]["median"],
    }


def rigor(profile: dict[str, Any] | None, device: bool = False) -> tuple[str, list[str]]:
    """The level that the evidence supports, and what each level rests on.

    L1: timing at the client. L2: also the engine's own counters, agreeing in every trial. L3: also the device's
    counters (DCGM), read during each trial (``device``) or saved meanwhile. L4: also a kernel profile (nsys, ncu).
    A level counts only on those below it.
    """
    found = profile or {}
    rests = ["L1: timing at the client", "L2: the engine's histograms and counters agree in every trial"]
    if device or found.get("dcgm"):
        rests.append(f"L3: device counters, {'over each trial' if device else ', '.join(found['dcgm'])}")
        if found.get("kernels"):
            rests.append(f"L4: kernel profile, {', '.join(found['kernels'])}")
    return f"L{len(rests)}", rests
