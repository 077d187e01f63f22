#!/usr/bin/python
# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bundle
short_description: Lay down an experiment's bundle of files in one call
version_added: "0.1.0"
description:
  - Writes a set of text files below one folder, each of them whole or not at all, and only where its content differs.
  - Files that stand in the folder and are not named are left alone.
author:
  - inference.spec_decode contributors (@inference-spec-decode)
options:
  path:
    description: The bundle's folder. It is made if it does not exist.
    type: path
    required: true
  files:
    description: Contents by path below O(path). A mapping or a list is written as JSON.
    type: dict
    required: true
  executables:
    description: Which of the files are to be executable.
    type: list
    elements: str
    default: []
attributes:
  check_mode:
    description: Compares and writes nothing.
    support: full
  diff_mode:
    description: Shows each file's text before and after.
    support: full
"""

EXAMPLES = r"""
- name: Lay down a bundle
  inference.spec_decode.bundle:
    path: /work/tiny-chat-eagle3/spec-decode
    files:
      configs/dataset.json:
        train: 1500
        eval: 48
      run.sh: |
        #!/bin/bash
        echo hello
    executables:
      - run.sh
"""

RETURN = r"""
changed_files:
  description: Paths below the bundle's folder that were written, or would be.
  returned: always
  type: list
  elements: str
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError
from ansible_collections.inference.spec_decode.plugins.module_utils.files import (
    read_text_or_none,
    write_text,
)


def run(module: AnsibleModule) -> dict:
    """Write what differs and return what did."""
    root = os.path.realpath(module.params["path"])
    changed, diff = [], []
    for name, content in sorted(module.params["files"].items()):
        path = os.path.realpath(os.path.join(root, name))  # a link must not lead out either
        if os.path.commonpath([root, path]) != root or path == root:
            raise SpecDecodeError(f"The file name {name!r} leads out of the bundle {root}.", "Give a path below it.")
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        mode = 0o755 if name in module.params["executables"] else 0o644
        before = read_text_or_none(path)
        if before == text and (os.stat(path).st_mode & 0o777) == mode:
            continue
        changed.append(name)
        diff.append({"before_header": path, "after_header": path, "before": before or "", "after": text})
        if not module.check_mode:
            write_text(path, text, mode)
    return {"changed": bool(changed), "changed_files": changed, "diff": diff if module._diff else []}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "files": {"type": "dict", "required": True},
            "executables": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module))
    except SpecDecodeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
