# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Node programs on bad input: one clear sentence, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import types

from ansible_collections.inference.spec_decode.plugins.module_utils import gates

ENGINE = pathlib.Path(__file__).resolve().parent.parent.parent / ".engine/bin/python"
CONFIG = {
    "train": 20, "eval": 4, "seed": 1, "max_length": 128, "max_dropped_fraction": 0.05, "regenerate": False,
    "regenerate_batch_size": 8, "max_new_tokens": 8,
}  # fmt: skip


def run(bundle, program, *arguments):
    return subprocess.run(
        [str(ENGINE), str(bundle / program), *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


def refused(answer, words):
    assert answer.returncode == 2, answer.stderr[-3000:]
    assert answer.stderr.strip().splitlines()[-1].startswith("error: ") or "error: " in answer.stderr
    assert words in answer.stderr, answer.stderr[-3000:]
    assert "Traceback" not in answer.stderr


def prepare(built, bundle, tmp_path, sources, template="qwen", template_file="", **changes):
    config = tmp_path / "dataset.json"
    config.write_text(json.dumps({**CONFIG, "sources": sources, **changes}))
    result = tmp_path / "out" / "dataset.json"
    answer = run(
        bundle, "prepare_dataset.py", "--target-model-path", built.target, "--method", "eagle3", "--chat-template", template,
        "--chat-template-file", template_file, "--config", config, "--output", tmp_path / "out", "--result", result,
    )  # fmt: skip
    assert result.exists() == (answer.returncode == 0)
    return answer, result


def sharegpt(tmp_path, rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return {"path": str(path), "layout": "auto"}


def conversation(question, answer="One."):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def rows(count, answered=True):
    return [conversation(f"Count to {n}.", "One." if answered else "") for n in range(count)]


def test_unknown_template_lists_the_known_ones(built, bundle, tmp_path):
    answer, _result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(30))], template="glm5p1")
    refused(answer, "'glm5p1' is not registered in the installed SpecForge, which knows: ")


def test_template_of_ones_own(built, bundle, tmp_path):
    template = tmp_path / "glm5p1.json"
    fields = {
        "assistant_header": "<|im_start|>assistant\n",
        "user_header": "<|im_start|>user\n",
        "end_of_turn_token": "<|im_end|>\n",
    }
    template.write_text(json.dumps(fields))
    answer, result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(30))], "glm5p1", template)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(result.read_text())
    assert found["supervised_span"].startswith("One.") and found["mask_outside_assistant"] == 0


def test_template_that_matches_nothing(built, bundle, tmp_path):
    answer, _result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(30))], template="llama3")
    refused(answer, "with an empty loss mask under the template")


def test_rows_without_an_assistant_turn(built, bundle, tmp_path):
    answer, _result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(30, answered=False))])
    refused(answer, "20 without an assistant turn")


def test_rows_that_the_targets_own_template_refuses_are_left_out(built, bundle, tmp_path):
    target = tmp_path / "strict"
    shutil.copytree(built.target, target)
    refusal = "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('No.') }}{% endif %}{% endfor %}"
    template = target / "chat_template.jinja"
    template.write_text(refusal + template.read_text())
    strict = [{"conversations": [{"from": "system", "value": "Be brief."}, *row["conversations"]]} for row in rows(4)]
    source = sharegpt(tmp_path, [*strict, *rows(30)])
    answer, result = prepare(types.SimpleNamespace(target=target), bundle, tmp_path, [source], train=29, eval=1)
    assert answer.returncode == 0, answer.stderr[-2000:]
    dropped = json.loads(result.read_text())["rows_dropped"]
    assert list(dropped) == ["not rendered by the chat template (TemplateError)"] and 1 <= sum(dropped.values()) <= 4


def test_what_a_method_trains_on_is_what_specforge_says(bundle):
    program = (
        "import itertools, torch\n"
        "from chat_format import Rendered\n"
        "from specforge.data.loss_mask import has_consecutive_supervised_tokens as dflash\n"
        "for bits in itertools.product((0, 1), repeat=4):\n"
        "    row = Rendered(torch.arange(4), torch.tensor(bits))\n"
        "    assert row.trains('dflash') == dflash(row.loss_mask) and row.trains('eagle3') == any(bits), bits\n"
    )
    answer = subprocess.run(
        [str(ENGINE), "-c", program], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(bundle)}
    )
    assert answer.returncode == 0, answer.stderr[-2000:]


def test_too_few_rows(built, bundle, tmp_path):
    answer, _result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(10))])
    refused(answer, "lacks 14 train rows")


def test_empty_source(built, bundle, tmp_path):
    (tmp_path / "empty.json").write_text("")
    answer, _result = prepare(built, bundle, tmp_path, [{"path": str(tmp_path / "empty.json")}])
    refused(answer, "is empty")


def test_mix_follows_the_weights_and_holds_prompts_out(built, bundle, tmp_path):
    sources = [
        {"path": str(built.data / "sharegpt.json"), "layout": "sharegpt", "weight": 3},
        {"path": str(built.data / "ultrachat.jsonl"), "layout": "ultrachat", "weight": 1},
    ]
    answer, result = prepare(built, bundle, tmp_path, sources, train=80, eval=8)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(result.read_text())
    assert found["counts"] == {"train": 80, "eval": 8} and found["overlap_train_eval"] == 0
    train = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert sorted(row["id"].split("-")[2][0] for row in train) == ["s"] * 60 + ["u"] * 20
    again, _result = prepare(built, bundle, tmp_path, sources, train=80, eval=8)
    assert again.returncode == 0
    assert [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()] == train


def test_one_row_of_two_sources_is_one_row(built, bundle, tmp_path):
    sources = [{"path": str(built.data / name)} for name in ("sharegpt.json", "ultrachat.jsonl")]
    answer, result = prepare(built, bundle, tmp_path, sources, train=1, eval=1)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(result.read_text())["counts"] == {"train": 1, "eval": 1}


def test_regenerated_rows_follow_their_source(built, bundle, tmp_path):
    """Rows of two sources of one name each get an answer; in an edited source no row keeps the old one."""
    for word in ("Count", "Add"):
        sources, asked = [], []
        for folder in ("first", "second"):
            questions = [f"{word} the {folder} to {number}." for number in range(3)]
            (tmp_path / folder).mkdir(exist_ok=True)
            sources.append(sharegpt(tmp_path / folder, [conversation(question) for question in questions]))
            asked += questions
        answer, _result = prepare(built, bundle, tmp_path, sources, train=6, eval=0, regenerate=True)
        assert answer.returncode == 0, answer.stderr
        written = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
        assert sorted(row["conversations"][0]["content"] for row in written) == sorted(asked)


def test_draft_for_a_target_of_another_width_is_not_staged(built, bundle, tmp_path):
    """vLLM's loader takes it, and its engine dies of the first request."""
    checkpoint = tmp_path / "epoch_0_step_10"
    checkpoint.mkdir()
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": json.loads((built.target / "config.json").read_text())["vocab_size"],
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensor = {"norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}
    header = json.dumps(tensor).encode()
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    (tmp_path / "train.json").write_text(json.dumps({"checkpoint": str(checkpoint)}))
    answer = run(
        bundle, "convert_eagle3_to_vllm.py", "--training", tmp_path / "train.json", "--draft-config", checkpoint / "config.json",
        "--aux-layers", "1,3,4", "--target-model-path", built.target, "--drafts", tmp_path / "drafts", "--result",
        tmp_path / "convert.json",
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-2000:]
    red = gates.evaluate("artifact", {"convert": json.loads((tmp_path / "convert.json").read_text())})
    words = "the draft reads hidden states of 64 values, but the target's have 128: it was trained for another target"
    assert not red.passed and red.reasons[0] == words
    assert not [path for path in (tmp_path / "drafts").iterdir() if not path.name.startswith(".")]


def arms(built, bundle, tmp_path, ports=(0, 0), arguments=()):
    plan = {
        "model": "small", "target": {"path": str(built.target)}, "prompts": {"path": str(tmp_path / "eval.jsonl"), "count": 1},
        "max_tokens": 8, "temperature": 0.0, "seed": 0, "warmup": 1, "trials": 1, "concurrencies": [1], "ports": list(ports),
        "startup_timeout_s": 120, "server_arguments": list(arguments), "server_environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        "arms": [{"name": "standing", "speculative_config": None}, {"name": "trained", "speculative_config": None}],
    }  # fmt: skip
    (tmp_path / "eval.jsonl").write_text(json.dumps({"conversations": [{"role": "user", "content": "Hello"}]}) + "\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/arms.json").write_text(json.dumps(plan))
    out = tmp_path / "acceptance.json"
    answer = run(bundle, "measure_arms.py", "--plan", tmp_path / "configs/arms.json", "--out", out)
    assert not out.exists()
    return answer


def test_port_in_use(built, bundle, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(arms(built, bundle, tmp_path, ports=(port, 0)), f"Port {port} on this machine is in use already")


def test_server_that_dies_on_start_shows_its_last_words(built, bundle, tmp_path):
    answer = arms(built, bundle, tmp_path, arguments=["--max-model-len=999999"])
    refused(answer, "The standing arm's server ended with exit code")
    assert "max_model_len" in answer.stderr


def test_capture_refuses_a_full_disk(built, bundle, tmp_path):
    """A disk that says it is full."""
    program = (
        "import sys, shutil, collections, runpy\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda _path: usage(1, 1, 0)\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    answer, _result = prepare(built, bundle, tmp_path, [sharegpt(tmp_path, rows(30))])
    assert answer.returncode == 0, answer.stderr
    result = tmp_path / "capture.json"
    answer = subprocess.run(
        [str(ENGINE), "-c", program, str(bundle / "capture_hidden_states.py"), "--target-model-path", str(built.target),
         "--method", "eagle3", "--aux-layers", "1,3,4", "--chat-template", "qwen", "--data", str(tmp_path / "out"),
         "--output", str(tmp_path / "features"), "--result", str(result), "--max-length", "128"],
        capture_output=True, text=True, check=False, env={**os.environ},
    )  # fmt: skip
    refused(answer, "but only 0.0 GB are free")
    assert not result.exists() and not list(tmp_path.glob("features/rows_*"))
