# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small parts: conversations, features, checkpoints, files, waiting, times, resolved configs, preflight."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    checkpoints,
    conversations,
    engines,
    features,
    files,
    inspection,
    preflight,
    site_facts,
    slurm_time,
    waiting,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": 1, "conversations": TURNS},
        {"prompt": "Hi", "prompt_id": 1, "messages": TURNS},
        {"id": 1, "data": ["Hi", "Hello"]},
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_layouts_are_recognised(tmp_path, row, lines):
    path = tmp_path / "data"
    path.write_text(json.dumps(row) + "\n" if lines else json.dumps([row]))
    (found,) = conversations.read(str(path))
    assert found["conversations"] == TURNS


def answered(answer):
    return {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", **answer}]}


def test_text_in_parts_is_text(tmp_path):
    path = tmp_path / "data.jsonl"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    path.write_text(json.dumps(answered({"content": parts, "tool_calls": None})) + "\n")
    (found,) = conversations.read(str(path))
    assert found["conversations"] == TURNS and "fault" not in found


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"content": [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {}}]}, "with content that is no text"),
        ({"content": 5}, "with content that is no text"),
        ({"content": ["Hello"]}, "with content that is no text"),
        ({"content": None, "tool_calls": [{"function": {"name": "look"}}]}, "with calls of tools"),
        ({"function_call": {"name": "look"}}, "with calls of tools"),
    ],
)
def test_rows_that_are_more_than_text_say_so_one_by_one(tmp_path, answer, fault):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([answered(answer), answered({"content": "Hello"})]))
    faulty, good = conversations.read(str(path))
    assert (faulty["fault"], faulty["conversations"]) == (fault, []) and good["conversations"] == TURNS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"id": 1', "Line 1 of .* is no valid JSON"),
        ("[{]", "is no valid JSON"),
        ('{"text": "hi"}\n', "Row 1 of .* is not in the layout"),
        ('{"conversations": [{"from": "narrator", "value": "x"}]}\n', "Row 1 of .* KeyError 'narrator'"),
        ("[3]", "Row 1 of .* is not in the layout"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(SpecDecodeError, match=words):
        list(conversations.read(str(path)))


def test_rows_of_two_sources_of_one_name_have_ids_of_their_own(tmp_path):
    ids = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "train.jsonl"
        path.write_text(json.dumps({"conversations": TURNS}) + "\n")
        ids.update(row["id"] for row in conversations.read(str(path)))
    assert len(ids) == 2


def test_missing_source_and_unknown_layout(tmp_path):
    with pytest.raises(SpecDecodeError, match="does not exist"):
        list(conversations.read(str(tmp_path / "none")))
    with pytest.raises(SpecDecodeError, match="'xml' of .* is not one of auto, sharegpt"):
        list(conversations.read(str(tmp_path / "none"), "xml"))


@given(st.integers(0, 10000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_sum_to_the_total_and_follow_the_weights(total, weights):
    parts = conversations.shares(total, weights)
    assert sum(parts) == total
    assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(parts, weights))


def store_with(tmp_path, identity="one", count=3):
    store = features.Store(str(tmp_path / "features"), identity)
    store.resume()
    with store.writing() as index:
        for number in range(count):
            os.makedirs(os.path.dirname(store.path(number)), exist_ok=True)
            with open(store.path(number), "wb") as stream:
                stream.write(b"x" * 10)
            index.add(number, 5, 10, True)
        index.flush()
    return store


def test_features_resume_leaves_out_what_is_truncated_missing_or_unlisted(tmp_path):
    store = store_with(tmp_path)
    with open(store.path(1), "wb") as stream:
        stream.write(b"short")
    os.unlink(store.path(2))
    with open(os.path.join(store.folder, "index.jsonl"), "a") as stream:
        stream.write("[3, 5, 1")  # the job was killed while it wrote this line
    assert set(features.Store(store.folder, "one").resume()) == {0}


def test_features_of_another_identity_are_never_mixed_in(tmp_path):
    store = store_with(tmp_path)
    assert features.Store(store.folder, "two").resume() == {}
    assert not os.path.exists(store.path(0))


def test_sealed_features_are_checked_before_training(tmp_path):
    store = store_with(tmp_path)
    store.seal({"layers": [1]}, store.verify(3))
    assert features.check_sealed(store.folder)["samples"] == 3
    with open(store.path(2), "ab") as stream:
        stream.truncate(4)
    with pytest.raises(SpecDecodeError, match="1 are missing or truncated"):
        features.check_sealed(store.folder)


def test_manifest_does_not_change_between_equal_captures(tmp_path):
    texts = []
    for name in ("a", "b"):
        store = store_with(tmp_path / name)
        store.seal({"layers": [1]}, store.verify(3))
        texts.append(open(os.path.join(store.folder, "manifest.json")).read())
    assert texts[0] == texts[1]


def checkpoint(tmp_path, step, ranks=2, names=("training_state.pt",)):
    folder = tmp_path / f"run-step{step}"
    folder.mkdir()
    for name in [*names, *(f"training_state_rank{rank}.pt" for rank in range(ranks))]:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", "x" * 100)
    return folder


def test_newest_complete_checkpoint_wins(tmp_path):
    checkpoint(tmp_path, 100)
    newest = checkpoint(tmp_path, 1000)
    assert checkpoints.newest_complete(str(tmp_path), "run") == (str(newest), [])


@pytest.mark.parametrize("fault", ["truncated", "no shared state", "no rank state", "a rank missing", "empty folder"])
def test_half_written_checkpoint_is_never_resumed_from(tmp_path, fault):
    good = checkpoint(tmp_path, 100)
    bad = checkpoint(tmp_path, 200)
    if fault == "truncated":
        whole = (bad / "training_state.pt").read_bytes()
        (bad / "training_state.pt").write_bytes(whole[: len(whole) // 2])
    elif fault == "no shared state":
        (bad / "training_state.pt").unlink()
    elif fault == "no rank state":
        for rank in range(2):
            (bad / f"training_state_rank{rank}.pt").unlink()
    elif fault == "a rank missing":
        (bad / "training_state_rank0.pt").unlink()
    else:
        for file in list(bad.iterdir()):
            file.unlink()
    newest, refused = checkpoints.newest_complete(str(tmp_path), "run")
    assert newest == str(good) and [path for path, _reason in refused] == [str(bad)]


def test_files_are_whole_or_absent(tmp_path):
    path = str(tmp_path / "deep" / "value.json")
    assert files.write_json(path, {"a": 1}) and not files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(os.path.dirname(path)) == ["value.json"]


def test_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecDecodeError, match="Cannot write .*file/value.json"):
        files.write_json(str(tmp_path / "file" / "value.json"), {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("12:00:00", 43200), ("2-06", 194400), ("2-06:30", 196200), ("1-00:00:30", 86430)],
)
def test_slurm_times(text, expected):
    assert slurm_time.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1h"])
def test_bad_slurm_times(text):
    with pytest.raises(SpecDecodeError, match="no time limit that Slurm knows"):
        slurm_time.seconds(text)


def test_pauses_grow_to_the_longest():
    backoff = waiting.Backoff(longest=2.0)
    assert [backoff.next() for _pause in range(6)] == [0.5, 0.75, 1.125, 1.6875, 2.0, 2.0]


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ({"name": "train", "state": "PENDING", "reason": "Priority"}, "train PENDING · Priority"),
        (
            {"name": "train", "state": "RUNNING", "nodes": "gpu[3-4]", "progress": {"text": "step 1200/10000 · acc_0 0.61"}},
            "train RUNNING on gpu[3-4] · step 1200/10000 · acc_0 0.61",
        ),
        ({"name": "train", "state": "RUNNING", "progress": {}}, "train RUNNING"),
        (
            {"name": "train", "state": "RUNNING", "nodes": "n1", "elapsed_s": 4353, "restarts": 1, "progress": {"text": "go"}},
            "train RUNNING 01:12:33 on n1, restart 1 · go",
        ),
    ],
)
def test_progress_lines(job, line):
    assert waiting.progress_line(job) == line
    assert waiting.progress_mark({**job, "elapsed_s": 9}) == waiting.progress_mark(job)


def test_waits_of_one_play_share_their_questions(tmp_path):
    asked = []

    def ask(questions):
        asked.append([question["name"] for question in questions])
        return {"jobs": [{"name": question["name"], "state": "RUNNING"} for question in questions]}

    boards = {name: waiting.Board(str(tmp_path), ["host", {"executor": "slurm"}]) for name in ("a", "b", "c")}
    for _round in range(3):
        for name, board in boards.items():
            assert board.look({"name": name}, ask, 5)["job"]["name"] == name
    # The first round gets to know who waits; then one question serves all three.
    assert [len(questions) for questions in asked] == [1, 2, 3, 3, 3]


def test_failed_question_is_nobodys_answer(tmp_path):
    board = waiting.Board(str(tmp_path), "same")
    assert board.look({"name": "a"}, lambda _questions: {"failed": True, "msg": "no"}, 5) == {"failed": True, "msg": "no"}
    assert board.look({"name": "a"}, lambda questions: {"jobs": questions}, 5) == {"job": {"name": "a"}}


PLAN = {
    "method": "eagle3",
    "target": {
        "hidden_size": 4096, "has_chat_template": True, "architecture": "Qwen3ForCausalLM", "parameters": 8e9, "dtype": "BF16",
        "sha": "t" * 64,
    },
    "values": {"aux_layers": [1, 17, 32]},
}  # fmt: skip
ENGINE = {
    "versions": {"torch": "2.13.0+cpu", "vllm": "0.32.0+cpu", "specforge": "0.2.0", "transformers": "5.19.0", "sglang": None},
    "specforge_interface": "cli",
    "templates": ["llama3", "qwen"],
    "template_fields": {"qwen": {"assistant_header": "<|im_start|>assistant\n", "end_of_turn_token": "<|im_end|>\n"}},
    "models": {
        "vllm": {"registered": True, "class": "Qwen3ForCausalLM", "eagle3": True}, "transformers": {"registered": True},
    },
    "rendering": {"text": f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{inspection.ANSWER}<|im_end|>\n", "error": ""},
}  # fmt: skip


def engine(**changes):
    return {**ENGINE, **changes}


def models(**changes):
    return engine(models={**ENGINE["models"], **changes})


def checks(tmp_path, **changes):
    source = tmp_path / "data.json"
    source.write_text("[]")
    arguments = {
        "chat_template": "qwen", "chat_template_file": "", "work_dir": str(tmp_path / "new" / "work"),
        "sources": [{"path": str(source)}], "rows": 10, "max_length": 128, "temperature": 0.0, **changes,
    }  # fmt: skip
    return {
        check["name"]: check
        for check in preflight.checks(arguments.pop("plan", PLAN), arguments.pop("engine", ENGINE), **arguments)
    }


def test_preflight_green(tmp_path):
    assert all(check["ok"] for check in checks(tmp_path).values())


def test_preflight_lists_the_known_templates(tmp_path):
    found = checks(tmp_path, chat_template="glm5p1")["chat template"]
    assert not found["ok"] and found["reason"] == "'glm5p1' is not one of llama3, qwen"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("engine", {"engine": {**ENGINE, "versions": {**ENGINE["versions"], "vllm": None}}}),
        ("target's chat template", {"plan": {**PLAN, "target": {**PLAN["target"], "has_chat_template": False}}}),
        ("data", {"sources": [{"path": "/nowhere/data.json"}]}),
        ("data", {"sources": []}),
        ("data", {"sources": [{"path": "/etc/hosts", "layout": "xml"}]}),
        ("disk", {"rows": 10**12}),
        ("work folder", {"work_dir": "/etc/hosts/nowhere"}),
        ("chat template", {"chat_template_file": "/nowhere/template.json"}),
        ("target's chat template", {"engine": engine(rendering={"text": "", "error": "UndefinedError: 'x'"})}),
        ("target's chat template", {"engine": engine(rendering={"text": f"[INST] {inspection.ANSWER} </s>", "error": ""})}),
        ("target's chat template", {"engine": engine(rendering=None)}),
        ("versions", {"engine": engine(versions={**ENGINE["versions"], "vllm": "0.34.0"})}),
        (
            "versions",
            {"engine": engine(versions={**ENGINE["versions"], "vllm": "0.34.0"}), "confirmed_versions": {"vllm": "0.33.9"}},
        ),
        ("trainer", {"engine": engine(specforge_interface="")}),
        ("trainer", {"trainer_interface": "scripts"}),
        ("trainer", {"trainer_interface": "scripts", "plan": {**PLAN, "method": "dflash"}}),
        ("trainer", {"capture_backend": "sglang"}),
        ("capture backend", {"engine": models(transformers={"registered": False})}),
        ("capture backend", {"engine": engine(models={})}),
        ("capture backend", {"capture_backend": "sglang", "engine": models(sglang={"registered": True, "eagle3": False})}),
        (
            "capture backend",
            {"capture_backend": "sglang", "plan": {**PLAN, "target": {**PLAN["target"], "architecture": "NewForCausalLM"}}},
        ),
        ("serving", {"engine": models(vllm={"registered": True, "class": "Glm4MoeForCausalLM", "eagle3": False})}),
        ("serving", {"engine": engine(models={"transformers": {"registered": True}})}),
        ("nodes", {"executor": "slurm"}),
        ("shared work folder", {"executor": "slurm"}),
    ],
)
def test_preflight_red(tmp_path, name, changes):
    found = checks(tmp_path, **changes)[name]
    assert not found["ok"] and found["reason"] and found["remedy"]


def test_sampling_is_refused_on_the_build_that_garbles_it(tmp_path):
    assert not checks(tmp_path, temperature=0.7)["sampling"]["ok"]
    assert checks(tmp_path)["sampling"]["ok"]


def test_feature_bytes_count_every_state():
    assert preflight.feature_bytes(PLAN, 1000) == 1000 * 4 * 4096 * 2
    assert preflight.feature_bytes({**PLAN, "method": "dflash"}, 1000) == 1000 * 3 * 4096 * 2


def test_engine_that_is_not_there():
    with pytest.raises(SpecDecodeError, match="Run make setup"):
        engines.engine_facts("/nowhere/python")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "versions",
            {"engine": engine(versions={**ENGINE["versions"], "vllm": "0.34.0"}), "confirmed_versions": {"vllm": "0.34.0"}},
        ),
        ("serving", {"engine": engine(models={}), "confirm_target_architecture": True}),
        ("shared work folder", {"executor": "slurm", "confirm_shared_work_dir": True}),
        ("capture backend", {"capture_backend": "sglang"}),
        (
            "target's chat template",
            {
                "engine": engine(
                    rendering={
                        "text": inspection.ANSWER,
                        "error": "",
                    }
                ),
                "chat_template": "gpt-oss",
            },
        ),
    ],
)
def test_preflight_green_where_a_person_or_a_table_knows(tmp_path, name, changes):
    assert checks(tmp_path, **changes)[name]["ok"]


def test_preflight_table_fits_a_terminal(tmp_path):
    lines = preflight.table(list(checks(tmp_path, sources=[]).values()))
    assert all(len(line) <= 72 for line in lines)
    assert any(line.startswith("RED data") for line in lines) and lines[-1].endswith("1 red")


def test_disk_and_time_show_their_formula(tmp_path):
    found = checks(tmp_path)
    assert "10 rows × 64 tokens × 4 states × 4096 × 2 bytes = 0.0 GB of features" in found["disk"]["reason"]
    assert "2 × parameters × 640 tokens at 30% of 989 TFLOP/s" in found["capture time"]["reason"]


def test_time_goes_by_what_was_measured_of_this_target(tmp_path):
    for name, sha, rate in (("mine", "t" * 64, 64), ("other", "u" * 64, 1)):
        bundle = tmp_path / "new/work" / name / "spec-decode"
        (bundle / "results").mkdir(parents=True)
        (bundle / "experiment.json").write_text(json.dumps({"target": {"sha": sha}}))
        (bundle / "results/capture.json").write_text(json.dumps({"throughput": {"tokens_per_s": rate}}))
    assert checks(tmp_path)["capture time"]["reason"] == "about 00:00:10 for 640 tokens, at 64 tokens/s as measured"


def test_nodes_of_sinfo():
    text = "gpu1|idle|10.0.0.1\ngpu2|mixed-|10.0.0.2\ngpu2|mixed-|10.0.0.2\ngpu3|idle*|10.0.0.3\ngpu4|drained|x\ngpu5|down~|y\n"
    nodes = site_facts.parse_nodes(text)
    assert [node.name for node in nodes if node.usable] == ["gpu1", "gpu2"] and [node.name for node in nodes if node.idle] == [
        "gpu1"
    ]
    assert not site_facts.all_here(nodes) and not site_facts.all_here([])
    assert site_facts.all_here(site_facts.parse_nodes("CLUSTER: one\na|idle|localhost\nb|idle|127.0.0.1\n"))


@pytest.mark.parametrize(
    ("sinfo", "ok", "words"),
    [
        ("printf 'g1|idle|localhost\\ng2|allocated|localhost\\n'", True, "2 of 2 nodes take jobs, 1 idle"),
        ("printf 'g1|allocated|far\\ng2|allocated|far\\n'", True, "0 idle: jobs will wait"),
        ("printf 'g1|down|far\\ng2|idle|far\\n'", False, "1 of 2 nodes take jobs"),
        ("echo 'slurm_load_partitions: Unable to contact' >&2; exit 1", False, "Unable to contact"),
        ("exec sleep 60", False, "sinfo did not answer within"),
    ],
)
def test_nodes_are_asked_of_the_cluster(tmp_path, monkeypatch, sinfo, ok, words):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sinfo").write_text(f"#!/bin/sh\n{sinfo}\n")
    (tmp_path / "bin/sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    # Short for the one that never answers; a busy machine may take a while for the others.
    monkeypatch.setattr(site_facts.slurm_nodes, "__defaults__", ("", 0.5 if "sleep" in sinfo else 60.0))
    found = checks(tmp_path, executor="slurm", slurm={"partition": "gpu", "nodes": 2})
    assert found["nodes"]["ok"] is ok and words in found["nodes"]["reason"]
    assert found["shared work folder"]["ok"] is ("localhost" in sinfo)


def test_nodes_are_asked_of_the_named_cluster_and_of_each_partition(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sinfo").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\necho "g1|idle|localhost"\n')
    (tmp_path / "bin/sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    phases = {"train": {"partition": "big"}, "capture": None}
    found = checks(tmp_path, executor="slurm", slurm={"partition": "gpu"}, slurm_phases=phases, slurm_cluster="two")
    assert found["nodes"]["ok"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.partition("%o ")[2] for line in asked] == [f"--clusters=two --partition={name}" for name in ("big", "gpu")]


def test_launchers_settings_that_cannot_be_are_a_red_check(tmp_path):
    found = checks(tmp_path, executor="slurm", slurm={"nodes": "1-4"})["nodes"]
    assert not found["ok"] and "nodes in spec_slurm must be a whole number from 1, but is '1-4'" in found["reason"]


@pytest.mark.parametrize(
    ("place", "kind", "shared"),
    [
        ("/a", "ext4", False),
        ("/scratch/b", "lustre", True),
        ("/scratch/my own/c", "fuse.sshfs", True),
        ("/scratch", "lustre", True),
    ],
)
def test_file_systems(place, kind, shared):
    mounts = "/dev/sda / ext4 rw 0 0\nserver:/x /scratch lustre rw 0 0\nz /scratch/my\\040own fuse.sshfs rw 0 0\n"
    assert site_facts.type_at(place, mounts) == kind and site_facts.is_shared(kind) is shared


def test_file_system_of_a_folder_that_is_yet_to_be_made():
    assert site_facts.file_system("/proc/1/nowhere/at/all") == "proc"
