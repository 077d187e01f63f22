# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rest of a cluster around the API double: scheduler, controllers, kubelets. See README.md for what it does not prove."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils.canary_placement import quantity, requests
from api_double import ApiDouble, Refused, Store, now
from network_double import Network
from runtime_double import Process, Proxy

Object = dict[str, Any]

GPU = "nvidia.com/gpu"


@dataclasses.dataclass
class Image:
    """What a container of some image does: a pretence, unless ``process`` says how to run it for real."""

    ready_after: float = 0.2
    #: of a Job's container, which ends well without one; a server that has one crashes
    exit_code: int | None = None
    #: what a pod's container prints
    log: Callable[[Object], str] = lambda pod: "nothing was said"
    missing: bool = False
    process: Any = None  # a function of a pod and a folder that returns a Process


class Cluster:
    """One namespace ``lab`` and the nodes that a test names."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._network = Network()
        self.store = Store(self._network.address)
        self.images: dict[str, Image] = {}
        self.claims: dict[str, pathlib.Path] = {}
        self._started: dict[str, float] = {}
        self._processes: dict[str, Process] = {}
        self._proxies: dict[str, Proxy] = {}
        self.api = ApiDouble(self.store, self._log)
        for name in ("default", "lab"):
            self.store.create("namespaces", "", {"metadata": {"name": name}})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        for process in self._processes.values():
            process.stop(5)
        for proxy in self._proxies.values():
            proxy.close()
        self.api.close()
        self._network.close()

    # What a test does

    def kubeconfig(self) -> pathlib.Path:
        path = self.folder / "kubeconfig"
        path.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self.api.url}}],
            "users": [{"name": "tester", "user": {"token": "not-a-secret"}}],
            "contexts": [{"name": "double", "context": {"cluster": "double", "user": "tester", "namespace": "lab"}}],
        }))  # fmt: skip
        return path

    def add_node(self, name: str, gpus: int = 0, cpu: str = "16", taints: list[Object] | None = None, **labels: str) -> None:
        resources = {"cpu": cpu, "memory": "64Gi", "pods": "110", **({GPU: str(gpus)} if gpus else {})}
        with self.store.lock:
            self.store.create("nodes", "", {
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}},
                "spec": {"taints": taints} if taints else {},
                "status": {"capacity": resources, "allocatable": resources,
                           "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now()}],
                           "nodeInfo": _node_info()},
            })  # fmt: skip

    def add_quota(self, **hard: str) -> None:
        with self.store.lock:
            self.store.create("resourcequotas", "lab", {
                "metadata": {"name": "quota"}, "spec": {"hard": {key.replace("__", "."): value for key, value in hard.items()}},
            })  # fmt: skip

    def add_pod(self, name: str, node: str, image: str = "other", gpus: int = 0, **labels: str) -> Object:
        """Somebody else's pod."""
        limits = {"resources": {"requests": {GPU: str(gpus)}, "limits": {GPU: str(gpus)}}} if gpus else {}
        with self.store.lock:
            return self.store.create("pods", "lab", {
                "metadata": {"name": name, "labels": labels},
                "spec": {"nodeName": node, "containers": [{"name": "main", "image": image, **limits}]},
            })  # fmt: skip

    def evict(self, pod: Object) -> None:
        """As the kubelet under pressure does: the pod fails, its controller makes another one."""
        with self.store.lock:
            self._end(pod["metadata"]["uid"])
            self.store.set_status(pod, "pods", {
                **pod["status"], "phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory.",
            })  # fmt: skip

    def crash(self, pod: Object) -> None:
        """The container dies and the kubelet starts it anew in the same pod."""
        uid = pod["metadata"]["uid"]
        with self.store.lock:
            self._end(uid)
            self._started.pop(uid, None)
            status = copy.deepcopy(pod["status"])
            status["containerStatuses"][0].update(
                restartCount=status["containerStatuses"][0]["restartCount"] + 1, ready=False, state={"running": {}},
                lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            )  # fmt: skip
            self.store.set_status(pod, "pods", status)

    def pods(self, **labels: str) -> list[Object]:
        """Pods that run or will."""
        wanted = ",".join(f"{key}={value}" for key, value in labels.items())
        with self.store.lock:
            return [
                pod for pod in self.store.select("pods", "lab", wanted)
                if (pod.get("status") or {}).get("phase", "Pending") in ("Pending", "Running")
                and not pod["metadata"].get("deletionTimestamp")
            ]  # fmt: skip

    # What the cluster does

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.05):
                self._turn()
        except Exception as error:
            # Without this a play would wait its whole time limit for a cluster that does nothing any more.
            self.store.failure = repr(error)
            raise

    def _turn(self) -> None:
        with self.store.lock:
            for deployment in self.store.select("deployments"):
                self._deployment(deployment)
            for replica_set in self.store.select("replicasets"):
                self._replica_set(replica_set)
            for job in self.store.select("jobs"):
                self._job(job)
            for pod in self.store.select("pods"):
                self._pod(pod)
            self._services()

    def _owned(self, plural: str, owner: Object) -> list[Object]:
        uid = owner["metadata"]["uid"]
        return [
            item for item in self.store.select(plural, owner["metadata"]["namespace"])
            if any(reference["uid"] == uid for reference in item["metadata"].get("ownerReferences") or [])
        ]  # fmt: skip

    def _make(self, plural: str, owner: Object, item: Object) -> Object | None:
        """Create what a controller owns; a refusal is an event, as with the real ones."""
        meta = owner["metadata"]
        item["metadata"]["ownerReferences"] = [
            {
                "apiVersion": owner["apiVersion"],
                "kind": owner["kind"],
                "name": meta["name"],
                "uid": meta["uid"],
                "controller": True,
            }
        ]
        try:
            if plural == "pods":
                self._admit(item, meta["namespace"])
            return self.store.create(plural, meta["namespace"], item)
        except Refused as refused:
            self.store.event(owner, "FailedCreate", f"Error creating: {refused}")
            return None

    def _admit(self, pod: Object, namespace: str) -> None:
        """Quotas and priority classes, as admission checks them."""
        spec = pod["spec"]
        name = spec.get("priorityClassName")
        if name and ("priorityclasses", "", name) not in self.store.objects:
            raise Refused(403, "Forbidden", f"pods is forbidden: no PriorityClass with name {name} was found")
        for quota in self.store.select("resourcequotas", namespace):
            for key, limit in quota["spec"]["hard"].items():
                what = key.removeprefix("requests.")
                asked = requests(pod).get(what, quantity(0))
                used = sum(requests(item).get(what, 0) for item in self.pods())
                if asked and asked + used > quantity(limit):
                    raise Refused(403, "Forbidden", f'pods "{spec["containers"][0]["name"]}" is forbidden: exceeded quota: quota,'
                                  f" requested: {key}={asked}, used: {key}={used}, limited: {key}={limit}")  # fmt: skip

    def _deployment(self, deployment: Object) -> None:
        meta, spec = deployment["metadata"], deployment["spec"]
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:9]
        sets = self._owned("replicasets", deployment)
        current = next((item for item in sets if item["metadata"]["name"].endswith(digest)), None)
        for item in sets:  # Recreate: the old pods go first
            if item is not current:
                item["spec"]["replicas"] = 0
                if not self._owned("pods", item):
                    self.store.delete("replicasets", meta["namespace"], item["metadata"]["name"])
        if current is None:
            template = copy.deepcopy(spec["template"])
            current = self._make("replicasets", deployment, {
                "metadata": {"name": f"{meta['name']}-{digest}", "labels": template["metadata"]["labels"]},
                "spec": {"replicas": 0, "selector": copy.deepcopy(spec["selector"]), "template": template},
            })  # fmt: skip
        if current is None:
            return
        if len(sets) <= 1:
            current["spec"]["replicas"] = spec["replicas"]
        status = current.get("status") or {}
        ready = status.get("readyReplicas", 0)
        enough = ready >= spec["replicas"]
        conditions = [
            {"type": "Available", "status": str(enough), "reason": f"MinimumReplicas{'A' if enough else 'Una'}vailable"}
        ]
        conditions += [item for item in status.get("conditions", []) if item["type"] == "ReplicaFailure"]
        self.store.set_status(deployment, "deployments", {
            "observedGeneration": meta["generation"], "replicas": status.get("replicas", 0), "readyReplicas": ready,
            "availableReplicas": ready, "updatedReplicas": status.get("replicas", 0), "conditions": conditions,
        })  # fmt: skip

    def _replica_set(self, replica_set: Object) -> None:
        spec = replica_set["spec"]
        pods = [pod for pod in self._owned("pods", replica_set) if not pod["metadata"].get("deletionTimestamp")]
        living = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded")]
        failure = []
        for _number in range(len(living), spec["replicas"]):
            template = copy.deepcopy(spec["template"])
            made = self._make("pods", replica_set, {
                "metadata": {"generateName": f"{replica_set['metadata']['name']}-", **template["metadata"]},
                "spec": template["spec"],
            })  # fmt: skip
            if made is None:
                said = self.store.select("events", replica_set["metadata"]["namespace"])[-1]["message"]
                failure = [{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": said}]
        for pod in living[spec["replicas"] :]:
            self.store.delete("pods", pod["metadata"]["namespace"], pod["metadata"]["name"])
        ready = sum(_ready(pod) for pod in living)
        self.store.set_status(replica_set, "replicasets", {
            "replicas": len(living), "readyReplicas": ready, "availableReplicas": ready, "conditions": failure,
        })  # fmt: skip

    def _job(self, job: Object) -> None:
        status = job.get("status") or {}
        if any(condition["status"] == "True" for condition in status.get("conditions") or []):
            return
        pods = self._owned("pods", job)
        if not pods:
            template = copy.deepcopy(job["spec"]["template"])
            self._make("pods", job, {
                "metadata": {"generateName": f"{job['metadata']['name']}-", **template.get("metadata", {})},
                "spec": template["spec"],
            })  # fmt: skip
            return
        phase = (pods[0].get("status") or {}).get("phase")
        found: Object = {"active": 1}
        if phase == "Succeeded":
            found = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
        elif phase == "Failed":
            found = {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded",
                                                  "message": "Job has reached the specified backoff limit"}]}  # fmt: skip
        self.store.set_status(job, "jobs", found)

    def _pod(self, pod: Object) -> None:
        meta, spec = pod["metadata"], pod["spec"]
        uid, status = meta["uid"], pod.get("status") or {}
        if meta.get("deletionTimestamp"):
            self._end(uid)
            return self.store.drop("pods", pod)
        if status.get("phase") in ("Failed", "Succeeded"):
            return None
        if not spec.get("nodeName") and (spec["schedulerName"] != "default-scheduler" or not self._schedule(pod)):
            return None
        container = spec["containers"][0]
        image = self.images.get(container["image"], Image())
        base = {"phase": "Pending", **status, "hostIP": "127.0.0.1"}
        scheduled = {"type": "PodScheduled", "status": "True"}
        if image.missing:
            message = f'Back-off pulling image "{container["image"]}": ErrImagePull: not found'
            self.store.event(pod, "Failed", f'Failed to pull image "{container["image"]}": not found')
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
            return self._set(pod, base, [scheduled, {"type": "Ready", "status": "False"}], waiting, False)
        if uid not in self._started:
            self._started[uid] = time.monotonic()
            base.setdefault("podIP", self._network.address())
            if image.process:
                self._processes[uid] = image.process(self, {**pod, "status": base})
        code = self._exit_code(pod, image)
        if code is not None:
            ended = {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}}
            if spec["restartPolicy"] == "Never":
                base["phase"] = "Succeeded" if code == 0 else "Failed"
                return self._set(pod, base, [scheduled], ended, False)
            self._end(uid, forget=True)
            self._set(pod, base, [scheduled], {"waiting": {"reason": "CrashLoopBackOff"}}, False)
            pod["status"]["containerStatuses"][0]["restartCount"] += 1
            pod["status"]["containerStatuses"][0]["lastState"] = ended
            return None
        process = self._processes.get(uid)
        ready = process.ready() if process else time.monotonic() - self._started[uid] >= image.ready_after
        base["phase"] = "Running"
        return self._set(pod, base, [scheduled, {"type": "Ready", "status": str(bool(ready))}], {"running": {}}, bool(ready))

    def _set(self, pod: Object, base: Object, conditions: list[Object], state: Object, ready: bool) -> None:
        known = ((pod.get("status") or {}).get("containerStatuses") or [{}])[0]
        container = pod["spec"]["containers"][0]
        self.store.set_status(pod, "pods", {**base, "conditions": conditions, "containerStatuses": [{
            "restartCount": 0, **known, "name": container["name"], "image": container["image"],
            "imageID": f"{container['image']}@sha256:{hashlib.sha256(container['image'].encode()).hexdigest()}",
            "ready": ready, "state": state,
        }]})  # fmt: skip

    def _exit_code(self, pod: Object, image: Image) -> int | None:
        process = self._processes.get(pod["metadata"]["uid"])
        if process:
            return process.exit_code()
        late = time.monotonic() - self._started[pod["metadata"]["uid"]] >= image.ready_after
        if pod["spec"]["restartPolicy"] == "Never":
            return (image.exit_code or 0) if late else None
        return image.exit_code if late else None

    def _schedule(self, pod: Object) -> bool:
        """Selectors, taints and room, as the default scheduler."""
        spec, why = pod["spec"], {}
        for node in self.store.select("nodes"):
            name = node["metadata"]["name"]
            if not (spec.get("nodeSelector") or {}).items() <= node["metadata"]["labels"].items():
                why[name] = "didn't match Pod's node affinity/selector"
                continue
            taints = [t for t in node["spec"].get("taints") or [] if not any(
                t["key"] == o.get("key") and (o.get("operator") == "Exists" or o.get("value") == t.get("value"))
                for o in spec.get("tolerations") or [])]  # fmt: skip
            if taints:
                why[name] = f"had untolerated taint {{{taints[0]['key']}: {taints[0].get('value', '')}}}"
                continue
            there = [requests(p) for p in self.pods() if p["spec"].get("nodeName") == name]
            room = node["status"]["allocatable"]
            lacking = [
                key for key, value in requests(pod).items()
                if value and value + sum(used.get(key, 0) for used in there) > quantity(room.get(key, 0))
            ]  # fmt: skip
            if lacking:
                why[name] = f"Insufficient {lacking[0]}"
                continue
            spec["nodeName"] = name
            return True
        total = len(self.store.select("nodes"))
        message = f"0/{total} nodes are available: {', '.join(f'1 {words}' for words in why.values())}."
        self.store.event(pod, "FailedScheduling", message)
        self.store.set_status(pod, "pods", {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]})  # fmt: skip
        return False

    def _services(self) -> None:
        """A Service's address leads to its ready pods, where there is something real to lead to."""
        if not self._processes:
            return
        wanted = {}
        for service in self.store.select("services"):
            meta, spec = service["metadata"], service["spec"]
            chosen = [pod for pod in self.pods(**spec.get("selector", {})) if _ready(pod)]
            wanted[meta["uid"]] = [self._address(pod, 8000) for pod in chosen]
            if meta["uid"] not in self._proxies:
                self._proxies[meta["uid"]] = Proxy(spec["clusterIP"], spec["ports"][0]["port"])
            self._proxies[meta["uid"]].direct(wanted[meta["uid"]])
        for uid in set(self._proxies) - set(wanted):
            self._proxies.pop(uid).close()

    def _address(self, pod: Object, port: int) -> tuple[str, int]:
        return pod["status"]["podIP"], port

    def _log(self, pod: Object) -> str:
        image = self.images.get(pod["spec"]["containers"][0]["image"], Image())
        path = self.folder / "pods" / pod["metadata"]["uid"] / "log"
        return path.read_text(errors="replace") if path.exists() else image.log(pod)

    def _end(self, uid: str, forget: bool = False) -> None:
        process = self._processes.pop(uid, None)
        if process:
            process.stop(10)
        if forget:
            self._started.pop(uid, None)


def _ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def _node_info() -> Object:
    names = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion", "kubeletVersion",
             "kubeProxyVersion", "operatingSystem")  # fmt: skip
    return {**dict.fromkeys(names, "double"), "architecture": "amd64"}
