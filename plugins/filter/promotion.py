# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Promotion records and deployments' arguments as filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.inference.spec_decode.plugins.module_utils import promotion
from ansible_collections.inference.spec_decode.plugins.plugin_utils.filters import as_filter


class FilterModule:
    """The filters of the promote role."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        functions = {
            "promotion_record": promotion.record,
            "rollback_record": promotion.rolled_back,
            "promoted_config": promotion.standing_config,
            "serving_container": promotion.find_container,
            "serving_arguments": promotion.arguments_with,
        }
        return {name: as_filter(function) for name, function in functions.items()}
