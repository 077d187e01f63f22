# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pods backed by real processes: containers without isolation. Paths, addresses and commands are translated."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, Any

Object = dict[str, Any]


class Process:
    """The one container of a pod as a process of this machine."""

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path, health: str) -> None:
        self._health = health
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stream:
            # A group of its own, but no session: Linux shares CPUs out between sessions, and vLLM's engine waits by yielding,
            # which gives way within its session only. A client in another one got its tokens late and in bursts.
            self._process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, process_group=0, cwd=log.parent
            )
        self._ready = False
        if health:
            threading.Thread(target=self._probe, daemon=True).start()

    def _probe(self) -> None:
        """The readiness probe, beside the controllers' loop and not in it."""
        while self._process.poll() is None:
            try:
                with urllib.request.urlopen(self._health, timeout=5) as answer:
                    self._ready = answer.status == 200
            except (urllib.error.URLError, OSError):
                self._ready = False
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.3)

    def ready(self) -> bool:
        return self._ready or not self._health

    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self, grace_s: float) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def containers(commands: dict[str, list[str]], environment: dict[str, str]) -> Callable[[Any, Object], Process]:
    """How to run pods for real: what stands for a container's first word, and the machine's own environment."""

    def start(cluster: Any, pod: Object) -> Process:
        spec, uid = pod["spec"], pod["metadata"]["uid"]
        container, folder = spec["containers"][0], cluster.folder / "pods" / uid
        places = {
            mount["mountPath"]: str(_place(cluster, pod, mount["name"]))
            for mount in container.get("volumeMounts", []) if mount["mountPath"] != "/dev/shm"
        }  # fmt: skip
        translate = _translator(places, pod["status"]["podIP"])
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                _write_config(cluster, pod, volume, _place(cluster, pod, volume["name"]), translate)
        words = [*container.get("command", []), *container.get("args", [])]
        command = [*commands[words[0]], *map(translate, words[1:])]
        own = {item["name"]: translate(item["value"]) for item in container.get("env", []) if "value" in item}
        port = next((port["containerPort"] for port in container.get("ports", [])), 0)
        health = f"http://{pod['status']['podIP']}:{port}{container['readinessProbe']['httpGet']['path']}" if port else ""
        return Process(command, {**environment, **own}, folder / "log", health)

    return start


def _place(cluster: Any, pod: Object, name: str) -> pathlib.Path:
    volume = next(item for item in pod["spec"]["volumes"] if item["name"] == name)
    if "persistentVolumeClaim" in volume:
        return cluster.claims[volume["persistentVolumeClaim"]["claimName"]]
    if "hostPath" in volume:
        return pathlib.Path(volume["hostPath"]["path"])
    place = cluster.folder / "pods" / pod["metadata"]["uid"] / name
    place.mkdir(parents=True, exist_ok=True)
    return place


def _write_config(cluster: Any, pod: Object, volume: Object, place: pathlib.Path, translate: Callable[[str], str]) -> None:
    config = cluster.store.get("configmaps", pod["metadata"]["namespace"], volume["configMap"]["name"])
    for item in volume["configMap"]["items"]:
        target = place / item["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        text = config["data"][item["key"]]
        target.write_text(json.dumps(_translated(json.loads(text), translate)) if target.suffix == ".json" else text)


def _translated(value: Any, translate: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _translated(item, translate) for key, item in value.items()}
    if isinstance(value, list):
        return [_translated(item, translate) for item in value]
    return translate(value) if isinstance(value, str) else value


def _translator(places: dict[str, str], address: str) -> Callable[[str], str]:
    """Mounted paths by the folders behind them, all at once, so that no replacement is replaced again."""
    known = sorted(places, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, known))})(?![\w-])") if known else None

    def translate(text: str) -> str:
        if text == "0.0.0.0":
            return address
        return pattern.sub(lambda match: places[match[0]], text) if pattern else text

    return translate


class Proxy:
    """A Service's address, see ``service_proxy.py``."""

    def __init__(self, address: str, port: int) -> None:
        program = pathlib.Path(__file__).with_name("service_proxy.py")
        self._process = subprocess.Popen(
            [sys.executable, program, address, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._targets: list[tuple[str, int]] = []
        if self._stream(self._process.stdout).readline() != "listening\n":
            raise OSError(f"the Service's address {address}:{port} cannot be had")

    def direct(self, targets: list[tuple[str, int]]) -> None:
        """Send new connections to the first of these."""
        if targets != self._targets:
            self._targets = list(targets)
            stream = self._stream(self._process.stdin)
            stream.write(json.dumps(targets) + "\n")
            stream.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stream(self._process.stdin).close()
        self._stream(self._process.stdout).close()

    @staticmethod
    def _stream(found: IO[str] | None) -> IO[str]:
        if found is None:
            raise OSError("the proxy has no pipes")
        return found
