# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the cluster says of an experiment's objects, in words and decisions. Pure; private to the collection."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from .canary_objects import COMPONENT, LABEL
from .errors import SpecDecodeError

Object = dict[str, Any]

#: reasons of a waiting container that waiting longer does not mend
HOPELESS = {
    "ImagePullBackOff": "the image cannot be pulled",
    "InvalidImageName": "the image's name is not valid",
    "ErrImageNeverPull": "the image is not on the node",
    "CreateContainerConfigError": "the container's configuration is refused",
    "CreateContainerError": "the container cannot be made",
    "RunContainerError": "the container cannot be run",
    "CrashLoopBackOff": "the server ends again and again",
}
CODE = re.compile(r'"code":\s*(\d{3})|^\W*(?:Exception \W*)?\(?(\d{3})\)?\s*\W*Reason:', re.MULTILINE)
WORDS = re.compile(r'"message":\s*"((?:[^"\\]|\\.)*)"')
REMEDIES = {
    "401": "The credentials are not taken: mend spec_kubernetes_connection or the kubeconfig.",
    "403": "Ask for the permissions in docs/kubernetes.md, or name what may be used instead.",
    "404": "The namespace must exist beforehand: create it, or set spec_kubernetes_namespace.",
    "409": "Another one changed it at the same time: run the playbook again.",
    "422": "Mend the setting that the message names.",
}


@dataclasses.dataclass
class Look:
    """What one look at a Deployment or a Job showed."""

    name: str
    done: bool = False
    failed: str = ""
    unscheduled: str = ""
    line: str = ""
    pod: str = ""  # whose log tells more


def refusal(message: str) -> Object:
    """An error of the API as ``{code, words, remedy, final}``; ``final`` if asking again cannot help."""
    found = CODE.search(message)
    code = next((group for group in found.groups() if group), "") if found else ""
    said = WORDS.search(message)
    words = said[1].replace('\\"', '"') if said else message.strip()
    final = code.startswith("4") and code not in ("408", "409", "429")
    return {"code": code, "words": words, "remedy": REMEDIES.get(code, ""), "final": final}


def look_at_deployment(name: str, deployments: list[Object], pods: list[Object], events: list[Object]) -> Look:
    """Ready, not yet, or hopeless and why."""
    found = next((item for item in deployments if item["metadata"]["name"] == name), None)
    if found is None:
        return Look(name, failed="it is gone: another one deleted it, as a teardown does")
    status, wanted = found.get("status") or {}, found["spec"].get("replicas", 1)
    mine = [pod for pod in pods if _belongs(pod, found)]
    for condition in status.get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return Look(name, failed=f"no pod may be made: {condition.get('message', '')}")
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return Look(name, failed=f"it did not get ready in time{_said(mine, events)}", pod=_last(mine))
    for pod in mine:
        trouble = pod_trouble(pod)
        if trouble:
            return Look(
                name, failed=f"pod {pod['metadata']['name']}: {trouble}{_said([pod], events)}", pod=pod["metadata"]["name"]
            )
    current = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 1)
    if current and status.get("availableReplicas", 0) == wanted == status.get("replicas", 0) == len(_living(mine)):
        return Look(name, done=True, line="ready" if wanted else "stopped")
    if not wanted:
        return Look(name, line="stopping")
    for pod in mine:
        if why := _unscheduled(pod, events):
            return Look(name, unscheduled=why, line="waits for a node")
    return Look(name, line=_phase(mine), pod=_last(mine))


def look_at_job(name: str, jobs: list[Object], pods: list[Object], events: list[Object]) -> Look:
    """Complete and Failed are both watched for: a failed Job is seen at once."""
    found = next((item for item in jobs if item["metadata"]["name"] == name), None)
    if found is None:
        return Look(name, failed="it is gone: another one deleted it, as a teardown does")
    mine = [pod for pod in pods if _belongs(pod, found)]
    for condition in (found.get("status") or {}).get("conditions") or []:
        if condition["status"] == "True" and condition["type"] in ("Complete", "SuccessCriteriaMet"):
            return Look(name, done=True, line="complete")
        if condition["status"] == "True" and condition["type"] in ("Failed", "FailureTarget"):
            why = f"{condition.get('reason', 'Failed')}: {condition.get('message', '')}{_said(mine, events)}"
            return Look(name, failed=why, pod=_last(mine))
    for pod in mine:
        trouble = pod_trouble(pod)
        if trouble:
            return Look(
                name, failed=f"pod {pod['metadata']['name']}: {trouble}{_said([pod], events)}", pod=pod["metadata"]["name"]
            )
        if why := _unscheduled(pod, events):
            return Look(name, unscheduled=why, line="waits for a node")
    if not mine:
        made = [event for event in events if event["involvedObject"].get("uid") == found["metadata"]["uid"]]
        refused = [event["message"] for event in made if event.get("reason") == "FailedCreate"]
        if refused:
            return Look(name, failed=f"no pod may be made: {refused[-1]}")
    return Look(name, line=_phase(mine))


def pod_trouble(pod: Object) -> str:
    """Why a pod will not get ready by waiting; empty if it may."""
    status = pod.get("status") or {}
    if status.get("phase") == "Failed" and status.get("reason"):
        return f"{status['reason']}: {status.get('message', '')}"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        ended = (container.get("lastState") or {}).get("terminated") or {}
        if container.get("restartCount") and ended:
            return f"the container ended with exit code {ended.get('exitCode')} ({ended.get('reason', '')}) and was started again"
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in HOPELESS:
            return f"{HOPELESS[waiting['reason']]} ({waiting['reason']}: {waiting.get('message', '')})"
    return ""


def arm_pods(pods: list[Object], experiment: str) -> dict[str, list[Object]]:
    """Each arm's living pods as ``{name, uid, node, ip, image_id, restarts}``."""
    found: dict[str, list[Object]] = {}
    for pod in _living(pods):
        own = pod["metadata"].get("labels") or {}
        if own.get(LABEL) != experiment or COMPONENT not in own or _owner(pod).get("kind") != "ReplicaSet":
            continue
        containers = (pod.get("status") or {}).get("containerStatuses") or [{}]
        found.setdefault(own[COMPONENT], []).append(
            {
                "name": pod["metadata"]["name"],
                "uid": pod["metadata"]["uid"],
                "node": pod["spec"].get("nodeName", ""),
                "ip": (pod.get("status") or {}).get("podIP", ""),
                "image_id": containers[0].get("imageID", ""),
                "restarts": sum(container.get("restartCount", 0) for container in containers),
            }
        )
    return {arm: sorted(pods, key=lambda pod: pod["name"]) for arm, pods in sorted(found.items())}


def check_steady(before: dict[str, list[Object]], after: dict[str, list[Object]]) -> dict[str, list[Object]]:
    """The pods that were measured, if they were the same ones from the first trial to the last."""
    for arm, pods in before.items():
        now = {pod["uid"]: pod for pod in after.get(arm, [])}
        for pod in pods:
            if pod["uid"] not in now:
                raise SpecDecodeError(
                    f"Pod {pod['name']} of the {arm} arm was replaced while it was measured"
                    f" (now: {', '.join(p['name'] for p in after.get(arm, [])) or 'none'}).",
                    "It was evicted or deleted; the measurement is void. Run the playbook again.",
                )
            if now[pod["uid"]]["restarts"] != pod["restarts"]:
                raise SpecDecodeError(
                    f"The server in pod {pod['name']} of the {arm} arm was restarted while it was measured.",
                    "The measurement is void. Look at the pod's previous log, then run the playbook again.",
                )
    return before


def labelled(resources: list[Object], experiment: str) -> list[Object]:
    """The experiment's objects; what a controller made goes with its owner, but is named too."""
    return [item for item in resources if (item["metadata"].get("labels") or {}).get(LABEL) == experiment]


def foreign(resources: list[Object], wanted: list[Object], experiment: str) -> list[str]:
    """Whose names the ``wanted`` objects are to have, though they are not the experiment's."""
    names = {(item["kind"], item["metadata"]["name"]) for item in wanted}
    mine = labelled(resources, experiment)
    found = [(item["kind"], item["metadata"]["name"]) for item in resources if item not in mine]
    return [f"{kind} {name}" for kind, name in found if (kind, name) in names]


def inventory(resources: list[Object], experiment: str) -> Object:
    """``{own, others}``: names of the experiment's objects, and identities of everyone else's top objects."""
    mine = labelled(resources, experiment)
    own = [f"{item['kind']} {item['metadata']['name']}" for item in mine]
    others = [
        f"{item['kind']} {item['metadata']['name']} {item['metadata']['uid']}"
        for item in resources if item not in mine and not _owner(item)
    ]  # fmt: skip
    return {"own": sorted(own), "others": sorted(others)}


def check_torn_down(before: Object, after: Object, experiment: str) -> list[str]:
    """Prove a teardown: nothing of the experiment is left, and nobody else's object went with it."""
    if after["own"]:
        raise SpecDecodeError(
            f"After the teardown there is still {', '.join(after['own'])} with the label {LABEL}={experiment}.",
            "A play of this experiment may still be running: stop it, then run the teardown again.",
        )
    vanished = sorted(set(before["others"]) - set(after["others"]))
    if vanished:
        raise SpecDecodeError(
            f"While experiment {experiment} was torn down, objects without its label vanished too: {', '.join(vanished)}.",
            "Teardown deletes by the label alone, so someone else deleted these; make sure of it.",
        )
    return [f"nothing is left with {LABEL}={experiment}", f"{len(after['others'])} other objects are as they were"]


def _owner(item: Object) -> Object:
    return next((owner for owner in item["metadata"].get("ownerReferences") or [] if owner.get("controller")), {})


def _belongs(pod: Object, owner: Object) -> bool:
    """A Job owns its pods, a Deployment the ReplicaSets of its name that own them."""
    found = _owner(pod)
    if found.get("uid") == owner["metadata"]["uid"]:
        return True
    chosen: dict[str, str] = (owner["spec"].get("selector") or {}).get("matchLabels") or {}
    own = pod["metadata"].get("labels") or {}
    return found.get("kind") == "ReplicaSet" and bool(chosen) and all(own.get(key) == value for key, value in chosen.items())


def _living(pods: list[Object]) -> list[Object]:
    return [
        pod for pod in pods
        if not pod["metadata"].get("deletionTimestamp") and (pod.get("status") or {}).get("phase") not in ("Failed", "Succeeded")
    ]  # fmt: skip


def _unscheduled(pod: Object, events: list[Object]) -> str:
    """Why a pod has no node yet; empty if it has one."""
    if pod["spec"].get("nodeName"):
        return ""
    found = _condition(pod, "PodScheduled")
    scheduler = pod["spec"].get("schedulerName", "default-scheduler")
    words = found.get("message") or found.get("reason") or f"the scheduler {scheduler} has said nothing of it"
    return f"{words}{_said([pod], events)}"


def _condition(pod: Object, kind: str) -> Object:
    return next((item for item in (pod.get("status") or {}).get("conditions") or [] if item["type"] == kind), {})


def _last(pods: list[Object]) -> str:
    return str(pods[-1]["metadata"]["name"]) if pods else ""


def _phase(pods: list[Object]) -> str:
    if not pods:
        return "no pod yet"
    pod = pods[-1]
    status = pod.get("status") or {}
    waiting = [
        (container.get("state") or {}).get("waiting", {}).get("reason")
        for container in status.get("containerStatuses") or []
        if (container.get("state") or {}).get("waiting")
    ]
    where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
    return f"{(waiting or [status.get('phase', 'Pending')])[0]}{where}"


def _said(objects: list[Object], events: list[Object]) -> str:
    """The warnings that the cluster recorded about some objects, as the end of a sentence."""
    uids = {item["metadata"]["uid"] for item in objects}
    said = [event["message"] for event in events if event.get("type") == "Warning" and event["involvedObject"].get("uid") in uids]
    return f" Events: {' / '.join(dict.fromkeys(said[-3:]))}" if said else ""
