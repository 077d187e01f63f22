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
import textwrap

import jinja2
import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import experiment, specforge
from ansible_collections.inference.spec_decode.plugins.module_utils.draft_config import METHODS, draft_config
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

TEMPLATES = pathlib.Path(__file__).resolve().parent.parent.parent / "templates"
HOSTILE = '/models/it\'s a "base"; $(touch hacked) `touch hacked` {{ x }} \\ } ${HOME}'
LAUNCHERS = ["prepare-data", "untrained", "capture", "train", "convert", "eval"]


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
        "trainer_interface": "cli", "specforge_source": "/src/SpecForge", "capture_backend": "transformers",
        "capture_tensor_parallel": 0, "untrained_check": True, "one_sample": False, "slurm": {}, "slurm_phases": {},
        "capture_batch_tokens": 512, "train_steps": 100, "training": {"batch_size": 4},
        "serving": {
            "server_arguments": ["--enforce-eager"], "server_environment": {"A": "1"}, "standing_config": {}, "prompts": 2,
            "prompts_per_slot": 5,
            "max_tokens": 8, "temperature": 0.0, "trials": 3, "warmup": 1, "concurrencies": [1], "ports": [0, 0],
            "aa_trials": 2, "sweep_k": [2, 5], "resident": "auto", "device_metrics": "",
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
    (bundle / "slurm/site.sh").write_text(rendered("slurm/site.sh.j2", found))
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


def recipe_by_hand(bundle, tmp_path, **environment):
    return subprocess.run(
        ["bash", str(bundle / "run-offline.sh")], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "STUB_OUT": str(tmp_path / "arguments"), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["METHOD", "AUX_LAYERS", "CHAT_TEMPLATE", "DRAFT_CONFIG", "MAX_LENGTH"])
def test_recipe_by_hand_refuses_what_its_training_would_not_follow(hostile, tmp_path, name):
    bundle, found = hostile
    answer = recipe_by_hand(bundle, tmp_path, **{name: "another"})
    assert answer.returncode == 2 and not (tmp_path / "arguments").exists()
    assert f"{name} is 'another', but this bundle was rendered for '{found['recipe'][name]}'" in answer.stderr
    assert recipe_by_hand(bundle, tmp_path, **{name: found["recipe"][name]}).returncode == 0


def test_target_of_the_recipe_by_hand_reaches_every_phase(hostile, tmp_path):
    bundle, found = hostile
    for name in ("prepare-data", "capture", "train", "convert"):
        subprocess.run(
            ["bash", str(bundle / "slurm" / f"{name}.sbatch")], check=True,
            env={"PATH": "/usr/bin:/bin", "STUB_OUT": str(tmp_path / "arguments"), "TARGET_MODEL_PATH": "/moved"},
        )  # fmt: skip
        arguments = (tmp_path / "arguments").read_text().split("\0")
        assert arguments[arguments.index("--target-model-path") + 1] == "/moved"
    # What convert loads the draft with at its end is a command of its own, which names no other target.
    assert found["recipe"]["TARGET_MODEL_PATH"] not in json.loads(found["recipe"]["LOAD_CHECK"])


def test_load_check_takes_the_recipes_target(tmp_path):
    stub = """
        class Stub:
            parse_args = add_cli_args = from_cli_args = from_engine_args = staticmethod(lambda given: print(given) or Stub)
        EngineArgs = LLMEngine = Stub
        FlexibleArgumentParser = str
    """
    for module in ("vllm/engine/arg_utils", "vllm/utils/argparse_utils", "vllm/v1/engine/llm_engine"):
        place = tmp_path / f"{module}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(textwrap.dedent(stub))
    found = experiment.compose(plan(), settings())
    command = [sys.executable, str(TEMPLATES.parent / "files/load_draft.py"), *json.loads(found["recipe"]["LOAD_CHECK"])[2:]]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path), "TARGET_MODEL_PATH": "/moved"}
    )
    assert "['--model', '/moved', '--enforce-eager'" in answer.stdout
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)})
    assert answer.returncode == 2 and "--target-model-path" in answer.stderr


def shellcheck(scripts):
    answer = subprocess.run(
        [pathlib.Path(sys.executable).with_name("shellcheck"), "--shell=bash", *scripts],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("file", ["", "/mine/template.json"])
def test_a_template_file_is_an_input_of_whatever_renders_by_it(file):
    jobs = experiment.compose(plan(), settings(chat_template_file=file))["jobs"]
    assert {phase for phase, job in jobs.items() if file in job["inputs"]} == ({"dataset", "capture"} if file else set())


def test_launchers_are_shellcheck_clean(tmp_path):
    bundle = lay_down(tmp_path, experiment.compose(plan(), settings(str(tmp_path / "work"))))
    scripts = [str(path) for path in [*bundle.glob("slurm/*"), bundle / "run-offline.sh"]]
    shellcheck(scripts)


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


SITE = {
    "partition": "gpu", "account": "research", "qos": "normal", "time": "12:00:00", "nodes": 2, "gpus": 8, "cpus": 16,
    "mem": "200G", "constraint": "h100|h200", "requeue": True, "signal": "TERM@300", "exclusive": True, "modules": ["cuda/12.9"],
    "nccl": {"SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "WARN"}, "environment": {"HF_HOME": HOSTILE},
}  # fmt: skip
PYXIS = {"kind": "pyxis", "image": "docker://registry#engine:1", "mounts": ["/models:/models", "/work"], "arguments": ["--no-x"]}
APPTAINER = {"kind": "apptainer", "image": "/images/engine's.sif", "mounts": ["/models"], "arguments": ["--nv"]}


def launcher_text(tmp_path, name, **changes):
    found = experiment.compose(plan(), settings(str(tmp_path / "work"), **changes))
    return (lay_down(tmp_path, found) / "slurm" / f"{name}.sbatch").read_text()


def test_directives_are_what_the_site_says(tmp_path):
    lines = launcher_text(tmp_path, "train", slurm=SITE).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    found = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(found)] == [f"#SBATCH {directive}" for directive in found], "sbatch stops at the first command"
    assert {
        "--job-name=base-eagle3-train", "--partition=gpu", "--account=research", "--qos=normal", "--time=12:00:00", "--nodes=2",
        "--gpus-per-node=8", "--cpus-per-task=16", "--mem=200G", "--constraint=h100|h200", "--requeue", "--signal=TERM@300",
        "--open-mode=append", "--output=%x-%j.log", "--ntasks-per-node=1", "--exclusive",
    } == set(found)  # fmt: skip


def test_a_phase_overrides_the_site_and_only_training_and_capture_spread_over_nodes(tmp_path):
    phases = {"train": {"time": "2-00:00:00", "partition": "long", "requeue": False}}
    found = experiment.compose(plan(), settings(slurm=SITE, slurm_phases=phases))["launch"]
    assert {"--time=2-00:00:00", "--partition=long", "--no-requeue", "--nodes=2"} <= set(found["train"]["directives"])
    assert {"--time=12:00:00", "--partition=gpu", "--nodes=2"} <= set(found["capture"]["directives"])
    assert "--nodes=1" in found["validate"]["directives"]


@pytest.mark.parametrize(
    "value", ["--wrap=id", "-x", "a b", "a\n#SBATCH --uid=0", "a\nid", 'a"b', "a'b", "a#b", "a\\b", "a\tb", "a\0"]
)
@pytest.mark.parametrize("key", ["partition", "account", "gres", "output", "mem"])
def test_directives_that_sbatch_would_take_apart_are_refused(key, value):
    with pytest.raises(SpecDecodeError, match="cannot stand in an #SBATCH line"):
        experiment.compose(plan(), settings(slurm={key: value}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slurm": {"partitoin": "gpu"}}, "no setting 'partitoin'"),
        ({"slurm": {"time": "soon"}}, "no time limit that Slurm knows"),
        ({"slurm": {"nodes": 0}}, "whole number from 1"),
        ({"slurm": {"gpus": "8; id"}}, "whole number from 1"),
        ({"slurm": {"environment": {"A B": 1}}}, "no name of an environment variable"),
        ({"slurm": {"container": {"kind": "docker", "image": "x"}}}, "no kind 'docker'"),
        ({"slurm": {"container": {"kind": "pyxis"}}}, "needs an image"),
        ({"slurm": {"container": {"kind": "pyxis", "image": "x", "mounts": ["/a,/etc"]}}}, "without a comma"),
        ({"slurm_phases": {"training": {}}}, "'training', which is no phase"),
    ],
)
def test_slurm_settings_that_cannot_be(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        experiment.compose(plan(), settings(**changes))


def started(tmp_path, name, tools=(), environment=(), **changes):
    """Run a launcher whose programs, ``srun`` and the like are stubs; returns the words of what it started at last."""
    out, bin_ = tmp_path / "started", tmp_path / "bin"
    bin_.mkdir()
    for tool in (*tools, "engine-python"):
        (bin_ / tool).write_text(f'#!/bin/bash\nprintf \'%s\\0\' {tool} "$@" > "$STUB_OUT"\nenv -0 > "$STUB_OUT.env"\n')
        (bin_ / tool).chmod(0o755)
    (bin_ / "scontrol").write_text("#!/bin/bash\nprintf 'node7\\nnode8\\n'\n")
    (bin_ / "scontrol").chmod(0o755)
    work = str(tmp_path / "a work's $(touch hacked) folder")
    found = experiment.compose(plan(), settings(work, engine_python="engine-python", **changes))
    bundle = lay_down(tmp_path, found)
    answer = subprocess.run(
        ["bash", str(bundle / "slurm" / f"{name}.sbatch")], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": f"{bin_}:/usr/bin:/bin", "STUB_OUT": str(out), **dict(environment)},
    )  # fmt: skip
    assert not list(tmp_path.rglob("hacked"))
    values = (
        dict(item.split("=", 1) for item in (tmp_path / "started.env").read_text().split("\0") if item) if out.exists() else {}
    )
    return answer, out.read_text().split("\0")[:-1] if out.exists() else [], values


JOB = (("SLURM_JOB_ID", "4242"), ("SLURM_JOB_NODELIST", "node[7-8]"))


def test_pyxis_container_over_two_nodes(tmp_path):
    answer, words, values = started(
        tmp_path, "train", ["srun"], JOB, slurm={"nodes": 2, "gpus": 8, "container": PYXIS, "nccl": {"SOCKET_IFNAME": "ib0"}}
    )
    assert answer.returncode == 0, answer.stderr
    assert words[:5] == [
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        f"--container-image={PYXIS['image']}",
    ]
    assert "--container-mounts=/models:/models,/work" in words and "--no-x" in words
    assert words[words.index("--no-x") + 1 :][:2] == ["engine-python", "train_draft.py"]
    assert (
        values["MASTER_ADDR"] == "node7" and values["MASTER_PORT"] == str(20000 + 4242) and values["NCCL_SOCKET_IFNAME"] == "ib0"
    )


def test_pyxis_container_by_hand_is_refused(tmp_path):
    answer, words, _values = started(tmp_path, "convert", ["srun"], slurm={"container": PYXIS})
    assert answer.returncode == 2 and "sbatch this script" in answer.stderr and not words


def test_apptainer_container_also_by_hand(tmp_path):
    answer, words, _values = started(tmp_path, "eval", ["apptainer"], slurm={"container": APPTAINER})
    assert answer.returncode == 0, answer.stderr
    assert words[:8] == [
        "apptainer", "exec", "--bind", "/models", "--nv", "/images/engine's.sif", "engine-python", "measure_arms.py",
    ]  # fmt: skip


def test_environment_modules_and_activation(tmp_path):
    activate = tmp_path / "venv's $(touch hacked)"
    activate.write_text('ACTIVATED=$UNSET_BEFORE yes=1; export ACTIVATED=yes; loaded="$LOADED"\n')
    (tmp_path / "module.sh").write_text('module() { export LOADED="$*"; }\n')
    slurm = {"modules": ["cuda/12; touch hacked"], "activate": str(activate), "environment": {"HF_HOME": HOSTILE}}
    answer, words, values = started(tmp_path, "capture", [], [("BASH_ENV", str(tmp_path / "module.sh"))], slurm=slurm)
    assert answer.returncode == 0, answer.stderr
    assert words[0] == "engine-python"
    assert values["HF_HOME"] == HOSTILE and values["LOADED"] == "load cuda/12; touch hacked" and values["ACTIVATED"] == "yes"


@pytest.mark.parametrize("container", [{}, PYXIS, APPTAINER])
def test_launchers_of_a_slurm_site_are_shellcheck_clean(tmp_path, container):
    slurm = {**SITE, "container": container, "activate": "/venv/bin/activate"}
    bundle = lay_down(tmp_path, experiment.compose(plan(), settings(str(tmp_path / "work"), slurm=slurm)))
    scripts = [str(path) for path in bundle.glob("slurm/*")]
    shellcheck(scripts)


def test_training_spreads_over_what_the_phase_is_given():
    found = experiment.compose(plan(), settings(slurm_phases={"train": {"nodes": 2, "gpus": 8}}))
    train = yaml.safe_load(found["documents"]["configs/base-train.yaml"])
    assert train["deployment"]["trainer"] == {"nnodes": 2, "nproc_per_node": 8}


def test_scripts_interface_renders_the_script(tmp_path):
    found = experiment.compose(plan(), settings(trainer_interface="scripts"))
    assert found["recipe"]["TRAIN_CONFIG"] == "configs/base-train.json"
    train = found["documents"]["configs/base-train.json"]
    assert train["script"] == "/src/SpecForge/scripts/train_eagle3.py" and "--train-hidden-states-path" in train["arguments"]


@pytest.mark.parametrize("interface", ["cli", "scripts"])
def test_bundle_says_the_same_in_specforges_own_commands(interface):
    found = experiment.compose(plan(), settings(trainer_interface=interface))["documents"]["configs/specforge.json"]
    assert found["prepare_data"][:2] == ["python", "/src/SpecForge/scripts/prepare_data.py"]
    assert found["prepare_hidden_states"][:2] == ["torchrun", "/src/SpecForge/scripts/prepare_hidden_states.py"]
    assert ("--aux-hidden-states-layers" in found["prepare_hidden_states"]) is (interface == "scripts")
    assert found["train"][0] == {"cli": "specforge", "scripts": "torchrun"}[interface]


def test_capture_through_sglang(tmp_path):
    slurm_phases = {"capture": {"gpus": 8, "nodes": 2}}
    wanted = settings(str(tmp_path / "work"), capture_backend="sglang", capture_tensor_parallel=8, slurm_phases=slurm_phases)
    found = experiment.compose(plan(), wanted)
    command = found["documents"]["configs/capture-command.json"]
    assert command["script"] == "/src/SpecForge/scripts/prepare_hidden_states.py" and command["processes_per_node"] == 8
    assert command["arguments"][command["arguments"].index("--tp-size") + 1] == "8"
    assert f"{found['bundle']}/configs/capture-command.json" in found["jobs"]["capture"]["inputs"]
    assert "capture_with_sglang.py" in (lay_down(tmp_path, found) / "slurm/capture.sbatch").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"capture_backend": "hf"}, "'hf' is not known"),
        ({"capture_backend": "sglang", "specforge_source": ""}, "Set spec_specforge_source"),
        ({"capture_backend": "sglang", "capture_tensor_parallel": 3, "slurm": {"gpus": 8}}, "3 do not divide the 8 processes"),
        ({"capture_backend": "sglang", "capture_tensor_parallel": 1, "slurm": {"gpus": 4}}, "10 rows do not divide among 4"),
    ],
)
def test_captures_that_cannot_be(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        experiment.compose(plan(), settings(**changes))
