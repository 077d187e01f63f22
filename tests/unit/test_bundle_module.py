# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bundle module writes below its folder and nowhere else."""

from __future__ import annotations

import types

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.modules import bundle


def lay_down(folder, *names):
    parameters = {"path": str(folder), "files": dict.fromkeys(names, "text"), "executables": []}
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


def test_modes_do_not_follow_the_umask(tmp_path):
    lay_down(tmp_path / "bundle", "a/file")
    assert (tmp_path / "bundle/a/file").stat().st_mode & 0o777 == 0o644
