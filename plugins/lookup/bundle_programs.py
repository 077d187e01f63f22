# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
name: bundle_programs
short_description: The node programs of this collection by their place in a bundle
version_added: "0.1.0"
description:
  - Returns one dictionary that maps paths below a bundle to the texts of the programs that run on the nodes, and of the
    library that they share with the collection's modules.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options: {}
"""

EXAMPLES = r"""
- name: Lay down the programs
  inference.spec_decode.bundle:
    path: /work/tiny-chat-eagle3/spec-decode
    files: "{{ lookup('inference.spec_decode.bundle_programs') }}"
"""

RETURN = r"""
_raw:
  description: One dictionary of texts by path.
  type: list
  elements: dict
"""

import pathlib
from typing import Any

from ansible.plugins.lookup import LookupBase

COLLECTION = pathlib.Path(__file__).resolve().parent.parent.parent


class LookupModule(LookupBase):
    """Reads the collection's own folders."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, str]]:
        programs = {path.name: path.read_text(encoding="utf-8") for path in sorted((COLLECTION / "files").glob("*.py"))}
        library = {
            f"spec_decode/{path.name}": path.read_text(encoding="utf-8")
            for path in sorted((COLLECTION / "plugins/module_utils").glob("*.py"))
        }
        return [{**programs, "spec_decode/__init__.py": "", **library}]
