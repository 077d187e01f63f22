# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a poll costs: calls of Slurm's commands and seconds, for 1, 100 and 1000 known jobs that pend in a real queue."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
COUNTS = (1, 100, 1000)
REPEATS = 5


def measured() -> dict[str, Any]:
    """Figures by number of jobs, with the cluster that they were measured on."""
    sys.path[:0] = [str(ROOT / ".collections"), str(ROOT / "tests/slurm")]
    import cluster

    with tempfile.TemporaryDirectory(prefix="sd-slurm-") as folder:
        os.chmod(folder, 0o755)
        try:
            site = cluster.Cluster(pathlib.Path(folder) / "c", cluster.Settings(nodes=1)).up()
        except cluster.CannotRun as error:
            return {"skipped": str(error)}
        before = dict(os.environ)
        os.environ.update(site.environment)
        try:
            context = {
                "slurm": site.run("sbatch", "--version").strip(),
                "accounting": site.settings.accounting,
                "cpus": os.cpu_count(),
                "load_average": os.getloadavg()[0],
                "repeats": REPEATS,
            }
            return {"context": context, "polls": polls(site, pathlib.Path(folder) / "jobs")}
        finally:
            site.run("scancel", f"--user={os.getuid()}", check=False)
            site.down()
            os.environ.clear()
            os.environ.update(before)


def polls(site: Any, folder: pathlib.Path) -> list[dict[str, Any]]:
    from ansible_collections.inference.spec_decode.plugins.module_utils import jobs
    from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_client import Slurm
    from ansible_collections.inference.spec_decode.plugins.module_utils.slurm_executor import SlurmExecutor, job_name

    specs = [jobs.JobSpec("bench", f"job-{number}", "", str(folder)) for number in range(max(COUNTS))]

    def known(spec: jobs.JobSpec) -> None:
        attempt = jobs.Attempt(1, jobs.attempt_key(spec, "", 1), jobs.now(), state=jobs.State.PENDING)
        attempt.job_id = site.run(
            "sbatch", "--parsable", "--hold", f"--job-name={job_name(spec, attempt)}", "--wrap=true"
        ).strip()
        jobs.write_record(spec, jobs.Record("bench", spec.name, "slurm", "", {}, os.getuid(), attempts=[attempt]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(known, specs))
    found = []
    for count in COUNTS:
        times, calls = [], set()
        for _repeat in range(REPEATS + 1):
            slurm = Slurm()
            started = time.monotonic()
            outcomes = jobs.query_all(specs[:count], SlurmExecutor(slurm=slurm))
            times.append(time.monotonic() - started)
            calls.add(slurm.calls)
            if {outcome.state for outcome in outcomes} != {jobs.State.PENDING}:
                raise SystemExit("bench: a job that pends was not found")
        # The first poll of a job notes its state on disk; those after it have nothing new to note.
        found.append(
            {
                "jobs": count,
                "calls_a_poll": max(calls),
                "first_poll_s": round(times[0], 3),
                "poll_s_median": round(statistics.median(times[1:]), 3),
            }
        )
    return found
