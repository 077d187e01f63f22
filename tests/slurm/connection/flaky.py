# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A connection to this machine that is broken while the file ``FLAKY_BROKEN`` exists, as a lost network is."""

from __future__ import annotations

DOCUMENTATION = r"""
name: flaky
short_description: The local connection, with faults
description:
  - Runs commands on this machine, and fails as a connection does while the file that C(FLAKY_BROKEN) names exists.
author:
  - inference.spec_decode contributors
extends_documentation_fragment:
  - connection_pipelining
"""

import os

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection.local import Connection as Local


class Connection(Local):
    """The local connection, unless it is broken."""

    transport = "flaky"

    def exec_command(self, cmd, in_data=None, sudoable=True):
        if os.path.exists(os.environ["FLAKY_BROKEN"]):
            raise AnsibleConnectionFailure("Connection timed out")
        return super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
