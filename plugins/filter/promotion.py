# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Promotion records and deployments' arguments as filters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.inference.spec_decode.plugins.module_utils import promotion
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def _as_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SpecDecodeError as error:
            raise AnsibleFilterError(str(error)) from error

    return wrapped


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
        return {name: _as_filter(function) for name, function in functions.items()}
