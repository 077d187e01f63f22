# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module: endpoints with TLS and a token, and the past of a Prometheus server (a stub that speaks its HTTP API)."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import itertools
import json
import re
import ssl
import threading
import urllib.parse

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import prometheus
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.modules import prom_acceptance

DEFAULTS = {
    "urls": None, "before": None, "after": None, "prometheus_url": None, "start": None, "end": None, "selector": "",
    "model_name": "", "driven": None, "speculative": True, "num_speculative_tokens": None, "bearer_token": None,
    "ca_path": None, "validate_certs": True, "timeout": 5,
}  # fmt: skip


def run(**params):
    return prom_acceptance.run({**DEFAULTS, **params})


@contextlib.contextmanager
def serving(page, certificate=None):
    """A server whose ``page(path, headers)`` gives a status and a text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = page(self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have given up waiting
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Vllm:
    """What an endpoint counts; every scrape finds ten more drafts and five more requests."""

    def __init__(self):
        self.scrapes = 0
        self.token = ""

    def page(self, path, headers):
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, "who are you?"
        if path != "/metrics":
            return 404, ""
        self.scrapes += 1
        labels = '{engine="0",model_name="m"}'
        counters = {"spec_decode_num_drafts": 10, "spec_decode_num_draft_tokens": 30, "spec_decode_num_accepted_tokens": 15,
                    "request_success": 5, "generation_tokens": 25, "prompt_tokens": 9}  # fmt: skip
        lines = [f"vllm:{name}_total{labels} {value * self.scrapes}" for name, value in counters.items()]
        return 200, "\n".join(["process_start_time_seconds 1", *lines, ""])


def test_window_over_two_endpoints():
    with serving(Vllm().page) as one, serving(Vllm().page) as two:
        before = run(urls=[one, two])
        assert set(before) == {"changed", "snapshots"}
        found = run(urls=[two + "/metrics", one], before=json.loads(json.dumps(before["snapshots"])), driven=10)
        assert found["acceptance"]["acceptance_length"] == pytest.approx(2.5) and found["acceptance"]["requests"] == 10
        assert {engine["url"] for engine in found["engines"]} == {f"{one}/metrics", f"{two}/metrics"}
        later = run(before=before["snapshots"], after=found["snapshots"])
        assert later["acceptance"] == found["acceptance"]
        with pytest.raises(SpecDecodeError, match="finished 20 requests in the window, but only 11 were driven"):
            run(urls=[one, two], before=before["snapshots"], driven=11)


def test_token_is_needed_and_never_shown():
    vllm = Vllm()
    vllm.token = "s3cret"
    with serving(vllm.page) as url:
        with pytest.raises(SpecDecodeError, match="401") as refused:
            run(urls=[url], bearer_token="wr0ng")
        assert "wr0ng" not in str(refused.value)
        assert run(urls=[url], bearer_token="s3cret")["snapshots"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that nobody but its owner trusts, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stub")])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + plain)
    return str(path)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_certificates(certificate, tmp_path):
    with serving(Vllm().page, certificate) as url:
        assert run(urls=[url], ca_path=certificate)["snapshots"]
        assert run(urls=[url], validate_certs=False)["snapshots"]
        with pytest.raises(SpecDecodeError, match="could not be scraped: .*certificate verify failed"):
            run(urls=[url])
        with pytest.raises(SpecDecodeError, match="could not be scraped: .*nowhere.pem"):
            run(urls=[url], ca_path=str(tmp_path / "nowhere.pem"))


def test_scrape_that_does_not_come():
    stop = threading.Event()

    def slow(_path, _headers):
        stop.wait(10)
        return 200, ""

    with serving(slow) as url:
        with pytest.raises(SpecDecodeError, match="could not be scraped: .*timed out"):
            run(urls=[url], timeout=1)
        stop.set()
    with serving(lambda *_: (503, "")) as url, pytest.raises(SpecDecodeError, match="could not be scraped: 503"):
        run(urls=[url])


class Prometheus:
    """The few expressions that are asked for, computed over series of ``(time, value)``."""

    def __init__(self):
        self.series = []
        self.error = ""
        for instance in ("a:8000", "b:8000"):
            target = {"job": "vllm", "instance": instance}
            model = {**target, "model_name": "m", "engine": "0"}
            self.add("up", target, [1] * 7)
            self.add("process_start_time_seconds", target, [50] * 7)
            self.add("vllm:num_requests_running", model, [0] * 7)
            for name, step in (("spec_decode_num_drafts", 10), ("spec_decode_num_draft_tokens", 30),
                               ("spec_decode_num_accepted_tokens", 15), ("request_success", 5), ("generation_tokens", 25),
                               ("prompt_tokens", 9)):  # fmt: skip
                self.add(f"vllm:{name}_total", model, [step * number for number in range(7)])
        self.add("up", {"job": "node", "instance": "a:9100"}, [0] * 7)

    def add(self, name, labels, values):
        """A value every 100 s from 1000 on; ``None`` where there is none."""
        points = [(1000 + 100 * number, value) for number, value in enumerate(values) if value is not None]
        self.series.append(({"__name__": name, **labels}, points))

    def change(self, name, instance, values):
        self.series = [
            (labels, points) for labels, points in self.series if (labels["__name__"], labels["instance"]) != (name, instance)
        ]
        model = {"model_name": "m", "engine": "0"} if name.startswith("vllm:") else {}
        self.add(name, {"job": "vllm", "instance": instance, **model}, values)

    def page(self, path, _headers):
        parts = urllib.parse.urlsplit(path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if parts.path != "/api/v1/query":
            return 404, "nothing here"
        if self.error:
            return 400, json.dumps({"status": "error", "errorType": "bad_data", "error": self.error})
        result = list(self.evaluate(query["query"], float(query["time"])))
        return 200, json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}})

    def evaluate(self, expression, at):
        function, name, matchers, span = re.fullmatch(r"(?:(\w+)\()?([\w:]*)\{(.*?)\}(?:\[(\d+)s\])?\)?", expression).groups()
        wanted = [re.fullmatch(r'(\w+)(=~?)"(.*)"', part).groups() for part in matchers.split(",") if part]
        if name:
            wanted.append(("__name__", "=", name))
        for labels, points in self.series:
            if not all(
                re.fullmatch(value, labels.get(label, "")) if how == "=~" else labels.get(label) == value
                for label, how, value in wanted
            ):
                continue
            inside = [value for moment, value in points if at - int(span or 300) <= moment <= at]
            if not inside or (not span and points[-1][0] < at - 100):
                continue
            pairs = list(itertools.pairwise(inside))
            found = {
                None: inside[-1],
                "min_over_time": min(inside),
                "count_over_time": len(inside),
                "changes": sum(a != b for a, b in pairs),
                "resets": sum(b < a for a, b in pairs),
            }[function]
            metric = labels if function is None else {key: value for key, value in labels.items() if key != "__name__"}
            yield {"metric": metric, "value": [at, str(found)]}


def ask(stub, **changes):
    with serving(stub.page) as url:
        return run(**{"prometheus_url": url, "start": "1000", "end": "1600", "selector": 'job="vllm"', **changes})


def test_range_of_a_prometheus_server():
    found = ask(Prometheus(), driven=60)
    assert found["acceptance"]["acceptance_length"] == pytest.approx(2.5)
    assert (found["acceptance"]["drafts"], found["acceptance"]["requests"], found["acceptance"]["seconds"]) == (120, 60, 600)
    assert [window["url"] for window in found["windows"]] == ["job=vllm,instance=a:8000", "job=vllm,instance=b:8000"]
    one = ask(Prometheus(), selector='{job="vllm",instance="b:8000"}', end="1970-01-01T00:20:00Z")
    assert (one["acceptance"]["requests"], one["acceptance"]["seconds"]) == (10, 200)


NONE = None


@pytest.mark.parametrize(
    ("name", "instance", "values", "words"),
    [
        # Fell and grew past its old value again: the two ends alone do not show it.
        ("vllm:generation_tokens_total", "b:8000", [0, 100, 3, 50, 100, 150, 200], "b:8000 restarted in the range: resets"),
        ("process_start_time_seconds", "a:8000", [50, 50, 60, 60, 60, 60, 60], "a:8000 restarted in the range: changes"),
        ("up", "a:8000", [1, 1, 0, 1, 1, 1, 1], "A scrape of job=vllm,instance=a:8000 failed in the range"),
        ("vllm:num_requests_running", "c:8000", [NONE, 0, 0, NONE, NONE, NONE, NONE], "vanished in the range: .*c:8000"),
        ("vllm:num_requests_running", "c:8000", [NONE, NONE, NONE, NONE, 0, 0, 0], "vanished in the range: .*c:8000"),
    ],
)
def test_what_happened_between_the_ends_is_seen(name, instance, values, words):
    stub = Prometheus()
    stub.change(name, instance, values)
    with pytest.raises(SpecDecodeError, match=words):
        ask(stub)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selector": 'job="other"'}, r'No scrape target matches \{job="other"\} in the range'),
        ({"start": "1600"}, "which is not after its start at 1600"),
        ({"start": "yesterday"}, "'yesterday' is no time"),
        ({"end": "nan"}, "'nan' is no time"),
        ({"start": "2026-01-31T12:00:00"}, "a date with its zone"),
        ({"model_name": "n"}, "serves m, not n"),
        ({"driven": 59}, "finished 60 requests in the window, but only 59 were driven"),
    ],
)
def test_questions_that_cannot_be_answered(changes, words):
    with pytest.raises(SpecDecodeError, match=words):
        ask(Prometheus(), **changes)


def test_target_that_is_no_vllm():
    stub = Prometheus()
    stub.series = [(labels, points) for labels, points in stub.series if not labels["__name__"].startswith("vllm:")]
    with pytest.raises(SpecDecodeError, match="has metrics of a vLLM model"):
        ask(stub)


def test_prometheus_that_refuses_or_is_none():
    stub = Prometheus()
    stub.error = "unexpected character"
    with pytest.raises(SpecDecodeError, match="did not answer min_over_time.*: unexpected character"):
        ask(stub)
    with serving(lambda *_: (200, "<html>")) as url, pytest.raises(SpecDecodeError, match="did not answer"):
        run(prometheus_url=url, start="1", end="2")
    with serving(lambda *_: (200, "{}")) as url, pytest.raises(SpecDecodeError, match="did not answer as Prometheus does"):
        run(prometheus_url=url, start="1", end="2")


def test_times():
    assert prometheus.instant("1700000000.5") == 1700000000.5
    assert prometheus.instant("2023-11-14T22:13:20Z") == prometheus.instant("2023-11-14T23:13:20+01:00") == 1700000000
