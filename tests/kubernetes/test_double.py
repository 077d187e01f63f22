# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The double itself: what it returns is what Kubernetes' own schemas describe, and it does what its tests rely on."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import kubernetes_schemas as schemas
import pytest
from api_double import Fault, Refused, merge, wait_until
from cluster_double import Cluster, Image

DEPLOYMENT = {
    "metadata": {"name": "web", "labels": {"experiment": "e"}},
    "spec": {
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "main", "image": "web", "resources": {"requests": {"cpu": "1"}}}]},
        },
    },
}
JOB = {
    "metadata": {"name": "once"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "job"}]}}},
}


def everything(cluster):
    """Objects of every kind in every state that the double knows."""
    cluster.add_node("a")
    cluster.add_quota(pods="9")
    cluster.images.update({"job": Image(exit_code=1), "gone": Image(missing=True)})
    with cluster.store.lock:
        cluster.store.create("deployments", "lab", DEPLOYMENT)
        cluster.store.create("jobs", "lab", JOB)
        cluster.store.create("services", "lab", {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})
    cluster.add_pod("gone", "a", image="gone")
    wait_until(lambda: status(cluster, "jobs", "once").get("failed"), 10, "the job fails")
    wait_until(lambda: status(cluster, "deployments", "web").get("availableReplicas"), 10, "the deployment is available")
    cluster.evict(cluster.pods(app="web")[0])
    wait_until(lambda: status(cluster, "deployments", "web").get("availableReplicas"), 10, "another pod took its place")


def status(cluster, plural, name):
    with cluster.store.lock:
        return dict(cluster.store.get(plural, "lab", name).get("status") or {})


def test_every_object_it_returns_is_valid_in_every_supported_version(cluster):
    everything(cluster)
    with cluster.store.lock:
        kinds = {item["kind"] for item in cluster.store.objects.values()}
        found = {
            f"{version} {item['kind']}": problems for version in schemas.versions() for item in cluster.store.objects.values()
            if (problems := schemas.problems(item, version, strict=True))
        }  # fmt: skip
    assert found == {}
    assert kinds == {"Namespace", "Node", "ResourceQuota", "Deployment", "ReplicaSet", "Pod", "Job", "Service", "Event"}


def ask(cluster, path, method="GET", body=None):
    request = urllib.request.Request(
        cluster.api.url + path, method=method, data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_a_status_is_returned_for_what_it_refuses(cluster):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(cluster, "/apis/apps/v1/namespaces/lab/deployments/none")
    found = json.load(refused.value)
    assert refused.value.code == 404 and found["reason"] == "NotFound"
    assert schemas.problems(found, "1.32") == []


def test_faults(cluster):
    path = "/api/v1/namespaces/lab/configmaps"
    cluster.api.faults += [Fault("POST", "configmaps", done=True), Fault("GET", "configmaps", code=500)]
    with pytest.raises(OSError):
        ask(cluster, path, "POST", {"metadata": {"name": "kept"}})
    with pytest.raises(urllib.error.HTTPError, match="500"):
        ask(cluster, path)
    assert [item["metadata"]["name"] for item in ask(cluster, path)["items"]] == ["kept"]


def test_owners_take_what_they_own_with_them(cluster):
    cluster.add_node("a")
    with cluster.store.lock:
        cluster.store.create("deployments", "lab", DEPLOYMENT)
    wait_until(lambda: cluster.pods(app="web"), 10, "a pod")
    with cluster.store.lock:
        cluster.store.delete("deployments", "lab", "web")
    wait_until(lambda: not cluster.pods(app="web"), 10, "no pod")
    assert cluster.store.select("replicasets") == []


def test_unknown_fields_and_changed_selectors_are_refused(cluster):
    wrong = {"metadata": {"name": "wrong"}, "spec": {**DEPLOYMENT["spec"], "replica": 2}}
    with cluster.store.lock:
        cluster.store.create("deployments", "lab", DEPLOYMENT)
        with pytest.raises(Refused, match="replica.*was unexpected"):
            cluster.store.create("deployments", "lab", wrong)
        with pytest.raises(Refused, match="field is immutable"):
            change = {"spec": {"selector": {"matchLabels": {"app": None, "experiment": "e"}},
                               "template": {"metadata": {"labels": {"experiment": "e"}}}}}  # fmt: skip
            cluster.store.patch("deployments", "lab", "web", change, strategic=True)


def test_clusters_beside_each_other_share_no_address(cluster, tmp_path):
    other = Cluster(tmp_path)
    networks = [network(each) for each in (cluster, other)]
    other.close()
    assert networks[0] != networks[1]


def network(cluster):
    """What the addresses of a Service and of a pod have in common."""
    cluster.add_node("a")
    cluster.add_pod("web", "a")
    with cluster.store.lock:
        service = cluster.store.create("services", "lab", {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})
    wait_until(lambda: cluster.pods()[0].get("status", {}).get("podIP"), 10, "the pod has an address")
    found = {service["spec"]["clusterIP"], cluster.pods()[0]["status"]["podIP"]}
    assert len(found) == 2
    (shared,) = {address.rsplit(".", 2)[0] for address in found}
    return shared


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_cluster_that_failed_says_so_to_whoever_asks(cluster):
    def start(_cluster, _pod):
        raise OSError("no room for another process")

    cluster.images["web"] = Image(process=start)
    cluster.add_node("a")
    cluster.add_pod("web", "a", image="web")
    wait_until(lambda: cluster.store.failure, 10, "the failure is noticed")
    with pytest.raises(urllib.error.HTTPError, match="500") as refused:
        ask(cluster, "/api/v1/namespaces/lab/pods")
    assert "no room for another process" in json.load(refused.value)["message"]


def test_patches():
    old = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["x"], "labels": {"a": "1"}}
    change = {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}], "args": ["y"], "labels": {"a": None}}
    assert merge(old, change, strategic=True) == {
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
        "args": ["y"], "labels": {},
    }  # fmt: skip
    assert merge(old, change, strategic=False)["env"] == change["env"]
