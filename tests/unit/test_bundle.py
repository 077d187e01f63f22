# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the bundle is rendered from: hostile values stay data, launchers are clean, documents are what they say."""

from __future__ import annotations

import json
import pathlib
import shlex
import subprocess
import sys

import jinja2
import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import experiment, specforge
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import METHODS, draft_config
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

TEMPLATES = pathlib.Path(__file__).resolve().parent.parent.parent / "templates"
HOSTILE = '/models/it\'s a "base"; $(touch hacked) `touch hacked` {{ x }} \\ } ${HOME}'
LAUNCHERS = ["prepare-data", "capture", "train", "convert", "eval"]


def plan(path="/models/base", method="eagle3"):
    config = {
        "num_hidden_layers": 16, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16,
        "vocab_size": 10,
    }  # fmt: skip
    drafts = {
        each: {name: field.value for name, field in draft_config(config, each, mask_token_id=3).items()} for each in METHODS
    }
    rule = {"value": [1, 7, 12], "source": "config.json", "rule": "[1, L//2-1, L-4]"}
    return {
        "method": method,
        "target": {"path": path, "sha": "t" * 64, "architecture": "Qwen3ForCausalLM", "parameters": 13000000, "bytes": 26000000},
        "values": {
            "slug": "base", "aux_layers": [1, 7, 12], "served_layers": [2, 8, 13], "num_speculative_tokens": 3,
            "embedding_key": "model.embed_tokens.weight", "lm_head_key": "lm_head.weight",
        },
        "config": config,
        "draft_configs": drafts,
        "derivation": {"aux_layers": rule, "chat_template": {"value": "qwen", "source": "explicit", "rule": "given"}},
    }  # fmt: skip


def settings(work="/work", **changes):
    return {
        "name": "", "chat_template": "qwen", "chat_template_file": "", "work_dir": work, "drafts_dir": f"{work}/drafts",
        "engine_python": "/engine/python", "engine": {"versions": {"vllm": "0.32.0", "sglang": None}},
        "job": {"executor": "local", "options": {}, "environment": {}, "attempts": 3, "poll_interval": 1},
        "dataset": {
            "sources": [{"path": "/data/a.json"}], "train": 10, "eval": 2, "max_length": 128, "seed": 1, "regenerate": True,
        },
        "hardware": {"gpu": "", "gpu_memory_gib": "", "num_gpus": "", "tp_size": "", "table": {}},
        "capture_batch_tokens": 512, "train_steps": 100, "training": {"batch_size": 4},
        "serving": {
            "server_arguments": ["--enforce-eager"], "server_environment": {"A": "1"}, "standing_config": {}, "prompts": 2,
            "max_tokens": 8, "temperature": 0.0, "trials": 3, "warmup": 1, "concurrencies": [1], "ports": [0, 0],
            "aa_trials": 2, "sweep_k": [2, 5], "resident": "auto",
            "startup_timeout_s": 60,
        },
        **changes,
    }  # fmt: skip


def rendered(name, found):
    # The settings that Ansible's own template lookup uses.
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader([TEMPLATES, TEMPLATES / "slurm"]), trim_blocks=True, keep_trailing_newline=False
    )
    loader.filters["quote"] = shlex.quote
    return loader.get_template(name).render(experiment=found) + "\n"


def lay_down(folder, found):
    bundle = pathlib.Path(found["bundle"])
    (bundle / "slurm").mkdir(parents=True)
    (bundle / "recipe.env").write_text(rendered("recipe.env.j2", found))
    (bundle / "run-offline.sh").write_text(rendered("run-offline.sh.j2", found))
    for name in LAUNCHERS:
        (bundle / "slurm" / f"{name}.sbatch").write_text(rendered(f"slurm/{name}.sbatch.j2", found))
    return bundle


@pytest.fixture
def hostile(tmp_path):
    stub = tmp_path / "engine 'python'"
    stub.write_text('#!/bin/bash\nprintf \'%s\\0\' "$@" > "$STUB_OUT"\n')
    stub.chmod(0o755)
    work = tmp_path / "a work's $(touch hacked) folder"
    found = experiment.compose(plan(HOSTILE), settings(str(work), engine_python=str(stub), chat_template=HOSTILE))
    return lay_down(tmp_path, found), found


@pytest.mark.parametrize("name", LAUNCHERS)
def test_hostile_values_reach_the_program_as_they_are(hostile, tmp_path, name):
    bundle, found = hostile
    out = tmp_path / "arguments"
    answer = subprocess.run(
        ["bash", str(bundle / "slurm" / f"{name}.sbatch")], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "STUB_OUT": str(out)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    arguments = out.read_text().split("\0")
    if name in ("prepare-data", "capture"):
        assert arguments[arguments.index("--target-model-path") + 1] == HOSTILE
        assert arguments[arguments.index("--chat-template") + 1] == HOSTILE
    assert not list(tmp_path.rglob("hacked"))


def test_environment_wins_over_the_recipe(hostile, tmp_path):
    bundle, _found = hostile
    out = tmp_path / "arguments"
    subprocess.run(
        ["bash", str(bundle / "slurm/capture.sbatch")], check=True,
        env={"PATH": "/usr/bin:/bin", "STUB_OUT": str(out), "AUX_LAYERS": "2,3,4", "METHOD": "dflash"},
    )  # fmt: skip
    arguments = out.read_text().split("\0")
    assert arguments[arguments.index("--aux-layers") + 1] == "2,3,4"
    assert arguments[arguments.index("--method") + 1] == "dflash"


def test_launchers_are_shellcheck_clean(tmp_path):
    bundle = lay_down(tmp_path, experiment.compose(plan(), settings(str(tmp_path / "work"))))
    scripts = [str(path) for path in [*bundle.glob("slurm/*.sbatch"), bundle / "run-offline.sh"]]
    answer = subprocess.run(
        [pathlib.Path(sys.executable).with_name("shellcheck"), "--shell=bash", *scripts],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout


def test_documents_are_what_they_say():
    found = experiment.compose(plan(), settings())
    documents = found["documents"]
    assert found["name"] == "base-eagle3" and found["bundle"] == "/work/base-eagle3/spec-decode"
    assert {"configs/base-eagle3.json", "configs/base-dflash.json", "configs/base-train.yaml", "experiment.json"} < set(documents)
    train = yaml.safe_load(documents["configs/base-train.yaml"])
    assert train["model"]["aux_hidden_state_layer_ids"] == [1, 7, 12] and train["training"]["max_steps"] == 100
    arms = documents["configs/arms.json"]["arms"]
    assert arms[0] == {"name": "standing", "speculative_config": None}
    assert arms[1]["speculative_config"] == {"method": "eagle3", "model": "{draft}", "num_speculative_tokens": 3}
    json.dumps(documents["experiment.json"])


def test_training_configuration_writes_out_what_changed_between_generations():
    for method in ("eagle3", "dflash"):
        config = specforge.run_config(
            plan(method=method), run_id="r", draft_config="d", features="f", output="o", chat_template="qwen",
            max_length=128, max_steps=10,
        )  # fmt: skip
        written = set(config["training"])
        assert {"num_epochs", "learning_rate", "warmup_ratio", "max_grad_norm", "save_interval", "seed"} <= written
        assert config["training"]["save_interval"] > 0 and config["data"]["max_length"] == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Not A Label"}, "must be 1 to 63 lower-case letters"),
        ({"train_steps": 0}, "at least one step"),
        ({"training": {"save_interval": 0}}, "keeps only the last checkpoint"),
        ({"serving": {**settings()["serving"], "trials": 0}}, "at least one trial"),
        ({"job": {**settings()["job"], "environment": {"A B": "x"}}}, "no name of an environment variable"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        experiment.compose(plan(), settings(**changes))


def test_only_what_a_phase_depends_on_is_part_of_its_identity():
    one = experiment.compose(plan(), settings())["jobs"]
    other = experiment.compose(plan(), settings(capture_batch_tokens=9, engine_python="/else/python"))["jobs"]
    assert one["dataset"]["environment"] == other["dataset"]["environment"]
    assert one["capture"]["environment"] == other["capture"]["environment"]
    moved = experiment.compose(plan("/models/other"), settings())["jobs"]
    assert all(one[phase]["environment"] != moved[phase]["environment"] for phase in ("dataset", "capture", "train", "convert"))


def test_parameters_fit_a_terminal():
    lines = experiment.parameters_table(experiment.compose(plan(), settings()))
    assert any("[1, 7, 12]" in line and "[2, 8, 13]" in line for line in lines)
    assert max(map(len, lines)) <= 72, "a callback indents them"
    long = experiment.parameters_table(experiment.compose(plan("/a long/path " * 12), settings()))
    assert max(map(len, long)) <= 72
