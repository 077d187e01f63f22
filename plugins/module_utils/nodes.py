# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A program's place among the nodes of its job. Private to the collection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Nodes:
    """How many nodes run this program, which of them this is, and where they meet."""

    count: int
    rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Nodes:
        """``srun`` numbers the nodes of a step; the launcher sets where they meet. By hand there is one node."""
        # Only a step spread over nodes has these: the batch script itself runs on one, whatever the job holds.
        count = int(environment.get("SLURM_STEP_NUM_NODES") or 1)
        return cls(
            count,
            int(environment.get("SLURM_NODEID") or 0) if count > 1 else 0,
            environment.get("MASTER_ADDR") or "127.0.0.1",
            int(environment.get("MASTER_PORT") or 29500),
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def torchrun(self, python: str, processes: int) -> list[str]:
        """``torchrun`` over these nodes, ``processes`` on each; append the script and its arguments."""
        command = [python, "-m", "torch.distributed.run", "--nnodes", str(self.count), "--nproc-per-node", str(processes)]
        if self.count == 1:
            return [*command, "--standalone"]
        return [
            *command, "--node-rank", str(self.rank), "--master-addr", self.address, "--master-port", str(self.port),
        ]  # fmt: skip
