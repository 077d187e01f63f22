# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One experiment: its parameters, its jobs and the documents of its bundle. Pure; private to the collection."""

from __future__ import annotations

import json
import os
import re
import textwrap
from typing import Any

from . import typed, user_input
from .draft_config import METHODS
from .errors import SpecDecodeError
from .files import sha256_value
from .fit import fit, summary
from .jobs import NAME_PATTERN
from .launchers import SCRIPTS, launchers
from .specforge import (
    BACKENDS,
    by_hand,
    capture_arguments,
    chosen_interface,
    run_config,
    script_config,
    script_path,
)

#: what one job writes and another reads, by its path below the bundle: known by the job, for the file may not be there yet
WRITERS = {
    "data/manifest.json": "dataset",
    "features/manifest.json": "capture",
    "train/manifest.json": "train",
    "results/draft.json": "convert",
}


def checked_name(name: str) -> str:
    """The experiment's name, if it can be a folder, a label and part of job names."""
    if not NAME_PATTERN.match(name):
        raise SpecDecodeError(
            f"The experiment's name {name!r} must be 1 to 63 lower-case letters, digits or inner hyphens:"
            " it becomes a folder, a label and part of job names.",
            "Give another with -e experiment=.",
        )
    return name


def bundle_of(work_dir: str, name: str) -> str:
    """Where an experiment's bundle stands."""
    return os.path.join(user_input.path(work_dir, "spec_work_dir"), name, "spec-decode")


def compose(plan: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The experiment from what was derived and what the user set. Everything later phases need stands in it."""
    settings = typed.settings(settings)
    method, values = plan["method"], plan["values"]
    _check_paths(plan["target"]["path"], settings)
    name = checked_name(settings["name"] or f"{values['slug']}-{method}")
    bundle = bundle_of(settings["work_dir"], name)
    slug = values["slug"]
    experiment: dict[str, Any] = {
        "name": name,
        "slug": slug,
        "method": method,
        "bundle": bundle,
        "drafts_dir": os.path.join(user_input.path(settings["drafts_dir"], "spec_drafts_dir"), slug),
        "target": plan["target"],
        "chat_template": settings["chat_template"],
        "chat_template_file": settings["chat_template_file"],
        "aux_layers": values["aux_layers"],
        "served_layers": values["served_layers"],
        "num_speculative_tokens": values["num_speculative_tokens"],
        "engine_python": os.path.normpath(settings["engine_python"]),
        "engine": settings["engine"]["versions"],
        "job": settings["job"],
        "dataset": settings["dataset"],
        "training": {"steps": settings["train_steps"], **settings["training"]},
        "capture": {
            "batch_tokens": settings["capture_batch_tokens"],
            "tensor_parallel": settings["capture_tensor_parallel"],
        },
        "trainer": _trainer(settings),
        "serving": settings["serving"],
    }
    experiment["fit"] = _fit(experiment, plan, settings["hardware"])
    experiment["launch"] = launchers(settings["slurm"], settings["slurm_phases"], name)
    experiment["recipe"] = _recipe(experiment, plan, settings)
    experiment["jobs"] = _jobs(experiment)
    experiment["documents"] = _documents(experiment, plan, settings)
    experiment["derivation"] = plan["derivation"]
    return experiment


def _check_paths(target: str, settings: dict[str, Any]) -> None:
    """Whatever jobs open by its name. What is not given is derived, or not needed."""
    sources = [("path in spec_sources", source.get("path", "")) for source in settings["dataset"]["sources"]]
    others = [("target", target), *((name, settings[name]) for name in ("chat_template_file", "specforge_source"))]
    for setting, value in [*others, *sources]:
        if value:
            user_input.path(value, setting)


def _fit(experiment: dict[str, Any], plan: dict[str, Any], hardware: dict[str, Any]) -> dict[str, Any]:
    target, serving, dataset = experiment["target"], experiment["serving"], experiment["dataset"]
    return fit(
        plan["config"],
        experiment["method"],
        layers=experiment["aux_layers"],
        draft=plan["draft_configs"][experiment["method"]],
        weights={"parameters": target["parameters"], "bytes": target["bytes"]},
        rows=dataset["train"],
        row_tokens=max(1, dataset["max_length"] // 2),
        context=_context(serving["server_arguments"]),
        requests=max(serving["concurrencies"], default=1),
        request_tokens=dataset["max_length"] + serving["max_tokens"],
        **hardware,
    )


def _context(arguments: list[str]) -> int:
    """The server's longest context as its flags give it, 0 if they do not."""
    found = re.search(r"--max-model-len[= ](\d+)", " ".join(map(str, arguments)))
    return int(found.group(1)) if found else 0


def _trainer(settings: dict[str, Any]) -> dict[str, Any]:
    """Which SpecForge trains, what captures, and whether an untrained draft is loaded first."""
    backend = settings["capture_backend"]
    if backend not in BACKENDS:
        raise SpecDecodeError(
            f"The capture backend {backend!r} is not known.", f"Set spec_capture_backend to one of {', '.join(BACKENDS)}."
        )
    return {
        "interface": chosen_interface(settings["trainer_interface"], settings["engine"].get("specforge_interface", "")),
        "source": settings["specforge_source"],
        "capture_backend": backend,
        "untrained_check": settings["untrained_check"],
    }


def _check_serving(serving: dict[str, Any]) -> None:
    if min(serving["trials"], serving["prompts"], serving["prompts_per_slot"]) < 1 or not serving["concurrencies"]:
        raise SpecDecodeError(
            "Measuring needs at least one trial, one prompt, also for each request in flight, and one concurrency.",
            "Mend spec_trials, spec_prompts, spec_prompts_per_slot or spec_concurrencies.",
        )
    if serving["aa_trials"] < 0 or any(tokens < 1 for tokens in serving["sweep_k"]):
        raise SpecDecodeError(
            f"{serving['aa_trials']} extra trials and a sweep over {serving['sweep_k']} speculative tokens cannot be measured.",
            "Mend spec_aa_trials or spec_sweep_k.",
        )


def arms_plan(experiment: dict[str, Any], prompts: str, seed: int, tested: dict[str, Any]) -> dict[str, Any]:
    """What the measurement does: the standing arm against ``tested``, with the same prompts, seeds and flags."""
    serving = experiment["serving"]
    _check_serving(serving)
    return {
        "model": experiment["slug"],
        "target": experiment["target"],
        "prompts": {"path": prompts, "count": serving["prompts"], "per_slot": serving["prompts_per_slot"]},
        "max_tokens": serving["max_tokens"],
        "temperature": serving["temperature"],
        "seed": seed,
        "warmup": serving["warmup"],
        "trials": serving["trials"],
        "aa_trials": serving["aa_trials"],
        "concurrencies": serving["concurrencies"],
        "sweep_num_speculative_tokens": serving["sweep_k"],
        "resident": serving["resident"],
        "device_metrics": serving["device_metrics"],
        "ports": serving["ports"],
        "startup_timeout_s": serving["startup_timeout_s"],
        "server_arguments": user_input.arguments(serving["server_arguments"], "spec_server_arguments"),
        "server_environment": user_input.variables(serving["server_environment"], "spec_server_environment"),
        "arms": [
            {"name": "standing", "speculative_config": serving["standing_config"] or None},
            {"name": "trained", "speculative_config": tested},
        ],
    }


def _recipe(experiment: dict[str, Any], plan: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """The variables of the recipe, as texts: the site's first, then the experiment's own, which win."""
    slug, method = experiment["slug"], experiment["method"]
    recipe = {
        **user_input.variables(settings["job"]["environment"], "spec_job_environment"),
        **user_input.variables(experiment["serving"]["server_environment"], "spec_server_environment"),
        "ENGINE_PYTHON": experiment["engine_python"],
        "TARGET_MODEL_PATH": experiment["target"]["path"],
        "TARGET_SHA": experiment["target"]["sha"],
        "METHOD": method,
        "AUX_LAYERS": ",".join(map(str, experiment["aux_layers"])),
        "CHAT_TEMPLATE": experiment["chat_template"],
        "CHAT_TEMPLATE_FILE": experiment["chat_template_file"],
        "DRAFT_CONFIG": f"configs/{slug}-{method}.json",
        "DATASET_CONFIG": "configs/dataset.json",
        "TRAIN_CONFIG": f"configs/{slug}-train.{'yaml' if experiment['trainer']['interface'] == 'cli' else 'json'}",
        "CAPTURE_COMMAND": "configs/capture-command.json",
        "ARMS_PLAN": "configs/arms.json",
        "MAX_LENGTH": str(experiment["dataset"]["max_length"]),
        "CAPTURE_BATCH_TOKENS": str(experiment["capture"]["batch_tokens"]),
        "EMBEDDING_KEY": plan["values"]["embedding_key"],
        "DRAFTS_DIR": experiment["drafts_dir"],
        "LOAD_CHECK": json.dumps(_load_check(experiment)),
    }
    return {name: user_input.text(value, name) for name, value in recipe.items()}


def _load_check(experiment: dict[str, Any]) -> list[str]:
    return [
        experiment["engine_python"], "load_draft.py", "--draft", "{draft}",
        "--speculative-config", json.dumps(_speculative(experiment, None)),
        "--server-arguments", json.dumps(experiment["serving"]["server_arguments"]),
    ]  # fmt: skip


def _speculative(experiment: dict[str, Any], model: str | None) -> dict[str, Any]:
    config = {"method": experiment["method"], "num_speculative_tokens": experiment["num_speculative_tokens"]}
    return {**config, "model": model} if model else config


def _jobs(experiment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each phase's job: its script, the variables and the files that its work depends on, and its result."""
    bundle, recipe = experiment["bundle"], experiment["recipe"]
    table: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "dataset": (
            ("TARGET_MODEL_PATH", "TARGET_SHA", "METHOD", "CHAT_TEMPLATE", "CHAT_TEMPLATE_FILE"),
            ("configs/dataset.json",),
        ),
        "capture": (
            (
                "TARGET_MODEL_PATH",
                "TARGET_SHA",
                "METHOD",
                "AUX_LAYERS",
                "CHAT_TEMPLATE",
                "CHAT_TEMPLATE_FILE",
                "MAX_LENGTH",
            ),
            (
                "data/manifest.json",
                *([recipe["CAPTURE_COMMAND"]] if experiment["trainer"]["capture_backend"] == "sglang" else []),
            ),
        ),
        "train": (
            ("TARGET_MODEL_PATH", "TARGET_SHA", "AUX_LAYERS"),
            (recipe["TRAIN_CONFIG"], recipe["DRAFT_CONFIG"], "features/manifest.json"),
        ),
        "untrained": (
            ("TARGET_MODEL_PATH", "TARGET_SHA", "METHOD", "AUX_LAYERS", "LOAD_CHECK"),
            (recipe["DRAFT_CONFIG"],),
        ),
        "convert": (
            ("TARGET_MODEL_PATH", "TARGET_SHA", "METHOD", "AUX_LAYERS", "EMBEDDING_KEY", "DRAFTS_DIR", "LOAD_CHECK"),
            (recipe["DRAFT_CONFIG"], "train/manifest.json"),
        ),
        "validate": (("TARGET_SHA",), (recipe["ARMS_PLAN"], "data/manifest.json", "results/draft.json")),
    }
    results = {"validate": "acceptance"}
    template = [experiment["chat_template_file"]] if experiment["chat_template_file"] else []
    own = {"dataset": [*(str(source["path"]) for source in experiment["dataset"]["sources"]), *template], "capture": template}
    return {
        phase: {
            "script": f"{bundle}/slurm/{SCRIPTS[phase]}.sbatch",
            "environment": {name: recipe[name] for name in names},
            "needs": [WRITERS[path] for path in inputs if path in WRITERS],
            "inputs": [*(f"{bundle}/{path}" for path in inputs if path not in WRITERS), *own.get(phase, [])],
            "result": f"{bundle}/results/{results.get(phase, phase)}.json",
        }
        for phase, (names, inputs) in table.items()
    }


def _documents(experiment: dict[str, Any], plan: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The bundle's files that are data: path below the bundle → content."""
    import yaml

    slug, bundle, seed = experiment["slug"], experiment["bundle"], experiment["dataset"]["seed"]
    prompts = f"{bundle}/data/{'train' if settings['one_sample'] else 'eval'}.jsonl"
    arms = arms_plan(experiment, prompts, seed, _speculative(experiment, "{draft}"))
    if settings["one_sample"]:
        # It is served to see whether it is accepted, not how fast: nothing stands beside the draft.
        arms["arms"] = [arm for arm in arms["arms"] if arm["name"] == "trained"]
    documents: dict[str, Any] = {
        f"configs/{slug}-{each}.json": plan["draft_configs"][each] for each in METHODS if each in plan["draft_configs"]
    }
    documents["configs/dataset.json"] = experiment["dataset"]
    train = _training(experiment, plan)
    documents["configs/specforge.json"] = by_hand(
        experiment["trainer"]["interface"],
        experiment["trainer"]["source"],
        _capture_arguments(experiment, plan),
        f"{bundle}/{experiment['recipe']['TRAIN_CONFIG']}",
        output=f"{bundle}/data/specforge",
        sample_size=experiment["dataset"]["train"],
        script=train if experiment["trainer"]["interface"] == "scripts" else None,
    )
    if experiment["trainer"]["interface"] == "cli":
        # By way of JSON: inside Ansible these are its own kinds of list and text, which YAML's serializer refuses.
        train = yaml.safe_dump(json.loads(json.dumps(train)), sort_keys=False)
    documents[experiment["recipe"]["TRAIN_CONFIG"]] = train
    if experiment["trainer"]["capture_backend"] == "sglang":
        documents[experiment["recipe"]["CAPTURE_COMMAND"]] = _capture(experiment, plan)
    documents["configs/arms.json"] = arms
    stated = {key: value for key, value in experiment.items() if key not in ("recipe", "launch", "jobs", "documents")}
    documents["experiment.json"] = {
        **stated, "derivation": plan["derivation"], "parameters_sha256": sha256_value(stated),
    }  # fmt: skip
    return documents


def _training(experiment: dict[str, Any], plan: dict[str, Any]) -> Any:
    """The trainer's configuration, in the form that its generation takes."""
    bundle, launch, trainer = experiment["bundle"], experiment["launch"]["train"], experiment["trainer"]
    shared = {
        "run_id": experiment["name"],
        "draft_config": f"{bundle}/{experiment['recipe']['DRAFT_CONFIG']}",
        "chat_template": experiment["chat_template"],
        "max_length": experiment["dataset"]["max_length"],
        "max_steps": experiment["training"]["steps"],
        "training": {key: value for key, value in experiment["training"].items() if key != "steps"},
        "trainer": {"nnodes": launch["nodes"], "nproc_per_node": max(1, launch["gpus"])},
    }
    if trainer["interface"] == "scripts":
        return script_config(plan, source=trainer["source"], data=f"{bundle}/data/train.jsonl", **shared)
    return run_config(plan, features=f"{bundle}/features", output=f"{bundle}/train", **shared)


def _capture(experiment: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """SpecForge's own capture, through SGLang, over the GPUs that the phase is given."""
    launch, trainer = experiment["launch"]["capture"], experiment["trainer"]
    tensor_parallel = _tensor_parallel(experiment)
    processes = max(1, launch["gpus"]) * launch["nodes"]
    if processes % tensor_parallel:
        raise SpecDecodeError(
            f"{tensor_parallel} do not divide the {processes} processes of the capture into groups of tensor parallelism.",
            "Mend spec_capture_tensor_parallel, or gpus and nodes in spec_slurm_phases.capture.",
        )
    rows = int(experiment["dataset"]["train"])
    if rows % (processes // tensor_parallel):
        raise SpecDecodeError(
            f"{rows} rows do not divide among {processes // tensor_parallel} groups of processes: SpecForge's capture would write"
            " some of them twice, in the place of others.",
            f"Make spec_train_rows a multiple of {processes // tensor_parallel}.",
        )
    return {
        "script": script_path(trainer["source"], "prepare_hidden_states.py"),
        "arguments": _capture_arguments(experiment, plan),
        "processes_per_node": max(1, launch["gpus"]),
        "nodes": launch["nodes"],
    }


def _capture_arguments(experiment: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    bundle, longest = experiment["bundle"], experiment["dataset"]["max_length"]
    return capture_arguments(
        experiment["trainer"]["interface"],
        plan,
        draft_config=f"{bundle}/{experiment['recipe']['DRAFT_CONFIG']}",
        data=f"{bundle}/data/train.jsonl",
        output=f"{bundle}/features",
        cache=f"{bundle}/cache",
        chat_template=experiment["chat_template"],
        max_length=longest,
        batch_size=max(1, experiment["capture"]["batch_tokens"] // longest),
        tensor_parallel=_tensor_parallel(experiment),
    )


def _tensor_parallel(experiment: dict[str, Any]) -> int:
    return int(experiment["capture"]["tensor_parallel"] or max(1, experiment["launch"]["capture"]["gpus"]))


def parameters_table(experiment: dict[str, Any]) -> list[str]:
    """The parameters stated back, for a terminal of 80 columns; only a path may be longer."""
    target = experiment["target"]
    method = experiment["method"]
    served = experiment["served_layers"]
    lines = {
        "experiment": experiment["name"],
        "target": f"{target['path']} ({target['architecture']}, {target['parameters'] / 1e6:.1f} M parameters)",
        "size": summary(experiment["fit"]),
        "method": f"{method}, K = {experiment['num_speculative_tokens']}",
        "aux layers": f"{experiment['aux_layers']} ({experiment['derivation']['aux_layers']['rule']}); vLLM's ids: {served}",
        "chat template": f"{experiment['chat_template']} ({experiment['derivation']['chat_template']['rule']})",
        "data": f"{experiment['dataset']['train']} rows to train, {experiment['dataset']['eval']} held out"
        + (", in the target's own words" if experiment["dataset"]["regenerate"] else ""),
        "training": f"{experiment['training']['steps']} steps, SpecForge's {experiment['trainer']['interface']} interface,"
        f" features through {experiment['trainer']['capture_backend']}",
        "measured": f"{experiment['serving']['trials']} trials an arm, {experiment['serving']['prompts']} prompts,"
        f" concurrency {', '.join(map(str, experiment['serving']['concurrencies']))}"
        + (f", also K = {', '.join(map(str, experiment['serving']['sweep_k']))}" if experiment["serving"]["sweep_k"] else ""),
        "engine": ", ".join(f"{name} {version}" for name, version in experiment["engine"].items() if version),
        "bundle": experiment["bundle"],
    }
    indent = " " * 15
    return [
        line
        for name, value in lines.items()
        for line in textwrap.wrap(
            value, 72, initial_indent=f"{name:<15}", subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    ]
