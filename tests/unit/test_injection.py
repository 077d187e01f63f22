# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever a user writes into a setting is data: it arrives unchanged where it is read, or is refused in one sentence."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    canary_objects,
    experiment,
    jobs,
    launchers,
    slurm_executor,
    slurm_script,
    user_input,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import test_bundle as bundles

#: what breaks out of one syntax or another: shells, sbatch, YAML, JSON, Jinja, printf, Slurm's file names
FRAGMENTS = [
    "'", '"', "\\", "`id`", "$(id)", "${HOME}", "$HOME", "; rm -rf x", "&& id", "> hacked", "#", " #x", "!", "*", "~", "%",
    "%j", "%x-%A_%a", "%s", "{{ 7*7 }}", "{% raw %}", "{# x #}", "{draft}", "{", "}", "[", ": ", "- ", "---", "...", "&a", "*a",
    "!unsafe", "<<: x", "null", "0x1", "1e3", "yes", "\n", "\n\n", "\n#SBATCH --uid=0\n", "\r", "\r\n", "\t", "\x0b", "\x0c",
    "\x1b[31m", "\x85", "\u2028", "\ufeff", "é", "漢", "👾", "--wrap=id", "-x", " ", "  ", "EOF", "a", "/", "..", ",", "=",
]  # fmt: skip
VALUES = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20),
)
WIDE = effort(max_examples=40)


def shell(script: str, **environment: str) -> dict[str, str]:
    """The environment after a script, read by bash; nothing else of this process's reaches it."""
    answer = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}\nenv -0"], capture_output=True, check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip
    assert answer.returncode == 0 and not answer.stderr, answer.stderr
    return dict(item.split("=", 1) for item in answer.stdout.decode().split("\0") if item)


@WIDE
@given(st.lists(VALUES, min_size=6, max_size=6))
@example(["a\n"] * 6)
def test_values_of_the_recipe_reach_the_programs_unchanged(values):
    path, template, key, site, server, engine = values
    plan = bundles.plan(f"/models/{path}")
    plan["values"]["embedding_key"] = key
    given_ = bundles.settings(
        chat_template=template, engine_python=f"/{engine}", slurm={"environment": {"SITE_VALUE": site}, "modules": []}
    )
    given_["job"]["environment"] = {"JOB_VALUE": site}
    given_["serving"]["server_environment"] = {"SERVER_VALUE": server}
    found = experiment.compose(plan, given_)
    texts = [bundles.rendered("recipe.env.j2", found), f"set -- train\n{bundles.rendered('slurm/site.sh.j2', found)}"]
    seen = shell("\n".join(texts))
    assert {name: seen[name] for name in found["recipe"]} == found["recipe"]
    assert (seen["TARGET_MODEL_PATH"], seen["CHAT_TEMPLATE"], seen["EMBEDDING_KEY"]) == (f"/models/{path}", template, key)
    assert (seen["SITE_VALUE"], seen["JOB_VALUE"], seen["SERVER_VALUE"]) == (site, site, server)
    again = shell("\n".join(texts), TARGET_MODEL_PATH=server)
    assert again["TARGET_MODEL_PATH"] == server, "what is set already wins"


@WIDE
@given(VALUES, VALUES, VALUES)
def test_words_of_a_container_are_the_launchers_own(image, argument, mount):
    container = {"kind": "apptainer", "image": image, "arguments": [argument], "mounts": [f"/{mount}"]}
    try:
        found = experiment.compose(bundles.plan(), bundles.settings(slurm={"container": container}))
    except SpecDecodeError as error:
        assert "," in mount and "without a comma" in str(error)
        return
    script = f"set -- train\n{bundles.rendered('slurm/site.sh.j2', found)}\nprintf '%s\\0' \"${{launch[@]}}\" >&2"
    answer = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert answer.stderr.decode().split("\0")[:-1] == ["apptainer", "exec", "--bind", f"/{mount}", argument, image]


@WIDE
@given(st.sampled_from(launchers.DIRECTIVES), VALUES)
def test_a_directive_is_one_line_that_says_the_value_or_is_refused(key, value):
    try:
        found = experiment.compose(bundles.plan(), bundles.settings(slurm={key: value}))
    except SpecDecodeError as error:
        assert "\n" not in str(error) and key in str(error)
        return
    text = bundles.rendered("slurm/train.sbatch.j2", found)
    assert slurm_script.options_of(text)[key] == value
    assert len(slurm_script.directives(text)) == len(found["launch"]["train"]["directives"])


@WIDE
@example("..", "0")
@given(VALUES, VALUES)
def test_launcher_in_a_folder_of_any_name(name, target):
    with tempfile.TemporaryDirectory() as folder:
        label = name.replace("/", "_")[:40]
        work = pathlib.Path(folder) / (label if label.strip(".") else f"_{label}")  # two dots lead out of the folder
        out = pathlib.Path(folder) / "out"
        stub = pathlib.Path(folder) / "engine"
        stub.write_text('#!/bin/bash\nprintf \'%s\\0\' "$PWD" "$@" > "$STUB_OUT"\n')
        stub.chmod(0o755)
        found = experiment.compose(bundles.plan(f"/m/{target}"), bundles.settings(str(work), engine_python=str(stub)))
        bundle = bundles.lay_down(folder, found)
        answer = subprocess.run(
            ["bash", str(bundle / "slurm/capture.sbatch")], capture_output=True, text=True, check=False,
            env={"PATH": "/usr/bin:/bin", "STUB_OUT": str(out)}, cwd="/",
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        where, *arguments = out.read_bytes().decode().split("\0")
        assert where == os.path.realpath(bundle)
        assert arguments[arguments.index("--target-model-path") + 1] == f"/m/{target}"


@WIDE
@given(VALUES, VALUES)
def test_documents_say_the_values(path, template):
    found = experiment.compose(bundles.plan(f"/models/{path}"), bundles.settings(chat_template=template))
    documents = found["documents"]
    train = yaml.safe_load(documents["configs/base-train.yaml"])
    assert train["model"]["target_model_path"] == f"/models/{path}" and train["data"]["chat_template"] == template
    stated = json.loads(json.dumps(documents["experiment.json"], indent=2, ensure_ascii=False))
    assert stated["target"]["path"] == f"/models/{path}" and stated["chat_template"] == template


@WIDE
@given(VALUES)
def test_kubernetes_objects_as_yaml_say_the_values(value):
    thing = {"metadata": {"annotations": {value: value}}, "spec": {"args": [value, f"--model={value}"]}}
    assert list(yaml.safe_load_all(canary_objects.canary_yaml([thing, thing]))) == [thing, thing]


@WIDE
@given(VALUES, VALUES, VALUES)
def test_options_for_sbatch_are_one_word_each(folder, comment, value):
    spec = jobs.JobSpec(
        "name", "train", "/s.sh", f"/{folder}", options=(("comment", comment), ("constraint", value), ("requeue", True))
    )
    record = jobs.Record("name", "train", "slurm", "f" * 64, {}, 0)
    attempt = jobs.Attempt(1, "k" * 16, "2026-01-01T00:00:00+00:00")
    options = slurm_executor.requested(spec, "#!/bin/bash\n")
    words = slurm_executor.SlurmExecutor()._identity(spec, record, attempt)
    words += [slurm_script.option(*item) for item in options.items()]
    assert all(word.startswith("--") for word in words)
    given_ = dict(word[2:].partition("=")[::2] for word in words)
    assert given_["constraint"] == value and json.loads(given_["comment"])["text"] == comment
    assert given_["output"].replace("%%", "%") == spec.log and "%" not in given_["output"].replace("%%", "")


def with_variable(place, name, value):
    """Settings with a variable in one of the environments that a user gives."""
    found = bundles.settings()
    if place == "job":
        found["job"] = {**found["job"], "environment": {name: value}}
    elif place == "server":
        found["serving"] = {**found["serving"], "server_environment": {name: value}}
    else:
        found["slurm"] = {"environment": {name: value}}
    return found


@pytest.mark.parametrize("name", ["a b", "a\n", "A\n=x", "1", "", "a;id", "a=b", "$(id)", "-x", "é"])
@pytest.mark.parametrize("place", ["job", "server", "slurm"])
def test_names_of_variables_cannot_be_quoted_and_are_refused(name, place):
    given_ = with_variable(place, name, "x")
    with pytest.raises(SpecDecodeError, match="no name of an environment variable"):
        experiment.compose(bundles.plan(), given_)


@pytest.mark.parametrize("name", ["a\n", "a b", "../a", "-a", "a/b", "{{ a }}", "A", "a" * 64, "ä"])
def test_names_that_become_folders_labels_and_jobs(name):
    with pytest.raises(SpecDecodeError, match="must be 1 to 63 lower-case letters"):
        experiment.compose(bundles.plan(), bundles.settings(name=name))
    with pytest.raises(SpecDecodeError, match="must be 1 to 63 lower-case letters"):
        jobs.JobSpec(name, "train", "/s", "/d")
    with pytest.raises(SpecDecodeError, match="must be 1 to 63 lower-case letters"):
        jobs.JobSpec("name", name, "/s", "/d")


@pytest.mark.parametrize("name", ["mem\n", "Mem", "-mem", "mem=1", "mem --uid"])
def test_names_of_sbatch_options(name):
    with pytest.raises(SpecDecodeError, match="is no option of sbatch"):
        slurm_executor.requested(jobs.JobSpec("name", "train", "/s", "/d", options=((name, "1"),)), "")


@pytest.mark.parametrize("ending", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_only_what_ends_a_line_for_slurm_begins_a_directive(ending):
    assert slurm_script.directives(f"#!/bin/bash\n# note{ending}#SBATCH --partition=serving\ntrue\n") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"work_dir": "work"}, "spec_work_dir is 'work', which is no absolute path"),
        ({"work_dir": "~/work"}, "spec_work_dir is '~/work', which is no absolute path"),
        ({"drafts_dir": "-x"}, "spec_drafts_dir is '-x'"),
        ({"chat_template_file": "mine.json"}, "chat_template_file is 'mine.json'"),
        ({"specforge_source": "SpecForge"}, "specforge_source is 'SpecForge'"),
        ({"work_dir": "/a\0b"}, "holds a NUL character"),
        ({"chat_template": "a\0b"}, "CHAT_TEMPLATE is .* holds a NUL character"),
        ({"chat_template": "a\udcff"}, "no valid UTF-8"),
    ],
)
def test_texts_that_no_job_could_read(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        experiment.compose(bundles.plan(), bundles.settings(**changes))


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
@pytest.mark.parametrize("place", ["job", "server", "slurm"])
def test_secrets_are_refused_where_they_would_stand_in_the_bundle(name, place):
    given_ = with_variable(place, name, "hunter2")
    with pytest.raises(SpecDecodeError, match=f"{name} in .* looks like a secret") as caught:
        experiment.compose(bundles.plan(), given_)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "flags", [["--api-key", "hunter2"], ["--api-key=hunter2"], ["--api_key=hunter2"], ["--hf-token=hunter2"]]
)
def test_secrets_are_refused_where_process_lists_would_show_them(flags):
    given_ = bundles.settings()
    given_["serving"] = {**given_["serving"], "server_arguments": flags}
    with pytest.raises(SpecDecodeError, match="in process lists") as caught:
        experiment.compose(bundles.plan(), given_)
    assert "hunter2" not in str(caught.value)


def test_what_only_sounds_like_a_secret_is_none():
    assert user_input.variables({"TOKENIZERS_PARALLELISM": "true", "VLLM_MAX_TOKENS": 1}, "x")
    assert shlex.join(user_input.arguments(["--max-num-batched-tokens=512"], "x"))
