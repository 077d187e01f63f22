# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The canary's objects, its node, its states and its measurements: everything that is decided without a cluster."""

from __future__ import annotations

import ast
import copy
import json
import pathlib
import sys

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    arms as planned,
)
from ansible_collections.inference.spec_decode.plugins.module_utils import (
    canary_measuring,
    canary_objects,
    canary_placement,
    canary_state,
    context,
    framing,
)
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "kubernetes"))

import kubernetes_schemas as schemas

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GPU = "nvidia.com/gpu"
CANARY = {
    "experiment": "tiny-eagle3", "model": "tiny", "namespace": "lab", "site": "auto", "image": "vllm/vllm-openai:v0.32.0",
    "image_pull_secrets": ["pull"], "command": ["vllm", "serve"], "replicas": 1, "gpus": 1, "gpu_resource": GPU,
    "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
    "job_resources": {"requests": {"cpu": "1"}}, "shared_memory": "16Gi",
    "models": {"path": "/models", "source": {"persistentVolumeClaim": {"claimName": "models"}}},
    "drafts_path": "/models/target/speculator", "target_path": "/models/base",
    "source": {"path": "/work", "source": {"persistentVolumeClaim": {"claimName": "work"}}}, "stage_target": False, "cache": {},
    "secrets": {"HF_TOKEN": {"name": "hugging-face", "key": "token"}}, "node": "", "node_selector": {},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}], "scheduler": "", "annotations": {},
    "share_node": False, "priority_class": "", "run_as": 1000, "read_only_root": True, "monitor": "PodMonitor",
    "startup_timeout_s": 1800, "schedule_timeout_s": 300, "job_timeout_s": 600,
    "server_arguments": ["--max-model-len=512"],
    "server_environment": {"VLLM_NO_USAGE_STATS": "1"},
}  # fmt: skip
CONFIG = {"method": "eagle3", "model": "/models/target/speculator/tiny/0123", "num_speculative_tokens": 3}
ARMS = [
    {"name": "standing", "speculative_config": None, "sweep": False},
    {"name": "trained", "speculative_config": CONFIG, "sweep": False},
]
SWEPT = {"name": "trained-k1", "speculative_config": {**CONFIG, "num_speculative_tokens": 1}, "sweep": True}
PLACEMENT = {"node": "a", "hostname": "a.cluster"}
PROGRAMS = {"stage_files.py": "print()", "measure_arms.py": "", "spec_decode/__init__.py": "", "train_draft.py": "not needed"}


def settings(**changes):
    return {**copy.deepcopy(CANARY), **changes}


def made(**changes):
    return canary_objects.canary_objects(settings(**changes), ARMS, PLACEMENT)


def of(kind, objects):
    return [item for item in objects if item["kind"] == kind]


def everything():
    canary = settings(scheduler="slurm", annotations={"slurm/lock": "1"}, cache={"hostPath": {"path": "/cache"}})
    plan = {"model": "tiny", "prompts": {"path": "/x", "count": 2}, "concurrencies": [1], "arms": ARMS}
    source = [{"source": "/work/d", "destination": "/models/d", "sha": "0123"}]
    return [
        *canary_objects.canary_objects(canary, ARMS, PLACEMENT),
        *canary_objects.staging_objects(canary, source, PROGRAMS),
        *canary_objects.staging_objects(canary, source, PROGRAMS, remove=True),
        *canary_objects.measuring_objects(canary, "session-1", plan, "a\nb\nc\n", PROGRAMS),
    ]


@pytest.mark.parametrize("version", schemas.versions())
def test_every_object_is_valid_under_the_strict_schema_of_every_supported_version(version):
    objects = everything()
    assert {item["kind"] for item in objects} == {"PriorityClass", "Deployment", "Service", "PodMonitor", "ConfigMap", "Job"}
    assert {item["metadata"]["name"]: schemas.problems(item, version) for item in objects} == {
        item["metadata"]["name"]: [] for item in objects
    }


def test_strict_schemas_find_what_is_wrong():
    wrong = made()[1]
    wrong["spec"]["template"]["spec"]["containers"][0]["shm"] = 1
    assert "'shm' was unexpected" in schemas.problems(wrong, "1.28")[0]


def test_every_object_carries_the_label_and_the_name():
    for item in everything():
        assert item["metadata"]["labels"]["experiment"] == "tiny-eagle3"
        assert item["metadata"]["name"].startswith("tiny-eagle3-")
        if "template" in item.get("spec", {}):
            assert item["spec"]["template"]["metadata"]["labels"]["experiment"] == "tiny-eagle3"


@pytest.mark.parametrize(("kind", "endpoints"), [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")])
def test_a_monitor_selects_what_its_arm_serves_with(kind, endpoints):
    objects = made(monitor=kind)
    for monitor in of(kind, objects):
        name = monitor["metadata"]["name"]
        (watched,) = [
            item["metadata"] if kind == "ServiceMonitor" else item["spec"]["template"]["metadata"]
            for item in of("Service" if kind == "ServiceMonitor" else "Deployment", objects)
            if item["metadata"]["name"] == name
        ]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= watched["labels"].items()
        (service,) = [item for item in of("Service", objects) if item["metadata"]["name"] == name]
        (endpoint,) = monitor["spec"][endpoints]
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]] and endpoint["path"] == "/metrics"
    assert len(of(kind, objects)) == len(ARMS)


def test_the_server():
    standing, trained = of("Deployment", made())
    assert (standing["metadata"]["name"], standing["spec"]["replicas"]) == ("tiny-eagle3-standing", 1)
    pod = trained["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert json.loads(server["args"][server["args"].index("--speculative-config") + 1]) == CONFIG
    assert "--speculative-config" not in standing["spec"]["template"]["spec"]["containers"][0]["args"]
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 1800
    assert server["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"} and "livenessProbe" not in server
    assert server["resources"]["limits"] == {"memory": "64Gi", GPU: "1"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
    assert {m["mountPath"]: m.get("readOnly", False) for m in server["volumeMounts"]} == {
        "/models": True, "/dev/shm": False, "/tmp": False, "/cache": False,
    }  # fmt: skip
    environment = {item["name"]: item.get("value") or item["valueFrom"] for item in server["env"]}
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and environment["HF_HOME"] == "/cache/huggingface"
    assert environment["HF_TOKEN"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
    assert pod["nodeSelector"] == {"kubernetes.io/hostname": "a.cluster"} and "nodeName" not in pod


def test_the_priority_never_preempts_and_is_made_only_where_none_is_named():
    found = of("PriorityClass", made())[0]
    assert found["preemptionPolicy"] == "Never" and found["value"] < 0 and not found["globalDefault"]
    assert of("PriorityClass", made(priority_class="idle")) == []
    assert of("Deployment", made(priority_class="idle"))[0]["spec"]["template"]["spec"]["priorityClassName"] == "idle"


@pytest.mark.parametrize(
    ("found", "named", "words"),
    [
        ({"metadata": {"labels": {"experiment": "other"}}}, "", "does not carry the label experiment=tiny-eagle3"),
        ({"metadata": {}}, "", "does not carry the label"),
        (None, "idle", "There is no PriorityClass idle."),
        ({"metadata": {}, "preemptionPolicy": "PreemptLowerPriority"}, "idle", "the canary must never preempt"),
        ({"metadata": {}}, "idle", "has preemptionPolicy PreemptLowerPriority"),
    ],
)
def test_a_priority_class_of_others_is_refused(found, named, words):
    with pytest.raises(SpecDecodeError, match=words):
        canary_objects.check_priority_class(found, settings(priority_class=named))


@pytest.mark.parametrize(
    "change",
    [
        {"server_environment": {"HF_TOKEN": "x"}},
        {"server_environment": {"VLLM_API_KEY": "x"}},
        {"server_arguments": ["--api-key=x"]},
    ],
)
def test_secrets_do_not_reach_objects(change):
    with pytest.raises(SpecDecodeError, match="for everyone to read"):
        made(**change)


def test_objects_for_other_hands_expect_secrets_in_a_secret():
    canary = canary_objects.by_hand(
        settings(server_environment={"HF_TOKEN": "x", "A": "1"}, server_arguments=["--api-key=x", "--b"])
    )
    assert "x" not in json.dumps(canary["server_environment"]) + json.dumps(canary["server_arguments"])
    server = of("Deployment", canary_objects.canary_objects(canary, ARMS))[0]["spec"]["template"]["spec"]["containers"][0]
    environment = {item["name"]: item.get("valueFrom") for item in server["env"]}
    assert environment["VLLM_API_KEY"] == {"secretKeyRef": {"name": "tiny-eagle3-secrets", "key": "VLLM_API_KEY"}}
    assert environment["HF_TOKEN"]["secretKeyRef"]["name"] == "hugging-face", "what is named already stays"


@pytest.mark.parametrize("site", sorted((ROOT / "inventories").iterdir()), ids=lambda path: path.name)
def test_sites_set_only_what_there_is(site):
    known = set(yaml.safe_load((ROOT / "playbooks/group_vars/all.yml").read_text()))
    for path in site.glob("group_vars/*.yml"):
        assert {key for key in yaml.safe_load(path.read_text()) if key.startswith(("spec_canary", "spec_kubernetes"))} <= known


def test_what_only_looks_like_a_secret_is_allowed():
    assert made(server_environment={"TOKENIZERS_PARALLELISM": "false"}, server_arguments=["--max-num-batched-tokens=512"])


@given(st.text(min_size=1), st.text())
def test_users_text_survives_the_way_through_yaml(target, argument):
    objects = made(target_path=target, server_arguments=[argument])
    assert list(yaml.safe_load_all(canary_objects.canary_yaml(objects))) == objects


@given(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    st.sampled_from(["standing", "trained-k3", "stage-01234567"]),
)
def test_names_are_dns_labels_with_room_for_a_pods_suffix(experiment, part):
    name = canary_objects.object_name(experiment, part)
    assert len(name) <= 52 and name[0].isalpha() and name.endswith(f"-{part}") and "--" not in name.replace(experiment, "")


def test_long_names_stay_different():
    one, other = "a" * 60 + "x", "a" * 60 + "y"
    assert canary_objects.object_name(one, "trained") != canary_objects.object_name(other, "trained")


def test_another_content_is_another_job():
    def name(sha):
        return canary_objects.staging_objects(settings(), [{"source": "/a", "destination": "/b", "sha": sha}], PROGRAMS)[1][
            "metadata"
        ]["name"]

    assert name("1") == name("1") != name("2")


def test_the_staging_job_writes_to_the_serving_volume_only():
    config, job = canary_objects.staging_objects(settings(), [], PROGRAMS)
    mounts = job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {m["name"]: m.get("readOnly", False) for m in mounts} == {
        "programs": True, "tmp": False, "cache": False, "models": False, "source": True,
    }  # fmt: skip
    assert set(config["data"]) == {"stage_files.py", "spec_decode..__init__.py", "plan.json"}


def test_prompts_that_no_config_map_takes_are_refused():
    plan = {"prompts": {"path": "/x", "count": 1}, "concurrencies": [1]}
    with pytest.raises(SpecDecodeError, match="spec_prompts"):
        canary_objects.measuring_objects(settings(), "session-1", plan, "x" * 1_100_000, {})


# Nodes


def node(name="a", gpus=8, *, taints=(), ready=True, cordoned=False, **labels):
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": f"{name}.cluster", **labels}},
        "spec": {"taints": list(taints), "unschedulable": cordoned},
        "status": {
            "allocatable": {"cpu": "64", "memory": "512Gi", "pods": "110", GPU: str(gpus)},
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def pod(name="p", on="a", gpus=0, phase="Running", container="main", **labels):
    limits = {GPU: str(gpus)} if gpus else {}
    return {
        "metadata": {"name": name, "namespace": "x", "labels": labels, "uid": name},
        "spec": {"nodeName": on, "containers": [{"name": container, "resources": {"limits": limits}}]},
        "status": {"phase": phase},
    }


def place(nodes, pods=(), **changes):
    return canary_placement.find_placement(nodes, list(pods), settings(**{"tolerations": [], **changes}))


@pytest.mark.parametrize(("text", "value"), [("500m", 0.5), ("64Gi", 64 * 2**30), ("8", 8), ("1e3", 1000), ("2k", 2000), (3, 3)])
def test_quantities(text, value):
    assert float(canary_placement.quantity(text)) == value


@pytest.mark.parametrize("text", ["", "GiB", "5 apples", "1Xi"])
def test_no_quantities(text):
    with pytest.raises(SpecDecodeError, match="no quantity"):
        canary_placement.quantity(text)


def test_the_smallest_node_that_takes_both_arms():
    found = place([node("big", 8), node("small", 2), node("one", 1)])
    assert (found["node"], found["hostname"], found["fits"], found["resident"]) == ("small", "small.cluster", 2, True)


def test_one_arm_after_the_other_where_only_one_fits():
    found = place([node("one", 1)])
    assert (found["fits"], found["resident"]) == (1, False)
    assert found["hardware"]["kind"] == "gpu" and found["hardware"]["count"] == 1


@pytest.mark.parametrize(
    ("nodes", "pods", "changes", "reason"),
    [
        ([node(cordoned=True)], [], {}, "a is cordoned"),
        ([node(ready=False)], [], {}, "a is not ready"),
        ([node(taints=[{"key": "slurm", "effect": "NoSchedule"}])], [], {}, "a has the taint slurm"),
        ([node()], [], {"node_selector": {"zone": "1"}}, "a lacks the label zone=1"),
        ([node()], [], {"node": "b"}, "a is not the one asked for"),
        ([node()], [pod("serving", gpus=1)], {}, r"a serves others \(serving\)"),
        ([node(gpus=0)], [], {}, "a has 0 nvidia.com/gpu free of 1"),
        ([node()], [], {"resources": {"requests": {"cpu": "65"}}}, "a has 64 cpu free of 65"),
        ([node(gpus=4)], [pod(gpus=2)], {"gpus": 3, "share_node": True}, "a has 2 nvidia.com/gpu free of 3"),
        ([], [], {}, "the cluster names no nodes"),
    ],
)
def test_a_node_that_does_not_do_says_why(nodes, pods, changes, reason):
    with pytest.raises(SpecDecodeError, match=reason):
        place(nodes, pods, **changes)


def test_what_does_not_keep_a_node_from_being_idle():
    done, own = pod("done", gpus=8, phase="Succeeded"), pod("own", gpus=8, experiment="tiny-eagle3")
    assert place([node()], [done, own, pod("cpu only")])["resident"]
    assert place([node()], [pod(gpus=2)], share_node=True)["fits"] == 2


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"key": "slurm", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "slurm", "value": "lock"}, True),
        ({"key": "slurm", "value": "other"}, False),
        ({"key": "slurm", "operator": "Exists", "effect": "NoExecute"}, False),
    ],
)
def test_tolerations(toleration, tolerated):
    nodes = [node(taints=[{"key": "slurm", "value": "lock", "effect": "NoSchedule"}])]
    if tolerated:
        assert place(nodes, tolerations=[toleration])
    else:
        with pytest.raises(SpecDecodeError, match="has the taint slurm"):
            place(nodes, tolerations=[toleration])


def test_the_kind_of_site_is_seen_and_can_be_told():
    slurmd = pod("slinky-0", container="slurmd")
    tainted = node(taints=[{"key": "sunk.slurm/lock", "effect": "NoExecute"}])
    assert canary_placement.site_kind([node()], [pod()])["kind"] == "plain"
    assert canary_placement.site_kind([node()], [slurmd]) == {"kind": "slurm_on_k8s", "evidence": "pod x/slinky-0 runs slurmd"}
    assert "sunk.slurm/lock" in canary_placement.site_kind([tainted], [])["evidence"]
    assert canary_placement.site_kind([tainted], [], "plain")["kind"] == "plain"
    with pytest.raises(SpecDecodeError, match="spec_kubernetes_site"):
        canary_placement.site_kind([], [], "nomad")


def test_slurm_decides_which_of_its_nodes_are_idle():
    nodes = [node("a"), node("b")]
    pods = [pod("s-a", on="a", gpus=8, container="slurmd"), pod("s-b", on="b", gpus=8, container="slurmd")]
    found = {"nodes": nodes, "pods": pods, "priority_classes": [], "services": [], "slurm_idle": ["s-b"]}
    placement = canary_placement.survey(found, settings(), [*ARMS, SWEPT])["placement"]
    assert (placement["node"], placement["fits"]) == ("b", 2), "an arm of a sweep takes another one's place"
    with pytest.raises(SpecDecodeError, match="An arm of 2 pods cannot be measured"):
        canary_placement.survey(found, settings(replicas=2), ARMS)
    with pytest.raises(SpecDecodeError, match="a is not idle in Slurm"):
        canary_placement.survey({**found, "slurm_idle": []}, settings(), ARMS)


def surveyed(selector, **labels):
    """The survey of a namespace with one Service."""
    service = {"metadata": {"name": "production", "labels": labels}, "spec": {"selector": selector}}
    found = {"nodes": [node()], "pods": [], "priority_classes": [], "services": [service], "slurm_idle": []}
    return canary_placement.survey(found, settings(tolerations=[]), ARMS)


@pytest.mark.parametrize(
    "selector",
    [
        {"app.kubernetes.io/managed-by": "ansible"},
        {"app.kubernetes.io/component": "standing", "app.kubernetes.io/part-of": "spec-decode"},
        {"experiment": "tiny-eagle3"},
    ],
)
def test_a_service_that_would_take_the_canary_for_its_own_is_refused(selector):
    with pytest.raises(SpecDecodeError, match="The Service production of namespace lab selects .* Nothing was started."):
        surveyed(selector)
    assert surveyed(selector, experiment="tiny-eagle3"), "the canary's own Services select its pods"


@pytest.mark.parametrize(
    "selector",
    [
        # As in vLLM's own guide to Kubernetes.
        {"app.kubernetes.io/name": "vllm"},
        {"app.kubernetes.io/managed-by": "ansible", "app": "production"},
        {"experiment": "other"},
        {},
        None,
    ],
)
def test_services_of_others_pods_are_no_obstacle(selector):
    assert surveyed(selector)["placement"]["node"] == "a"


# States


def refusal_of(code, reason, message):
    body = json.dumps({"kind": "Status", "message": message, "reason": reason, "code": code})
    return canary_state.refusal(f"Failed to create object: b'{body}'")


def test_refusals_say_whether_asking_again_helps():
    found = refusal_of(403, "Forbidden", 'nodes is forbidden: User "me" cannot list resource "nodes"')
    assert (
        found["final"] and found["words"].startswith('nodes is forbidden: User "me"') and "docs/kubernetes.md" in found["remedy"]
    )
    assert not refusal_of(500, "InternalError", "etcd")["final"] and not refusal_of(429, "TooManyRequests", "slow")["final"]
    assert refusal_of(404, "NotFound", 'namespaces "lab" not found')["remedy"].startswith("The namespace must exist")
    assert not canary_state.refusal("Connection aborted.")["final"]


def deployment(**status):
    return {"metadata": {"name": "d", "uid": "d", "generation": 1}, "status": {"observedGeneration": 1, **status},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"experiment": "e"}}}}  # fmt: skip


def served(phase="Running", waiting=None, last=None, restarts=0, conditions=(), **status):
    return {
        "metadata": {"name": "d-1", "uid": "p", "labels": {"experiment": "e", canary_objects.COMPONENT: "trained"},
                     "ownerReferences": [{"kind": "ReplicaSet", "uid": "r", "controller": True}]},
        "spec": {"nodeName": "a"},
        "status": {"phase": phase, "podIP": "10.0.0.1", "conditions": list(conditions), **status, "containerStatuses": [
            {"name": "vllm", "restartCount": restarts, "imageID": "i", "state": {"waiting": waiting} if waiting else {},
             "lastState": {"terminated": last} if last else {}}]},
    }  # fmt: skip


def test_ready_only_when_the_new_generation_is():
    ready = {"availableReplicas": 1, "replicas": 1}
    assert canary_state.look_at_deployment("d", [deployment(**ready)], [served()], []).done
    old = deployment(**ready, observedGeneration=0)
    assert not canary_state.look_at_deployment("d", [old], [served()], []).done


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ([served(waiting={"reason": "ImagePullBackOff", "message": "not found"})], "the image cannot be pulled"),
        ([served(waiting={"reason": "CreateContainerConfigError", "message": 'secret "x" not found'})], 'secret "x" not found'),
        ([served(restarts=1, last={"exitCode": 1, "reason": "Error"})], "ended with exit code 1"),
        ([served("Failed", reason="Evicted", message="low on memory")], "Evicted: low on memory"),
    ],
)
def test_hopeless_pods_are_seen_at_once(pods, words):
    assert words in canary_state.look_at_deployment("d", [deployment()], pods, []).failed


def test_what_else_ends_a_wait():
    refused = deployment(conditions=[{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}])
    assert canary_state.look_at_deployment("d", [refused], [], []).failed == "no pod may be made: exceeded quota"
    assert "another one deleted it" in canary_state.look_at_deployment("d", [], [], []).failed
    waits = served("Pending", conditions=[{"type": "PodScheduled", "status": "False", "message": "Insufficient gpu"}])
    waits["spec"] = {"schedulerName": "slurm"}
    event = {"type": "Warning", "message": "0/1 nodes", "involvedObject": {"uid": "p"}}
    found = canary_state.look_at_deployment("d", [deployment()], [waits], [event])
    assert found.unscheduled == "Insufficient gpu Events: 0/1 nodes" and not found.failed
    waits["status"]["conditions"] = []
    found = canary_state.look_at_deployment("d", [deployment()], [waits], [])
    assert found.unscheduled == "the scheduler slurm has said nothing of it"


def test_jobs_end_well_or_badly_and_both_are_seen():
    def job(kind):
        return {"metadata": {"name": "j", "uid": "j"}, "spec": {},
                "status": {"conditions": [{"type": kind, "status": "True", "reason": "BackoffLimitExceeded"}]}}  # fmt: skip

    assert canary_state.look_at_job("j", [job("Complete")], [], []).done
    assert canary_state.look_at_job("j", [job("Failed")], [], []).failed.startswith("BackoffLimitExceeded")
    assert "another one deleted it" in canary_state.look_at_job("j", [], [], []).failed


def test_pods_must_stay_the_same():
    before = canary_state.arm_pods([served()], "e")
    assert canary_state.check_steady(before, before) == before
    assert before["trained"][0]["node"] == "a" and canary_state.arm_pods([served()], "other") == {}
    with pytest.raises(SpecDecodeError, match="was replaced while it was measured"):
        canary_state.check_steady(before, {})
    with pytest.raises(SpecDecodeError, match="was restarted while it was measured"):
        canary_state.check_steady(before, canary_state.arm_pods([served(restarts=1)], "e"))


def test_a_teardown_is_proved():
    mine = {"kind": "Service", "metadata": {"name": "m", "uid": "1", "labels": {"experiment": "e"}}}
    other = {"kind": "Service", "metadata": {"name": "o", "uid": "2", "labels": {"experiment": "f"}}}
    owned = {"kind": "Pod", "metadata": {"name": "x", "uid": "3", "ownerReferences": [{"controller": True}]}}
    before = canary_state.inventory([mine, other, owned], "e")
    after = canary_state.inventory([other], "e")
    assert before["own"] == ["Service m"]
    assert canary_state.check_torn_down(before, after, "e") == [
        "nothing is left with experiment=e",
        "1 other objects are as they were",
    ]
    with pytest.raises(SpecDecodeError, match="there is still Service m"):
        canary_state.check_torn_down(before, before, "e")
    with pytest.raises(SpecDecodeError, match="vanished too: Service o 2"):
        canary_state.check_torn_down(before, canary_state.inventory([], "e"), "e")


@pytest.mark.parametrize("programs", [canary_objects.ENGINE_PROGRAMS, canary_objects.STAGING_PROGRAMS])
def test_pods_get_every_program_that_one_of_theirs_imports(programs):
    """A node has the whole bundle; a pod only what is named for it."""
    files = {path.name for path in (ROOT / "files").glob("*.py")}
    for program in programs:
        tree = ast.parse((ROOT / "files" / program).read_text())
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        wanted = {f"{name}.py" for name in names} & files
        assert wanted <= set(programs), program


# Measuring


def test_sessions():
    both = ["standing", "trained"]
    assert canary_measuring.sessions(ARMS, {"trials": 3}, True) == [
        {"name": "session-1", "arms": both, "pairs": [1, 2, 3], "purpose": "compare"},
    ]  # fmt: skip
    found = canary_measuring.sessions(ARMS, {"trials": 3}, False)
    assert [(x["arms"], x["pairs"]) for x in found] == [
        (["standing"], [1]), (["trained"], [1, 2]), (["standing"], [2, 3]), (["trained"], [3]),
    ]  # fmt: skip


@pytest.mark.parametrize("resident", [True, False])
def test_sessions_take_the_trials_that_one_machine_would(resident):
    """Whatever the number of trials, sweeps and concurrencies: the same trials as measure_arms.py takes, in its ABBA order."""
    plan = {**planned.OPTIONAL, "trials": 3, "aa_trials": 2, "concurrencies": [1, 8], "sweep_num_speculative_tokens": [1, 5],
            "target": {}, "prompts": {},
            "arms": [{"name": "standing"}, {"name": "trained", "speculative_config": CONFIG}]}  # fmt: skip
    whole = planned.arms(plan, {})
    arms = [{"name": arm.name, "speculative_config": arm.speculative_config, "sweep": arm.sweep} for arm in whole.values()]
    taken = [measured_as_planned(plan, session, arms) for session in canary_measuring.sessions(arms, plan, resident)]
    found = canary_measuring.acceptance(taken, plan, {}, arms, FACTS)["trials"]
    wanted = planned.schedule(plan, whole, resident)
    assert {planned.key_of(trial) for trial in found} == {step.key for step in wanted} and len(found) == len(wanted)
    for concurrency in (1, 8):
        for purpose in ("compare", "sweep"):
            assert [(t["arm"], t["pair"]) for t in found if (t["concurrency"], t["purpose"]) == (concurrency, purpose)] == [
                (s.arm, s.pair) for s in wanted if (s.concurrency, s.purpose) == (concurrency, purpose)
            ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drafts_path": "/data/drafts"}, "spec_canary_drafts_path is /data/drafts, which is not on the volume"),
        ({"drafts_path": "/models/../etc"}, "spec_canary_drafts_path is /models/../etc, which is not on"),
        ({"drafts_path": "/models-of-others"}, "spec_canary_drafts_path is /models-of-others, which is not on"),
        ({"stage_target": True, "target_path": "/base"}, "spec_canary_target_path is /base, which is not on"),
    ],
)
def test_only_the_serving_volume_is_staged_to(changes, words):
    experiment, draft = {"slug": "tiny", "target": {"path": "/work/base"}}, {"draft_dir": "/work/d", "sha": "01"}
    whole = canary_measuring.staging_sources(experiment, draft, settings(stage_target=True))
    assert [item["destination"] for item in whole] == ["/models/target/speculator/tiny/01", "/models/base"]
    assert canary_measuring.staging_sources(experiment, draft, settings(target_path="/elsewhere"))[1:] == []
    with pytest.raises(SpecDecodeError, match=words):
        canary_measuring.staging_sources(experiment, draft, settings(**changes))


def test_what_has_no_draft_of_its_own_stages_none():
    experiment, draft = {"slug": "tiny", "target": {"path": "/work/base"}}, {"draft_dir": None, "sha": None}
    assert canary_measuring.staging_sources(experiment, draft, settings(drafts_path="/elsewhere")) == []
    (target,) = canary_measuring.staging_sources(experiment, draft, settings(stage_target=True))
    assert target == {"source": "/work/base", "destination": "/models/base", "sha": ""}


def measured_as_planned(plan, session, arms):
    """What a session's job brings back: the trials that its own plan asks for."""
    own = canary_measuring.session_plan(plan, session, arms, {arm["name"]: "http://x" for arm in arms}, "/m")
    steps = planned.schedule(own, planned.arms(own, {}), True)
    return {
        "session": session, "waited_s": 1.0, "pods": {arm: [{"name": arm, "node": "a"}] for arm in session["arms"]},
        "result": {
            "finished_at": "x", "duration_s": 1.0, "plan": {"prompts": {"sha256": "x"}},
            "arms": {arm: {} for arm in session["arms"]}, "configs": {arm: {} for arm in session["arms"]},
            "trials": [step.named for step in steps],
        },
    }  # fmt: skip


def test_the_plan_of_a_session():
    plan = {"trials": 5, "aa_trials": 2, "sweep_num_speculative_tokens": [1], "target": {"path": "/work/base"},
            "arms": [{"speculative_config": {"model": "{draft}"}}]}  # fmt: skip
    session = {"name": "session-2", "arms": ["trained"], "pairs": [1, 2]}
    found = canary_measuring.session_plan(plan, session, ARMS, {"trained": "http://10.0.0.1:8000"}, "/models/base")
    assert found == {
        "trials": 2, "aa_trials": 0, "sweep_num_speculative_tokens": [], "resident": True, "target": {"path": "/models/base"},
        "arms": [{"name": "trained", "speculative_config": CONFIG, "sweep": False, "url": "http://10.0.0.1:8000"}],
    }  # fmt: skip
    first = {"name": "session-1", "arms": ["standing"], "pairs": [1]}
    assert canary_measuring.session_plan(plan, first, ARMS, {"standing": "http://10.0.0.2:8000"}, "/m")["aa_trials"] == 2
    with pytest.raises(SpecDecodeError, match="The trained arm has no address"):
        canary_measuring.session_plan(plan, session, ARMS, {}, "/m")


def test_the_draft_stands_below_its_checksum_and_each_further_k_is_an_arm():
    experiment = {"slug": "tiny", "documents": {"configs/arms.json": {"arms": [
        {"name": "standing", "speculative_config": None},
        {"name": "trained", "speculative_config": {**CONFIG, "model": "{draft}"}},
    ]}}}  # fmt: skip
    assert canary_measuring.canary_arms(experiment, {"sha": "0123"}, settings()) == ARMS
    experiment["documents"]["configs/arms.json"]["sweep_num_speculative_tokens"] = [1, 3]
    assert canary_measuring.canary_arms(experiment, {"sha": "0123"}, settings()) == [*ARMS, SWEPT], "K = 3 is the trained arm"
    experiment["documents"]["configs/arms.json"]["arms"].pop()
    with pytest.raises(SpecDecodeError, match="There is no arm with speculation whose K could be swept"):
        canary_measuring.canary_arms(experiment, {"sha": "0123"}, settings())


def measured(name, arms, pairs, on="a", mode="FULL", purpose="compare"):
    return {
        "session": {"name": name, "arms": arms, "pairs": pairs, "purpose": purpose},
        "waited_s": 1.5,
        "pods": {arm: [{"name": f"{arm}-{name}", "node": on}] for arm in arms},
        "result": {
            "phase": "acceptance", "plan": {"prompts": {"sha256": "x"}}, "differences": [],
            "finished_at": name, "duration_s": 2.0,
            "arms": {arm: {"startup_s": 1} for arm in arms},
            "configs": {arm: {"compilation_config.cudagraph_mode": mode} for arm in arms},
            "trials": [{"arm": arm, "pair": n} for n in range(1, len(pairs) + 1) for arm in arms],
        },
    }  # fmt: skip


FACTS = {
    "identity": "i", "image": "vllm/vllm-openai:v0.32.0", "site": {},
    "placement": {"resident": False, "hardware": {"kind": "gpu"}, "node": "a"},
}  # fmt: skip


def merged(*parts, swept=()):
    return canary_measuring.acceptance(list(parts), {"prompts": {"count": 2}}, {"d": 1}, [*ARMS, *swept], FACTS)


def test_sessions_become_one_result():
    found = merged(measured("1", ["standing"], [1]), measured("2", ["trained"], [1, 2]), measured("3", ["standing"], [2]))
    assert [(t["arm"], t["pair"]) for t in found["trials"]] == [("standing", 1), ("trained", 1), ("trained", 2), ("standing", 2)]
    assert (found["finished_at"], found["duration_s"]) == ("3", 6.0)
    assert found["arms"]["standing"]["starts_s"] == [1.5, 1.5] and found["plan"]["prompts"] == {"sha256": "x", "count": 2}
    assert found["node"] == "a" and found["differences"] == []
    assert context.image_of(found, "standing") == context.image_of(found, "trained") == "vllm/vllm-openai:v0.32.0"
    assert found["hardware"] == {"kind": "gpu"} and found["arms"]["trained"]["speculative_config"] == CONFIG


def test_another_node_and_another_configuration_are_differences():
    found = merged(measured("1", ["standing"], [1]), measured("2", ["trained"], [1], on="b", mode="PIECEWISE"))
    assert {item["field"] for item in found["differences"]} == {"compilation_config.cudagraph_mode", "kubernetes.node"}
    again = merged(
        measured("1", ["standing"], [1]), measured("2", ["trained"], [1]), measured("3", ["standing"], [2], mode="NONE")
    )
    assert again["differences"][0]["field"] == "compilation_config.cudagraph_mode of the standing arm's starts"


def test_a_sweep_has_pairs_and_differences_of_its_own():
    compared = measured("1", ["standing", "trained"], [1])
    found = merged(compared, measured("2", ["standing", "trained-k1"], [2], mode="NONE", purpose="sweep"), swept=(SWEPT,))
    assert [(t["arm"], t["pair"], t.get("purpose")) for t in found["trials"]][2:] == [
        ("standing", 2, "sweep"), ("trained-k1", 2, "sweep"),
    ]  # fmt: skip
    # The standing arm's second start differs from its first, which touches both comparisons.
    assert [item["field"] for item in found["differences"]] == ["compilation_config.cudagraph_mode of the standing arm's starts"]
    swept = found["arms"]["trained-k1"]
    assert (swept["sweep"], swept["num_speculative_tokens"], found["arms"]["trained"]["sweep"]) == (True, 1, False)
    assert [item["field"] for item in swept["differences"]] == ["compilation_config.cudagraph_mode"]
    assert found["design"]["sweep"] == [1]


def test_only_what_was_measured_of_the_same_on_the_same_node_counts():
    placement = {"node": "a", "resident": False}
    known = {"identity": "i", "placement": placement, "sessions": {"session-1": {}}}
    assert canary_measuring.still_there(known, "i", placement) == known
    for changed in (("j", placement), ("i", {"node": "b", "resident": False}), ("i", {"node": "a", "resident": True})):
        assert canary_measuring.still_there(known, *changed)["sessions"] == {}
    assert canary_measuring.still_there({}, "i", placement)["sessions"] == {}


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_documents_travel_in_logs(value):
    assert framing.unframe(f"before\n{framing.frame('another')}\nbetween\n{framing.frame(value)}\nafter") == value


def test_damaged_documents_are_refused():
    lines = framing.frame(list(range(9000))).splitlines()
    with pytest.raises(SpecDecodeError, match="is not whole"):
        framing.unframe("\n".join(lines[:-2]))
    with pytest.raises(SpecDecodeError, match="holds no result; it ends with: boom"):
        framing.unframe("boom")
