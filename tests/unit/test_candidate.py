# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Experiments with nothing to train: any speculative config against the standing one."""

from __future__ import annotations

import json
import pathlib
import shlex
import struct
import subprocess

import jinja2
import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import arms, canary_measuring, candidate
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

TEMPLATES = pathlib.Path(__file__).resolve().parent.parent.parent / "templates"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
SERVING = {
    "server_arguments": [], "server_environment": {"A": 1}, "standing_config": {}, "prompts": 2, "prompts_per_slot": 5,
    "max_tokens": 8,
    "temperature": 0.0, "trials": 3, "aa_trials": 0, "warmup": 1, "concurrencies": [1], "sweep_k": [], "resident": "auto",
    "device_metrics": "",
    "ports": [0, 0], "startup_timeout_s": 60,
}  # fmt: skip


@pytest.fixture
def target(tmp_path):
    """The least that is a checkpoint folder; quantised for serving, which is no obstacle here."""
    folder = tmp_path / "Some Target"
    folder.mkdir()
    config = {"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "nvfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    tensor = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    header = json.dumps(tensor).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"conversations": []}\n' * 3)
    return str(path)


def settings_of(folder, prompts, python="/e/python", **environment):
    return {"name": "", "work_dir": str(folder), "engine_python": python, "job": {"environment": environment},
            "serving": SERVING, "seed": 7, "prompts_file": prompts, "slurm": {}, "slurm_phases": {}}  # fmt: skip


def test_method_without_a_model_is_one_measuring_job(target, prompts, tmp_path):
    facts = candidate.inspect(target, NGRAM, prompts, 2)
    experiment = candidate.compose(facts, settings_of(tmp_path, prompts, SITE="x"))
    assert experiment["name"] == "some-target-ngram-candidate" and list(experiment["jobs"]) == ["validate"]
    arms = experiment["documents"]["configs/arms.json"]["arms"]
    assert [arm["speculative_config"] for arm in arms] == [None, NGRAM]
    assert experiment["documents"]["results/draft.json"]["sha"] is None
    assert prompts in experiment["jobs"]["validate"]["inputs"] and experiment["recipe"]["SITE"] == "x"
    assert any("no speculation" in line for line in candidate.table(experiment))


def test_settings_of_a_training_are_not_even_read(target, prompts, tmp_path):
    """In a play each is a template, and some of them cannot be told without a plan to train."""

    class Lazy(dict):
        def items(self):
            raise AssertionError("all settings are read")

    facts = candidate.inspect(target, NGRAM, prompts, 2)
    settings = settings_of(tmp_path, prompts)
    assert candidate.compose(facts, Lazy(settings)) == candidate.compose(facts, settings)


def test_numbers_may_be_texts_as_of_a_trained_experiment(target, prompts, tmp_path):
    settings = settings_of(tmp_path, prompts)
    texts = {**settings, "seed": "7", "serving": {**SERVING, "trials": "3", "temperature": "0.0"}}
    facts = candidate.inspect(target, NGRAM, prompts, 2)
    assert candidate.compose(facts, texts) == candidate.compose(facts, settings)
    with pytest.raises(SpecDecodeError, match="The setting serving.trials must be a whole number, but is 'few'"):
        candidate.compose(facts, {**settings, "serving": {**SERVING, "trials": "few"}})


def test_launcher_of_a_candidate_runs_the_measurement_and_nothing_else(target, prompts, tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    experiment = candidate.compose(candidate.inspect(target, NGRAM, prompts, 2), settings_of(tmp_path, prompts, str(stub)))
    bundle = pathlib.Path(experiment["bundle"])
    (bundle / "slurm").mkdir(parents=True)
    loader = jinja2.Environment(loader=jinja2.FileSystemLoader([TEMPLATES, TEMPLATES / "slurm"]), trim_blocks=True)
    loader.filters["quote"] = shlex.quote
    for name in ("recipe.env", "slurm/site.sh", "slurm/eval.sbatch"):
        (bundle / name).write_text(loader.get_template(f"{name}.j2").render(experiment=experiment) + "\n")
    answer = subprocess.run(["bash", str(bundle / "slurm/eval.sbatch")], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [
        "measure_arms.py", "--plan", "configs/arms.json", "--draft", "results/draft.json", "--out", "results/acceptance.json"
    ]  # fmt: skip


def test_public_draft_is_known_by_its_content(target, prompts, tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    config = {"method": "eagle3", "num_speculative_tokens": 3, "model": str(draft)}
    shas = []
    for content in (b"one", b"two"):
        (draft / "model.safetensors").write_bytes(content)
        shas.append(candidate.inspect(target, config, prompts, 2)["candidate"]["sha"])
    assert len(set(shas)) == 2 and all(len(sha) == 16 for sha in shas)
    # As hf download --local-dir leaves it, and git clone.
    for name, text in ((".cache/huggingface/download/config.json.metadata", "1764100000.0"), (".git/HEAD", "ref: main")):
        (draft / name).parent.mkdir(parents=True)
        (draft / name).write_text(text)
    assert candidate.inspect(target, config, prompts, 2)["candidate"]["sha"] == shas[-1]


def test_public_draft_is_served_from_wherever_it_is_staged(target, prompts, tmp_path):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft/config.json").write_text("{}")
    config = {"method": "eagle3", "num_speculative_tokens": "3", "model": str(tmp_path / "draft")}
    experiment = candidate.compose(candidate.inspect(target, config, prompts, 2), settings_of(tmp_path, prompts))
    documents = experiment["documents"]
    sha = documents["results/draft.json"]["sha"]
    canary = {"drafts_path": "/models/drafts", "stage_target": False, "models": {"path": "/models"}}
    _standing, trained = canary_measuring.canary_arms(experiment, documents["results/draft.json"], canary)
    assert trained["speculative_config"] == {**config, "num_speculative_tokens": 3, "model": f"/models/drafts/some-target/{sha}"}
    (staged,) = canary_measuring.staging_sources(experiment, documents["results/draft.json"], canary)
    assert staged == {"source": config["model"], "destination": f"/models/drafts/some-target/{sha}", "sha": sha}
    here = arms.arms(arms.complete(documents["configs/arms.json"]), documents["results/draft.json"])
    assert here["trained"].speculative_config["model"] == config["model"], "on this machine it stands where it was"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "names no method"),
        ({"method": "eagle3", "num_speculative_tokens": 3}, "method eagle3 needs a draft"),
        ({"method": "eagle3", "num_speculative_tokens": 3, "model": "/nowhere"}, "/nowhere is no folder with a config.json"),
        ({"method": "mtp"}, "how many tokens to draft: its num_speculative_tokens is not given"),
        ({"method": "mtp", "num_speculative_tokens": "four"}, "its num_speculative_tokens is four"),
        ({"method": "mtp", "num_speculative_tokens": -1}, "its num_speculative_tokens is -1"),
    ],
)
def test_candidate_that_cannot_be_measured_is_refused(target, prompts, config, words):
    with pytest.raises(SpecDecodeError, match=words):
        candidate.inspect(target, config, prompts, 2)


def test_layers_of_the_target_need_no_draft_by_any_name(target, prompts):
    for method in ("mtp", "deepseek_mtp", "mimo_mtp"):
        assert candidate.inspect(target, {"method": method, "num_speculative_tokens": 1}, prompts, 2)["candidate"]["sha"] is None


@pytest.mark.parametrize("place", [{"hidden_size": 64}, {"hidden_size": 128, "target_hidden_size": 64},
                                   {"target_hidden_size": None, "transformer_layer_config": {"hidden_size": 64}}])  # fmt: skip
def test_draft_for_a_target_of_another_width_is_refused(target, prompts, tmp_path, place):
    """vLLM loads it, and fails at the first request."""
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text(json.dumps(place))
    config = {"method": "eagle3", "num_speculative_tokens": 3, "model": str(draft)}
    told = pathlib.Path(target) / "config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "hidden_size": 128}))
    with pytest.raises(SpecDecodeError, match="another target: the draft reads hidden states of 64 values, .* have 128"):
        candidate.inspect(target, config, prompts, 2)
    told.write_text(json.dumps({**json.loads(told.read_text()), "hidden_size": 64}))
    assert candidate.inspect(target, config, prompts, 2)["candidate"]["draft_dir"] == str(draft)


def test_too_few_prompts_or_none(target, prompts):
    with pytest.raises(SpecDecodeError, match="holds 3 prompts, but 4 are asked for"):
        candidate.inspect(target, NGRAM, prompts, 4)
    with pytest.raises(SpecDecodeError, match="The prompts /nowhere cannot be read"):
        candidate.inspect(target, NGRAM, "/nowhere", 1)
