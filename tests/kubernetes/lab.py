# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An experiment with a converted draft, and the role canary run for it against the cluster's double."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
from typing import Any

import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils.framing import frame
from cluster_double import Cluster, Image

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
Object = dict[str, Any]

SERVER = "vllm/vllm-openai:v0.32.0"
SETTINGS = {
    "spec_kubernetes_namespace": "lab", "spec_poll_interval": 1, "spec_startup_timeout": 30, "spec_canary_schedule_timeout": 3,
    "spec_canary_job_timeout": 60, "spec_canary_target_path": "/models/base", "target": "/models/base",
    "spec_canary_resources": {"requests": {"cpu": "2", "memory": "1Gi"}},
    "spec_canary_job_resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
}  # fmt: skip
STAGING = {"spec_canary_source": {"path": "/work", "source": {"persistentVolumeClaim": {"claimName": "work"}}}}


class Lab:
    """One experiment's bundle on this machine."""

    def __init__(self, cluster: Cluster, folder: pathlib.Path, name: str = "tiny-eagle3", trials: int = 3) -> None:
        self.cluster, self.name, self.folder = cluster, name, folder
        self.bundle = folder / name / "spec-decode"
        (self.bundle / "results").mkdir(parents=True)
        (self.bundle / "data").mkdir()
        prompts = self.bundle / "data/eval.jsonl"
        prompts.write_text("".join(json.dumps({"conversations": [{"from": "human", "value": f"{n}?"}]}) + "\n" for n in range(4)))
        self.stage(str(folder / "drafts/tiny/0123456789abcdef"), "0123456789abcdef")
        plan = {
            "model": "tiny", "target": {"path": "/work/base", "sha": "f" * 64}, "prompts": {"path": str(prompts), "count": 4},
            "trials": trials, "concurrencies": [1], "warmup": 1, "max_tokens": 13, "temperature": 0.0, "seed": 7,
            "ports": [0, 0], "startup_timeout_s": 30, "server_arguments": ["--max-model-len=512"], "server_environment": {},
            "arms": [
                {"name": "standing", "speculative_config": None},
                {"name": "trained", "speculative_config": {"method": "eagle3", "model": "{draft}", "num_speculative_tokens": 3}},
            ],
        }  # fmt: skip
        self.experiment = {
            "name": name, "slug": "tiny", "bundle": str(self.bundle), "target": plan["target"], "job": {"executor": "local"},
            "serving": {"server_arguments": plan["server_arguments"], "server_environment": {}},
            "documents": {"configs/arms.json": plan},
        }  # fmt: skip
        (self.bundle / "experiment.json").write_text(json.dumps(self.experiment))

    def stage(self, place: str, sha: str) -> None:
        """Where the converted draft stands."""
        self.draft = {"method": "eagle3", "draft_dir": place, "sha": sha}
        (self.bundle / "results/draft.json").write_text(json.dumps(self.draft))

    def command(self, role: str = "canary", tasks_from: str = "main", **settings: Any) -> list[str]:
        play = [{
            "hosts": "localhost", "gather_facts": False, "connection": "local",
            "vars_files": [str(ROOT / "playbooks/group_vars/all.yml")], "tasks": [
                {"ansible.builtin.include_role": {"name": f"inference.spec_decode.{role}", "tasks_from": tasks_from}},
            ],
        }]  # fmt: skip
        path = self.folder / f"{self.name}-{role}.yml"
        path.write_text(yaml.safe_dump(play))
        variables = {
            **SETTINGS, "spec_kubernetes_connection": {"kubeconfig": str(self.cluster.kubeconfig())},
            "canary_experiment": self.experiment, "experiment": self.name, "spec_canary": "kubernetes",
            "spec_work_dir": str(self.folder), "ansible_python_interpreter": str(ROOT / ".venv/bin/python"), **settings,
        }  # fmt: skip
        return [str(ROOT / ".venv/bin/ansible-playbook"), "-i", "localhost,", str(path), "-e", json.dumps(variables)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"), "LC_ALL": "C.UTF-8",
                "ANSIBLE_CALLBACK_RESULT_FORMAT": "yaml", "HOME": str(self.folder)}  # fmt: skip

    def play(self, *flags: str, code: int = 0, **settings: Any) -> str:
        answer = subprocess.run(
            [*self.command(**settings), *flags], cwd=ROOT, env=self.environment(), capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        text = answer.stdout + answer.stderr
        assert answer.returncode == code, text[-6000:]
        assert "Traceback" not in text, text[-6000:]
        return text

    def result(self, name: str) -> Object:
        return json.loads((self.bundle / f"results/{name}.json").read_text())

    def own(self) -> list[str]:
        """What is left in the cluster with the experiment's label."""
        with self.cluster.store.lock:
            return sorted(
                f"{item['kind']} {item['metadata']['name']}" for item in self.cluster.store.objects.values()
                if (item["metadata"].get("labels") or {}).get("experiment") == self.name
            )  # fmt: skip


def changed(output: str) -> int:
    return int(re.findall(r"changed=(\d+)", output)[-1])


def said(output: str) -> str:
    return " ".join(output.split())


def pretend(cluster: Cluster, nodes: dict[str, int] | None = None) -> None:
    """Nodes with GPUs, and an image whose servers get ready and whose jobs print what real ones would."""
    for name, gpus in (nodes or {"gpu-a": 2}).items():
        cluster.add_node(name, gpus=gpus, **{"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"})
    cluster.images[SERVER] = Image(log=lambda pod: printed(cluster, pod))


def printed(cluster: Cluster, pod: Object) -> str:
    """A measurement as the measuring job prints it, of the arms and trials in its own plan."""
    config = next((v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v), "")
    if not config:
        return "INFO the server is up"
    plan = json.loads(cluster.store.get("configmaps", "lab", config)["data"]["plan.json"])
    if "folders" in plan:
        return "staging\n" + frame({"folders": [{**folder, "changed": True} for folder in plan["folders"]]})
    names = [arm["name"] for arm in plan["arms"]]
    order = [(pair, name) for pair in range(1, plan["trials"] + 1) for name in (names if pair % 2 else names[::-1])]
    resolved = {"compilation_config.cudagraph_mode": "2", "model_config.dtype": "bfloat16"}
    return "measuring\n" + frame({
        "phase": "acceptance", "status": "complete", "finished_at": "now", "duration_s": 1.0,
        "plan": plan, "node": "a pod", "hardware": {"kind": "cpu"},
        "arms": {name: {"resolved": {"cudagraph_mode": "FULL"}, "command": None, "startup_s": 1.0} for name in names},
        "configs": dict.fromkeys(names, resolved), "differences": [],
        "trials": [{"arm": name, "pair": pair, "concurrency": 1, "void": ""} for pair, name in order],
    })  # fmt: skip
