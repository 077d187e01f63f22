# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an engine's Python has installed, told from its files: neither torch nor an engine is imported.

This text runs in the engine's own interpreter (see ``engines.py``), which can read its engines' syntax and has the
template library that its servers render prompts with. So it stands alone: standard library only, no relative imports.
Private to the collection.
"""

from __future__ import annotations

import ast
import datetime
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

PACKAGES = ("torch", "vllm", "specforge", "transformers", "sglang")
VLLM_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS", "_TRANSFORMERS_BACKEND_MODELS")
#: what a model class must have for its states to be captured, by method
SGLANG_SETTERS = {"eagle3": "set_eagle3_layers_to_capture", "dflash": "set_dflash_layers_to_capture"}
QUESTION = "What is 1 + 1?"
ANSWER = "It is two."


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder(package: str) -> pathlib.Path | None:
    """Where a package is installed; finding it does not import it."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return pathlib.Path(places[0]) if places else None


class Classes:
    """Classes of a package, followed through imports and base classes without running anything."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._trees: dict[pathlib.Path, ast.Module] = {}

    def lineage(
        self, file: pathlib.Path, name: str, seen: frozenset[tuple[pathlib.Path, str]] = frozenset()
    ) -> Iterator[ast.ClassDef]:
        """The class and its bases, as far as the package's own files say."""
        if (file, name) in seen or len(seen) > 40:
            return
        seen = seen | {(file, name)}
        tree = self.tree(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                yield node
                for base in node.bases:
                    yield from self.lineage(file, base_name(base), seen)
                return
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._file_of(file, node)
                        if source is not None:
                            yield from self.lineage(source, alias.name, seen)
                        return

    def tree(self, file: pathlib.Path) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[file]

    def module(self, dotted: str) -> pathlib.Path | None:
        """The file of a module of the package, by its whole dotted name."""
        parts = dotted.split(".")
        if parts[0] != self._root.name:
            return None
        base = self._root.joinpath(*parts[1:])
        return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)

    def _file_of(self, file: pathlib.Path, node: ast.ImportFrom) -> pathlib.Path | None:
        if not node.level:
            return self.module(node.module or "")
        package = file.parent
        for _level in range(node.level - 1):
            package = package.parent
        dotted = [self._root.name, *package.relative_to(self._root).parts, *(node.module or "").split(".")]
        return self.module(".".join(part for part in dotted if part))


def base_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return base_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def vllm_model(root: pathlib.Path, architecture: str) -> dict[str, Any]:
    """Whether vLLM knows the architecture, and whether its class declares the EAGLE3 interface."""
    classes = Classes(root)
    registry = root / "model_executor/models/registry.py"
    known: dict[str, tuple[str, str]] = {}
    for node in classes.tree(registry).body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if isinstance(node, ast.Assign) and names and names[0] in VLLM_TABLES and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    known[str(key.value)] = ast.literal_eval(value)
    through = architecture if architecture in known else "TransformersForCausalLM"
    if through not in known:
        return {"registered": False, "class": "", "eagle3": False}
    module, name = known[through]
    file = classes.module(module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}")
    declared = file is not None and any(
        "SupportsEagle3" in (node.name, *(base_name(base) for base in node.bases)) for node in classes.lineage(file, name)
    )
    return {"registered": architecture in known, "class": name, "eagle3": declared}


def sglang_model(root: pathlib.Path, architecture: str) -> dict[str, Any]:
    """Which methods' states SGLang's class of that architecture can be told to keep."""
    classes = Classes(root)
    for file in sorted((root / "srt/models").glob("*.py")):
        if f"class {architecture}(" in file.read_text(encoding="utf-8"):
            defined = {
                item.name
                for node in classes.lineage(file, architecture)
                for item in node.body
                if isinstance(item, ast.FunctionDef)
            }
            return {"registered": True, **{method: setter in defined for method, setter in SGLANG_SETTERS.items()}}
    return {"registered": False, **dict.fromkeys(SGLANG_SETTERS, False)}


def transformers_model(root: pathlib.Path, model_type: str) -> dict[str, Any]:
    """Whether transformers loads the model type as a causal language model."""
    tree = ast.parse((root / "models/auto/modeling_auto.py").read_text(encoding="utf-8"))
    for node in tree.body:
        names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if names == ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"]:
            pairs = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
            return {"registered": model_type in pairs}
    return {"registered": False}


def specforge_facts(root: pathlib.Path) -> dict[str, Any]:
    """The generation of its interface and its chat templates, with their fields."""
    file = root / "data/template.py"
    spec = importlib.util.spec_from_file_location("specforge_templates", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    registry = module.TEMPLATE_REGISTRY
    fields = {name: registry.get(name).model_dump() for name in registry.get_all_template_names()}
    # The scripts generation has its flags in args.py; the CLI generation moved its capture into the package.
    generation = "cli" if (root / "offline_capture").is_dir() else "scripts"
    return {"specforge_interface": generation, "templates": sorted(fields), "template_fields": fields}


def rendering(target: pathlib.Path) -> dict[str, str]:
    """A short conversation as the target's own chat template renders it, or why it does not."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

        settings_file = target / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        own = target / "chat_template.jinja"
        template = own.read_text(encoding="utf-8") if own.is_file() else settings.get("chat_template") or ""
        if isinstance(template, list):  # several by name, of which "default" is used
            template = next((item["template"] for item in template if item.get("name") == "default"), "")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)

        def refuse(message: str) -> None:
            raise ValueError(message)

        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token")
        }
        text = environment.from_string(template).render(
            messages=[{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
            add_generation_prompt=False,
            raise_exception=refuse,
            strftime_now=lambda pattern: datetime.datetime.now(datetime.timezone.utc).strftime(pattern),
            **tokens,
        )
    except Exception as error:  # whatever a foreign template raises is what the user is told
        return {"text": "", "error": f"{type(error).__name__}: {error}"}
    return {"text": text, "error": ""}


def facts(target: str) -> dict[str, Any]:
    """All answers; those about a target only if its folder is given."""
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in PACKAGES},
        "specforge_interface": "",
        "templates": [],
        "template_fields": {},
        "models": {},
    }
    if root := folder("specforge"):
        found |= specforge_facts(root)
    if not target:
        return found
    config = json.loads(pathlib.Path(target, "config.json").read_text(encoding="utf-8"))
    architecture = str((config.get("architectures") or ["unknown"])[0])
    if root := folder("vllm"):
        found["models"]["vllm"] = vllm_model(root, architecture)
    if root := folder("sglang"):
        found["models"]["sglang"] = sglang_model(root, architecture)
    if root := folder("transformers"):
        found["models"]["transformers"] = transformers_model(root, str(config.get("model_type", "")))
    return {**found, "rendering": rendering(pathlib.Path(target))}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts(sys.argv[1])))
