# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings of the tests."""

from __future__ import annotations

import pathlib
import sys

import pytest
from hypothesis import HealthCheck, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Examples are not timed: a busy machine is no defect of the code.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The node programs importable as in a bundle: beside the package ``spec_decode``."""
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "spec_decode").symlink_to(ROOT / "plugins/module_utils")
    added = [str(bundle), str(ROOT / "files")]
    sys.path[:0] = added
    yield
    for path in added:
        sys.path.remove(path)
