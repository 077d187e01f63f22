# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which idle node takes the canary, and what kind of site this is. Pure; private to the collection."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from .canary_objects import LABEL, check_priority_class, labels, priority_name
from .errors import SpecDecodeError

Object = dict[str, Any]

SITES = ("plain", "slurm_on_k8s")
HOSTNAME = "kubernetes.io/hostname"
QUANTITY = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)$")
FACTORS = {
    "": Decimal(1), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal("1e3"),
    "M": Decimal("1e6"), "G": Decimal("1e9"), "T": Decimal("1e12"), "P": Decimal("1e15"), "E": Decimal("1e18"),
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}  # fmt: skip
#: how many nodes' reasons an error names
NAMED = 8


def quantity(text: Any) -> Decimal:
    """A Kubernetes quantity such as ``500m``, ``64Gi`` or ``8`` as a number."""
    match = QUANTITY.match(str(text).strip())
    if not match or match[2] not in FACTORS:
        raise SpecDecodeError(f"{text!r} is no quantity of Kubernetes.", "Write it as 500m, 8, 64Gi or the like.")
    return Decimal(match[1]) * FACTORS[match[2]]


def requests(pod: Object) -> dict[str, Decimal]:
    """What the scheduler reserves for a pod: its containers together, or its largest init container."""
    spec = pod["spec"]
    total: dict[str, Decimal] = {}
    for container in spec.get("containers", []):
        _add(total, _wanted(container))
    for container in spec.get("initContainers", []):
        wanted = _wanted(container)
        if container.get("restartPolicy") == "Always":  # a sidecar, which stays
            _add(total, wanted)
        else:
            for name, value in wanted.items():
                total[name] = max(total.get(name, Decimal(0)), value)
    _add(total, {name: quantity(value) for name, value in (spec.get("overhead") or {}).items()})
    total["pods"] = Decimal(1)
    return total


def _wanted(container: Object) -> dict[str, Decimal]:
    resources = container.get("resources") or {}
    return {
        name: quantity(value) for name, value in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items()
    }


def _add(total: dict[str, Decimal], more: dict[str, Decimal]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, Decimal(0)) + value


def site_kind(nodes: list[Object], pods: list[Object], override: str = "auto") -> Object:
    """Whether Slurm shares these nodes: ``{kind, evidence}``. An override other than ``auto`` wins."""
    if override != "auto":
        if override not in SITES:
            raise SpecDecodeError(
                f"The site {override!r} is not known.", f"Set spec_kubernetes_site to auto, {' or '.join(SITES)}."
            )
        return {"kind": override, "evidence": "spec_kubernetes_site"}
    for node in nodes:
        for taint in (node.get("spec") or {}).get("taints") or []:
            if "slurm" in taint["key"].lower():
                return {"kind": "slurm_on_k8s", "evidence": f"node {node['metadata']['name']} has the taint {taint['key']}"}
    for pod in pods:
        if is_slurm(pod):
            return {
                "kind": "slurm_on_k8s",
                "evidence": f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']} runs slurmd",
            }
    return {"kind": "plain", "evidence": "no node has a Slurm taint, no pod runs slurmd"}


def is_slurm(pod: Object) -> bool:
    """Whether a pod is a Slurm node of its own."""
    found = pod["metadata"].get("labels") or {}
    containers = [container["name"] for container in pod["spec"].get("containers", [])]
    return found.get("app.kubernetes.io/name") == "slurmd" or "slurmd" in containers


def slurm_nodes(pods: list[Object], idle: list[str]) -> dict[str, bool]:
    """Kubernetes nodes that hold Slurm nodes, and whether all of those are among the ``idle`` ones that Slurm names."""
    by_node: dict[str, list[str]] = {}
    for pod in pods:
        if is_slurm(pod) and pod["spec"].get("nodeName"):
            by_node.setdefault(pod["spec"]["nodeName"], []).append(pod["spec"].get("hostname") or pod["metadata"]["name"])
    return {node: set(names) <= set(idle) for node, names in by_node.items()}


def find_placement(
    nodes: list[Object], pods: list[Object], canary: Object, arms: int = 2, slurm: dict[str, bool] | None = None
) -> Object:
    """The idle node for the canary: ``{node, hostname, fits, resident, hardware}``.

    Idle means that no one else's pod uses its GPUs (unless the canary may share), that what is asked fits beside what
    runs there, and on a site with Slurm that Slurm calls it idle. ``fits`` is how many arms fit at once.
    """
    rejected: dict[str, str] = {}
    fitting: list[tuple[int, Decimal, str, Object]] = []
    running = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    for node in nodes:
        name = node["metadata"]["name"]
        there = [
            pod for pod in running
            if pod["spec"].get("nodeName") == name
            and (pod["metadata"].get("labels") or {}).get(LABEL) != canary["experiment"]
        ]  # fmt: skip
        if slurm is not None:
            there = [pod for pod in there if not is_slurm(pod)]
        reason, fits = _suitability(node, there, canary, slurm)
        if reason:
            rejected[name] = reason
            continue
        allocatable = quantity(node["status"]["allocatable"].get(canary["gpu_resource"], 0))
        fitting.append((-min(fits, arms), allocatable, name, node))
    if not fitting:
        raise SpecDecodeError(
            f"No node is idle and takes {_ask(canary)}: {_reasons(rejected)}.",
            "Wait until one is free, ask for less (spec_canary_gpus, spec_canary_resources), or allow what stands in the way"
            " (spec_canary_tolerations, spec_canary_node_selector, spec_canary_node). Nothing was started.",
        )
    negative, _size, name, node = min(fitting, key=lambda item: item[:3])
    fits = -negative
    return {
        "node": name,
        "hostname": (node["metadata"].get("labels") or {}).get(HOSTNAME, name),
        "fits": fits,
        "resident": fits >= arms,
        "hardware": _hardware(node, canary),
    }


def _suitability(node: Object, there: list[Object], canary: Object, slurm: dict[str, bool] | None) -> tuple[str, int]:
    """Why a node does not do (empty if it does), and how many arms fit on it."""
    name, spec, status = node["metadata"]["name"], node.get("spec") or {}, node.get("status") or {}
    if canary["node"] and name != canary["node"]:
        return "is not the one asked for", 0
    if spec.get("unschedulable"):
        return "is cordoned", 0
    if not any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []):
        return "is not ready", 0
    own = node["metadata"].get("labels") or {}
    missing = {key: value for key, value in canary["node_selector"].items() if own.get(key) != value}
    if missing:
        key, value = next(iter(missing.items()))
        return f"lacks the label {key}={value}", 0
    for taint in spec.get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(t, taint) for t in canary["tolerations"]):
            return f"has the taint {taint['key']}, which spec_canary_tolerations does not name", 0
    if slurm is not None and not slurm.get(name, True):
        return "is not idle in Slurm", 0
    gpus = canary["gpu_resource"]
    users = [pod["metadata"]["name"] for pod in there if requests(pod).get(gpus)]
    if canary["gpus"] and users and not canary["share_node"]:
        return f"serves others ({', '.join(users[:2])})", 0
    free = {key: quantity(value) for key, value in status.get("allocatable", {}).items()}
    for pod in there:
        _add(free, {key: -value for key, value in requests(pod).items()})
    wanted = {key: quantity(value) for key, value in canary["resources"].get("requests", {}).items()}
    wanted["pods"] = Decimal(1)
    if canary["gpus"]:
        wanted[gpus] = Decimal(canary["gpus"])
    for key, value in wanted.items():
        if free.get(key, Decimal(0)) < value * canary["replicas"]:
            return f"has {_plain(free.get(key, Decimal(0)))} {key} free of {_plain(value * canary['replicas'])}", 0
    return "", int(min(free[key] // (value * canary["replicas"]) for key, value in wanted.items() if value))


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


def _hardware(node: Object, canary: Object) -> Object:
    """As the node programs describe their machine; the GPUs are those of one arm."""
    status, own = node["status"], node["metadata"].get("labels") or {}
    cpus = int(quantity(status["allocatable"].get("cpu", 0)))
    kind = "gpu" if canary["gpus"] else "cpu"
    names = {"gpu": own.get("nvidia.com/gpu.product"), "cpu": (status.get("nodeInfo") or {}).get("architecture")}
    return {
        "kind": kind,
        "name": names[kind] or f"{kind} of node {node['metadata']['name']}",
        "count": canary["gpus"] or cpus,
        "cpus": cpus,
        "memory_bytes": int(quantity(status["allocatable"].get("memory", 0))),
    }


def _ask(canary: Object) -> str:
    asked = {**canary["resources"].get("requests", {})}
    if canary["gpus"]:
        asked[canary["gpu_resource"]] = canary["gpus"]
    return ", ".join(f"{value} {key}" for key, value in asked.items()) or "one pod"


def _reasons(rejected: dict[str, str]) -> str:
    if not rejected:
        return "the cluster names no nodes"
    named = [f"{name} {reason}" for name, reason in sorted(rejected.items())[:NAMED]]
    return "; ".join(named) + (f"; and {len(rejected) - NAMED} more" if len(rejected) > NAMED else "")


def _plain(value: Decimal) -> str:
    return f"{value.normalize():f}"


def check_services(services: list[Object], canary: Object, arms: list[Object]) -> None:
    """Refuse where someone's Service would send its requests to the canary's pods."""
    experiment = canary["experiment"]
    for service in services:
        chosen = set((service["spec"].get("selector") or {}).items())
        if not chosen or (service["metadata"].get("labels") or {}).get(LABEL) == experiment:
            continue
        if any(chosen <= set(labels(experiment, arm["name"]).items()) for arm in arms):
            words = ", ".join(f"{key}={value}" for key, value in sorted(chosen))
            raise SpecDecodeError(
                f"The Service {service['metadata']['name']} of namespace {canary['namespace']} selects {words}, which the"
                " canary's pods carry too: it would send its users' requests to them.",
                "Let it select what its own pods alone carry, or set spec_kubernetes_namespace to another namespace."
                " Nothing was started.",
            )


def survey(found: Object, canary: Object, arms: list[Object]) -> Object:
    """The ground before anything is made: ``{site, placement}``. Refuses what the canary must not do.

    ``found`` holds ``nodes``, ``pods`` of all namespaces, ``priority_classes``, ``services`` of the canary's namespace, and
    ``slurm_idle``, the names that Slurm gives its idle nodes. ``arms`` are all that are served, one after the other or at once.
    """
    if canary["replicas"] != 1:
        raise SpecDecodeError(
            f"An arm of {canary['replicas']} pods cannot be measured: their counters are not added up.",
            "Set spec_canary_replicas to 1.",
        )
    name = priority_name(canary)
    classes = {item["metadata"]["name"]: item for item in found["priority_classes"]}
    check_priority_class(classes.get(name), canary)
    check_services(found["services"], canary, arms)
    site = site_kind(found["nodes"], found["pods"], canary["site"])
    slurm = slurm_nodes(found["pods"], found["slurm_idle"]) if site["kind"] == "slurm_on_k8s" else None
    compared = sum(not arm["sweep"] for arm in arms)  # those that only vary K take the place of one of these
    return {"site": site, "placement": find_placement(found["nodes"], found["pods"], canary, compared, slurm)}
