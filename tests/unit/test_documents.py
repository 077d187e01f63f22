# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The pages lead somewhere, name what exists, and the schemas describe what is written."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
import xml.etree.ElementTree

import jsonschema
import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import gates, runbook

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))])


def name_of(path):
    return str(path.relative_to(ROOT))


def support(folder, name):
    """A module of the tests' own, whatever folder they are started in."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


schemas = support("support", "schemas")


def anchors(path):
    """The places of a page that a link can name."""
    text = path.read_text()
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _hash, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_playbooks_and_settings_that_are_named_exist(page):
    text = page.read_text()
    for playbook in re.findall(r"\bplaybooks/(\w+)\.yml", text):
        assert (ROOT / f"playbooks/{playbook}.yml").exists(), playbook
    if page.name == "CONTRIBUTING.md":
        return
    known = set(yaml.safe_load((ROOT / "playbooks/group_vars/all.yml").read_text()))
    known |= {"spec_decode", "spec_decode_verdicts", "spec_gate", "spec_slug", "spec_sources"}
    for setting in re.findall(r"`(spec_[a-z_]+)", text):
        assert setting in known, f"{setting} is no setting"


def test_archive_that_the_pages_install_is_of_this_version():
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    named = [name for page in PAGES for name in re.findall(r"inference-spec_decode-([\d.]+)\.tar", page.read_text())]
    assert named and set(named) == {version}


def test_settings_of_a_gpu_leave_none_of_the_small_machines():
    """As docs/site-local.md says of the file that users copy."""
    small = yaml.safe_load((ROOT / "inventories/local/group_vars/spec_decode.yml").read_text())
    replaced = yaml.safe_load((ROOT / "demo/gpu.yml").read_text())
    assert set(small) - set(replaced) == {"spec_executor", "spec_poll_interval", "spec_engine_python", "spec_sources"}


def test_every_gate_has_its_section_in_the_runbook():
    assert {*gates.GATES, runbook.PENDING, runbook.CANARY, runbook.DRAFT_TIER} <= anchors(ROOT / runbook.PAGE)
    red = gates.evaluate("training", {"train": {}})
    assert red.message("training").endswith("More: docs/runbook.md#training")


@pytest.mark.parametrize(
    "symptom",
    ["Training loss stays zero", "Acceptance is near zero", "Acceptance is fine, TPOT is worse", "PENDING for ever",
     "canary does not schedule", "verdict stays DRAFT"],
)  # fmt: skip
def test_runbook_knows_what_goes_wrong_most(symptom):
    assert [line for line in (ROOT / runbook.PAGE).read_text().splitlines() if line.startswith("## ") and symptom in line]


def test_page_of_the_bundle_names_every_file():
    bundles = support("unit", "test_bundle")
    changes = {"capture_backend": "sglang", "slurm": {"gpus": 1}}
    found = bundles.experiment.compose(bundles.plan(), bundles.settings(**changes))
    named = {path.replace(found["slug"], "<slug>") for path in found["documents"]}
    programs = [*(ROOT / "files").glob("*.py"), *(ROOT / "roles").rglob("*.yml"), *(ROOT / "plugins/module_utils").glob("*.py")]
    named |= {path for program in programs for path in re.findall(r"(?:results|deploy)/[a-z-]+\.json", program.read_text())}
    page = (ROOT / "docs/bundle.md").read_text().replace("…previous", "deploy/standing-speculative-config.previous")
    assert [path for path in sorted(named) if path not in page] == []


def test_picture_is_whole():
    assert xml.etree.ElementTree.parse(ROOT / "docs/flow.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", schemas.NAMES)
def test_schema_is_one(name):
    jsonschema.Draft202012Validator.check_schema(schemas.schema(name))
    assert schemas.problems(name, {}), "an empty document must not pass"


def test_verdicts_are_as_their_schema_says():
    measurements = support("unit", "measurements")
    found = measurements.judge(measurements.measurement([5.0, 5.1, 5.0], [2.5, 2.6, 2.5]))
    assert schemas.problems("verdict", found) == []
    assert schemas.problems("verdict", {**found, "decision": "perhaps"})
