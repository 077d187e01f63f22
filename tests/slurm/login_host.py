# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A login host: a real ``sshd`` on this machine with keys, a port and a configuration of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from cluster import CannotRun, install, which

START_LIMIT_S = 20.0


class NoServer(Exception):
    """Why no ``sshd`` can run here, and what would change that."""


class LoginHost:
    """The machine itself, reached by SSH; ``environment`` is what its sessions find set, as a site's profile does it."""

    def __init__(self, folder: pathlib.Path, environment: dict[str, str]) -> None:
        self._program, self._folder = _program(), folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        #: what an inventory says of this host
        self.variables: dict[str, Any] = {
            "ansible_connection": "ssh",
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(folder / "user_key"),
            "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={folder}/known_hosts -o IdentitiesOnly=yes",
            "ansible_python_interpreter": sys.executable,
            # A terminal is made by root alone; a user's own server ends every session that asks for one.
            "ansible_ssh_use_tty": os.geteuid() == 0,
        }
        if os.geteuid() == 0:
            pathlib.Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd leaves its privileges
        for name in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, stdin=subprocess.DEVNULL
            )
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host_key.pub').read_text()}")
        variables = " ".join(f'"{name}={value}"' for name, value in environment.items())
        (folder / "sshd_config").write_text(
            f"""ListenAddress 127.0.0.1
Port {self.port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
SetEnv {variables}
"""
        )

    def start(self) -> None:
        """Listen; returns when a client is greeted."""
        with open(self._folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-D", "-e", "-f", str(self._folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + START_LIMIT_S
        while not self._greets():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise NoServer(f"sshd does not start: {(self._folder / 'sshd.log').read_text().strip()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop listening, and break every session, as a machine does whose network is gone; what runs there goes on."""
        if self._process is None:
            return
        for pid in [self._process.pid, *self._sessions(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _greets(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
            return probe.recv(4) == b"SSH-"
        return False

    def _sessions(self, parent: int) -> list[int]:
        """The server's own processes below ``parent``, and none of those that they started for a user."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pid, _bracket, rest = path.read_text().partition(" (")
                name, _bracket, fields = rest.rpartition(") ")
                if name.startswith("sshd") and int(fields.split()[1]) == parent:
                    found += [int(pid), *self._sessions(int(pid))]
        return found


def _program() -> str:
    """The server's path. Root has it installed where it is missing, as with Slurm; anybody else is told."""
    found = which("sshd")
    if found is None and os.geteuid() == 0:
        try:
            install("openssh-server")
        except CannotRun as error:
            raise NoServer(f"there is no sshd: {error}") from None
        found = which("sshd")
    if found is None:
        raise NoServer("there is no sshd; install openssh-server")
    return found
