# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every command and run configuration against the flags and keys of its SpecForge generation, read from its source."""

from __future__ import annotations

import json
import pathlib

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import draft_config, specforge
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

DATA = pathlib.Path(__file__).parent / "data/specforge"
SCRIPTS, CLI = (json.loads((DATA / f"{name}.json").read_text()) for name in ("scripts", "cli"))
#: names of one value in both generations, where they differ
SAME = {"draft_accumulation_steps": "accumulation_steps", "max_num_steps": "max_steps"}
#: no evaluation data is given to the trainer: acceptance is measured in the serving engine
EVALUATION = {"eval_data_path", "eval_hidden_states_path", "eval_interval"}


def plan(method="eagle3"):
    return {
        "method": method,
        "target": {"path": "/models/base"},
        "values": {"aux_layers": [1, 38, 74], "embedding_key": "model.embed_tokens.weight", "lm_head_key": "lm_head.weight"},
        "draft_configs": {"dflash": {"block_size": 16, "num_hidden_layers": 5, "dflash_config": {"mask_token_id": 9}}},
    }


def config(method, **training):
    return specforge.run_config(
        plan(method), run_id="r", draft_config="d", features="f", output="o", chat_template="qwen", max_length=128,
        max_steps=10, training=training,
    )  # fmt: skip


def script(method="eagle3", source="/src/SpecForge/", **training):
    return specforge.script_config(
        plan(method), run_id="r", source=source, draft_config="d", data="train.jsonl", chat_template="qwen", max_length=128,
        max_steps=10, training=training,
    )  # fmt: skip


def dflash_arguments():
    values = specforge.training_values("dflash", 10)
    return specforge.train_dflash_arguments(plan("dflash"), values, "d", "train.jsonl", "qwen", 128, 10)


def capture(interface, method="eagle3"):
    return specforge.capture_arguments(
        interface, plan(method), draft_config="/b/draft.json", data="/b/train.jsonl", output="/b/features", cache="/b/cache",
        chat_template="qwen", max_length=2048, batch_size=8, tensor_parallel=4, trust_remote_code=True,
    )  # fmt: skip


def parsed(arguments, flags):
    """``{flag: value}``; refuses a flag that the script has not, one without its value, or one that it requires and lacks."""
    found, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        assert flag in flags, f"{flag} is no flag of the script"
        found[flag] = rest.pop(0) if flags[flag]["value"] else True
    missing = [flag for flag, facts in flags.items() if facts["required"] and flag not in found]
    assert not missing, f"required flags are missing: {missing}"
    return found


@pytest.mark.parametrize("generation", [SCRIPTS, CLI], ids=["scripts", "cli"])
def test_prepare_data_fits_both_generations(generation):
    flags = generation["scripts"]["prepare_data.py"]
    for options in ({}, {"data_path": "x.json", "sample_size": 9, "split_eval": True}):
        found = parsed(specforge.prepare_data_arguments("sharegpt", "/out", **options), flags)
        assert found["--dataset"] == "sharegpt" and found["--output-path"] == "/out"


def test_capture_of_the_scripts_takes_its_layers_by_flag():
    found = parsed(capture("scripts"), SCRIPTS["scripts"]["prepare_hidden_states.py"])
    assert found["--enable-aux-hidden-states"] and found["--aux-hidden-states-layers"] == "1,38,74"
    assert found["--tp-size"] == "4" and found["--batch-size"] == "8" and found["--max-length"] == "2048"


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_capture_of_the_cli_generation_takes_its_layers_from_the_draft_config(method):
    found = parsed(capture("cli", method), CLI["scripts"]["prepare_hidden_states.py"])
    assert found["--strategy"] == method and found["--draft-model-config"] == "/b/draft.json"


def test_capture_of_dflash_with_the_scripts_is_refused():
    with pytest.raises(
        SpecDecodeError, match=r"for EAGLE3 only\. Set spec_trainer_interface: cli .* spec_capture_backend: transformers"
    ):
        capture("scripts", "dflash")


def test_layers_have_one_source_of_truth():
    """The scripts train on the draft config's layers and capture on the flag's: both must say the same."""
    target = {
        "num_hidden_layers": 78, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128,
    }  # fmt: skip
    layers = draft_config.draft_config(target, "eagle3")["eagle_config"].value["eagle_aux_hidden_state_layer_ids"]
    arguments = capture("scripts")
    assert arguments[arguments.index("--aux-hidden-states-layers") + 1] == ",".join(map(str, layers))


def test_train_eagle3_is_what_the_script_takes():
    made = script()
    found = parsed(made["arguments"], SCRIPTS["scripts"]["train_eagle3.py"])
    assert made["script"] == "/src/SpecForge/scripts/train_eagle3.py"
    assert found["--max-num-steps"] == found["--total-steps"] == "10" and found["--train-hidden-states-path"] == "{features}"
    assert found["--num-epochs"] == "10" and found["--seed"] == "0" and found["--ttt-length"] == "7"


def test_train_dflash_is_what_the_script_takes():
    found = parsed(dflash_arguments(), SCRIPTS["scripts"]["train_dflash.py"])
    assert found["--block-size"] == "16" and found["--num-draft-layers"] == "5" and found["--mask-token-id"] == "9"
    assert found["--learning-rate"] == "0.0006" and found["--num-epochs"] == "6"


def test_offline_dflash_with_the_scripts_is_refused_with_the_way_out():
    with pytest.raises(SpecDecodeError, match="train_dflash.py is online only") as caught:
        script("dflash")
    assert "spec_trainer_interface: cli" in caught.value.remedy and "method=eagle3" in caught.value.remedy
    assert "torchrun /src/SpecForge/scripts/train_dflash.py --target-model-path /models/base" in caught.value.remedy


def test_scripts_need_the_source_tree():
    with pytest.raises(SpecDecodeError, match="Set spec_specforge_source to a checkout"):
        script(source="")


@pytest.mark.parametrize("changes", [{"fsdp_sharding": "NO_SHARD"}, {"optimizer_cpu_offload": True}, {"eval_interval": 5}])
def test_what_the_scripts_cannot_do_is_refused_not_dropped(changes):
    with pytest.raises(SpecDecodeError, match=f"no way to set {next(iter(changes))}"):
        script(**changes)


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_run_config_has_only_keys_of_the_schema(method):
    found = config(method)
    assert set(found) <= set(CLI["config"][""])
    for section in ("model", "data", "training", "tracking", "deployment"):
        assert set(found[section]) <= set(CLI["config"][section]), section
    assert set(found["deployment"]["trainer"]) <= set(CLI["config"]["deployment.trainer"])


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_every_default_that_changed_between_the_generations_is_written_out(method):
    """The changed defaults are computed from both generations' sources, so that none is forgotten."""
    written = {**config(method)["training"], **config(method)["data"]}
    arguments = script()["arguments"] if method == "eagle3" else dflash_arguments()
    flags = SCRIPTS["scripts"][f"train_{method}.py"]
    given = parsed(arguments, flags)
    changed = {}
    for flag, facts in flags.items():
        key = SAME.get(flag[2:].replace("-", "_"), flag[2:].replace("-", "_"))
        for section in ("training", "data"):
            new = CLI["config"][section].get(key, "absent")
            old = facts.get("default", None if facts["value"] else False)
            if new not in ("absent", old) and not str(old).startswith("computed"):
                changed[key] = flag
    expected = {
        "eagle3": {"num_epochs", "seed", "save_interval", "dist_timeout", "kl_decay"},
        "dflash": {
            "num_epochs",
            "learning_rate",
            "warmup_ratio",
            "max_grad_norm",
            "save_interval",
            "chat_template",
            "max_length",
        },
    }[method]
    assert expected <= set(changed)
    # Training data are features here, and how many processes load them shapes nothing.
    for key in set(changed) - EVALUATION - {"train_data_path", "dataloader_num_workers"}:
        assert key in written, f"{key} is not in the run configuration"
        assert changed[key] in given, f"{changed[key]} is not in the script's arguments"
        assert str(written[key]) == given[changed[key]], key


def test_auto_takes_what_is_installed():
    assert specforge.chosen_interface("auto", "cli") == "cli"
    assert specforge.chosen_interface("auto", "scripts") == "scripts"
    assert specforge.chosen_interface("scripts", "cli") == "scripts"
    with pytest.raises(SpecDecodeError, match="has no SpecForge"):
        specforge.chosen_interface("auto", "")
    with pytest.raises(SpecDecodeError, match="'both' is not known"):
        specforge.chosen_interface("both", "cli")
