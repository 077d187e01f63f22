# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is chosen to train on, what both generations of trainers print and leave behind, and a program among its nodes."""

from __future__ import annotations

import json
import math
import pathlib
import struct
import sys
import types
import zipfile

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import checkpoints, features
from ansible_collections.inference.spec_decode.plugins.module_utils.nodes import Nodes
from ansible_collections.inference.spec_decode.plugins.module_utils.training_log import CliLog, ScriptsLog
from ansible_collections.inference.spec_decode.tests.support import small_target

SCRIPTS_OUTPUT = """
Training Epoch 0:   1%|          | 50/5000 [00:10<10:00, loss=3.2]Eval - Step 50 [51/10], position 0,  Acc: 0.62
Eval - Step 50 [51/10], position 1,  Acc: 0.41
Eval - Step 50 [51/10], position 0,  Acceptance Rate: 0.7000
Eval - Step 50 [51/10], position 1,  Acceptance Rate: 0.5000
Eval - Step 50 [51/10], position 0, pLoss: 2.0
Eval - Step 50 [51/10], position 1, pLoss: 3.0
Training completed at step 60, saving final checkpoint...
Eval - Step 60 [61/10], position 0,  Acc: nan
Eval - Step 60 [61/10], position 0, pLoss: nan
Eval - Step 60 [61/10], position 1, pLoss: 1.0
"""


def test_lines_of_the_scripts_become_one_step():
    log = ScriptsLog(positions=2)
    first, second = [found for line in SCRIPTS_OUTPUT.splitlines() if (found := log.feed(line))]
    assert first[0] == 50 and first[1]["acc_0"] == 0.62 and first[1]["acceptance_rate_1"] == 0.5
    assert first[1]["loss"] == pytest.approx(2.0 + 0.8 * 3.0)
    assert second[0] == 60 and math.isnan(second[1]["loss"]) and "acc_1" not in second[1]


def test_lines_of_the_cli_become_one_step():
    log = CliLog()
    assert log.feed("Loading ...") is None
    assert log.feed("step 10: {'train/loss': nan, 'train/acc': [0.5, 0.25]}\n")[1]["acc_1"] == 0.25
    assert math.isnan(log.feed("step 10: {'train/loss': nan}")[1]["loss"])


def safetensors(path, cut=0):
    header = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"x" * 8
    path.write_bytes(content[: len(content) - cut])


def script_checkpoint(folder, epoch, step, leave_out="", cut=0):
    place = folder / f"epoch_{epoch}_step_{step}"
    place.mkdir()
    with zipfile.ZipFile(place / "training_state.pt", "w") as archive:
        archive.writestr("data", "x")
    (place / "config.json").write_text("{}")
    safetensors(place / "model.safetensors", cut)
    if leave_out:
        (place / leave_out).unlink()
    return place


def test_newest_whole_checkpoint_of_the_scripts(tmp_path):
    script_checkpoint(tmp_path, 0, 900)
    newest = script_checkpoint(tmp_path, 1, 1000)
    assert checkpoints.newest_complete(str(tmp_path), "run") == (str(newest), [])
    assert checkpoints.step_of(str(newest)) == 1000


@pytest.mark.parametrize(
    "fault", [{"leave_out": "training_state.pt"}, {"leave_out": "model.safetensors"}, {"leave_out": "config.json"}, {"cut": 3}]
)
def test_half_written_checkpoint_of_the_scripts_is_refused(tmp_path, fault):
    good = script_checkpoint(tmp_path, 0, 900)
    bad = script_checkpoint(tmp_path, 1, 1000, **fault)
    newest, refused = checkpoints.newest_complete(str(tmp_path), "run")
    assert newest == str(good) and [path for path, _reason in refused] == [str(bad)]


def test_one_node_by_hand_and_in_a_batch_script():
    for environment in ({}, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_NODEID": "0"}):
        nodes = Nodes.from_environment(environment)
        assert nodes.count == 1 and nodes.first
        assert nodes.torchrun("python", 4)[-1] == "--standalone"


def test_nodes_of_a_step_meet_at_the_first():
    step = {"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "24242"}
    nodes = Nodes.from_environment(step)
    assert not nodes.first
    assert nodes.torchrun("python", 8) == [
        "python", "-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "8", "--node-rank", "2",
        "--master-addr", "gpu1", "--master-port", "24242",
    ]  # fmt: skip


@pytest.fixture
def train_draft(programs, monkeypatch):
    """The program where no engine is: it asks PyTorch for a GPU and transformers for a wrapper around the language model."""
    text = types.SimpleNamespace(get_text_config=lambda: text)
    reader = types.SimpleNamespace(from_pretrained=lambda _path: text)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False)))
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoConfig=reader))
    import train_draft

    yield train_draft
    del sys.modules["train_draft"]


def sealed_features(folder):
    store = features.Store(str(folder), "captured")
    store.resume()
    store.seal({"layers": [1, 7, 12]}, {})


@pytest.mark.parametrize("interface", ["cli", "scripts"])
def test_another_draft_config_at_the_same_place_is_trained_anew(train_draft, tmp_path, monkeypatch, interface):
    draft, configuration, script = (tmp_path / name for name in ("draft.json", "train.yaml", "train_eagle3.py"))
    config = {"run_id": "r", "training": {"strategy": "eagle3", "max_steps": 10, "ttt_length": 7}}
    if interface == "cli":
        config["model"] = {"draft_model_config": str(draft)}
    else:
        script.touch()
        config.update(interface=interface, script=str(script), deployment={"trainer": {"nproc_per_node": 1}})
        config["arguments"] = ["--draft-model-config", str(draft), "--output-dir", "{output}"]
    configuration.write_text(yaml.safe_dump(config))
    small_target.write_target(tmp_path / "target")
    sealed_features(tmp_path / "features")
    trained = []

    def train(command, environment, log, metrics, total, first):
        metrics.add(total, {"loss": 1.0})
        folder = pathlib.Path(metrics.path).parent
        trained.append(folder.name)
        checkpoint = folder / f"r-step{total}"
        checkpoint.mkdir()
        for name in ("training_state.pt", "training_state_rank0.pt"):
            with zipfile.ZipFile(checkpoint / name, "w") as archive:
                archive.writestr("data", "x")

    monkeypatch.setattr(train_draft, "train", train)
    arguments = {
        "config": configuration, "target-model-path": tmp_path / "target", "aux-layers": "1,7,12",
        "features": tmp_path / "features", "output": tmp_path / "train", "result": tmp_path / "train.json",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_draft.py", *(f"--{name}={value}" for name, value in arguments.items())])
    for mask_token in (3, 3, 4):
        draft.write_text(json.dumps({"mask_token_id": mask_token}))
        train_draft.main()
    first, second = trained
    assert first != second and json.loads((tmp_path / "train/manifest.json").read_text())["identity"] == second


LOST = """
import os, time
print(os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"])
print("step 900: {'train/loss': 0.5}")
print("step 950: {'train/loss': 0.4}")
print("step 1000: {'train/loss': nan}", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("own", [None, "0"])
def test_trainer_whose_loss_is_lost_is_stopped_and_its_weights_with_it(train_draft, tmp_path, monkeypatch, capfd, own):
    monkeypatch.setattr(train_draft.signal, "signal", lambda *_: None)
    if own:
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", own)
    metrics = train_draft.Metrics(str(tmp_path / "metrics.jsonl"), 0)
    assert train_draft.train([sys.executable, "-c", LOST], {}, CliLog(), metrics, 2000, 0) == 1000
    assert capfd.readouterr().out.splitlines()[0] == (own or "1")
    sound, *_doubtful = [script_checkpoint(tmp_path, 0, step) for step in (900, 950, 1000)]
    error = train_draft.forget(str(tmp_path), "run", metrics.steps)
    assert "no finite number at step 1000 (0.400 at step 950)" in str(error)
    assert [str(sound)] == checkpoints.all_of(str(tmp_path), "run")


@pytest.fixture
def selection(programs, monkeypatch, tmp_path):
    """Chooses from sources of 30 rows each, out of which four are ``bad``; a ``short`` one trains EAGLE3 alone."""

    def render(turns):
        if turns[1]["content"] == "bad":
            raise ValueError("bad")
        return types.SimpleNamespace(trains=lambda method: turns[1]["content"] != "short" or method == "eagle3", loss_mask=Mask())

    chat = types.SimpleNamespace(render=render, max_length=128)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "chat_format", types.SimpleNamespace(ChatFormat=None, REFUSALS=(ValueError,)))
    import prepare_dataset

    def choose(names, method="eagle3", kinds=("bad",) * 4, weights=types.MappingProxyType({}), **changes):
        sources = []
        for name in names:
            answers = [*kinds, *["good"] * (30 - len(kinds))]
            rows = [{"data": [f"{name} {number}", answer]} for number, answer in enumerate(answers)]
            (tmp_path / name).write_text(json.dumps(rows))
            sources.append({"path": str(tmp_path / name), "weight": weights.get(name, 1)})
        config = {"seed": 1, "max_dropped_fraction": 0.1, "eval": 0, "sources": sources, **changes}
        found = prepare_dataset.Selection(chat, method, config)
        train, _held_out = found.choose()
        return len(train), dict(found.dropped)

    yield choose
    del sys.modules["prepare_dataset"]


class Mask:
    @staticmethod
    def any():
        return True


def test_rows_that_cannot_be_used_are_weighed_against_their_own_source(selection):
    from spec_decode.errors import SpecDecodeError

    rows, dropped = selection(["a", "b", "c"], train=78)
    assert rows == 78 and 8 <= sum(dropped.values()) <= 12
    with pytest.raises(SpecDecodeError, match=r"lacks 4 train rows: .*b has 30 rows, of which 4 cannot be used, .* is 30\."):
        selection(["a", "b"], train=56, weights={"a": 26, "b": 30})


def test_rows_that_dflash_cannot_train_on_are_left_out_for_it_alone(selection):
    assert selection(["a"], train=30, kinds=("short",) * 4) == (30, {})
    rows, dropped = selection(["a"], "dflash", train=26, kinds=("short",) * 4)
    assert rows == 26 and list(dropped) == ["with a loss mask without two tokens side by side under the template (at 128 tokens)"]
