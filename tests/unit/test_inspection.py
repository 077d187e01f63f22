# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages are read and never imported: every file here would raise if it were."""

from __future__ import annotations

import json
import sys

import pytest
from ansible_collections.inference.spec_decode.plugins.module_utils import engines, inspection
from ansible_collections.inference.spec_decode.plugins.module_utils.errors import SpecDecodeError

BOOM = "raise RuntimeError('imported')\n"


def package(folder, name, files):
    for path, text in files.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder / name


@pytest.fixture
def vllm(tmp_path):
    registry = (
        "_TEXT_GENERATION_MODELS = {\n"
        "    'PlainForCausalLM': ('plain', 'PlainForCausalLM'), 'OwnForCausalLM': ('own', 'OwnForCausalLM'),\n"
        "    'ChildForCausalLM': ('child', 'ChildForCausalLM'), 'NewForCausalLM': ('vllm.models.new', 'NewForCausalLM'),\n"
        "    'LostForCausalLM': ('lost', 'LostForCausalLM'), 'LoopForCausalLM': ('loop', 'LoopForCausalLM'),\n"
        "}\n"
        "_TRANSFORMERS_BACKEND_MODELS = {'TransformersForCausalLM': ('own', 'OwnForCausalLM')}\n"
        "_SPECULATIVE_DECODING_MODELS = {'Draft': ('own', 'OwnForCausalLM')}\n"
    )
    return package(tmp_path, "vllm", {
        "model_executor/models/registry.py": BOOM + registry,
        "model_executor/models/plain.py": BOOM + "class PlainForCausalLM(nn.Module, SupportsPP): pass\n",
        "model_executor/models/own.py": BOOM + "class OwnForCausalLM(nn.Module, interfaces.SupportsEagle3): pass\n",
        "model_executor/models/child.py": BOOM + "from .own import OwnForCausalLM as Base\nclass ChildForCausalLM(Base): pass\n",
        "models/new/__init__.py": BOOM + "if cuda:\n    from .gpu.model import NewForCausalLM\nelse:\n    pass\n",
        "models/new/gpu/model.py": BOOM + "from vllm.model_executor.models.child import ChildForCausalLM\n"
        "class NewForCausalLM(ChildForCausalLM): pass\n",
        "model_executor/models/loop.py": BOOM + "from .loop import LoopForCausalLM\n",
    })  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("PlainForCausalLM", {"registered": True, "class": "PlainForCausalLM", "eagle3": False}),
        ("OwnForCausalLM", {"registered": True, "class": "OwnForCausalLM", "eagle3": True}),
        ("ChildForCausalLM", {"registered": True, "class": "ChildForCausalLM", "eagle3": True}),
        ("NewForCausalLM", {"registered": True, "class": "NewForCausalLM", "eagle3": True}),
        ("LostForCausalLM", {"registered": True, "class": "LostForCausalLM", "eagle3": False}),
        ("LoopForCausalLM", {"registered": True, "class": "LoopForCausalLM", "eagle3": False}),
        ("UnknownForCausalLM", {"registered": False, "class": "OwnForCausalLM", "eagle3": True}),
        ("Draft", {"registered": False, "class": "OwnForCausalLM", "eagle3": True}),
    ],
)
def test_interface_is_found_through_imports_and_bases(vllm, architecture, expected):
    assert inspection.vllm_model(vllm, architecture) == expected


def test_capture_setters_of_sglang(tmp_path):
    root = package(tmp_path, "sglang", {
        "srt/models/llama.py": BOOM + "class LlamaForCausalLM(nn.Module):\n"
        "    def set_eagle3_layers_to_capture(self, ids): pass\n",
        "srt/models/phi.py": BOOM + "from sglang.srt.models.llama import LlamaForCausalLM\n"
        "class PhiForCausalLM(LlamaForCausalLM):\n    def set_dflash_layers_to_capture(self, ids): pass\n",
    })  # fmt: skip
    assert inspection.sglang_model(root, "LlamaForCausalLM") == {"registered": True, "eagle3": True, "dflash": False}
    assert inspection.sglang_model(root, "PhiForCausalLM") == {"registered": True, "eagle3": True, "dflash": True}
    assert inspection.sglang_model(root, "OtherForCausalLM") == {"registered": False, "eagle3": False, "dflash": False}


def test_model_types_of_transformers(tmp_path):
    text = BOOM + "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict([('qwen3', 'Qwen3ForCausalLM')])\nOTHER = ['bert']\n"
    root = package(tmp_path, "transformers", {"models/auto/modeling_auto.py": text})
    assert inspection.transformers_model(root, "qwen3")["registered"]
    assert not inspection.transformers_model(root, "bert")["registered"]


def target(tmp_path, template, as_file=False, **settings):
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", {"bos_token": "<s>"}),
        (
            [
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": "<s>{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}"},
            ],
            {},
        ),
        (
            "{% if strftime_now('%Y') | length != 4 %}{{ raise_exception('no year') }}{% endif %}{{ bos_token }}"
            "{% for m in messages %}{% if false %}{% break %}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            {"bos_token": {"content": "<s>"}},
        ),
    ],
)
def test_templates_render_as_a_server_renders_them(tmp_path, template, settings):
    found = inspection.rendering(target(tmp_path, template, **settings))
    assert found == {"text": f"<s>[user]{inspection.QUESTION}[assistant]{inspection.ANSWER}", "error": ""}


def test_template_in_a_file_wins(tmp_path):
    target(tmp_path, "{{ messages[1].content }}", as_file=True, chat_template="old")
    assert inspection.rendering(tmp_path)["text"] == inspection.ANSWER


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "ValueError: roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[7].content }}", "UndefinedError"),
    ],
)
def test_template_that_does_not_render_says_why(tmp_path, template, words):
    assert words in inspection.rendering(target(tmp_path, template))["error"]


def test_facts_are_asked_of_another_interpreter(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["XForCausalLM"], "model_type": "x"}))
    found = engines.engine_facts(sys.executable, str(target(tmp_path, "{{ messages[1].content }}")))
    assert found["python"] == sys.version.split()[0] and found["rendering"]["text"] == inspection.ANSWER
    assert found["specforge_interface"] == "" and found["models"] == {}


def test_interpreter_that_fails_is_one_clear_error(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SpecDecodeError, match="fails: ImportError: no such thing"):
        engines.engine_facts(str(broken))
