# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Device counters over a trial, from a DCGM exporter's answers."""

from __future__ import annotations

import http.server
import threading

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import dcgm
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.tests.unit.measurements import WIN, judge, measurement

ANSWER = """\
# HELP DCGM_FI_PROF_DRAM_ACTIVE Ratio of cycles the device memory interface is active.
# TYPE DCGM_FI_PROF_DRAM_ACTIVE gauge
DCGM_FI_PROF_DRAM_ACTIVE{gpu="0",UUID="a",device="nvidia0"} 0.6
DCGM_FI_PROF_DRAM_ACTIVE{gpu="1",UUID="b",device="nvidia1"} 0.8
# TYPE DCGM_FI_DEV_XID_ERRORS gauge
DCGM_FI_DEV_XID_ERRORS{gpu="0"} 0
"""


@pytest.fixture
def exporter():
    """A server that answers what its ``text`` holds."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.text.encode())

        def log_message(self, *_arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.text = ANSWER
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/metrics"
    yield server
    server.shutdown()


def test_means_over_devices_and_looks(exporter, monkeypatch):
    monkeypatch.setattr(dcgm, "EVERY_S", 0.01)
    with dcgm.watching(exporter.url) as watch:
        threading.Event().wait(0.1)
    assert watch.means == {"DCGM_FI_PROF_DRAM_ACTIVE": 0.7}


def test_nothing_to_watch():
    with dcgm.watching("") as watch:
        pass
    assert watch.means == {}


def test_exporter_that_is_none_or_dies_is_an_error(exporter, monkeypatch):
    monkeypatch.setattr(dcgm, "EVERY_S", 0.01)
    with pytest.raises(SpecDecodeError, match="holds none of DCGM_FI_PROF_DRAM_ACTIVE"), dcgm.watching(exporter.url):
        exporter.text = "up 1\n"
        threading.Event().wait(0.2)
    with pytest.raises(SpecDecodeError, match="does not answer"), dcgm.watching("http://127.0.0.1:9/metrics"):
        pass


def test_watched_trials_raise_the_rigor_and_one_unwatched_does_not():
    found = measurement(*WIN)
    for each in found["trials"]:
        each["device"] = {"DCGM_FI_PROF_DRAM_ACTIVE": 0.5}
    result = judge(found)
    assert result["context"]["trained"]["grounding"]["rigor"] == "L3"
    assert result["arms"]["trained"]["device"] == {"DCGM_FI_PROF_DRAM_ACTIVE": 0.5}
    found["trials"][0]["device"] = {}
    assert judge(found)["context"]["trained"]["grounding"]["rigor"] == "L2"
