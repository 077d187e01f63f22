# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An experiment with nothing to train: any speculative config against the standing one. Private to the collection."""

from __future__ import annotations

import json
import os
from typing import Any

from . import typed, user_input
from .checkpoint import read_target
from .derive import spec_slug
from .draft_config import width_problem
from .errors import SpecDecodeError
from .evidence import draft_sha
from .experiment import arms_plan, bundle_of, checked_name
from .files import read_json_object, sha256_value
from .launchers import launchers
from .verdict import has_no_draft

#: settings of an experiment that only measures: those of a training may not even be known
TAKEN = ("name", "work_dir", "prompts_file", "engine_python", "seed", "job", "serving", "slurm", "slurm_phases")
#: methods whose draft reads the target's hidden states
READS_STATES = ("eagle", "eagle3", "dflash")


def inspect(target: str, config: dict[str, Any], prompts: str, count: int) -> dict[str, Any]:
    """The facts of a candidate: its target, its own checksum, and that there is enough to ask. Refuses what cannot be."""
    method, model = config.get("method"), config.get("model")
    if not method:
        raise SpecDecodeError(
            "The candidate names no method.", "Give a speculative config such as {method: ngram, num_speculative_tokens: 4}."
        )
    if not model and not has_no_draft(method):
        raise SpecDecodeError(f"The candidate's method {method} needs a draft.", "Give its folder as model.")
    if model and not os.path.isfile(os.path.join(model, "config.json")):
        raise SpecDecodeError(
            f"The candidate's draft {model} is no folder with a config.json.", "Download the draft first, and give its folder."
        )
    tokens = str(config.get("num_speculative_tokens") or "").strip()
    if not tokens.isdecimal() or not int(tokens):
        raise SpecDecodeError(
            f"The candidate does not say how many tokens to draft: its num_speculative_tokens is {tokens or 'not given'}.",
            "Give a whole number above zero.",
        )
    config = {**config, "num_speculative_tokens": int(tokens)}
    try:
        with open(prompts, encoding="utf-8") as stream:
            rows = sum(1 for line in stream if line.strip())
    except OSError as error:
        raise SpecDecodeError(f"The prompts {prompts} cannot be read: {error.strerror}.", "Mend spec_prompts_file.") from error
    if rows < count:
        raise SpecDecodeError(f"{prompts} holds {rows} prompts, but {count} are asked for.", "Lower spec_prompts.")
    found = read_target(target, serving_copy=True)
    if model and method in READS_STATES:
        problem = width_problem(read_json_object(os.path.join(model, "config.json"), "draft config"), found.config)
        if problem:
            raise SpecDecodeError(f"The candidate {model} is for another target: {problem}.", "Mend spec_candidate or target.")
    return {
        "slug": spec_slug(target),
        "target": {
            "path": target, "sha": found.sha, "parameters": found.parameters, "bytes": found.bytes, "dtype": found.dtype,
            "architecture": (found.config.get("architectures") or ["unknown"])[0],
        },
        "candidate": {"speculative_config": config, "sha": draft_sha(model) if model else None, "draft_dir": model},
    }  # fmt: skip


def compose(facts: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The experiment: one job that measures, and the documents of its bundle."""
    settings = typed.settings({name: settings[name] for name in TAKEN})
    candidate, target = facts["candidate"], facts["target"]
    config = candidate["speculative_config"]
    name = checked_name(settings["name"] or f"{facts['slug']}-{config['method']}-candidate".replace("_", "-"))
    bundle = bundle_of(settings["work_dir"], name)
    user_input.path(settings["prompts_file"], "spec_prompts_file")
    experiment: dict[str, Any] = {
        "name": name,
        "slug": facts["slug"],
        "method": str(config["method"]),
        "bundle": bundle,
        "target": target,
        "num_speculative_tokens": config["num_speculative_tokens"],
        "engine_python": os.path.normpath(settings["engine_python"]),
        "job": settings["job"],
        "serving": settings["serving"],
        "seed": settings["seed"],
        "candidate": candidate,
        "prompts": settings["prompts_file"],
    }
    experiment["launch"] = launchers(settings["slurm"], settings["slurm_phases"], name)
    # Pods serve a copy of the draft from a place of their own, so that the plan leaves open where it stands.
    tested = {**config, "model": "{draft}"} if config.get("model") else config
    plan = arms_plan(experiment, settings["prompts_file"], settings["seed"], tested)
    experiment["recipe"] = {
        **user_input.variables(settings["job"]["environment"], "spec_job_environment"),
        **plan["server_environment"],
        "ENGINE_PYTHON": experiment["engine_python"],
        "TARGET_MODEL_PATH": target["path"],
        "TARGET_SHA": target["sha"],
        "ARMS_PLAN": "configs/arms.json",
    }
    draft = {"method": experiment["method"], "draft_dir": candidate["draft_dir"], "sha": candidate["sha"]}
    experiment["jobs"] = {
        "validate": {
            "script": f"{bundle}/slurm/eval.sbatch",
            "environment": {"TARGET_SHA": target["sha"]},
            "inputs": [f"{bundle}/configs/arms.json", f"{bundle}/results/draft.json", settings["prompts_file"]],
            "result": f"{bundle}/results/acceptance.json",
        }
    }
    stated = {key: value for key, value in experiment.items() if key not in ("recipe", "launch", "jobs")}
    # By way of JSON: inside Ansible these are its own kinds of list and text.
    stated = json.loads(json.dumps(stated))
    experiment["documents"] = {
        "configs/arms.json": plan,
        "results/draft.json": draft,
        "experiment.json": {**stated, "parameters_sha256": sha256_value(stated)},
    }
    return experiment


def table(experiment: dict[str, Any]) -> list[str]:
    """The candidate stated back, a line each."""
    serving = experiment["serving"]
    config = json.dumps(experiment["candidate"]["speculative_config"], sort_keys=True)
    lines = {
        "experiment": experiment["name"],
        "target": f"{experiment['target']['path']} ({experiment['target']['architecture']})",
        "candidate": config,
        "standing": json.dumps(serving["standing_config"], sort_keys=True) if serving["standing_config"] else "no speculation",
        "measured": f"{serving['trials']} trials an arm, {serving['prompts']} prompts of {experiment['prompts']},"
        f" concurrency {', '.join(map(str, serving['concurrencies']))}",
        "bundle": experiment["bundle"],
    }
    return [f"{name:<14} {value}" for name, value in lines.items()]
