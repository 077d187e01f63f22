# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The Kubernetes objects of an experiment: its arms, its jobs, its priority. Pure; private to the collection.

Every object carries the label ``experiment``, by which alone teardown finds it. Values of users reach the
objects as data and YAML only through a serializer.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from .arms import most_prompts
from .errors import SpecDecodeError
from .files import sha256_text
from .user_input import SECRET, SECRET_FLAG

Object = dict[str, Any]

LABEL = "experiment"
INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
PORT = 8000
#: longest name of an object: what Kubernetes appends to it for pods must still make a label
NAME_LIMIT = 52
#: largest content of a ConfigMap, with room for its metadata below the 1 MiB that the API server takes
CONFIG_MAP_BYTES = 1_000_000
#: below every pod that names no class, so that anything may take the canary's place and nothing is ever started for it
PRIORITY = -100
ENGINE_PROGRAMS = ("arm_servers.py", "dflash_vllm_eval.py", "engine_log.py", "measure_arms.py", "measure_canary.py")
STAGING_PROGRAMS = ("stage_files.py",)


def object_name(experiment: str, part: str) -> str:
    """``<experiment>-<part>`` as a DNS label; a long experiment's name ends in its checksum."""
    # Services must not begin with a digit.
    stem = experiment if experiment[0].isalpha() else f"x{experiment}"
    name = f"{stem}-{part}"
    if len(name) <= NAME_LIMIT:
        return name
    room = NAME_LIMIT - len(part) - 8
    return f"{stem[:room].rstrip('-')}-{sha256_text(experiment)[:6]}-{part}"


def labels(experiment: str, part: str) -> dict[str, str]:
    return {
        LABEL: experiment,
        # Not vllm: by that label Services select what serves in production, and the canary would answer for it.
        "app.kubernetes.io/name": "spec-decode-canary",
        INSTANCE: object_name(experiment, part),
        COMPONENT: part,
        "app.kubernetes.io/part-of": "spec-decode",
        "app.kubernetes.io/managed-by": "ansible",
    }


def selector(experiment: str, part: str) -> dict[str, str]:
    return {LABEL: experiment, COMPONENT: part}


def canary_objects(canary: Object, arms: list[Object], placement: Object | None = None) -> list[Object]:
    """Everything that serves the arms: Deployments and Services, monitors where asked, the priority class where owned.

    ``canary`` are the settings, ``arms`` the served arms with their speculative config, the draft's path filled in,
    ``placement`` the node that was found idle; without one the scheduler chooses.
    """
    _refuse_secrets(canary)
    made = [] if canary["priority_class"] else [priority_class(canary)]
    for arm in arms:
        made += [deployment(canary, arm, placement), service(canary, arm)]
        if canary["monitor"]:
            made.append(monitor(canary, arm))
    return made


def by_hand(canary: Object) -> Object:
    """The settings for objects that someone applies by hand later: what looks like a secret is expected in a Secret."""
    secrets = object_name(canary["experiment"], "secrets")
    named = [key for key in canary["server_environment"] if SECRET.search(str(key))]
    flags = [flag for flag in canary["server_arguments"] if SECRET_FLAG.match(str(flag))]
    expected = {key: {"name": secrets, "key": key} for key in [*named, *(["VLLM_API_KEY"] if flags else [])]}
    return {
        **canary,
        "server_environment": {key: value for key, value in canary["server_environment"].items() if key not in named},
        "server_arguments": [flag for flag in canary["server_arguments"] if flag not in flags],
        "secrets": {**expected, **canary["secrets"]},
    }


def canary_yaml(objects: list[Object]) -> str:
    """The objects as one YAML text of several documents."""
    import yaml

    # By way of JSON: inside Ansible these are its own kinds of list and text, which YAML's serializer refuses.
    return yaml.safe_dump_all(json.loads(json.dumps(objects)), sort_keys=False, explicit_start=True, width=120)


def priority_name(canary: Object) -> str:
    return canary["priority_class"] or object_name(canary["experiment"], "canary")


def priority_class(canary: Object) -> Object:
    """Never preempts, and is below everything that names no class."""
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": priority_name(canary), "labels": labels(canary["experiment"], "canary")},
        "value": PRIORITY,
        "preemptionPolicy": "Never",
        "globalDefault": False,
        "description": "A measurement of speculative decoding: takes idle nodes only and gives way to everything.",
    }


def check_priority_class(found: Object | None, canary: Object) -> None:
    """Refuse a class that another one owns, or that may preempt."""
    name = priority_name(canary)
    if not canary["priority_class"]:
        if found and (found["metadata"].get("labels") or {}).get(LABEL) != canary["experiment"]:
            raise SpecDecodeError(
                f"There is a PriorityClass {name} already, and it does not carry the label {LABEL}={canary['experiment']}.",
                "Name a class that never preempts with spec_canary_priority_class.",
            )
        return
    if not found:
        raise SpecDecodeError(
            f"There is no PriorityClass {name}.", "Create it, or leave spec_canary_priority_class empty to have one made."
        )
    if found.get("preemptionPolicy") != "Never":
        raise SpecDecodeError(
            f"The PriorityClass {name} has preemptionPolicy {found.get('preemptionPolicy', 'PreemptLowerPriority')};"
            " the canary must never preempt.",
            "Name one with preemptionPolicy: Never.",
        )


def deployment(canary: Object, arm: Object, placement: Object | None) -> Object:
    """One arm's server."""
    experiment, part = canary["experiment"], arm["name"]
    pod = _pod(canary, placement)
    pod["containers"] = [_server(canary, arm)]
    pod["volumes"] = [
        {"name": "models", **_read_only(canary["models"]["source"])},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": canary["shared_memory"]}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", **(canary["cache"] or {"emptyDir": {}})},
    ]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(canary, part),
        "spec": {
            "replicas": arm["replicas"] if "replicas" in arm else canary["replicas"],
            "revisionHistoryLimit": 0,
            # Two pods of one arm at once would need a second set of GPUs.
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": canary["startup_timeout_s"] + canary["schedule_timeout_s"] + 60,
            "selector": {"matchLabels": selector(experiment, part)},
            "template": {
                "metadata": {
                    "labels": labels(experiment, part),
                    **({"annotations": canary["annotations"]} if canary["annotations"] else {}),
                },
                "spec": pod,
            },
        },
    }


def service(canary: Object, arm: Object) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(canary, arm["name"]),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(canary["experiment"], arm["name"]),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def monitor(canary: Object, arm: Object) -> Object:
    """A PodMonitor or a ServiceMonitor of the Prometheus operator."""
    kind = canary["monitor"]
    endpoints = {"PodMonitor": "podMetricsEndpoints", "ServiceMonitor": "endpoints"}
    if kind not in endpoints:
        raise SpecDecodeError(
            f"The monitor {kind!r} is not known.", f"Set spec_canary_monitor to one of {', '.join(endpoints)}, or leave it empty."
        )
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": kind,
        "metadata": _metadata(canary, arm["name"]),
        "spec": {
            "selector": {"matchLabels": selector(canary["experiment"], arm["name"])},
            endpoints[kind]: [{"port": "http", "path": "/metrics", "interval": "15s"}],
        },
    }


def staging_objects(canary: Object, sources: list[Object], programs: dict[str, str], remove: bool = False) -> list[Object]:
    """A Job that copies folders to the serving volume under their checksums (or takes them away), and its programs.

    Each of ``sources`` is ``{source, destination, sha}`` with paths as the pod sees them.
    """
    part = "unstage" if remove else "stage"
    plan = json.dumps({"remove": remove, "folders": sources}, indent=2, sort_keys=True)
    volumes = {"models": canary["models"]} if remove or not canary["source"] else {
        "models": canary["models"], "source": canary["source"],
    }  # fmt: skip
    command = ["python3", f"{_PROGRAMS}/stage_files.py", "--plan", f"{_PROGRAMS}/plan.json"]
    return _job(canary, part, command, {**_with_library(programs, STAGING_PROGRAMS), "plan.json": plan}, volumes, None)


def measuring_objects(canary: Object, part: str, plan: Object, prompts: str, programs: dict[str, str]) -> list[Object]:
    """A Job that measures running arms from inside the cluster and prints the result, and its programs and prompts."""
    name = f"prompts{os.path.splitext(plan['prompts']['path'])[1]}"
    inside = {**plan, "prompts": {**plan["prompts"], "path": f"{_PROGRAMS}/{name}"}}
    if name != "prompts.json":  # a row a line
        prompts = "".join(prompts.splitlines(keepends=True)[: most_prompts(plan)])
    files = {
        **_with_library(programs, ENGINE_PROGRAMS),
        "plan.json": json.dumps(inside, indent=2, sort_keys=True),
        name: prompts,
    }
    command = [
        "python3",
        f"{_PROGRAMS}/measure_canary.py",
        "--plan",
        f"{_PROGRAMS}/plan.json",
        "--out",
        "/tmp/measure/acceptance.json",
        "--print",
    ]
    return _job(canary, part, command, files, {}, canary["startup_timeout_s"])


_PROGRAMS = "/spec-decode"


def _with_library(programs: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: text for name, text in programs.items() if name in names or name.startswith("spec_decode/")}


def _job(
    canary: Object, part: str, command: list[str], files: dict[str, str], volumes: Object, grace_s: int | None
) -> list[Object]:
    """A Job in the vLLM image, which has a Python with all that the programs need, and its ConfigMap."""
    experiment = canary["experiment"]
    config, items = _config_map(canary, part, files)
    pod = _pod(canary, None)
    pod["restartPolicy"] = "Never"
    pod["containers"] = [
        {
            "name": part,
            "image": canary["image"],
            "command": command,
            # A server that asks for a key asks the client for it too.
            "env": [{"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}, *_home(), *_secrets(canary, ("VLLM_API_KEY",))],
            "resources": canary["job_resources"],
            "securityContext": _container_security(canary),
            "volumeMounts": [
                {"name": "programs", "mountPath": _PROGRAMS, "readOnly": True},
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": "cache", "mountPath": "/cache"},
                *({"name": name, "mountPath": volume["path"], **({} if name == "models" else {"readOnly": True})}
                  for name, volume in volumes.items()),
            ],
        }
    ]  # fmt: skip
    programs: Object = {"name": "programs", "configMap": {"name": config["metadata"]["name"], "items": items}}
    pod["volumes"] = [
        programs,
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
        *({"name": name, **volume["source"]} for name, volume in volumes.items()),
    ]
    job: Object = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(canary, part),
        "spec": {
            # A second try is the role's decision, which sees why the first one failed.
            "backoffLimit": 0,
            "activeDeadlineSeconds": canary["job_timeout_s"] + (grace_s or 0),
            "template": {"metadata": {"labels": labels(experiment, part)}, "spec": pod},
        },
    }
    # A Job cannot be changed: its content is in its name, so that another content is another Job.
    digest = sha256_text(json.dumps([config, job], sort_keys=True))[:8]
    name = object_name(experiment, f"{part}-{digest}")
    for labelled in (config, job, job["spec"]["template"]):
        labelled["metadata"]["labels"] = {**labels(experiment, part), INSTANCE: name}
    config["metadata"]["name"] = job["metadata"]["name"] = programs["configMap"]["name"] = name
    return [config, job]


def _config_map(canary: Object, part: str, files: dict[str, str]) -> tuple[Object, list[dict[str, str]]]:
    """The files as a ConfigMap, and where each of them is mounted: keys hold no slashes."""
    size = sum(len(text.encode()) for text in files.values())
    if size > CONFIG_MAP_BYTES:
        raise SpecDecodeError(
            f"The programs and prompts of the {part} job are {size} bytes; a ConfigMap takes {CONFIG_MAP_BYTES}.",
            "Measure with fewer prompts (spec_prompts).",
        )
    keys = {path: path.replace("/", "..") for path in sorted(files)}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(canary, part),
        "data": {keys[path]: files[path] for path in sorted(files)},
    }
    return config, [{"key": key, "path": path} for path, key in keys.items()]


def _metadata(canary: Object, part: str) -> Object:
    return {
        "name": object_name(canary["experiment"], part),
        "namespace": canary["namespace"],
        "labels": labels(canary["experiment"], part),
    }


def _pod(canary: Object, placement: Object | None) -> Object:
    """What all pods have in common: where they may run, and what they may not do."""
    pod: Object = {
        "priorityClassName": priority_name(canary),
        # Otherwise Services' variables, such as VLLM_PORT of a Service called vllm, would configure the server.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 30,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": canary["run_as"],
            "runAsGroup": canary["run_as"],
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    asked = {
        "schedulerName": canary["scheduler"],
        "tolerations": canary["tolerations"],
        "imagePullSecrets": [{"name": name} for name in canary["image_pull_secrets"]],
    }
    pod.update({key: value for key, value in asked.items() if value})
    wanted = dict(canary["node_selector"])
    if placement:
        # By a selector and not by spec.nodeName, which would go past the scheduler and its accounts.
        wanted["kubernetes.io/hostname"] = placement["hostname"]
    if wanted:
        pod["nodeSelector"] = wanted
    return pod


def _server(canary: Object, arm: Object) -> Object:
    arguments = [
        canary["target_path"], "--served-model-name", canary["model"], "--host", "0.0.0.0", "--port", str(PORT),
        *map(str, canary["server_arguments"]),
    ]  # fmt: skip
    if arm.get("speculative_config"):
        arguments += ["--speculative-config", json.dumps(arm["speculative_config"], sort_keys=True)]
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    period = 10 if canary["startup_timeout_s"] >= 60 else 1
    return {
        "name": "vllm",
        "image": canary["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": list(canary["command"]),
        "args": arguments,
        "env": _environment(canary),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        # Compiling and capturing graphs takes its time. No liveness probe: under load a slow answer is no death,
        # and a restart would void the measurement.
        "startupProbe": {
            **health,
            "periodSeconds": period,
            "failureThreshold": max(1, math.ceil(canary["startup_timeout_s"] / period)),
        },
        "readinessProbe": {**health, "periodSeconds": min(5, period), "failureThreshold": 3},
        "resources": _resources(canary),
        "securityContext": _container_security(canary),
        "volumeMounts": [
            {"name": "models", "mountPath": canary["models"]["path"], "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": "/cache"},
        ],
    }


def _environment(canary: Object) -> list[Object]:
    plain = {
        "VLLM_SERVER_DEV_MODE": "1",  # the server tells its resolved configuration
        "HF_HOME": "/cache/huggingface",
        **{str(key): str(value) for key, value in canary["server_environment"].items()},
    }
    return [
        *_home(),
        *({"name": name, "value": value} for name, value in sorted(plain.items())),
        *_secrets(canary, tuple(canary["secrets"])),
    ]


def _secrets(canary: Object, names: tuple[str, ...]) -> list[Object]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": where["name"], "key": where["key"]}}}
        for name, where in sorted(canary["secrets"].items())
        if name in names
    ]


def _home() -> list[Object]:
    # The user has no entry in the image's password file, and everything else of the image is read-only.
    return [{"name": "HOME", "value": "/cache"}, {"name": "USER", "value": "vllm"}]


def _resources(canary: Object) -> Object:
    found: dict[str, Object] = {key: dict(value) for key, value in canary["resources"].items()}
    if canary["gpus"]:
        for section in ("requests", "limits"):
            found.setdefault(section, {})[canary["gpu_resource"]] = str(canary["gpus"])
    return found


def _container_security(canary: Object) -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": canary["read_only_root"],
        "capabilities": {"drop": ["ALL"]},
    }


def _read_only(source: Object) -> Object:
    claim = source.get("persistentVolumeClaim")
    return {"persistentVolumeClaim": {**claim, "readOnly": True}} if claim else source


def _refuse_secrets(canary: Object) -> None:
    named = [key for key in canary["server_environment"] if SECRET.search(str(key))]
    flags = [str(flag).partition("=")[0] for flag in canary["server_arguments"] if SECRET_FLAG.match(str(flag))]
    if named or flags:
        raise SpecDecodeError(
            f"{(named + flags)[0]} would stand in the Deployment for everyone to read.",
            "Put it into a Secret and name that in spec_canary_secrets: {VARIABLE: {name: SECRET, key: KEY}}.",
        )
