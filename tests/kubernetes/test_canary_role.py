# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role canary against the cluster's double: what it makes, measures, and takes away."""

from __future__ import annotations

from lab import Lab, changed, pretend, said


def test_side_by_side_where_a_node_takes_both_arms(cluster, tmp_path):
    pretend(cluster)
    lab = Lab(cluster, tmp_path)
    output = lab.play()
    assert "side by side" in said(output)
    result = lab.result("acceptance")
    assert [t["arm"] for t in result["trials"]] == ["standing", "trained", "trained", "standing", "standing", "trained"]
    assert result["node"] == "gpu-a" and result["differences"] == [] and result["design"]["resident"]
    assert result["hardware"] == {
        "kind": "gpu", "name": "NVIDIA-H100-80GB-HBM3", "count": 1, "cpus": 16, "memory_bytes": 64 * 2**30,
    }  # fmt: skip
    assert lab.own() == []
    assert changed(lab.play()) == 0
