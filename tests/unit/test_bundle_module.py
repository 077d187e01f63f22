# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bundle module writes below its folder and nowhere else."""

from __future__ import annotations

import os
import types

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.modules import bundle


def lay_down(folder, *names, executables=()):
    parameters = {"path": str(folder), "files": dict.fromkeys(names, "text"), "executables": list(executables)}
    return bundle.run(types.SimpleNamespace(params=parameters, check_mode=False, _diff=False))


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", ".", "link/out", "linked"])
def test_name_that_leads_out_is_refused(tmp_path, name):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "bundle/linked").symlink_to(tmp_path / "elsewhere/file")
    with pytest.raises(SpecDecodeError, match="leads out of the bundle"):
        lay_down(tmp_path / "bundle", name)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        lay_down(tmp_path / "bundle", "a/file", "run.sh", executables=["run.sh"])
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "bundle" / name).stat().st_mode & 0o777 for name in ("a/file", "run.sh")}
    assert modes == {"a/file": 0o644, "run.sh": 0o755}
    assert not list((tmp_path / "bundle").rglob(".*")), "no temporary file is left"


@pytest.mark.parametrize("text", ["a\r\nb\r", "\ufeffa", "a\x0bb\u2028", ""])
def test_second_call_finds_every_text_as_it_was_written(tmp_path, text):
    parameters = {"path": str(tmp_path), "files": {"file": text}, "executables": []}
    module = types.SimpleNamespace(params=parameters, check_mode=False, _diff=False)
    assert bundle.run(module)["changed"] and not bundle.run(module)["changed"]
    assert (tmp_path / "file").read_bytes().decode() == text
