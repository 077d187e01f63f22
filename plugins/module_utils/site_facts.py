# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The place where jobs run: Slurm's nodes, and whether they see a folder. Private to the collection."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess

#: file systems that more than one machine can mount
SHARED_TYPES = frozenset(
    {
        "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "cifs", "smb3", "glusterfs", "9p", "virtiofs",
        "afs", "pvfs2", "orangefs", "daos", "vast",
    }
)  # fmt: skip
#: beginnings of ``sinfo``'s long state names whose nodes take no jobs
UNUSABLE = ("down", "drain", "fail", "maint", "unk", "inval", "power", "boot", "reboot", "planned", "future", "blocked")


@dataclasses.dataclass(frozen=True)
class Node:
    """A node as ``sinfo`` lists it."""

    name: str
    state: str
    address: str

    @property
    def usable(self) -> bool:
        return not self.state.startswith(UNUSABLE)

    @property
    def idle(self) -> bool:
        return self.state == "idle"


def slurm_nodes(partition: str, cluster: str = "", limit_s: float = 20.0) -> tuple[list[Node], str]:
    """The nodes of a partition (of all if empty), or why ``sinfo`` does not tell."""
    if not shutil.which("sinfo"):
        return [], "there is no sinfo here"
    place = [f"--{name}={value}" for name, value in (("clusters", cluster), ("partition", partition)) if value]
    command = ["sinfo", "--noheader", "--Node", "--format", "%N|%T|%o", *place]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return [], f"sinfo did not answer within {limit_s:.0f} s"
    if answer.returncode:
        # Its last line says what it failed at; those before say how it tried.
        return [], (answer.stderr.strip().splitlines() or [f"sinfo ended with exit code {answer.returncode}"])[-1]
    return parse_nodes(answer.stdout), ""


def parse_nodes(text: str) -> list[Node]:
    """Lines of ``name|state|address``; a node in several partitions stands once. Marks such as ``*`` are taken off."""
    found: dict[str, Node] = {}
    for line in text.splitlines():
        name, mark, rest = line.strip().partition("|")
        state, _mark, address = rest.partition("|")
        if mark:  # else the name of a cluster, which stands before its nodes
            # "*" is a node that does not respond; other marks say how it is powered
            word = "down" if state.endswith("*") else state.rstrip("~#!%$@^-+").lower()
            found[name] = Node(name, word, address or name)
    return list(found.values())


def all_here(nodes: list[Node]) -> bool:
    """Whether every node is this machine, so that any folder is shared."""
    here = {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn()}
    return bool(nodes) and all(node.address in here for node in nodes)


def existing(path: str) -> str:
    """The path, or the nearest folder above it that exists."""
    current = os.path.abspath(path)
    while not os.path.exists(current):
        current = os.path.dirname(current)
    return current


def file_system(path: str) -> str:
    """The type of the file system that holds ``path``."""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as stream:
        return type_at(os.path.realpath(existing(path)), stream.read())


def type_at(place: str, mounts: str) -> str:
    """The type of the innermost file system of ``mounts`` that holds ``place``."""
    best, kind = "", "unknown"
    for fields in map(str.split, mounts.splitlines()):
        point = fields[1].replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def is_shared(kind: str) -> bool:
    """Whether a file system of that type is one that several machines mount."""
    return kind in SHARED_TYPES or (kind.startswith("fuse.") and kind not in ("fuse.lxcfs", "fuse.fuse-overlayfs", "fuse.portal"))
