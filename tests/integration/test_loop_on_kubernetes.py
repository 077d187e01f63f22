# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The last phase through kubernetes.core: real vLLM servers and real counters behind an API server's double.

The draft is brought to the serving volume by a Job, both arms are served from Deployments, and a third Job measures
them through their Services. Only the cluster around them is a double: see tests/kubernetes/README.md. After test_loop.py
everything up to the draft is there already.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/kubernetes"))
sys.path.insert(0, str(ROOT / "tests/integration"))
sys.path.insert(0, str(ROOT / "tests/support"))

import schemas
from cluster_double import Cluster, Image
from runtime_double import containers
from test_loop import Loop, changed

SERVER = "vllm-cpu:test"


@pytest.fixture(scope="module")
def site(built, tmp_path_factory):
    """A cluster with one node and two volumes, and the loop's experiment up to its draft."""
    loop = Loop(built.work, built.target)
    loop.play("--tags", "dataset,capture,train,convert")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.add_node("cpu-a")
    models = cluster.folder / "models"
    models.mkdir()
    (models / "base").symlink_to(built.target)
    cluster.claims = {"models": models, "work": built.work}
    engine = str(ROOT / ".engine/bin/python")
    libraries = ROOT / ".engine/lib/libiomp5.so"
    environment = {"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if libraries.exists():
        environment["LD_PRELOAD"] = str(libraries)
    commands = {"vllm": [engine, "-m", "vllm.entrypoints.cli.main"], "python3": [engine]}
    cluster.images[SERVER] = Image(process=containers(commands, environment))
    yield loop, cluster
    cluster.close()


def settings(loop: Loop, cluster: Cluster) -> dict:
    small = {"requests": {"cpu": "1", "memory": "1Gi"}}
    return {
        "spec_canary": "kubernetes", "spec_kubernetes_connection": {"kubeconfig": str(cluster.kubeconfig())},
        "spec_kubernetes_namespace": "lab", "spec_canary_image": SERVER, "spec_canary_gpus": 0,
        "spec_canary_resources": small, "spec_canary_job_resources": small, "spec_canary_target_path": "/models/base",
        "spec_canary_source": {"path": str(loop.work), "source": {"persistentVolumeClaim": {"claimName": "work"}}},
        "spec_prompts": 6, "spec_max_tokens": 40,
    }  # fmt: skip


def test_validated_on_kubernetes(site):
    loop, cluster = site
    output = loop.play("--tags", "validate,report", **settings(loop, cluster))
    acceptance, verdict = loop.result("acceptance"), loop.result("verdict")
    draft = loop.result("draft")
    served = acceptance["arms"]["trained"]["speculative_config"]["model"]
    assert served == f"/models/target/speculator/small-chat/{draft['sha']}"
    assert (cluster.claims["models"] / "target/speculator/small-chat" / draft["sha"] / "model.safetensors").is_file()
    compared = [trial["arm"] for trial in acceptance["trials"] if trial["purpose"] == "compare"]
    assert compared == ["standing", "trained", "trained", "standing", "standing", "trained"]
    # A busy machine may leave a trial void, but not all of them; none that counts disagrees with the server.
    usable = [trial for trial in acceptance["trials"] if not trial["void"]]
    assert {trial["arm"] for trial in usable} == {"standing", "trained"}, [trial["void"] for trial in acceptance["trials"]]
    for trial in usable:
        assert trial["client"]["tpot_ms"]["mean"] == pytest.approx(1e3 * trial["engine"]["tpot_s"]["mean"], rel=0.05)
    trained = [trial["engine"] for trial in usable if trial["arm"] == "trained"]
    assert all(engine["drafts"] > 0 and engine["requests"] == 6 for engine in trained)
    assert schemas.problems("acceptance", acceptance) == []
    assert acceptance["node"] == "cpu-a" and acceptance["hardware"]["kind"] == "cpu"
    assert [item for item in acceptance["differences"] if not item.get("follows_from_speculation")] == []
    assert acceptance["arms"]["standing"]["resolved"]["version"] == acceptance["arms"]["trained"]["resolved"]["version"]
    assert verdict["tier"] == "DRAFT" and verdict["arms"]["trained"]["acceptance_length"] > 1
    assert "measured on a CPU, where there are no CUDA graphs" in verdict["tier_reasons"] and "DRAFT" in output


def test_nothing_is_left_and_a_rerun_does_no_work(site):
    loop, cluster = site
    left = [key for key, item in cluster.store.objects.items() if (item["metadata"].get("labels") or {}).get("experiment")]
    assert left == []
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(cluster.folder) not in listed, "the servers must be gone"
    assert changed(loop.play("--tags", "validate,report", **settings(loop, cluster))) == 0
