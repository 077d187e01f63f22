# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Built, installed into an empty home folder, and run by its name: nothing may depend on the checkout."""

from __future__ import annotations

import pathlib
import re
import shutil
import tarfile

import pytest

from .conftest import BIN, NAMESPACE, PLAYBOOKS, ROOT, run


def test_tarball_holds_the_collection_and_nothing_of_the_workshop(tarball):
    with tarfile.open(tarball) as archive:
        names = {member.name.split("/")[0] for member in archive.getmembers()}
    assert {"plugins", "roles", "playbooks", "templates", "files", "inventories", "docs", "meta", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith((".", "dist"))]


@pytest.mark.parametrize("method", ["eagle3", "dflash"])
def test_train_draft_by_its_name_in_check_mode(installed, method):
    printed = installed.play("train_draft", "--check", target=str(installed.target), method=method, chat_template="qwen")
    assert f"tiny-{method}" in printed and "failed=0" in printed
    assert not installed.work.exists(), "check mode must leave nothing behind"


def test_bundle_is_the_same_under_the_oldest_ansible(installed, oldest, tmp_path):
    """Its templates hand numbers over as texts; what is written must not differ by that."""
    laid = {}
    for name, ansible in {"pinned": BIN, "oldest": oldest}.items():
        settings = {"target": str(installed.target), "spec_work_dir": str(tmp_path / "work")}
        installed.play("train_draft", "--tags", "scaffold", ansible=ansible, **settings)
        bundle = tmp_path / "work/tiny-eagle3/spec-decode"
        laid[name] = {path.relative_to(bundle): path.read_text() for path in bundle.rglob("*") if path.is_file()}
        shutil.rmtree(tmp_path / "work")
    assert laid["pinned"] == laid["oldest"]
    installed.play("status", ansible=oldest, spec_work_dir=str(tmp_path / "work"))


def test_target_alone_suffices(installed):
    """Method and chat template are derived, and said."""
    printed = installed.play("train_draft", "--check", target=str(installed.target))
    assert "tiny-eagle3" in printed and "qwen (the one of qwen3 whose markers" in " ".join(printed.replace("\\n", " ").split())


#: phase → the tasks that make it, by which its tag is known to reach into the roles that a phase includes
PHASES = {
    "dataset": ["Run the job dataset", "Gate the data set"],
    "capture": ["Run the job capture", "Gate the features"],
    "train": ["Run the job train", "Gate the training"],
    "convert": ["Run the job convert", "Gate the artifact"],
    "validate": ["Run the job validate", "Find out which draft is to be served", "Look for results", "Judge the measurement"],
    "report": [],
}


def tasks_that_ran(printed):
    """Names of tasks that were not skipped, without the roles' names."""
    found = re.findall(r"^TASK \[(.+)\] \*+\n(?!skipping)", printed, re.MULTILINE)
    return [name.rpartition(" : ")[2] for name in found]


@pytest.mark.parametrize("tags", [["validate"], ["dataset", "capture", "train", "convert", "report"]], ids="-".join)
def test_tags_of_phases_run_these_phases_and_no_others(installed, tags):
    tasks = tasks_that_ran(installed.play("train_draft", "--check", "--tags", ",".join(tags), target=str(installed.target)))
    assert "State the parameters back" in tasks
    for phase, makes in PHASES.items():
        expected = makes if phase in tags else []
        assert [name for name in makes if name in tasks] == expected, f"{phase}: {tasks}"


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_every_playbook_can_be_had_by_its_name(installed, playbook):
    installed.play(playbook, "--syntax-check")


def test_bundle_of_an_installed_collection_is_that_of_the_checkout(installed, tmp_path):
    """The scaffold finds templates and programs wherever the collection lies."""
    installed.play(
        "train_draft", "--tags", "scaffold", target=str(installed.target), method="eagle3", chat_template="qwen",
        spec_work_dir=str(tmp_path),
    )  # fmt: skip
    bundle = tmp_path / "tiny-eagle3/spec-decode"
    programs = {path.name for path in pathlib.Path(ROOT / "files").glob("*.py")}
    assert programs <= {path.name for path in bundle.iterdir()}
    assert (bundle / "slurm/train.sbatch").read_text().startswith("#!/")


def test_documentation_of_the_installed_modules(installed):
    printed = run(BIN / "ansible-doc", "--list", NAMESPACE, env=installed.environment).stdout
    assert f"{NAMESPACE}.slurm_job" in printed and "UNDOCUMENTED" not in printed


def test_status_and_verdicts_show_where_it_stands_and_change_nothing(installed, tmp_path):
    settings = {"spec_work_dir": str(tmp_path), "experiment": "tiny-eagle3"}
    installed.play("train_draft", "--tags", "scaffold", target=str(installed.target), **settings)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    printed = installed.play("status", **settings)
    assert "tiny-eagle3: eagle3 draft for" in printed and "dataset comes next" in printed and "changed=0" in printed
    assert "tiny-eagle3" in installed.play("verdicts", **settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
