# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rules that ansible-test's sanity tests hold the collection to, told in a second instead of in minutes."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOLDERS = ("plugins", "files", "tests", "scripts", "demo")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ROLES = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_python_source(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert "SPDX-License-Identifier: GPL-3.0-or-later" in text[:500], "the header is missing"
    names = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "_"]
    assert not names, f"pylint disallows the name _ (lines {names}): call it _row or the like"
    if path.is_relative_to(ROOT / "plugins"):
        asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert not asserts, f"no assert in plugins (lines {asserts})"


@pytest.mark.parametrize("role", ROLES, ids=name_of)
def test_role_says_what_it_takes(role):
    """Every default has its option, and nothing else; all prefixed by the role's name."""
    entries = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"].values()
    options = {name: option for entry in entries for name, option in entry.get("options", {}).items()}
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text()) or {}
    assert set(defaults) <= set(options)
    assert all(name.startswith(f"{role.name}_") for name in options)
    assert all(option.get("description") and option.get("type") for option in options.values())


def test_texts_name_settings_and_no_variables_of_roles():
    """What only hands a setting on to one role does not help where another reads the setting itself."""
    handed_on = {
        name
        for role in ROLES
        for name, value in (yaml.safe_load((role / "defaults/main.yml").read_text()) or {}).items()
        if re.fullmatch(r"{{ \w+ }}", str(value))
    }
    for path in SOURCES:
        if path.is_relative_to(ROOT / "plugins") or path.is_relative_to(ROOT / "files"):
            constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str) and " " in value]
            named = {word for text in texts for word in re.findall(r"\w+", text)} & handed_on
            assert not named, f"{name_of(path)}: {', '.join(sorted(named))}"


def test_every_filter_has_its_documentation():
    package = "ansible_collections.inference.spec_decode.plugins.filter"
    modules = [importlib.import_module(f"{package}.{path.stem}") for path in (ROOT / "plugins/filter").glob("*.py")]
    documented = {path.stem for path in (ROOT / "plugins/filter").glob("*.yml")}
    assert {name for module in modules for name in module.FilterModule().filters()} == documented


def test_check_mode_of_every_playbook_is_tested():
    """In molecule's scenario; what needs a controller beside the double of one."""
    plays = yaml.safe_load((ROOT / "extensions/molecule/check_mode/converge.yml").read_text())
    checked = {play["ansible.builtin.import_playbook"].rpartition(".")[2] for play in plays}
    checked |= set(re.findall(r'play\("(\w+)", "--check"', (ROOT / "tests/collection/test_awx.py").read_text()))
    assert checked == {path.stem for path in (ROOT / "playbooks").glob("*.yml")}


def test_every_module_is_in_the_action_group_of_all():
    groups = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["action_groups"]
    listed = {name for name in groups["all"] if isinstance(name, str)} | set(groups["jobs"])
    assert listed == {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}


def test_nothing_was_added_after_this_version():
    """What says so would be missing from the release's notes."""
    version = yaml.safe_load((ROOT / "galaxy.yml").read_text())["version"]
    for path in [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "plugins").rglob("*.yml")]:
        for added in re.findall(r"version_added: [\"']?([\d.]+)", path.read_text()):
            assert tuple(map(int, added.split("."))) <= tuple(map(int, version.split("."))), path


def test_templates_start_with_a_portable_shebang():
    for path in (ROOT / "templates").rglob("*"):
        if path.is_file() and path.read_text().startswith("#!"):
            assert path.read_text().startswith("#!/usr/bin/env bash\n"), path
