#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Slurm on this one machine, in a folder of its own: nodes that pretend to have GPUs, two partitions, preemption.

As root, Debian's packages are installed if they are missing, and the cluster has munge and accounting. Otherwise the
packages are unpacked into the folder, and it has neither. A Slurm that is on the machine already is never touched:
configuration, state, sockets and ports are this cluster's own, and only processes that it started are ever stopped.

    cluster.py up FOLDER      start what is not running, and print the environment to use it
    cluster.py down FOLDER    stop what it started

With ``--apt-source LINE`` the Slurm of another release is unpacked and run, whatever this machine has:

    cluster.py up FOLDER --apt-source \
        'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main'
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server")
#: what is unpacked, with all that it needs, instead of installed
UNPACKED = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "slurm-wlm-mysql-plugin")
#: what makes unpacked programs find their libraries
PATCHER = "patchelf"
#: see invoke-rc.d(8)
SERVICE_POLICY = pathlib.Path("/usr/sbin/policy-rc.d")
COMMANDS = ("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
CPUS, MEMORY_MB, GPUS = 16, 16000, 8
START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
#: longer paths do not fit a Unix socket's address
LONGEST_FOLDER = 80


class CannotRun(Exception):
    """Why no Slurm can run here, and what would change that."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cluster is to be like."""

    accounting: bool = True
    nodes: int = 2
    min_job_age: int = 300
    message_timeout: int = 5
    #: a line of apt's sources.list: where another release's Slurm comes from; empty for this machine's own
    apt_source: str = ""


class Cluster:
    """One cluster in one folder. What it is made of is on disk, so that another process can go on with it."""

    def __init__(self, folder: pathlib.Path, settings: Settings | None = None, rootless: bool = False) -> None:
        self.folder = folder.resolve()
        self.rootless = rootless or os.geteuid() != 0
        settings = settings or self._kept_settings()
        self.settings = dataclasses.replace(settings, accounting=False) if self.rootless else settings
        self.name = "specdecode"
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise CannotRun(f"the folder {self.folder} is longer than {LONGEST_FOLDER} characters; give a shorter one")

    # what there is

    @property
    def conf(self) -> pathlib.Path:
        return self.folder / "etc/slurm.conf"

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.settings.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead Slurm's commands to this cluster."""
        found = {"SLURM_CONF": str(self.conf)}
        if self._unpacked.is_dir():
            found["PATH"] = f"{self.folder}/bin:{os.environ['PATH']}"
        return found

    @property
    def _unpacked(self) -> pathlib.Path:
        """Where the programs are if they are not this machine's own."""
        return self.folder / "root"

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run one of Slurm's commands and return what it printed."""
        answer = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and answer.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {answer.returncode}: {answer.stderr.strip()}")
        return answer.stdout

    # up and down

    def up(self) -> Cluster:
        """Start what is not running; returns when every node takes jobs."""
        self._provide_programs()
        self._lay_down()
        for daemon in self._daemons():
            self.start(daemon)
        wanted = len(self.node_names)
        _until(lambda: self._nodes_up() >= wanted, f"{wanted} nodes take jobs", self.folder)
        return self

    def down(self) -> None:
        """Stop what this cluster started, the last first."""
        for daemon in reversed(self._daemons()):
            self.stop(daemon)

    def start(self, daemon: str) -> None:
        """Start one daemon, unless it runs, and wait until it answers."""
        if self.pid(daemon) is None:
            command, ready = self._daemon(daemon)
            log = self.folder / f"log/{daemon}.out"
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    env={**os.environ, **self.environment}, cwd=self.folder,
                )  # fmt: skip
            (self.folder / f"pid/{daemon}").write_text(f"{process.pid} {_started_at(process.pid)}")
            _until(ready, f"{daemon} answers", self.folder)
        if daemon == "slurmdbd":
            self._register_cluster()

    def stop(self, daemon: str, number: int = signal.SIGTERM) -> None:
        """Stop one daemon, if it runs, and wait until it is gone."""
        pid = self.pid(daemon)
        if pid is None:
            return
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, number)
        deadline = time.monotonic() + STOP_LIMIT_S
        while self.pid(daemon) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.pid(daemon) is not None:
            os.kill(pid, signal.SIGKILL)
            _until(lambda: self.pid(daemon) is None, f"{daemon} is gone", self.folder)
        (self.folder / f"pid/{daemon}").unlink()

    def pid(self, daemon: str) -> int | None:
        """The process of a daemon, if this cluster started it and it is alive."""
        try:
            pid, _blank, started = (self.folder / f"pid/{daemon}").read_text().partition(" ")
        except FileNotFoundError:
            return None
        with contextlib.suppress(ChildProcessError):
            os.waitpid(int(pid), os.WNOHANG)  # reap it, if it was this process's child
        return int(pid) if _started_at(int(pid)) == started != "" else None

    @contextlib.contextmanager
    def paused(self, daemon: str):
        """The daemon does not answer, but its connections stand (SIGSTOP)."""
        pid = self.pid(daemon)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self, daemon: str, number: int = signal.SIGTERM):
        """The daemon is not there."""
        self.stop(daemon, number)
        try:
            yield
        finally:
            self.start(daemon)

    # the programs

    def _provide_programs(self) -> None:
        if (self.folder / "bin").is_dir():
            return
        wanted = ["slurmctld", "slurmd", "sbatch", *(() if self.rootless else ("munged", "slurmdbd", "mariadbd"))]
        installed = all(which(name) for name in wanted)
        if installed and not self.settings.apt_source:
            return
        if not shutil.which("apt-get"):
            raise CannotRun(f"Slurm ({', '.join(wanted)}) is not installed, and there is no apt-get to get it with")
        if not self.rootless and not installed:
            install(*PACKAGES)
        if self.rootless or self.settings.apt_source:
            self._unpack()

    def _unpack(self) -> None:
        """Slurm with all that it needs, down to the C library: nothing of the machine's own is used or changed."""
        self._fetch("tools", [PATCHER], "", alone=True)
        self._fetch("root", list(UNPACKED), self.settings.apt_source)
        self._make_self_contained()
        # Slurm's programs go by the name that they are called by.
        (self.folder / "bin").mkdir()
        for path in self._programs():
            (self.folder / "bin" / path.name.removesuffix("-wlm")).symlink_to(path)

    def _fetch(self, name: str, packages: list[str], source: str, alone: bool = False) -> None:
        """Unpack packages, ``alone`` or with all that they need, into the folder ``name``."""
        apt = self.folder / f"apt/{name}"
        for part in ("lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        options = _options(apt, source)
        _call(["apt-get", "-qq", *options, "update"])
        if alone:
            _call(["apt-get", "-qq", *options, "download", *packages], cwd=apt / "cache/archives")
        else:
            _call(["apt-get", "-qq", *options, "install", "--yes", "--download-only", "--no-install-recommends", *packages])
        for package in sorted(apt.glob("cache/archives/*.deb")):
            _call(["dpkg", "-x", str(package), str(self.folder / name)])

    def _programs(self) -> list[pathlib.Path]:
        commands = [self._unpacked / "usr/bin" / name for name in COMMANDS]
        return [*commands, *self._unpacked.glob("usr/sbin/slurm*")]

    def _make_self_contained(self) -> None:
        """Name the unpacked libraries in the programs: a variable would reach the jobs too, whose shell is the machine's."""
        patcher = self.folder / "tools/usr/bin" / PATCHER
        (plugins,) = self._plugin_folders()
        loader = next(self._unpacked.rglob("ld-linux-*.so.*"))
        libraries = f"{loader.parent}:{plugins.parent}:{plugins}"
        programs = self._programs()
        for path in [*programs, *plugins.glob("*.so*")]:
            if path.is_symlink() or path.read_bytes()[:4] != b"\x7fELF":
                continue
            interpreter = ["--set-interpreter", str(loader)] if path in programs else []
            _call([str(patcher), *interpreter, "--force-rpath", "--set-rpath", libraries, str(path)])

    def _plugin_folders(self) -> list[pathlib.Path]:
        return sorted(self._unpacked.glob("usr/lib/*/slurm-wlm"))

    def _program(self, name: str) -> str:
        unpacked = self.folder / "bin" / name
        return str(unpacked) if unpacked.exists() else str(which(name))

    # the configuration

    def _lay_down(self) -> None:
        for name in ("etc", "log", "pid", "state/ctld", "state/mysql", "state/munge", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "state/munge/munge.key"
        if not self.rootless and not key.exists():
            key.parent.chmod(0o700)
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        (self.folder / "etc/settings.json").write_text(json.dumps(dataclasses.asdict(self.settings)))
        ports = self._ports()
        self.conf.write_text(self._slurm_conf(ports))
        (self.folder / "etc/cgroup.conf").write_text("")
        (self.folder / "etc/gres.conf").write_text("\n".join(["AutoDetect=off", *self._gres()]) + "\n")
        if self.settings.accounting:
            path = self.folder / "etc/slurmdbd.conf"
            path.write_text(self._slurmdbd_conf(ports))
            path.chmod(0o600)

    def _kept_settings(self) -> Settings:
        path = self.folder / "etc/settings.json"
        return Settings(**json.loads(path.read_text())) if path.exists() else Settings()

    def _ports(self) -> dict[str, int]:
        """Ports that were free when the cluster was made, the same ever after."""
        path = self.folder / "etc/ports.json"
        if not path.exists():
            names = ["slurmctld", "slurmdbd", "mariadbd", *self.node_names]
            with contextlib.ExitStack() as stack:
                probes = {name: stack.enter_context(socket.socket()) for name in names}
                for probe in probes.values():
                    probe.bind(("127.0.0.1", 0))
                path.write_text(json.dumps({name: probe.getsockname()[1] for name, probe in probes.items()}))
        found: dict[str, int] = json.loads(path.read_text())
        return found

    def _gres(self) -> list[str]:
        """Pretended GPUs. Slurm wants a character device for each: as root, clones of /dev/null; else terminals."""
        lines = []
        for index, node in enumerate(self.node_names):
            if self.rootless:
                lines.append(f"NodeName={node} Name=gpu Type=h100 File=/dev/tty[{GPUS * index}-{GPUS * index + GPUS - 1}]")
                continue
            for number in range(GPUS * index, GPUS * (index + 1)):
                device = self.folder / f"dev/gpu{number}"
                if not device.exists():
                    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            devices = f"{self.folder}/dev/gpu[{GPUS * index}-{GPUS * (index + 1) - 1}]"
            lines.append(f"NodeName={node} Name=gpu Type=h100 File={devices}")
        return lines

    def _slurm_conf(self, ports: dict[str, int]) -> str:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        user = "root" if not self.rootless else _call(["id", "-un"]).strip()
        lines = [
            f"ClusterName={self.name}",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports['slurmctld']}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"StateSaveLocation={folder}/state/ctld",
            f"SlurmdSpoolDir={folder}/state/%n",
            f"SlurmctldPidFile={folder}/pid/slurmctld.own",
            f"SlurmdPidFile={folder}/pid/%n.own",
            f"SlurmctldLogFile={folder}/log/slurmctld.log",
            f"SlurmdLogFile={folder}/log/%n.log",
            "ProctrackType=proctrack/linuxproc",
            "MpiDefault=none",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory",
            "GresTypes=gpu",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "JobRequeue=1",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=2,bf_interval=2,bf_window=1440,batch_sched_delay=0,sched_min_interval=100000",
            f"MinJobAge={self.settings.min_job_age}",
            "KillWait=2",
            "SlurmctldTimeout=10",
            "SlurmdTimeout=10",
            "InactiveLimit=0",
            f"MessageTimeout={self.settings.message_timeout}",
            "TCPTimeout=2",
        ]
        if self.rootless:
            lines += ["AuthType=auth/none", "CredType=cred/none"]
        else:
            lines += ["AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.sock", "CredType=cred/munge"]
        lines += [f"PluginDir={path}" for path in self._plugin_folders()]
        if self.settings.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={ports['slurmdbd']}",
                f"AccountingStoragePass={folder}/munge.sock",
                "AccountingStorageTRES=gres/gpu",
                "AccountingStoreFlags=job_comment",
                "JobAcctGatherType=jobacct_gather/linux",
            ]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs={CPUS} Boards=1 SocketsPerBoard=1"
            f" CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:h100:{GPUS} State=UNKNOWN"
            for node in self.node_names
        ]
        lines += [
            "PartitionName=train Nodes=ALL Default=YES MaxTime=30-0 State=UP PriorityTier=1 PreemptMode=REQUEUE"
            " GraceTime=0 DefMemPerCPU=100",
            "PartitionName=serving Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
            " DefMemPerCPU=100",
        ]
        return "\n".join(lines) + "\n"

    def _slurmdbd_conf(self, ports: dict[str, int]) -> str:
        return "\n".join(
            [
                "AuthType=auth/munge",
                f"AuthInfo=socket={self.folder}/munge.sock",
                "DbdHost=localhost",
                "DbdAddr=127.0.0.1",
                f"DbdPort={ports['slurmdbd']}",
                "SlurmUser=root",
                f"LogFile={self.folder}/log/slurmdbd.log",
                f"PidFile={self.folder}/pid/slurmdbd.own",
                "StorageType=accounting_storage/mysql",
                "StorageHost=127.0.0.1",
                f"StoragePort={ports['mariadbd']}",
                "StorageUser=slurm",
                "StoragePass=slurm",
                "StorageLoc=slurm_acct",
                *(f"PluginDir={path}" for path in self._plugin_folders()),
                "",
            ]
        )

    # the daemons

    def _daemons(self) -> list[str]:
        first = [] if self.rootless else ["munged"]
        accounting = ["mariadbd", "slurmdbd"] if self.settings.accounting else []
        return [*first, *accounting, "slurmctld", *self.node_names]

    def _daemon(self, name: str) -> tuple[list[str], Callable[[], bool]]:
        """A daemon's command, in the foreground, and how to see that it answers."""
        folder = self.folder
        if name == "munged":
            # munged wants its folders safe from others; this one is the cluster's own.
            return [
                self._program(name), "--foreground", "--force", f"--key-file={folder}/state/munge/munge.key",
                f"--socket={folder}/munge.sock", f"--pid-file={folder}/pid/munged.own",
                f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/state/munge/munge.seed",
            ], (folder / "munge.sock").exists  # fmt: skip
        if name == "mariadbd":
            data = folder / "state/mysql"
            if not (data / "mysql").exists():
                shutil.chown(data, "mysql", "mysql")
                _call(["mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={data}", "--skip-test-db",
                       "--auth-root-authentication-method=socket"])  # fmt: skip
            return [
                self._program(name), "--no-defaults", "--user=mysql", f"--datadir={data}", f"--socket={data}/m.sock",
                "--bind-address=127.0.0.1", f"--port={self._ports()[name]}", "--innodb-buffer-pool-size=64M",
                "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", f"--log-error={folder}/log/mariadb.log",
                f"--pid-file={data}/m.pid",
            ], lambda: self._succeeds("mariadb-admin", "--no-defaults", "-uroot", f"--socket={data}/m.sock", "ping")  # fmt: skip
        if name == "slurmdbd":
            self._make_database()
            return [self._program(name), "-D"], lambda: self._succeeds("sacctmgr", "-n", "show", "cluster")
        if name == "slurmctld":
            return [self._program(name), "-D", "-i"], lambda: " is UP" in self.run("scontrol", "ping", check=False)
        stepd = folder / "bin/slurmstepd"
        return [self._program("slurmd"), "-D", "-N", name, *(["-d", str(stepd)] if stepd.exists() else [])], lambda: True

    def _make_database(self) -> None:
        users = "".join(
            f"CREATE USER IF NOT EXISTS slurm@'{host}' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct.* TO slurm@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        self.run("mariadb", "--no-defaults", "-uroot", f"--socket={self.folder}/state/mysql/m.sock",
                 "-e", f"CREATE DATABASE IF NOT EXISTS slurm_acct; {users}")  # fmt: skip

    def _register_cluster(self) -> None:
        if self.name not in self.run("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster").split():
            self.run("sacctmgr", "-i", "add", "cluster", self.name)

    def _succeeds(self, *command: str) -> bool:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run(*command, timeout=10)
            return True
        return False

    def _nodes_up(self) -> int:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines()
        return len({line.split()[0] for line in lines if line.split()[1] in ("idle", "mix", "alloc")})


def install(*packages: str) -> None:
    """Install packages on this machine, as root; none of their services is started.

    Raises ``CannotRun``: there is no ``apt-get``, or it failed.
    """
    if not shutil.which("apt-get"):
        raise CannotRun(f"there is no apt-get to install {', '.join(packages)} with")
    with _no_service_starts():
        _call(["apt-get", "update", "-qq"])
        _call(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], DEBIAN_FRONTEND="noninteractive")


@contextlib.contextmanager
def _no_service_starts():
    """A package's scripts ask this file whether they may start something; where a machine has its own, that one decides."""
    own = not SERVICE_POLICY.exists()
    if own:
        SERVICE_POLICY.write_text("#!/bin/sh\nexit 101\n")
        SERVICE_POLICY.chmod(0o755)
    try:
        yield
    finally:
        if own:
            SERVICE_POLICY.unlink()


def which(name: str) -> str | None:
    """A program, also where only root's path leads."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _call(command: list[str], cwd: pathlib.Path | None = None, **environment: str) -> str:
    answer = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise CannotRun(f"{shlex.join(command)} failed: {' / '.join(answer.stderr.strip().splitlines()[-2:])}")
    return answer.stdout


def _options(folder: pathlib.Path, source: str) -> list[str]:
    """What makes ``apt-get`` work in a folder, for anybody, as if nothing were installed."""
    options = {
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
    }
    if source:
        (folder / "sources.list").write_text(f"{source}\n")
        options |= {"Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "-"}
    return [f"-o{name}={value}" for name, value in options.items()]


def _started_at(pid: int) -> str:
    """The kernel's start time of a living process: with it a number that was given anew is not taken for the old process."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _until(condition: Callable[[], bool], what: str, folder: pathlib.Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise CannotRun(f"not within {START_LIMIT_S:.0f} s: {what}; see {folder}/log")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--no-accounting", action="store_true")
    parser.add_argument("--rootless", action="store_true")
    parser.add_argument("--apt-source", metavar="LINE", default="", help="where another release's Slurm comes from")
    options = parser.parse_args()
    try:
        settings = None
        if options.no_accounting or options.apt_source:
            settings = Settings(accounting=not options.no_accounting, apt_source=options.apt_source)
        cluster = Cluster(options.folder, settings, options.rootless)
        if options.verb == "down":
            cluster.down()
            return 0
        for name, value in cluster.up().environment.items():
            print(f"export {name}={shlex.quote(value)}")
    except CannotRun as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
