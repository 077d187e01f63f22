# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A double of AWX's API, as far as awx.awx needs it to create objects and to find them again.

It keeps what it is sent. It checks no permissions, no references between objects and no field names, and runs nothing.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import urllib.parse

NAMED = ("name", "identifier", "username")
#: objects that an installation has from the start
THERE = {
    "organizations": ["Default"],
    "credential_types": ["Machine", "OpenShift or Kubernetes API Bearer Token"],
    "users": ["admin"],
}


class Store:
    """Objects by endpoint, and by which other objects they point to."""

    def __init__(self) -> None:
        self.objects: dict[str, list[dict]] = {}
        self.links: dict[tuple[str, int, str], list[dict]] = {}
        self.surveys: dict[int, dict] = {}
        self.requests: list[tuple[str, str]] = []
        for endpoint, names in THERE.items():
            for name in names:
                self.create(endpoint, {"name": name, "username": name})

    def create(self, endpoint: str, fields: dict) -> dict:
        number = 1 + sum(len(items) for items in self.objects.values())
        url = f"/api/v2/{endpoint}/{number}/"
        kind = {"inventories": "inventory"}.get(endpoint, endpoint.removesuffix("s"))
        item = {"id": number, "type": kind, "url": url, "scm_revision": "", **fields, "summary_fields": {}}
        item["related"] = {"survey_spec": f"{url}survey_spec/"} if endpoint == "workflow_job_templates" else {}
        for edge in ("credentials", "success_nodes", "failure_nodes", "always_nodes"):
            item["related"][edge] = f"{url}{edge}/"
        self.objects.setdefault(endpoint, []).append(item)
        return item

    def find(self, endpoint: str, query: dict[str, str]) -> list[dict]:
        if endpoint == "unified_job_templates":
            items = [item for each in ("job_templates", "projects") for item in self.objects.get(each, [])]
        else:
            items = self.objects.get(endpoint, [])
        wanted = {key: value for key, value in query.items() if key in ("name", "identifier", "workflow_job_template", "type")}
        return [item for item in items if all(str(item.get(key)) == value for key, value in wanted.items())]

    def named(self, kind: str) -> dict[str, dict]:
        return {next(str(item[key]) for key in NAMED if item.get(key)): item for item in self.objects.get(kind, [])}


class Handler(http.server.BaseHTTPRequestHandler):
    store: Store

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the terminal."""

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode() if status != 204 else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-API-Product-Name", "AWX")
        self.send_header("X-API-Product-Version", "24.6.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def parts(self) -> tuple[list[str], dict[str, str], dict]:
        address = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}") if length else {}
        path = [part for part in address.path.split("/") if part][2:]
        self.store.requests.append((self.command, address.path))
        return path, dict(urllib.parse.parse_qsl(address.query)), body

    def do_GET(self) -> None:
        path, query, _body = self.parts()
        if not path:
            self.answer(200, {"current_version": "/api/v2/"})
        elif path == ["ping"]:
            self.answer(200, {"version": "24.6.1"})
        elif len(path) == 1:
            self.answer(200, self.listed(self.store.find(path[0], query)))
        elif path[-1] == "survey_spec":
            self.answer(200, self.store.surveys.get(int(path[1]), {}))
        elif len(path) == 3:
            self.answer(200, self.listed(self.store.links.get((path[0], int(path[1]), path[2]), [])))
        else:
            found = [item for item in self.store.objects.get(path[0], []) if str(item["id"]) == path[1]]
            self.answer(*((200, found[0]) if found else (404, {"detail": "Not found."})))

    def do_POST(self) -> None:
        path, _query, body = self.parts()
        if path[-1] == "survey_spec":
            self.store.surveys[int(path[1])] = body
            self.answer(200, {})
        elif path[-1] == "create_approval_template":
            item = self.store.create("workflow_approval_templates", body)
            node = next(item for item in self.store.objects[path[0]] if str(item["id"]) == path[1])
            node["unified_job_template"] = item["id"]
            node["related"]["unified_job_template"] = item["url"]
            self.answer(201, item)
        elif len(path) == 3:
            self.store.links.setdefault((path[0], int(path[1]), path[2]), []).append({"id": body["id"]})
            self.answer(204, {})
        else:
            self.answer(201, self.store.create(path[0], body))

    def do_PATCH(self) -> None:
        path, _query, body = self.parts()
        item = next(item for item in self.store.objects[path[0]] if str(item["id"]) == path[1])
        item.update(body)
        self.answer(200, item)

    def listed(self, items: list[dict]) -> dict:
        return {"count": len(items), "next": None, "previous": None, "results": items}


@contextlib.contextmanager
def controller():
    """A running double; yields its address and its store."""
    handler = type("Bound", (Handler,), {"store": Store()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
