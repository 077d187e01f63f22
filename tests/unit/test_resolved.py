# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What servers resolved their configurations to: recorded from vLLM 0.32, from /server_info and from its start-up log."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib

import pytest
import requests
from ansible_collections.inference.spec_decode.plugins.module_utils import resolved, vllm_metrics
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

DATA = pathlib.Path(__file__).parent / "data"
#: what the start-up log does not tell unless it was given as an argument
UNLOGGED = {"gpu_memory_utilization", "async_scheduling"}


def info(arm):
    document = json.loads((DATA / f"vllm-0.32-{arm}.server_info.json").read_text())
    return {**resolved.flatten(document), "version": "0.32.0"}


def log(arm):
    return (DATA / f"vllm-0.32-{arm}.log").read_text()


@pytest.mark.parametrize("arm", ["none", "ngram"])
def test_log_and_server_info_tell_the_same(arm):
    told, logged = resolved.essentials(info(arm)), resolved.essentials(resolved.from_log(log(arm)))
    assert {name for name in told if told[name] != logged[name]} == UNLOGGED
    assert all(logged[name] is None for name in UNLOGGED)
    assert (logged["cudagraph_mode"], logged["max_num_batched_tokens"], logged["version"]) == ("NONE", 512, "0.32.0")


def test_differences_name_what_is_not_the_speculative_config():
    arms = {"standing": info("none"), "trained": info("ngram")}
    (only,) = resolved.differences(arms)
    assert only["field"] == "parallel_config.disable_nccl_for_dp_synchronization" and only["follows_from_speculation"]
    assert {found["field"] for found in resolved.speculative_differences(arms)} == {
        "speculative_config.method", "speculative_config.num_speculative_tokens",
        "scheduler_config.max_num_scheduled_tokens",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "follows"),
    [
        ("compilation_config.cudagraph_mode", 1, False),
        ("model_config.enforce_eager", False, False),
        ("scheduler_config.max_num_seqs", 8, False),
        ("scheduler_config.max_num_batched_tokens", 256, False),
        ("scheduler_config.async_scheduling", True, False),
        ("cache_config.cache_dtype", "fp8", False),
        ("cache_config.enable_prefix_caching", True, False),
        ("parallel_config.tensor_parallel_size", 2, False),
        ("version", "0.31.0", False),
        ("compilation_config.cudagraph_capture_sizes", [4, 8], True),
    ],
)
def test_every_field_that_shapes_a_measurement_is_compared(field, value, follows):
    found = resolved.differences({"standing": info("none"), "trained": {**info("none"), field: value}})
    assert [(each["field"], each["follows_from_speculation"]) for each in found] == [(field, follows)]
    assert found[0]["values"]["trained"] == value


@pytest.mark.parametrize("field", ["instance_id", "parallel_config.data_parallel_master_port", "x.static_forward_context.a.b"])
def test_what_differs_between_two_starts_says_nothing(field):
    assert resolved.differences({"standing": info("none"), "trained": {**info("none"), field: "other"}}) == []
    assert resolved.differences({"standing": info("none"), "trained": {**info("none"), "x.transport": 1}})


def test_configurations_told_in_different_ways_are_compared_by_the_essentials():
    configs = {"standing": info("none"), "trained": resolved.from_log(log("ngram"))}
    compared = resolved.comparable(configs, {"standing": "server_info", "trained": "log"})
    assert {found["field"] for found in resolved.differences(compared)} == UNLOGGED
    assert resolved.comparable(configs, {"standing": "log", "trained": "log"}) is configs


def test_log_of_several_starts_and_of_graph_modes():
    line = "INFO Initializing a V1 LLM engine (v0.{}) with config: model='/a, b=1', dtype=x, compilation_config={}, x=1\n"
    named = resolved.from_log(line.format("9.1", "{'cudagraph_mode': <CUDAGraphMode.PIECEWISE: 1>}") + log("none"))
    assert named["version"] == "0.32.0"
    named = resolved.from_log(log("none") + line.format("11.0", "{'cudagraph_mode': <CUDAGraphMode.FULL_AND_PIECEWISE: (2, 1)>}"))
    assert resolved.essentials(named)["cudagraph_mode"] == "FULL_AND_PIECEWISE" and named["version"] == "0.11.0"
    older = resolved.from_log(line.format("10.2", '{"cudagraph_mode":[2,1]}') + "Asynchronous scheduling is enabled.\n")
    assert resolved.essentials(older)["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    assert resolved.essentials(older)["async_scheduling"] is True


def test_log_of_something_else():
    with pytest.raises(SpecDecodeError, match="holds no line of vLLM about its configuration"):
        resolved.from_log("nginx started\n")


@dataclasses.dataclass(frozen=True)
class Pages(vllm_metrics.Access):
    """What a server answers: every page that it has holds all of ``found``, each reader picks what is its own."""

    found: dict = dataclasses.field(default_factory=dict)
    status: int = 404

    def get(self, address, **_query):
        answer = requests.Response()
        answer.status_code = 200 if address.rpartition("/")[2] in self.found else self.status
        answer.raw = io.BytesIO(json.dumps(self.found).encode())
        answer.raise_for_status()
        return answer


def pages(status=404, **found):
    return Pages(found={"version": "0.32.0", **found}, status=status)


def test_where_a_running_server_is_read(tmp_path):
    text = log("ngram").partition("with config: ")[2]
    (tmp_path / "server.log").write_text(log("ngram"))
    told = json.loads((DATA / "vllm-0.32-ngram.server_info.json").read_text())["vllm_config"]

    found = resolved.of_running("http://a", pages(server_info=1, vllm_config=told))
    assert found.source == "server_info" and resolved.essentials(found.config)["max_num_seqs"] == 4
    found = resolved.of_running("http://a", pages(server_info=1, vllm_config=text))
    assert found.source == "server_info" and resolved.essentials(found.config)["enforce_eager"] is True
    found = resolved.of_running("http://a", pages(), str(tmp_path / "server.log"))
    assert (found.source, found.problem) == ("log", "") and resolved.essentials(found.config)["max_num_seqs"] == 4
    assert resolved.of_running("http://a", pages()) == ({"version": "0.32.0"}, "nothing", "")


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (500, "http://a/server_info answered HTTP 500, as where the server's PATH names a folder that its user may not enter"),
        (403, "http://a/server_info answered HTTP 403"),
    ],
)
def test_page_that_fails_is_no_page_that_is_missing(tmp_path, status, problem):
    (tmp_path / "server.log").write_text(log("ngram"))
    found = resolved.of_running("http://a", pages(status), str(tmp_path / "server.log"))
    assert (found.source, found.problem) == ("log", problem)
    assert resolved.essentials(found.config)["expert_parallel"] is False
    assert resolved.of_running("http://a", pages(status)).problem == problem


def test_log_without_its_line_of_arguments_tells_no_default():
    line = log("none").partition("\n")[2]
    assert "non-default" not in line and resolved.essentials(resolved.from_log(line))["expert_parallel"] is None
    given = log("none").replace("'max_num_seqs': 4}", "'max_num_seqs': 4, 'enable_expert_parallel': True}", 1)
    assert resolved.essentials(resolved.from_log(given))["expert_parallel"] is True


@pytest.mark.parametrize(
    ("config", "planned", "words"),
    [
        ({"num_speculative_tokens": 5, "method": "eagle3"}, None, "it drafts 5 tokens by eagle3, and should not speculate"),
        ({"num_speculative_tokens": 5, "method": "eagle3"}, {"method": "eagle3", "num_speculative_tokens": 3}, "drafts 5 tokens"),
        ({"num_speculative_tokens": 3, "method": "ngram"}, {"method": "eagle3", "num_speculative_tokens": 3}, "drafts by ngram"),
        (None, {"method": "eagle3", "num_speculative_tokens": 3}, "it does not speculate"),
        (None, None, ""),
        ({"num_speculative_tokens": 1, "method": "mimo_mtp"}, {"method": "mtp", "num_speculative_tokens": 1}, ""),
        ({"num_speculative_tokens": 3, "method": "eagle3"}, {"model": "/draft", "num_speculative_tokens": 3}, ""),
    ],
)
def test_server_that_speculates_otherwise_than_it_should(config, planned, words):
    said = resolved.contradiction(resolved.flatten({"vllm_config": {"speculative_config": config}}), planned)
    assert words in said and bool(words) == bool(said)
    assert resolved.contradiction({"version": "1"}, planned) == "", "a server that does not tell contradicts nothing"


def test_server_that_is_not_there():
    with pytest.raises(SpecDecodeError, match="http://127.0.0.1:9/version could not be read"):
        resolved.of_running("http://127.0.0.1:9")
