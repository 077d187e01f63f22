# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role canary against the cluster's double: what it makes, measures and takes away, and what may go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.parse

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils.canary_objects import canary_objects
from api_double import Fault, wait_until
from lab import ROOT, SERVER, STAGING, Lab, changed, pretend, printed, said

ABBA = ["standing", "trained", "trained", "standing", "standing", "trained"]


@pytest.fixture
def lab(cluster, tmp_path):
    return Lab(cluster, tmp_path)


def test_side_by_side_with_a_server_that_fails_and_loses_replies(cluster, lab):
    """500s, cut connections and replies lost after the work was done: nothing is made twice, nothing is given up."""
    pretend(cluster)
    cluster.api.faults += [
        Fault("GET", r"/nodes", code=500),
        Fault("POST", r"/deployments", done=True),
        Fault("POST", r"/jobs", code=503),
        Fault("GET", r"/pods\?", code=500, times=2),
        Fault("GET", r"/log"),
        Fault("DELETE", r"/deployments", code=500),
    ]
    output = lab.play(**STAGING)
    assert all(fault.times == 0 for fault in cluster.api.faults)
    assert "side by side" in said(output)
    result = lab.result("acceptance")
    assert [trial["arm"] for trial in result["trials"]] == ABBA
    assert result["node"] == "gpu-a" and result["differences"] == [] and result["design"]["resident"]
    assert result["hardware"] == {
        "kind": "gpu", "name": "NVIDIA-H100-80GB-HBM3", "count": 1, "cpus": 16, "memory_bytes": 64 * 2**30,
    }  # fmt: skip
    assert {arm: [pod["node"] for pod in result["arms"][arm]["pods"]] for arm in result["arms"]} == {
        "standing": ["gpu-a"], "trained": ["gpu-a"],
    }  # fmt: skip
    assert lab.own() == []
    written = list(yaml.safe_load_all((lab.bundle / "deploy/tiny-spec-canary.yaml").read_text()))
    assert [item["kind"] for item in written] == ["PriorityClass", "Deployment", "Service", "Deployment", "Service"]
    assert changed(lab.play(**STAGING)) == 0
    lab.play(role="teardown")
    assert used_rights(cluster.api.requests) <= documented_rights()


def test_what_has_no_draft_stages_none_and_takes_none_away(cluster, lab):
    """Prompt lookup as a candidate, where drafts would be staged."""
    pretend(cluster)
    config = {"method": "ngram", "num_speculative_tokens": 3}
    lab.experiment["documents"]["configs/arms.json"]["arms"][1]["speculative_config"] = config
    (lab.bundle / "results/draft.json").write_text(json.dumps({"method": "ngram", "draft_dir": None, "sha": None}))
    lab.play(**STAGING)
    assert lab.result("acceptance")["arms"]["trained"]["speculative_config"] == config
    lab.play(role="teardown", teardown_draft=True, **STAGING)
    made = [path for method, path in cluster.api.requests if method == "POST" and path.endswith("/jobs")]
    assert len(made) == 1, "the one that measured"


def used_rights(requests):
    """Verb, group and resource of each request as a Role names them, and whether in a namespace; discovery needs none."""
    verbs = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}
    found = set()
    for method, path in requests:
        _api, *parts = urllib.parse.urlsplit(path).path.strip("/").split("/")
        group, rest = ("", parts[1:]) if _api == "api" else (parts[0] if parts else "", parts[2:])
        namespaced = rest[:1] == ["namespaces"]
        plural, name, sub = (*rest[2 if namespaced else 0 :], "", "", "")[:3]
        if plural:
            verb = verbs.get(method, "get" if name else "list")
            found.add((verb, group, f"{plural}/{sub}" if sub else plural, namespaced))
    return found


def documented_rights():
    """What docs/kubernetes.md asks for, in the namespace and cluster-wide."""
    (written,) = re.findall(r"```yaml\n(apiVersion: rbac.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL)
    return {
        (verb, group, resource, role["kind"] == "Role")
        for role in yaml.safe_load_all(written) for rule in role["rules"]
        for verb in rule["verbs"] for group in rule["apiGroups"] for resource in rule["resources"]
    }  # fmt: skip


def test_each_further_k_is_compared_with_the_baseline_on_the_same_node(cluster, lab):
    """A sweep on a node for two: the arm that speculated makes room for the next K, the baseline stays."""
    lab.experiment["documents"]["configs/arms.json"].update(sweep_num_speculative_tokens=[1, 3, 5], aa_trials=1)
    pretend(cluster)
    assert "side by side" in said(lab.play())
    result = lab.result("acceptance")
    assert [trial["arm"] for trial in result["trials"] if trial.get("purpose") != "sweep"] == ABBA
    for name, tokens, first in (("trained-k1", 1, 8), ("trained-k5", 5, 20)):
        own = [(t["arm"], t["pair"]) for t in result["trials"] if t.get("purpose") == "sweep" and first <= t["pair"] < first + 3]
        assert own == [(name if arm == "trained" else arm, first + place // 2) for place, arm in enumerate(ABBA)]
        arm = result["arms"][name]
        assert (arm["sweep"], arm["num_speculative_tokens"], arm["speculative_config"]["num_speculative_tokens"]) == (
            True, tokens, tokens,
        )  # fmt: skip
    assert [len(result["arms"]["standing"][what]) for what in ("pods", "starts_s")] == [1, 1], "it stayed up"
    assert {pod["node"] for arm in result["arms"].values() for pod in arm["pods"]} == {"gpu-a"} and lab.own() == []
    written = list(yaml.safe_load_all((lab.bundle / "deploy/tiny-spec-canary.yaml").read_text()))
    assert "tiny-eagle3-trained-k1" not in [item["metadata"]["name"] for item in written]


def test_one_after_the_other_where_a_node_takes_one_arm(cluster, lab):
    """ABBA with restarts, and after an eviction only what is missing is measured again."""
    pretend(cluster, {"gpu-a": 1})
    evicted = []

    def evict_once(pod):
        text = printed(cluster, pod)
        running = cluster.pods(**{"app.kubernetes.io/component": "standing"})
        if "session-3" in pod["metadata"]["name"] and running and not evicted:
            evicted.append(running[0]["metadata"]["name"])
            cluster.evict(running[0])
        return text

    cluster.images[SERVER].log = evict_once
    output = lab.play(code=2)
    assert f"Pod {evicted[0]} of the standing arm was replaced while it was measured" in said(output)
    assert lab.own() == [] and not (lab.bundle / "results/acceptance.json").exists()
    assert sorted(lab.result("canary")["sessions"]) == ["session-1", "session-2"]
    again = lab.play()
    assert again.count("complete") == 2, "two sessions were measured already"
    result = lab.result("acceptance")
    assert [trial["arm"] for trial in result["trials"]] == ABBA and not result["design"]["resident"]
    assert [len(result["arms"][arm]["starts_s"]) for arm in ("standing", "trained")] == [2, 2] and result["node"] == "gpu-a"


def test_a_restart_of_one_arm_voids_the_measurement(cluster, lab):
    pretend(cluster)

    def crash(pod):
        for server in cluster.pods(**{"app.kubernetes.io/component": "trained"}):
            cluster.crash(server)
        return printed(cluster, pod)

    cluster.images[SERVER].log = crash
    output = said(lab.play(code=2))
    assert "of the trained arm was restarted while it was measured. The measurement is void." in output
    assert lab.own() == [] and not (lab.bundle / "results/acceptance.json").exists()


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        ("image", {}, "tiny-eagle3-standing-.*: the image cannot be pulled .ImagePullBackOff"),
        ("never", {"spec_startup_timeout": 1}, "is not done after 5 s: Running on gpu-a Its log ends with: INFO"),
        ("job", STAGING, "tiny-eagle3-stage-[0-9a-f]{8}: BackoffLimitExceeded: .* Its log ends with:"),
        ("quota", {}, "no pod may be made: Error creating: pods .* exceeded quota: quota, requested: requests.nvidia.com/gpu=1"),
        ("forbidden", {}, 'nodes is forbidden: User \\\\?"tester\\\\?" cannot list resource'),
        ("created", {}, 'deployments is forbidden: User \\\\?"tester\\\\?" cannot create resource'),
        ("namespace", {"spec_kubernetes_namespace": "nowhere"}, 'namespaces \\\\?"nowhere\\\\?" not found'),
        ("room", {**STAGING, "spec_canary_job_resources": {"requests": {"cpu": "1000"}}},
         "stage-.* was given no node within 3 s: 0/1 nodes are available: 1 Insufficient cpu."),
        ("name", {}, "There is already Deployment tiny-eagle3-trained in namespace lab, without the label"),
        ("service", {}, "The Service production of namespace lab selects app.kubernetes.io/managed-by=ansible, which"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_and_leaves_nothing_behind(cluster, lab, fault, settings, words):
    pretend(cluster)
    image = cluster.images[SERVER]
    if fault == "image":
        image.missing = True
    if fault == "never":
        image.ready_after = 3600
    if fault == "job":
        image.exit_code = 1
    if fault == "quota":
        cluster.add_quota(**{"requests.nvidia.com/gpu": "1"})
    if fault == "forbidden":
        cluster.api.forbidden.add(("list", "nodes"))
    if fault == "created":
        cluster.api.forbidden.add(("create", "deployments"))
    if fault == "name":
        add_deployment(cluster, "tiny-eagle3-trained")
    if fault == "service":
        add_service(cluster, "production", {"app.kubernetes.io/managed-by": "ansible"})
    output = said(lab.play(code=2, **settings))
    assert re.search(words, output), output[-3000:]
    if fault in ("name", "service"):
        assert not [path for method, path in cluster.api.requests if method != "GET"]
    assert lab.own() == [] and not (lab.bundle / "results/acceptance.json").exists()


def add_deployment(cluster, name):
    labels = {"app": name}
    with cluster.store.lock:
        cluster.store.create("deployments", "lab", {
            "metadata": {"name": name},
            "spec": {"replicas": 0, "selector": {"matchLabels": labels},
                     "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", "image": "pause"}]}}},
        })  # fmt: skip


def add_service(cluster, name, selector):
    with cluster.store.lock:
        cluster.store.create("services", "lab", {
            "metadata": {"name": name}, "spec": {"selector": selector, "ports": [{"name": "http", "port": 80}]},
        })  # fmt: skip


def test_check_mode_makes_nothing(cluster, lab):
    pretend(cluster)
    output = lab.play("--check")
    assert "side by side" in said(output) and changed(output) > 0
    assert lab.own() == [] and not (lab.bundle / "deploy").exists()
    assert not [path for method, path in cluster.api.requests if method != "GET" and "dryRun=All" not in path]


def test_other_sites_get_the_objects_for_other_hands(cluster, lab):
    lab.experiment["serving"]["server_environment"]["HF_TOKEN"] = "hf_of_somebody"
    lab.experiment["documents"]["configs/arms.json"]["sweep_num_speculative_tokens"] = [1, 5]  # which needs no objects
    lab.play(tasks_from="manifest")
    text = (lab.bundle / "deploy/tiny-spec-canary.yaml").read_text()
    assert "hf_of_somebody" not in text and "tiny-eagle3-secrets" in text and lab.draft["sha"] in text
    assert cluster.api.requests == []
    assert changed(lab.play(tasks_from="manifest")) == 0


def test_teardown_of_one_of_two_while_it_comes_up(cluster, lab, tmp_path):
    """By the label alone: the other experiment and everyone's objects stay as they are; twice is as once."""
    pretend(cluster, {"gpu-a": 8})
    cluster.images[SERVER].ready_after = 3600
    other = Lab(cluster, tmp_path, "tiny-eagle3-other")
    play = subprocess.Popen(
        lab.command(spec_startup_timeout=600), env=lab.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(cluster.pods(experiment=lab.name)) == 2, 60, "the canary comes up")
        with cluster.store.lock:
            settings = yaml.safe_load(OTHER)
            for item in canary_objects({**settings, "experiment": other.name}, [{"name": "trained", "speculative_config": None}]):
                plural = {"PriorityClass": "priorityclasses"}.get(item["kind"], item["kind"].lower() + "s")
                cluster.store.create(plural, item["metadata"].get("namespace", ""), item)
        wait_until(lambda: cluster.pods(experiment=other.name), 10, "the other canary's pod")
        before = other.own()
        cluster.api.faults += [
            Fault("GET", r"/jobs", code=500),
            Fault("DELETE", r"/deployments", done=True),
            Fault("DELETE", r"/services", code=503),
        ]
        output = said(lab.play(role="teardown"))
        assert all(fault.times == 0 for fault in cluster.api.faults)
        assert "nothing is left with experiment=tiny-eagle3" in output and "other objects are as they were" in output
        assert "it is gone: another one deleted it, as a teardown does" in said(play.communicate(timeout=60)[0])
    finally:
        if play.poll() is None:
            os.killpg(play.pid, signal.SIGKILL)
    assert lab.own() == [] and other.own() == before and len(before) == 5
    assert changed(lab.play(role="teardown")) == 0


def kill_once_it_serves(cluster, lab, **settings):
    cluster.images[SERVER].ready_after = 3600
    play = subprocess.Popen(lab.command(**settings), env=lab.environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: cluster.pods(experiment=lab.name), 60, "the canary comes up")
    os.killpg(play.pid, signal.SIGKILL)
    play.wait()
    assert lab.own()
    cluster.images[SERVER].ready_after = 0.2


def test_a_killed_play_leaves_nothing_that_teardown_does_not_find(cluster, lab):
    """Even where Slurm does not answer, and to someone who may not see monitors."""
    pretend(cluster)
    kill_once_it_serves(cluster, lab)
    cluster.api.forbidden |= {("list", "podmonitors"), ("list", "servicemonitors")}
    jobs = lab.bundle / "jobs"
    jobs.write_text("no folder: jobs cannot be looked up")
    lab.play(role="teardown", code=2)
    assert lab.own() == []
    jobs.unlink()
    lab.play(role="teardown", teardown_draft=True, **STAGING)
    assert lab.own() == []
    removed = [path for method, path in cluster.api.requests if method == "POST" and path.endswith("/jobs")]
    assert removed, "the draft is taken from the volume by a job"


def test_nothing_of_a_killed_play_is_served_with(cluster, lab):
    """What a merge would leave as it was: an item of a list that is not asked for any more."""
    pretend(cluster)
    kill_once_it_serves(cluster, lab, spec_canary_secrets={"HF_TOKEN": {"name": "hugging-face", "key": "token"}})
    served = []

    def look(pod):
        served.extend(json.dumps(item["spec"]) for item in cluster.store.select("deployments", "lab"))
        return printed(cluster, pod)

    cluster.images[SERVER].log = look
    lab.play()
    assert served and not [text for text in served if "HF_TOKEN" in text]
    assert lab.own() == []


OTHER = """
{model: tiny, namespace: lab, image: pause, image_pull_secrets: [], command: [vllm, serve], replicas: 1, gpus: 1,
 gpu_resource: nvidia.com/gpu, resources: {}, shared_memory: 1Gi, models: {path: /models, source: {emptyDir: {}}},
 target_path: /m, cache: {}, secrets: {}, node_selector: {}, tolerations: [], scheduler: "", annotations: {},
 priority_class: "", run_as: 1000, read_only_root: true, monitor: "", startup_timeout_s: 60, schedule_timeout_s: 60,
 server_arguments: [], server_environment: {}}
"""
