#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derive both drafts for every language model that the installed transformers knows, and build them.

Each config class of transformers' causal and image-text-to-text mappings is constructed with its defaults. A draft config that
is derived from it must be accepted by SpecForge's draft model and by vLLM's; else there must be one clear reason. Run it with the
engine's Python: ``.engine/bin/python scripts/targets_table.py``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import warnings
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".collections"))
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1",
)  # fmt: skip
warnings.filterwarnings("ignore")

import torch
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import METHODS, draft_config
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.fit import fit
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import configuration_auto, modeling_auto

#: any id inside every vocabulary: the default configs come without tokenizers, where a target's mask token is looked up
MASK = 1
#: drafts up to this many parameters get random weights, larger ones are built without memory (PyTorch's meta device)
SMALL = 40_000_000
PACKAGES = ("transformers", "specforge", "vllm")
#: kinds of reasons, by their words
KINDS = {
    "encoder-decoder": "is an encoder-decoder",
    "encoder": "is an encoder ",
    "too shallow": "is too shallow",
    "no one number of layers": "has no number of layers",
    "narrow token embeddings": "token embeddings have",
    "cannot be constructed without arguments": "transformers itself",
}


@dataclasses.dataclass
class Draft:
    """What became of one method for one target."""

    config: dict[str, Any] | None = None
    #: what is estimated of target and draft
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    #: of SpecForge's model of it, the shared token embedding included
    parameters: int = 0
    random_weights: bool = False
    #: what SpecForge or vLLM said against it
    problems: list[str] = dataclasses.field(default_factory=list)


def targets() -> dict[str, dict[str, Any] | str]:
    """Model type → default config, or why there is none."""
    kinds = [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    found: dict[str, dict[str, Any] | str] = {}
    for kind in sorted(set(kinds)):
        try:
            found[kind] = json.loads(configuration_auto.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except (ValueError, TypeError, StrictDataclassError) as error:
            found[kind] = f"transformers itself needs more than defaults: {str(error).splitlines()[0].rstrip('.:')}."
    return found


def render(config: dict[str, Any] | str, method: str) -> Draft:
    if isinstance(config, str):
        return Draft(reason=config)
    try:
        fields = draft_config(config, method, mask_token_id=MASK)
    except SpecDecodeError as error:
        return Draft(reason=str(error))
    draft = {name: field.value for name, field in fields.items()}
    return Draft(config=draft, figures={name: figure["value"] for name, figure in fit(config, method, draft=draft).items()})


class Builder:
    """Builds draft models as the trainer and the server do."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def specforge(self, draft: Draft) -> None:
        """SpecForge's own loader and class for the config's file."""
        from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

        config = AutoDraftModelConfig.from_file(str(self._write("specforge", draft.config) / "config.json"))
        with torch.device("meta"):
            draft.parameters = sum(each.numel() for each in AutoDraftModel.from_config(config).parameters())
        if draft.parameters <= SMALL:
            model = AutoDraftModel.from_config(config)
            draft.random_weights = all(bool(each.isfinite().all()) for each in model.parameters())
            assert draft.random_weights, "random weights are not finite"

    def vllm(self, draft: Draft, method: str) -> None:
        """vLLM's class, behind a stand-in target of the same hidden size, vocabulary and depth."""
        from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig, set_current_vllm_config
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        served = {name: value for name, value in draft.config.items() if name != "eagle_config"}
        shared = (
            "hidden_size",
            "vocab_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        stand_in = {
            **{name: served[name] for name in shared},
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 64, "torch_dtype": "bfloat16",
            "num_hidden_layers": served.get("num_target_layers", 16),
        }  # fmt: skip
        target = str(self._write("target", stand_in))
        length = min(64, served["max_position_embeddings"])
        model = ModelConfig(model=target, tokenizer=target, skip_tokenizer_init=True, enforce_eager=True, max_model_len=length)
        speculative = SpeculativeConfig(
            model=str(self._write("draft", served)), method=method, num_speculative_tokens=3, target_model_config=model,
            target_parallel_config=ParallelConfig(),
        )  # fmt: skip
        config = VllmConfig(model_config=model, speculative_config=speculative)
        with set_current_vllm_config(config), set_default_torch_dtype(model.dtype):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{self.folder}/rendezvous", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            with torch.device("meta"):
                initialize_model(vllm_config=config, model_config=speculative.draft_model_config)

    def _write(self, name: str, config: dict[str, Any]) -> pathlib.Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def sweep(configs: dict[str, dict[str, Any] | str]) -> dict[str, dict[str, Draft]]:
    """Every target's drafts, rendered and built."""
    found = {kind: {method: render(config, method) for method in METHODS} for kind, config in configs.items()}
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(pathlib.Path(folder))
        for drafts in found.values():
            for method, draft in drafts.items():
                if draft.config is None:
                    continue
                for name, build in (("SpecForge", builder.specforge), ("vLLM", lambda one, m=method: builder.vllm(one, m))):
                    try:
                        with contextlib.redirect_stdout(io.StringIO()):
                            build(draft)
                    except Exception as error:  # whatever a library says against a config is a finding
                        draft.problems.append(f"{name}: {type(error).__name__}: {error}")
    return found


def kind_of(reason: str) -> str:
    return next((kind for kind, words in KINDS.items() if words in reason), "other")


def table(configs: dict[str, dict[str, Any] | str], found: dict[str, dict[str, Draft]]) -> str:
    """The page ``docs/targets.md``."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Targets",
        "",
        "<!-- Written by scripts/targets_table.py; do not edit. -->",
        "",
        f"Every config class of transformers' causal and image-text-to-text mappings ({len(configs)} model types), constructed",
        "with its defaults, and what the derivation makes of it. Each rendered draft config was built by SpecForge's draft",
        f"model class (with random weights up to {SMALL // 10**6} million parameters, larger ones on PyTorch's meta device) and,",
        "on the meta device, by vLLM's class behind a stand-in target of the same hidden size, vocabulary and depth.",
        "",
        "The defaults of a class are not a real checkpoint: a row shows that the derivation holds for its shape of config, not",
        "that a draft was trained, nor that vLLM serves the target with one (the preflight asks that of the installed vLLM).",
        "",
        f"Versions: {versions}.",
        "",
        "| method | rendered and built | with random weights | refused | why refused |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        drafts = [each[method] for each in found.values()]
        rendered = [draft for draft in drafts if draft.config]
        kinds = collections.Counter(kind_of(draft.reason) for draft in drafts if not draft.config)
        why = ", ".join(f"{kind}: {number}" for kind, number in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
        small = sum(draft.random_weights for draft in rendered)
        lines.append(f"| {method} | {len(rendered)} | {small} | {len(drafts) - len(rendered)} | {why} |")
    lines += [
        "",
        "DFlash's mask token comes from a target's tokenizer, which default configs do not have; here it was given.",
        "",
        "## Rendered",
        "",
        "Heads are attention heads / key-value heads × head size.",
        "",
        "| model type | aux layers | target layers | hidden | heads | MLP | vocabulary | positions | rotary base, scaling |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(kind, drafts) for kind, drafts in found.items() if any(draft.config for draft in drafts.values())]
    lines += ["", "## Refused", "", "| model type | method | reason |", "|---|---|---|"]
    for kind, drafts in found.items():
        reasons: dict[str, list[str]] = {}
        for method, draft in drafts.items():
            if draft.reason:
                reasons.setdefault(draft.reason, []).append(method)
        lines += [f"| {kind} | {', '.join(methods)} | {reason.replace('|', '/')} |" for reason, methods in reasons.items()]
    return "\n".join(lines) + "\n"


def _row(kind: str, drafts: dict[str, Draft]) -> str:
    eagle3, dflash = drafts["eagle3"].config, drafts["dflash"].config
    draft = eagle3 or dflash
    heads = _both(eagle3, dflash, lambda one: f"{one['num_attention_heads']}/{one['num_key_value_heads']}×{one['head_dim']}")
    scaling = draft["rope_scaling"]
    cells = [
        kind,
        ", ".join(map(str, eagle3["eagle_config"]["eagle_aux_hidden_state_layer_ids"])) if eagle3 else "refused",
        ", ".join(map(str, dflash["dflash_config"]["target_layer_ids"])) if dflash else "refused",
        draft["hidden_size"], heads, _both(eagle3, dflash, lambda one: one["intermediate_size"]), draft["vocab_size"],
        draft["max_position_embeddings"], f"{draft['rope_theta']:g}" + (f", {scaling['rope_type']}" if scaling else ""),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _both(eagle3: dict[str, Any] | None, dflash: dict[str, Any] | None, show: Any) -> str:
    """One value where the methods agree, else both, EAGLE3's first."""
    return "; ".join(dict.fromkeys(str(show(one)) for one in (eagle3, dflash) if one))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/targets.md", help="page to write")
    parser.add_argument("--json", type=pathlib.Path, help="file for all drafts with what was said against them")
    options = parser.parse_args()
    configs = targets()
    found = sweep(configs)
    options.out.write_text(table(configs, found))
    if options.json:
        details = {kind: {m: dataclasses.asdict(draft) for m, draft in drafts.items()} for kind, drafts in found.items()}
        options.json.write_text(json.dumps(details))
    bad = [
        f"{kind} {method}: {problem}"
        for kind, drafts in found.items()
        for method, draft in drafts.items()
        for problem in [
            *draft.problems,
            *(["no sentence: " + draft.reason] if not re.search(r"\.$", draft.reason or ".") else []),
        ]
    ]
    print("\n".join(bad) or f"{len(found)} model types: every draft config that was rendered was built, all others have a reason")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
