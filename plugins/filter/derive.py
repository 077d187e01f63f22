# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Derivations from a target's config.json as filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.inference.spec_decode.plugins.module_utils import (
    awx,
    candidate,
    chain,
    derive,
    experiment,
    fit,
    gates,
    layers,
    phases,
    plots,
    report,
    status,
    targets,
)
from ansible_collections.inference.spec_decode.plugins.module_utils import draft_config as drafts
from ansible_collections.inference.spec_decode.plugins.plugin_utils.filters import as_filter


def draft_config(config: dict[str, Any], method: str = "eagle3", **options: Any) -> dict[str, Any]:
    """The draft config without its derivations."""
    return {name: field.value for name, field in drafts.draft_config(config, method, **options).items()}


class FilterModule:
    """The collection's filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        functions = {
            "arm_rows": report.arm_rows,
            "candidate_experiment": candidate.compose,
            "candidate_table": candidate.table,
            "awx_job_templates": awx.job_templates,
            "awx_workflow_nodes": awx.workflow_nodes,
            "aux_layers": layers.aux_layers,
            "chain": chain.links,
            "context_line": report.context_line,
            "dflash_target_layers": layers.dflash_target_layers,
            "draft_config": draft_config,
            "experiment": experiment.compose,
            "fit": fit.fit,
            "gate_thresholds": gates.thresholds_of,
            "inventory_yaml": report.inventory_yaml,
            "next_step": phases.next_step,
            "parameters_table": experiment.parameters_table,
            "phases": phases.selected,
            "served_aux_layers": layers.served_aux_layers,
            "spec_slug": derive.spec_slug,
            "status_lines": status.status_lines,
            "targets": targets.named,
            "verdict_fact": report.verdict_fact,
            "verdict_plots": plots.figures,
            "verdict_lines": status.verdict_lines,
            "verdict_table": report.verdict_table,
        }
        return {name: as_filter(function) for name, function in functions.items()}
