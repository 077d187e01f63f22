# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The canary on Kubernetes as filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.inference.spec_decode.plugins.module_utils import (
    canary_measuring,
    canary_objects,
    canary_placement,
    canary_state,
    framing,
)
from ansible_collections.inference.spec_decode.plugins.plugin_utils.filters import as_filter


class FilterModule:
    """What the role canary decides, decided outside of Jinja."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        functions = {
            "canary_acceptance": canary_measuring.acceptance,
            "canary_arms": canary_measuring.canary_arms,
            "canary_by_hand": canary_objects.by_hand,
            "canary_foreign": canary_state.foreign,
            "canary_identity": canary_measuring.identity,
            "canary_labelled": canary_state.labelled,
            "canary_measuring": canary_objects.measuring_objects,
            "canary_objects": canary_objects.canary_objects,
            "canary_pods": canary_state.arm_pods,
            "canary_session_plan": canary_measuring.session_plan,
            "canary_session_arms": canary_measuring.session_arms,
            "canary_sessions": canary_measuring.sessions,
            "canary_sources": canary_measuring.staging_sources,
            "canary_staging": canary_objects.staging_objects,
            "canary_still_there": canary_measuring.still_there,
            "canary_steady": canary_state.check_steady,
            "canary_survey": canary_placement.survey,
            "canary_torn_down": canary_state.check_torn_down,
            "canary_urls": canary_measuring.urls,
            "canary_yaml": canary_objects.canary_yaml,
            "kubernetes_inventory": canary_state.inventory,
            "kubernetes_refusal": canary_state.refusal,
            "unframe": framing.unframe,
        }
        return {name: as_filter(function) for name, function in functions.items()}
