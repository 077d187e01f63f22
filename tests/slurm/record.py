#!/usr/bin/env python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Record what a real Slurm answers to the collection's own questions, for the tests of its parsers.

    record.py [--apt-source LINE]      writes tests/unit/data/slurm/<version>/

A cluster of its own is started for it (see cluster.py), and one job is brought into each state that can be had.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / ".collections"), str(ROOT / "tests/slurm")]
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_client import Slurm
from cluster import Cluster, Settings

DATA = ROOT / "tests/unit/data/slurm"
LIMIT_S = 150
#: jobs by name: what sbatch is told, and the script
JOBS = {
    "completed": (['--comment={"k": "a|b, c"}'], "true"),
    "failed": ([], "exit 3"),
    "killed": ([], "kill -9 $$"),
    "timed-out": (["--time=1"], "exec sleep 300"),
    "running": ([], "exec sleep 300"),
    "cancelled": ([], "exec sleep 300"),
    "node-fails": (["--nodelist=n2", "--no-requeue"], "exec sleep 300"),
    "requeued": ([], "exec sleep 300"),
    "array": (["--array=0-1"], 'exit "$((SLURM_ARRAY_TASK_ID * 5))"'),
    "too-long": (["--time=40-0"], "true"),
    "never-runs": (["--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes"], "true"),
    "depends": (["--dependency=afterok:{running}"], "true"),
}
#: submissions that Slurm refuses for good
REFUSED = {
    "partition": ["--partition=nowhere"],
    "memory": ["--mem=999G"],
    "time": ["--time=soon"],
    "option": ["--gpuz=1"],
    "gres": ["--gres=abacus:1"],
    "node": ["--nodelist=n99"],
    "exclusive": ["--exclusive=sometimes"],
}


class Recorder(Slurm):
    """Slurm's commands as the collection calls them; keeps the last answer as it came."""

    def __init__(self) -> None:
        super().__init__(limit_s=30)
        self.answer: subprocess.CompletedProcess[str] | None = None

    def _call(self, *arguments, **named):
        self.answer = super()._call(*arguments, **named)
        return self.answer

    def submission(self, folder: pathlib.Path, *options: str) -> dict[str, str | int]:
        """What ``sbatch`` says, however it ends."""
        try:
            self.submit(["--output=/dev/null", *options, "--wrap=true"], os.environ, str(folder))
        except SpecDecodeError:
            pass
        return {"returncode": self.answer.returncode, "stdout": self.answer.stdout, "stderr": self.answer.stderr}


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"record: not within {LIMIT_S} s: {what}")
        time.sleep(0.3)


def bring_about(cluster: Cluster) -> None:
    """One job in each state."""
    ids: dict[str, str] = {}

    def state(name: str) -> str:
        return cluster.run("squeue", "-h", "-t", "all", "-j", ids[name], "-O", "State:|").partition("|")[0]

    for name, (options, script) in JOBS.items():
        if name == "never-runs":
            until(lambda: state("failed") == "FAILED", "a job fails")
        options = [option.format_map(ids) if option.startswith("--dependency") else option for option in options]
        ids[name] = cluster.run(
            "sbatch", "--parsable", "--output=/dev/null", f"--job-name={name}", *options, f"--wrap={script}"
        ).strip()
    for name in ("cancelled", "node-fails", "requeued", "running"):
        until(lambda name=name: state(name) == "RUNNING", f"{name} runs")
    cluster.run("scancel", ids["cancelled"])
    cluster.run("scontrol", "update", "node=n2", "state=down", "reason=recorded")
    cluster.run("scontrol", "requeue", ids["requeued"])
    until(lambda: state("node-fails") == "NODE_FAIL", "the node is down")
    cluster.run("scontrol", "update", "node=n2", "state=resume", check=False)  # older ones have returned it already
    until(lambda: state("timed-out") == "TIMEOUT", "the time is up")
    until(lambda: state("requeued") == "PENDING", "the requeued job pends")
    until(lambda: state("never-runs") == "CANCELLED", "a job is given up")


def record(cluster: Cluster, folder: pathlib.Path) -> dict[str, str]:
    """All answers, by the name of the file that keeps them."""
    client, found = Recorder(), {}
    client.queue(JOBS, os.getuid())
    found["squeue.txt"] = client.answer.stdout
    client.accounts(JOBS, os.getuid(), "2000-01-01T00:00:00")
    found["sacct.txt"] = client.answer.stdout
    found["partitions.txt"], found["nodes.txt"] = client.show("partitions"), client.show("nodes")
    wanted = ("PreemptMode", "PreemptType", "MessageTimeout")
    found["config.txt"] = "\n".join(line for line in client.show("config").splitlines() if line.startswith(wanted)) + "\n"
    (failed,) = (job for job in json.loads(cluster.run("squeue", "--states=all", "--json"))["jobs"] if job["name"] == "failed")
    found["squeue.json"] = json.dumps({field: failed[field] for field in ("job_state", "exit_code", "submit_time")}) + "\n"
    refused = {name: client.submission(folder, *options) for name, options in REFUSED.items()}
    silent = {}
    with cluster.stopped("slurmctld"):
        silent["controller down"] = client.submission(folder)
    with cluster.paused("slurmctld"):
        silent["controller hangs"] = client.submission(folder)
    with cluster.stopped("munged"):
        silent["munge down"] = client.submission(folder)
    found["sbatch.json"] = json.dumps({"refused": refused, "silent": silent}, indent=1) + "\n"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--apt-source", metavar="LINE", default="", help="where another release's Slurm comes from")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sd-slurm-"))
    folder.chmod(0o755)  # the database has a user of its own
    cluster = Cluster(folder / "c", Settings(message_timeout=3, apt_source=parser.parse_args().apt_source)).up()
    try:
        os.environ.update(cluster.environment)
        bring_about(cluster)
        version = cluster.run("squeue", "--version").split()[-1]
        for name, text in record(cluster, folder).items():
            # Nothing of this machine belongs into the recording.
            own = {str(cluster.folder): "/slurm", socket.gethostname().split(".")[0]: "host", platform.release(): "6.1.0"}
            for found, shown in own.items():
                text = text.replace(found, shown)
            (DATA / version).mkdir(parents=True, exist_ok=True)
            (DATA / version / name).write_text(text)
    finally:
        cluster.run("scancel", f"--user={os.getuid()}", check=False)
        cluster.down()
        shutil.rmtree(folder)
    print(f"record: {DATA / version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
