# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The vLLM servers of a measurement's arms. Used by measure_arms.py."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time

from engine_log import error_lines
from spec_decode.errors import SpecDecodeError
from spec_decode.files import tail
from spec_decode.progress import Progress
from spec_decode.vllm_metrics import Access, scrape

#: longest address of a socket, and how much of it vLLM adds to its folder: a UUID
LONGEST_ADDRESS, OWN_NAME = 107, 37


class Server:
    """One arm's vLLM server: started, ready, stopped, and perhaps started again."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], port: int, log: str) -> None:
        self.name, self.port, self.log = name, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*command, "--port", str(port)]
        self.startup_s: list[float] = []
        self._environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **environment}
        self._environment["PATH"] = searchable(self._environment.get("PATH", os.defpath))
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._sockets: tempfile.TemporaryDirectory[str] | None = None

    @property
    def up(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the server, which is of use when :meth:`wait` returns."""
        refuse_taken_port(self.port)
        self._started = time.monotonic()
        self._sockets = socket_folder()
        own = {"VLLM_RPC_BASE_PATH": self._sockets.name} if self._sockets else {}
        with open(self.log, "ab" if self.startup_s else "wb") as log:
            # A group of its own in this session: it can be stopped as a whole and still carries the job's mark.
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env={**own, **self._environment}, process_group=0
            )

    def wait(self, timeout_s: float, progress: Progress) -> None:
        """Return as soon as the server answers ``/health``."""
        while not self._healthy():
            passed = time.monotonic() - self._started
            code = self._process.poll() if self._process else None
            if code is not None:
                raise SpecDecodeError(
                    f"The {self.name} arm's server ended with exit code {code} after {passed:.0f} s."
                    f" Its log ends with:\n{self._last_lines()}",
                    f"See {self.log}.",
                )
            if passed > timeout_s:
                raise SpecDecodeError(
                    f"The {self.name} arm's server was not ready after {timeout_s:.0f} s. Its log ends with:\n"
                    f"{self._last_lines()}",
                    "Raise spec_startup_timeout if it only needs longer.",
                )
            progress.update(f"starting the {self.name} arm", int(passed), 0)
            time.sleep(0.5)
        self.startup_s.append(round(time.monotonic() - self._started, 1))

    def stop(self) -> None:
        """End the server and everything that it started."""
        if self._process is None:
            return
        for number, grace in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived their parent
        self._process = None
        if self._sockets:
            self._sockets.cleanup()

    def check_alive(self) -> None:
        """Refuse to go on with a server that died between two trials."""
        if self._process is not None and self._process.poll() is not None:
            raise SpecDecodeError(
                f"The {self.name} arm's server died while it was measured. Its log ends with:\n{self._last_lines()}",
                f"See {self.log}.",
            )

    def _healthy(self) -> bool:
        return healthy(self.url, Access(timeout_s=5))

    def _last_lines(self) -> str:
        return "\n".join(f"    {line}" for line in error_lines(self.log) or tail(self.log, 12))


class RunningServer:
    """An arm's server that somebody else runs: nothing is started or stopped, only asked."""

    command = None

    def __init__(self, name: str, url: str, log: str, access: Access) -> None:
        self.name, self.url, self.log = name, url, log
        self.startup_s: list[float] = []
        self.up = False
        self._access = access

    def start(self) -> None:
        """It runs."""

    def wait(self, timeout_s: float, progress: Progress) -> None:
        progress.update(f"looking for the {self.name} arm at {self.url}")
        self.check_alive()
        self.up = True

    def running_since(self) -> float:
        """When the server started; now, where it does not tell, as it then may be another one each time."""
        self.check_alive()
        return scrape(self.url, self._access).process_start or time.time()

    def stop(self) -> None:
        """It is not ours to stop."""

    def check_alive(self) -> None:
        if not healthy(self.url, self._access):
            raise SpecDecodeError(
                f"The {self.name} arm's server at {self.url} does not answer /health.",
                "Start it, or mend the arm's url in the plan.",
            )


class Fleet:
    """The arms' servers; those that a step needs are up, all are down at the end.

    ``together`` starts all that a step needs at once. Otherwise one follows the other: while vLLM finds out how much
    memory is left for its KV cache, nothing else may take or give back any.
    """

    def __init__(
        self, servers: dict[str, Server | RunningServer], timeout_s: float, progress: Progress, together: bool = False
    ) -> None:
        self.servers = servers
        self._timeout_s, self._progress, self._together = timeout_s, progress, together

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_exception: object) -> None:
        for server in self.servers.values():
            server.stop()

    def running_since(self) -> dict[str, float]:
        """Of the servers that somebody else runs, by arm: whatever was measured of an earlier start may be of other weights."""
        return {name: server.running_since() for name, server in self.servers.items() if isinstance(server, RunningServer)}

    def need(self, names: tuple[str, ...]) -> list[str]:
        """Bring these servers up; which started."""
        for name, server in self.servers.items():
            if name not in names:
                server.stop()
        started = [name for name in names if not self.servers[name].up]
        for at_once in [started] if self._together else [[name] for name in started]:
            for name in at_once:
                self.servers[name].start()
            for name in at_once:
                self.servers[name].wait(self._timeout_s, self._progress)
        return started


def healthy(url: str, access: Access) -> bool:
    try:
        access.get(f"{url}/health")
    except OSError:
        return False
    return True


def searchable(path: str) -> str:
    """A PATH without the folders that may not be searched, where vLLM's /server_info would fail."""
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if os.access(folder or ".", os.X_OK))


def socket_folder() -> tempfile.TemporaryDirectory[str] | None:
    """A folder for the sockets that vLLM leaves behind; none where their addresses would be too long in it."""
    folder = tempfile.TemporaryDirectory(prefix="arm-", ignore_cleanup_errors=True)
    if len(folder.name) + OWN_NAME > LONGEST_ADDRESS:
        folder.cleanup()
        return None
    return folder


def refuse_taken_port(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SpecDecodeError(
                f"Port {port} on this machine is in use already ({error.strerror}).",
                "Stop what uses it, or set spec_ports to others (0 takes a free one).",
            ) from error


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
