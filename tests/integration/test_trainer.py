# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The trainer's side against the real engines: what SpecForge and vLLM themselves say, and the check on one sample."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import derive, features, files, gates, specforge
from ansible_collections.inference.spec_decode.plugins.module_utils.engines import engine_facts
from ansible_collections.inference.spec_decode.tests.support import small_target

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ENGINE = ROOT / ".engine/bin/python"
SERVER = ["--max-model-len=512", "--max-num-seqs=4", "--dtype=bfloat16", "--enforce-eager", "--gpu-memory-utilization=0.2"]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def run(command, **environment):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip


def test_vllm_itself_agrees_with_what_its_files_say(built, tmp_path):
    """The classes are imported and asked, on a machine without a GPU."""
    architectures = ["Qwen3ForCausalLM", "Glm4MoeForCausalLM", "MixtralForCausalLM", "SmolLM3ForCausalLM", "Qwen3MoeForCausalLM"]
    program = (
        "import json, sys\n"
        "from vllm.model_executor.models.interfaces import supports_eagle3\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "load = lambda name: ModelRegistry.models[name].load_model_cls()\n"
        "print(json.dumps({name: bool(supports_eagle3(load(name))) for name in sys.argv[1:]}))\n"
    )
    answer = run([ENGINE, "-c", program, *architectures])
    assert answer.returncode == 0, answer.stderr[-2000:]
    expected = json.loads(answer.stdout.splitlines()[-1])
    assert set(expected.values()) == {True, False}
    for name, declared in expected.items():
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name], "model_type": "x"}))
        assert engine_facts(str(ENGINE), str(tmp_path))["models"]["vllm"]["eagle3"] is declared, name


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_run_configuration_is_one_that_specforge_takes(built, tmp_path, method):
    plan = derive.plan(str(built.target), method, {"draft": {method: {"num_hidden_layers": 2}}} if method == "dflash" else {})
    config = specforge.run_config(
        plan, run_id="r", draft_config="d.json", features="f", output="o", chat_template="qwen", max_length=128, max_steps=10,
        trainer={"nproc_per_node": 2},
    )  # fmt: skip
    program = "import json, sys; from specforge.config import Config; Config.model_validate(json.loads(sys.argv[1]))"
    answer = run([ENGINE, "-c", program, json.dumps(config)])
    assert answer.returncode == 0, answer.stderr[-2000:]


def untrained(built, bundle, tmp_path, method, load=None, **changes):
    """The program's answer for a target's draft config with changes, and where its result would be."""
    plan = derive.plan(str(built.target), method, {"draft": {method: {"num_hidden_layers": 2}}} if method == "dflash" else {})
    config = tmp_path / "draft.json"
    config.write_text(json.dumps({**plan["draft_configs"][method], **changes}))
    load = load or [
        str(ENGINE), str(bundle / "load_draft.py"), "--target-model-path", str(built.target), "--draft", "{draft}",
        "--speculative-config", json.dumps({"method": method, "num_speculative_tokens": 3}),
        "--server-arguments", json.dumps(SERVER),
    ]  # fmt: skip
    result = tmp_path / "untrained.json"
    answer = run([
        ENGINE, bundle / "check_untrained_draft.py", "--draft-config", config, "--method", method,
        "--aux-layers", ",".join(map(str, plan["values"]["aux_layers"])), "--load-check", json.dumps(load), "--result", result,
    ])  # fmt: skip
    assert not list(tmp_path.glob(".untrained-*")), "random weights stay nowhere"
    return answer, result


def accepted(answer, result):
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = gates.evaluate("artifact", {"convert": json.loads(result.read_text())})
    assert found.passed, found.reasons


def test_untrained_draft_loads_before_anything_is_trained(built, bundle, tmp_path):
    accepted(*untrained(built, bundle, tmp_path, "eagle3"))


def test_untrained_draft_that_vllm_cannot_build_is_refused_at_minute_one(built, bundle, tmp_path):
    answer, result = untrained(built, bundle, tmp_path, "eagle3", architectures=["LlamaForCausalLMEagle9"])
    assert answer.returncode == 2 and not result.exists()
    assert "error: vLLM does not load the draft: " in answer.stderr and "LlamaForCausalLMEagle9" in answer.stderr


def test_draft_that_did_not_load_is_tried_again_once_the_engine_is_mended(built, bundle, tmp_path):
    missing = tmp_path / "package"
    engine = f"import pathlib\nif not pathlib.Path({str(missing)!r}).exists(): raise ModuleNotFoundError('No module named x')"
    load = [sys.executable, "-c", engine, "{draft}"]
    answer, result = untrained(built, bundle, tmp_path, "eagle3", load)
    assert answer.returncode == 2 and not result.exists()
    assert "error: vLLM does not load the draft: ModuleNotFoundError: No module named x" in answer.stderr
    missing.touch()
    accepted(*untrained(built, bundle, tmp_path, "eagle3", load))


@pytest.fixture(scope="module")
def captured(built, bundle, tmp_path_factory):
    """A folder with data, a draft config and a command of 20 rows, ready to be captured through the double."""
    folder = tmp_path_factory.mktemp("sglang")
    rows = [
        {"conversations": [{"from": "human", "value": f"Count to {n}."}, {"from": "gpt", "value": "One, two. " * (1 + n % 3)}]}
        for n in range(30)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    config = {
        "sources": [{"path": str(folder / "rows.json"), "layout": "auto"}], "train": 20, "eval": 4, "seed": 1, "max_length": 128,
        "max_dropped_fraction": 0.05, "regenerate": False, "regenerate_batch_size": 8, "max_new_tokens": 8,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(config))
    answer = run([
        ENGINE, bundle / "prepare_dataset.py", "--target-model-path", built.target, "--method", "eagle3",
        "--chat-template", "qwen", "--config", folder / "dataset.json", "--output", folder / "data",
        "--result", folder / "dataset-result.json",
    ])  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    (folder / "SpecForge/scripts").mkdir(parents=True)
    shutil.copy(ROOT / "tests/integration/sglang_double.py", folder / "SpecForge/scripts/prepare_hidden_states.py")
    plan = derive.plan(str(built.target), "eagle3", {})
    layers = plan["values"]["aux_layers"]
    (folder / "draft.json").write_text(json.dumps(plan["draft_configs"]["eagle3"]))
    arguments = specforge.capture_arguments(
        "cli", plan, draft_config=str(folder / "draft.json"), data=str(folder / "data/train.jsonl"),
        output=str(folder / "features"), cache=str(folder / "cache"), chat_template="qwen", max_length=128, batch_size=4,
        tensor_parallel=1,
    )  # fmt: skip
    script = specforge.script_path(str(folder / "SpecForge"), "prepare_hidden_states.py")
    (folder / "command.json").write_text(json.dumps({"script": script, "arguments": arguments, "processes_per_node": 1}))
    return folder, layers


def capture(built, bundle, folder, layers, faults="", program="capture_with_sglang.py", template=("qwen", "")):
    (folder / "capture.json").unlink(missing_ok=True)
    return run([
        ENGINE, bundle / program, *(["--command", folder / "command.json"] if "sglang" in program else []),
        "--target-model-path", built.target, "--method", "eagle3", "--aux-layers", ",".join(map(str, layers)),
        "--chat-template", template[0], "--chat-template-file", template[1], "--max-length", "128",
        "--data", folder / "data", "--output", folder / "features", "--result", folder / "capture.json",
    ], DOUBLE_FAULTS=faults)  # fmt: skip


def test_capture_through_sglang_finds_gaps_and_mends_them(built, bundle, captured):
    """Killed in a write, then a sample dropped for its NaN, then whole: each attempt keeps what is whole."""
    folder, layers = captured
    killed = capture(built, bundle, folder, layers, "cut")
    assert killed.returncode == 1 and not (folder / "capture.json").exists(), killed.stderr[-2000:]
    gap = capture(built, bundle, folder, layers, "nan")
    assert gap.returncode == 0, gap.stderr[-3000:]
    assert "data_5.ckpt is not readable: removed" in gap.stdout
    # The rows are not in the target's own words, so that its LM head names their next tokens seldom.
    limits = {"layers": layers, "min_next_token_agreement": 0.0}
    red = gates.evaluate("capture", {"capture": json.loads((folder / "capture.json").read_text())}, limits)
    assert red.reasons == ["19 of 20 samples are captured and whole"]
    whole = capture(built, bundle, folder, layers)
    assert whole.returncode == 0, whole.stderr[-3000:]
    result = json.loads((folder / "capture.json").read_text())
    green = gates.evaluate("capture", {"capture": result}, limits)
    assert green.passed, green.reasons
    assert result["throughput"]["resumed_samples"] == 19 and result["tokens"] < 20 * 128
    manifest = features.check_sealed(str(folder / "features"))
    assert manifest["samples"] == 20 and manifest["layers"] == layers


def test_both_captures_agree(built, bundle, captured):
    """The same rows through our own capture: equal tokens, equal states, whatever the numbering."""
    folder, layers = captured
    answer = run([
        ENGINE, bundle / "capture_hidden_states.py", "--target-model-path", built.target, "--method", "eagle3", "--aux-layers",
        ",".join(map(str, layers)), "--chat-template", "qwen", "--max-length", "128", "--data", folder / "data", "--output",
        folder / "own", "--result", folder / "own.json",
    ])  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    program = (
        "import pathlib, sys, torch\n"
        "sides = []\n"
        "for folder in sys.argv[1:]:\n"
        "    records = [torch.load(path) for path in pathlib.Path(folder).glob('rows_*/data_*.ckpt')]\n"
        "    sides.append({tuple(r['input_ids'].tolist()): r for r in records})\n"
        "own, theirs = sides\n"
        "assert own.keys() == theirs.keys() and len(own) > 10, (len(own), len(theirs))\n"
        "for key, record in own.items():\n"
        "    for name, tensor in record.items():\n"
        "        other = theirs[key][name]\n"
        "        assert tensor.shape == other.shape and tensor.dtype == other.dtype, (name, tensor.shape, other.shape)\n"
        "        assert (tensor.float() - other.float()).norm() <= 0.02 * tensor.float().norm() + 1e-6, name\n"
    )
    answer = run([ENGINE, "-c", program, folder / "own", folder / "features"])
    assert answer.returncode == 0, answer.stderr[-2000:]


def test_training_whose_loss_is_lost_ends_at_once_and_keeps_no_lost_weights(built, bundle, captured, tmp_path):
    """SpecForge itself goes on to its last step with a loss of NaN."""
    folder, layers = captured
    shutil.copytree(folder / "data", tmp_path / "data")
    answer = capture(built, bundle, tmp_path, layers, program="capture_hidden_states.py")
    assert answer.returncode == 0, answer.stderr[-2000:]
    plan = derive.plan(str(built.target), "eagle3", {})
    training = {
        "batch_size": 4, "num_epochs": 100, "save_interval": 1, "log_interval": 1, "max_checkpoints": 100, "warmup_ratio": 0,
        "learning_rate": 1e30, "attention_backend": "sdpa", "fsdp_sharding": "NO_SHARD",
    }  # fmt: skip
    config = specforge.run_config(
        plan, run_id="r", draft_config=str(folder / "draft.json"), features="f", output="o", chat_template="qwen", max_length=128,
        max_steps=60, training=training,
    )  # fmt: skip
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    answer = run([
        ENGINE, bundle / "train_draft.py", "--config", tmp_path / "train.yaml", "--target-model-path", built.target,
        "--aux-layers", ",".join(map(str, layers)), "--features", tmp_path / "features", "--output", tmp_path / "train",
        "--result", tmp_path / "result.json",
    ])  # fmt: skip
    assert answer.returncode == 2 and not (tmp_path / "result.json").exists(), answer.stdout[-2000:] + answer.stderr[-2000:]
    lost = re.search(
        r"loss is no finite number at step (\d+) \([\d.]+ at step (\d+)\), and its weights cannot recover", answer.stderr
    )
    assert lost and int(lost[2]) == int(lost[1]) - 1 < 10, answer.stderr[-2000:]
    kept = [int(path.name.partition("-step")[2]) for path in (tmp_path / "train").glob("*/r-step*")]
    assert all(step < int(lost[2]) for step in kept)


@pytest.mark.parametrize("program", ["capture_with_sglang.py", "capture_hidden_states.py"])
def test_what_changed_is_captured_anew(built, bundle, captured, tmp_path, program):
    """At the same places: first the template, whose mask then covers less, then the conversations."""
    shutil.copytree(captured[0] / "data", tmp_path / "data")
    command = json.loads((captured[0] / "command.json").read_text())
    words = [word.replace(str(captured[0]), str(tmp_path)) for word in command["arguments"]]
    words[words.index("--draft-model-config") + 1] = str(captured[0] / "draft.json")
    words[words.index("--chat-template") + 1] = "own"
    (tmp_path / "command.json").write_text(json.dumps({**command, "arguments": words}))
    rows, template = tmp_path / "data/train.jsonl", tmp_path / "template.json"
    fields = {"assistant_header": "<|im_start|>assistant\n", "user_header": "<|im_start|>user\n"}
    found = []
    for end, said in (("<|im_end|>\n", "One"), ("<|im_end|>", "One"), ("<|im_end|>", "Two")):
        template.write_text(json.dumps({**fields, "end_of_turn_token": end}))
        rows.write_text(rows.read_text().replace("One", said))
        manifest = {"sha256": {"train": files.sha256_file(str(rows))}}
        (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
        answer = capture(built, bundle, tmp_path, captured[1], program=program, template=("own", template))
        assert answer.returncode == 0, answer.stderr[-3000:]
        result = json.loads((tmp_path / "capture.json").read_text())
        assert result["samples"] == {"expected": 20, "written": 20} and result["throughput"]["resumed_samples"] == 0
        assert result["shape_errors"] == []
        found.append(features.check_sealed(str(tmp_path / "features"))["content"])
    assert len(set(found)) == 3


def test_trainers_head_takes_a_multimodal_target(bundle, tmp_path):
    """SpecForge's own class reads a wrapper whose sizes stand in its text part."""
    target = tmp_path / "target"
    small_target.write_target(target)
    text = {**json.loads((target / "config.json").read_text()), "model_type": "gemma3_text"}
    wrapper = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (target / "config.json").write_text(json.dumps(wrapper))
    program = (
        "import sys\n"
        "from train_draft import text_part, trainer_view\n"
        "from specforge.modeling.target.target_head import TargetHead\n"
        "view = trainer_view(sys.argv[1], sys.argv[2], text_part(sys.argv[1]))\n"
        "print(*TargetHead.from_pretrained(view).fc.weight.shape)\n"
    )
    answer = run([ENGINE, "-c", program, target, tmp_path / "view"], PYTHONPATH=str(bundle))
    assert answer.returncode == 0 and answer.stdout.splitlines()[-1] == "12 8", answer.stderr[-2000:]


def test_one_sample_is_learned_and_accepted(built):
    settings = {
        "target": str(built.target), "method": "eagle3", "chat_template": "qwen", "experiment": "one", "spec_poll_interval": 1,
        "spec_work_dir": str(built.work), "spec_verdicts_dir": str(built.work / "host_vars"), "spec_max_new_tokens": 60,
        "spec_overfit_steps": 150, "spec_overfit_training": {"learning_rate": 0.002, "save_interval": 150},
    }  # fmt: skip
    answer = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), "playbooks/overfit_check.yml", "-i", "inventories/local", "-e",
         json.dumps(settings)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-4000:]
    words = " ".join(answer.stdout.split())
    share = re.search(r"accuracy (1\.00|0\.9\d) in training on one sample, (\d+)% of the drafted tokens accepted", words)
    assert share and int(share[2]) >= 85, words[-1500:]
