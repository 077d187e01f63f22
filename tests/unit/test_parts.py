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
    preflight,
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
    "target": {"hidden_size": 4096, "has_chat_template": True},
    "values": {"aux_layers": [1, 17, 32]},
}
ENGINE = {"versions": dict.fromkeys(("torch", "vllm", "specforge", "transformers"), "1"), "templates": ["llama3", "qwen"]}


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
    ],
)
def test_preflight_red(tmp_path, name, changes):
    found = checks(tmp_path, **changes)[name]
    assert not found["ok"] and found["reason"] and found["remedy"]


def test_sampling_is_refused_on_the_build_that_garbles_it(tmp_path):
    engine = {**ENGINE, "versions": {**ENGINE["versions"], "vllm": "0.32.0+cpu"}}
    assert not checks(tmp_path, engine=engine, temperature=0.7)["sampling"]["ok"]
    assert checks(tmp_path, engine=engine)["sampling"]["ok"]


def test_feature_bytes_count_every_state():
    assert preflight.feature_bytes(PLAN, 1000) == 1000 * 4 * 4096 * 2
    assert preflight.feature_bytes({**PLAN, "method": "dflash"}, 1000) == 1000 * 3 * 4096 * 2


def test_engine_that_is_not_there():
    with pytest.raises(SpecDecodeError, match="Run make setup"):
        engines.engine_facts("/nowhere/python")
