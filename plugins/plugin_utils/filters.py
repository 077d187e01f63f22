# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions of module_utils as filters. Private to the collection."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError


def as_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its error for a user as the filter's error."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SpecDecodeError as error:
            raise AnsibleFilterError(str(error)) from error

    return wrapped
