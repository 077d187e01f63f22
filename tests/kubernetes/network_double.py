# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A cluster's network: addresses of this machine's loopback that no other double of a cluster gives out meanwhile."""

from __future__ import annotations

import errno
import itertools
import socket

#: the second byte of a network's addresses
NETWORKS = range(64, 192)
CLAIM_PORT = 10256


class Network:
    """A /16 of the loopback, from 127.64 to 127.191, held until it is closed or its process ends."""

    def __init__(self) -> None:
        self._claim, network = _claim()
        numbers = itertools.product(range(254), range(1, 255))
        self._addresses = (f"127.{network}.{third}.{fourth}" for third, fourth in numbers)

    def address(self) -> str:
        """One that was not given out before."""
        return next(self._addresses)

    def close(self) -> None:
        self._claim.close()


def _claim() -> tuple[socket.socket, int]:
    """A bound socket of the first free network; the kernel lets no second one be bound there, in no process."""
    for network in NETWORKS:
        claim = socket.socket()
        try:
            claim.bind((f"127.{network}.255.254", CLAIM_PORT))
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return claim, network
    raise OSError(f"all {len(NETWORKS)} networks of clusters' doubles are in use on this machine")
