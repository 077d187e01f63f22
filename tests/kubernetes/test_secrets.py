# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The cluster's API key, given as a setting, is shown by no play and stands in no object, file or process list."""

from __future__ import annotations

from lab import Lab, pretend

KEY = "k8s-Canary0f0f0f"


def test_api_key_is_shown_nowhere(cluster, tmp_path):
    pretend(cluster)
    lab = Lab(cluster, tmp_path / "lab", trials=1)
    connection = {"host": cluster.api.url, "api_key": KEY, "validate_certs": False}
    printed = lab.play("-vvv", "--diff", spec_kubernetes_connection=connection)
    printed += lab.play("-vvv", "--diff", role="teardown", spec_kubernetes_connection=connection)
    assert lab.result("acceptance")["status"] == "complete" and lab.own() == []
    assert KEY not in printed
    with cluster.store.lock:
        assert not [item for item in cluster.store.objects.values() if KEY in str(item)]
    assert not [str(path) for path in (tmp_path / "lab").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
