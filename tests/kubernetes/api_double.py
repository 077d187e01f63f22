# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A double of the Kubernetes API server: what kubernetes.core asks of one. See README.md for what it does not prove."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import http.server
import json
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any

import kubernetes_schemas as schemas

Object = dict[str, Any]
Key = tuple[str, str, str]  # plural, namespace, name

VERSION = "1.32"


@dataclasses.dataclass(frozen=True)
class Kind:
    group_version: str
    plural: str
    kind: str
    namespaced: bool = True


KINDS = {
    kind.plural: kind
    for kind in (
        Kind("v1", "namespaces", "Namespace", False),
        Kind("v1", "nodes", "Node", False),
        Kind("v1", "pods", "Pod"),
        Kind("v1", "services", "Service"),
        Kind("v1", "configmaps", "ConfigMap"),
        Kind("v1", "events", "Event"),
        Kind("v1", "resourcequotas", "ResourceQuota"),
        Kind("apps/v1", "deployments", "Deployment"),
        Kind("apps/v1", "replicasets", "ReplicaSet"),
        Kind("batch/v1", "jobs", "Job"),
        Kind("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", False),
        Kind("monitoring.coreos.com/v1", "podmonitors", "PodMonitor"),
        Kind("monitoring.coreos.com/v1", "servicemonitors", "ServiceMonitor"),
    )
}
#: by which field strategic merge tells the items of a list apart
MERGE_KEYS = {
    "containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath",
    "conditions": "type", "imagePullSecrets": "name", "ownerReferences": "uid", "containerStatuses": "name",
}  # fmt: skip


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code,
        }  # fmt: skip


@dataclasses.dataclass
class Fault:
    """The next ``times`` requests that match are answered with ``code``; without one the connection is cut.

    ``done`` cuts it after the work: the reply is lost.
    """

    method: str
    path: str
    code: int = 0
    times: int = 1
    done: bool = False


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All objects, with what the API server itself does to them: identities, versions, defaults, deletion."""

    def __init__(self, address: Callable[[], str]) -> None:
        """``address`` returns a free one of the cluster's network for each new Service."""
        self.lock = threading.RLock()
        self.objects: dict[Key, Object] = {}
        #: why the cluster behind the API does nothing any more; every request is answered with it
        self.failure = ""
        self._address = address
        self._version = 0

    def select(self, plural: str, namespace: str = "", labels: str = "", fields: str = "") -> list[Object]:
        return [
            item for (kind, place, _name), item in sorted(self.objects.items())
            if kind == plural and (not namespace or place == namespace) and _selects(labels, item["metadata"].get("labels") or {})
            and _selects(fields, _Fields(item))
        ]  # fmt: skip

    def get(self, plural: str, namespace: str, name: str) -> Object:
        try:
            return self.objects[plural, namespace, name]
        except KeyError:
            group = KINDS[plural].group_version.rpartition("/")[0].partition("/")[0]
            raise Refused(404, "NotFound", f'{plural}{"." + group if group else ""} "{name}" not found') from None

    def create(self, plural: str, namespace: str, item: Object, dry: bool = False) -> Object:
        kind = KINDS[plural]
        if kind.namespaced:
            self.get("namespaces", "", namespace)
        item = copy.deepcopy(item)
        meta = item["metadata"]
        if meta.get("generateName") and not meta.get("name"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        name = meta["name"]
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name) or len(name) > 253:
            raise Refused(422, "Invalid", f'{kind.kind} "{name}" is invalid: metadata.name: Invalid value: "{name}"')
        if plural == "services" and not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            raise Refused(422, "Invalid", f'Service "{name}" is invalid: metadata.name: a DNS-1035 label must consist of …')
        if (plural, namespace, name) in self.objects:
            raise Refused(409, "AlreadyExists", f'{plural} "{name}" already exists')
        item.update(apiVersion=kind.group_version, kind=kind.kind)
        meta.update(uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
        if kind.namespaced:
            meta["namespace"] = namespace
        if plural in ("pods", "deployments", "jobs", "replicasets"):
            item.pop("status", None)
        self._default(plural, item)
        self._check(item)
        return item if dry else self.put(item, plural)

    def patch(self, plural: str, namespace: str, name: str, change: Object, strategic: bool, dry: bool = False) -> Object:
        old = self.get(plural, namespace, name)
        new = merge(old, change, strategic)
        new["metadata"] = {**new["metadata"], **{key: old["metadata"][key] for key in ("uid", "creationTimestamp", "generation")}}
        if "status" in old:
            new["status"] = old["status"]
        self._default(plural, new)
        self._check(new)
        immutable = {"deployments": ("selector",), "jobs": ("template", "selector")}.get(plural, ())
        for field in immutable:
            if new["spec"].get(field) != old["spec"].get(field):
                raise Refused(422, "Invalid", f'{KINDS[plural].kind} "{name}" is invalid: spec.{field}: field is immutable')
        if new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] += 1
        if new == old or dry:
            return new
        return self.put(new, plural)

    def put(self, item: Object, plural: str) -> Object:
        meta = item["metadata"]
        self._version += 1
        meta["resourceVersion"] = str(self._version)
        self.objects[plural, meta.get("namespace", ""), meta["name"]] = item
        return item

    def set_status(self, item: Object, plural: str, status: Object) -> None:
        """As controllers do: a status that says the same changes nothing."""
        if item.get("status") != status:
            item["status"] = status
            self.put(item, plural)

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        """Mark for deletion; pods go when their processes have ended, owners with what they own (background)."""
        item = self.get(plural, namespace, name)
        item["metadata"].setdefault("deletionTimestamp", now())
        item["metadata"].setdefault("deletionGracePeriodSeconds", 30 if plural == "pods" else 0)
        if plural != "pods":
            self.drop(plural, item)
        return item

    def drop(self, plural: str, item: Object) -> None:
        meta = item["metadata"]
        self.objects.pop((plural, meta.get("namespace", ""), meta["name"]), None)
        for key, owned in list(self.objects.items()):
            if any(owner["uid"] == meta["uid"] for owner in owned["metadata"].get("ownerReferences") or []):
                self.delete(*key)

    def event(self, item: Object, reason: str, message: str, kind: str = "Warning") -> None:
        """One event for each thing that is said of an object."""
        meta, where = item["metadata"], item["metadata"].get("namespace", "default")
        for known in self.select("events", where):
            if known["involvedObject"]["uid"] == meta["uid"] and known["message"] == message:
                return
        self.create("events", where, {
            "metadata": {"name": f"{meta['name']}.{uuid.uuid4().hex[:12]}"}, "reason": reason, "message": message, "type": kind,
            "involvedObject": {"kind": item["kind"], "name": meta["name"], "namespace": where, "uid": meta["uid"]},
            "firstTimestamp": now(), "lastTimestamp": now(), "count": 1,
        })  # fmt: skip

    def _check(self, item: Object) -> None:
        found = schemas.problems(item, VERSION)
        name = item["metadata"]["name"]
        spec = item.get("spec") or {}
        if item["kind"] in ("Deployment", "ReplicaSet"):
            labels = spec["template"]["metadata"].get("labels") or {}
            if not spec["selector"].get("matchLabels", {}).items() <= labels.items():
                found.append("spec.template.metadata.labels: `selector` does not match template `labels`")
        for key, value in (item["metadata"].get("labels") or {}).items():
            if len(value) > 63 or not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", value):
                found.append(f'metadata.labels: Invalid value: "{value}" of {key}')
        if found:
            raise Refused(422, "Invalid", f'{item["kind"]} "{name}" is invalid: {"; ".join(found)}')

    def _default(self, plural: str, item: Object) -> None:
        spec = item.setdefault("spec", {}) if plural in ("deployments", "replicasets", "jobs", "pods", "services") else {}
        if plural == "deployments":
            for key, value in (("replicas", 1), ("revisionHistoryLimit", 10), ("progressDeadlineSeconds", 600)):
                spec.setdefault(key, value)
        if plural == "services":
            spec.setdefault("type", "ClusterIP")
            spec.setdefault("sessionAffinity", "None")
            if "clusterIP" not in spec:
                spec["clusterIP"] = self._address()
            for port in spec.get("ports", []):
                port.setdefault("protocol", "TCP")
                port.setdefault("targetPort", port["port"])
        if plural == "jobs":
            for key, value in (("parallelism", 1), ("completions", 1), ("backoffLimit", 6), ("suspend", False)):
                spec.setdefault(key, value)
        pod = spec if plural == "pods" else (spec.get("template") or {}).get("spec")
        if pod is None:
            return
        for key, value in (("restartPolicy", "Always"), ("dnsPolicy", "ClusterFirst"), ("schedulerName", "default-scheduler"),
                           ("terminationGracePeriodSeconds", 30), ("securityContext", {})):  # fmt: skip
            pod.setdefault(key, copy.deepcopy(value))
        for container in pod.get("containers", []):
            container.setdefault("imagePullPolicy", "IfNotPresent")
            container.setdefault("resources", {})
            container.setdefault("terminationMessagePath", "/dev/termination-log")
            container.setdefault("terminationMessagePolicy", "File")
            for probe in ("startupProbe", "readinessProbe"):
                for key, value in (
                    ("successThreshold", 1),
                    ("periodSeconds", 10),
                    ("failureThreshold", 3),
                    ("timeoutSeconds", 1),
                ):
                    if probe in container:
                        container[probe].setdefault(key, value)
                        container[probe].get("httpGet", {}).setdefault("scheme", "HTTP")
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                volume["configMap"].setdefault("defaultMode", 420)


class _Fields(dict):
    """Field selectors: dotted paths into an object."""

    def __init__(self, item: Object) -> None:
        super().__init__()
        self._item = item

    def get(self, path: str, default: Any = None) -> Any:
        value: Any = self._item
        for part in path.split("."):
            value = (value or {}).get(part)
        return default if value is None else value


def _selects(selector: str, values: dict[str, str]) -> bool:
    for term in filter(None, selector.split(",")):
        if "!=" in term:
            key, _sign, value = term.partition("!=")
            if values.get(key) == value:
                return False
        elif "=" in term:
            key, _sign, value = term.replace("==", "=").partition("=")
            if values.get(key) != value:
                return False
        elif values.get(term) is None:
            return False
    return True


def merge(old: Any, change: Any, strategic: bool, field: str = "") -> Any:
    """RFC 7386, or strategic merge where lists have a key."""
    if isinstance(change, dict):
        merged = dict(old) if isinstance(old, dict) else {}
        for key, value in change.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value, strategic, key)
        return merged
    by = MERGE_KEYS.get(field)
    if strategic and by and isinstance(change, list) and isinstance(old, list):
        changed = {item[by]: item for item in change}
        kept = [merge(item, changed.pop(item[by]), True) if item[by] in changed else item for item in old]
        return kept + list(changed.values())
    return copy.deepcopy(change)


class ApiDouble:
    """The server: routes requests to the store, with refusals and faults as a test sets them."""

    def __init__(self, store: Store, logs: Any) -> None:
        self.store, self._logs = store, logs
        self.faults: list[Fault] = []
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural), as a Role that lacks them
        self.requests: list[tuple[str, str]] = []
        self.absent_groups: set[str] = set()
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: Any) -> None:
                pass

            def handle_any(self) -> None:
                api.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append((request.command, request.path))
        fault = next(
            (f for f in self.faults if f.times and f.method == request.command and re.search(f.path, request.path)), None
        )
        if fault:
            fault.times -= 1
        try:
            if self.store.failure:
                raise Refused(500, "InternalError", f"the cluster's double has failed: {self.store.failure}")
            if fault and fault.code:
                raise Refused(fault.code, "InternalError", "the double was told to fail")
            if fault and not fault.done:
                return self._cut(request)
            address = urllib.parse.urlsplit(request.path)
            query = dict(urllib.parse.parse_qsl(address.query, keep_blank_values=True))
            parts = address.path.strip("/").split("/")
            with self.store.lock:
                code, body = self._route(request.command, parts, query, json.loads(raw) if raw else None, request.headers)
                body = body if isinstance(body, str) else json.dumps(body)
            if fault:
                return self._cut(request)
        except Refused as refused:
            code, body = refused.status["code"], json.dumps(refused.status)
        data = body.encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json" if body[:1] == "{" else "text/plain")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    @staticmethod
    def _cut(request: http.server.BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.connection.close()

    def _route(self, method: str, parts: list[str], query: dict[str, str], body: Any, headers: Any) -> tuple[int, Any]:
        kinds = [kind for kind in KINDS.values() if kind.group_version not in self.absent_groups]
        groups = sorted({kind.group_version for kind in kinds if "/" in kind.group_version})
        if parts == ["version"]:
            return 200, {"major": "1", "minor": VERSION[2:], "gitVersion": f"v{VERSION}.0+double"}
        if parts == ["api"]:
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            named = [{"groupVersion": group, "version": "v1"} for group in groups]
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": one["groupVersion"].partition("/")[0], "versions": [one], "preferredVersion": one} for one in named
            ]}  # fmt: skip
        group, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if not rest:
            verbs = ["create", "delete", "get", "list", "patch", "update"]
            found = [
                {"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": kind.namespaced, "kind": kind.kind,
                 "verbs": verbs} for kind in kinds if kind.group_version == group
            ]  # fmt: skip
            if group == "v1":
                found.append({"name": "pods/log", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]})
            return 200, {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": found}
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = (*rest, "", "")[:3]
        if not any(kind.plural == plural and kind.group_version == group for kind in kinds):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        self._authorize(method, plural, name, namespace)
        if sub == "log":
            if query.get("previous") in ("true", "True"):
                raise Refused(400, "BadRequest", f'previous terminated container in pod "{name}" not found')
            return 200, self._logs(self.store.get("pods", namespace, name))
        return self._act(method, plural, namespace, name, query, body, headers)

    def _authorize(self, method: str, plural: str, name: str, namespace: str) -> None:
        verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}.get(method, "patch")
        if (verb, plural) in self.forbidden:
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            group = KINDS[plural].group_version.rpartition("/")[0]
            raise Refused(
                403, "Forbidden",
                f'{plural} is forbidden: User "tester" cannot {verb} resource "{plural}" in API group "{group}" {where}',
            )  # fmt: skip

    def _act(
        self, method: str, plural: str, namespace: str, name: str, query: dict[str, str], body: Any, headers: Any
    ) -> tuple[int, Any]:
        dry = query.get("dryRun") == "All"
        kind = KINDS[plural]
        if method == "GET" and name:
            return 200, self.store.get(plural, namespace, name)
        if method == "GET":
            if query.get("watch"):
                raise Refused(405, "MethodNotAllowed", "the double has no watches")
            found = self.store.select(plural, namespace, query.get("labelSelector", ""), query.get("fieldSelector", ""))
            return 200, {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "metadata": {"resourceVersion": "1"},
                         "items": found}  # fmt: skip
        if method == "POST":
            return 201, self.store.create(plural, namespace, body, dry)
        if method == "PATCH":
            strategic = "strategic" in headers.get("Content-Type", "")
            if strategic and kind.kind in schemas.CUSTOM:
                raise Refused(415, "UnsupportedMediaType", "custom resources take merge patches only")
            return 200, self.store.patch(plural, namespace, name, body, strategic, dry)
        if method == "DELETE" and name:
            return 200, self.store.get(plural, namespace, name) if dry else self.store.delete(plural, namespace, name)
        raise Refused(405, "MethodNotAllowed", f"the double does not {method} {plural}")


def wait_until(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
