# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Numbers that arrive as texts become numbers, and nothing else is touched."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from ansible_collections.inference.spec_decode.plugins.module_utils import typed
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_texts_become_what_they_are():
    given = {
        "name": "7", "train_steps": "240", "dataset": {"train": "8", "regenerate": "False", "max_dropped_fraction": "0.05"},
        "serving": {"temperature": "0.0", "resident": "True", "server_arguments": ["1"]}, "one_sample": True,
    }  # fmt: skip
    found = typed.settings(given)
    assert found["name"] == "7" and found["train_steps"] == 240 and found["one_sample"] is True
    assert found["dataset"] == {"train": 8, "regenerate": False, "max_dropped_fraction": 0.05}
    assert found["serving"] == {"temperature": 0.0, "resident": True, "server_arguments": ["1"]}
    assert given["dataset"]["train"] == "8", "the given settings stay as they are"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_steps": "many"}, "train_steps must be a whole number, but is 'many'"),
        ({"dataset": {"max_dropped_fraction": "half"}}, "dataset.max_dropped_fraction must be a number"),
        ({"one_sample": "perhaps"}, "one_sample must be true or false"),
    ],
)
def test_what_is_none_is_refused(given, words):
    with pytest.raises(SpecDecodeError, match=words):
        typed.settings(given)


def test_every_number_and_flag_of_the_role_is_known():
    """A filter to int, float or bool in the role's variables marks a setting that older Ansible makes a text of."""
    settings = yaml.safe_load((ROOT / "roles/scaffold/vars/main.yml").read_text())["scaffold_settings"]
    kinds = {"| int }}": typed.WHOLE, "| float }}": typed.REAL, "| bool }}": typed.FLAG}
    marked = {}
    for section, value in settings.items():
        for name, text in value.items() if isinstance(value, dict) else {"": value}.items():
            for ending, kind in kinds.items():
                if str(text).endswith(ending):
                    marked[(section, name) if name else (section,)] = kind
    assert marked.pop(("serving", "resident")) == typed.FLAG
    assert marked == typed.KINDS
