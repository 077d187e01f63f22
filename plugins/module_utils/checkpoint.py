# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A target's checkpoint folder, read without torch: only configs and safetensors headers. Private to the collection."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from typing import Any

from .errors import SpecDecodeError
from .files import read_json_object, sha256_file, sha256_value
from .target_config import text_config

INDEX = "model.safetensors.index.json"
#: Quantisations made for serving: hidden states captured from them are not those of the base model.
SERVING_QUANTISATIONS = frozenset(
    {
        "nvfp4", "modelopt", "modelopt_fp4", "mxfp4", "gptq", "awq", "bitsandbytes", "compressed-tensors", "gguf", "hqq",
        "aqlm", "auto-round", "eetq", "fp_quant", "higgs", "quanto", "quark", "sinq", "spqr", "torchao", "vptq",
    }
)  # fmt: skip
#: in the name of an FP8 checkpoint's method or format; compressed-tensors calls it ``float-quantized``
FP8_NAMES = ("fp8", "float8", "float-quantized")
EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEAD_SUFFIXES = ("lm_head.weight", "output.weight", "embed_out.weight")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "I8": 1,
}
#: safetensors keeps its header below this size
LARGEST_HEADER = 100 << 20


@dataclasses.dataclass(frozen=True)
class Target:
    """What the files of a checkpoint folder say of the model in it."""

    path: str
    config: dict[str, Any]
    #: tensor name → file
    weight_map: dict[str, str]
    has_index: bool
    bytes: int
    parameters: int
    dtype: str
    embedding_key: str
    embedding_shape: list[int]
    lm_head_key: str
    has_chat_template: bool
    #: changes when the config, the tokenizer or the tensors' layout or sizes do
    sha: str


def read_target(path: str, embedding_key: str = "", *, serving_copy: bool = False) -> Target:
    """Read and check a checkpoint folder. Refuses what is missing, half-copied or quantised for serving.

    ``embedding_key`` names the token embedding of a target whose own name for it is not known. A ``serving_copy``
    may be quantised: nothing is captured from it.
    """
    if not os.path.isdir(path):
        raise SpecDecodeError(f"The target {path} is not a folder.", "Give the folder of a Hugging Face checkpoint.")
    config_path = os.path.join(path, "config.json")
    if not os.path.exists(config_path):
        raise SpecDecodeError(
            f"The target {path} has no config.json.", "Give the folder that holds config.json, weights and tokenizer."
        )
    config = read_json_object(config_path, "target's config")
    if not serving_copy:
        _refuse_quantised(config, path)
    weight_map, has_index, headers = _weights(path)
    tokenizer = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(path, name))]
    if not tokenizer:
        raise SpecDecodeError(
            f"The target {path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}).",
            "Copy the tokenizer's files too.",
        )
    if embedding_key and embedding_key not in weight_map:
        raise SpecDecodeError(f"The target {path} has no tensor {embedding_key}.", "Mend embedding_key.")
    embedding = embedding_key or _key(weight_map, EMBEDDING_SUFFIXES)
    if not embedding:
        raise SpecDecodeError(
            f"No tensor of the target {path} is a token embedding (none ends in {', '.join(EMBEDDING_SUFFIXES)}).",
            "Give its name as embedding_key.",
        )
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    return Target(
        path=path,
        config=config,
        weight_map=weight_map,
        has_index=has_index,
        bytes=sum(os.path.getsize(os.path.join(path, name)) for name in headers),
        parameters=sum(math.prod(info["shape"]) for info in tensors.values()),
        dtype=_main_dtype(tensors),
        embedding_key=embedding,
        embedding_shape=list(tensors[embedding]["shape"]),
        lm_head_key=_key(weight_map, HEAD_SUFFIXES) or embedding,
        has_chat_template=_has_chat_template(path),
        sha=_identity(path, headers, tokenizer),
    )


def read_header(path: str) -> dict[str, Any]:
    """Tensor name → ``{dtype, shape, data_offsets}`` of a safetensors file whose size agrees with its header."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else LARGEST_HEADER + 1
            if length > LARGEST_HEADER or length + 8 > size:
                raise _half_copied(path, f"its header of {length} bytes does not fit into the file of {size} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
    except OSError as error:
        raise SpecDecodeError(f"The weight file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise _half_copied(path, "its header is no JSON") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if end != size:
        raise _half_copied(path, f"its header describes {end} bytes, but the file has {size}")
    return header


def _half_copied(path: str, reason: str) -> SpecDecodeError:
    return SpecDecodeError(f"The weight file {path} is not whole: {reason}.", "Copy it again.")


def _weights(path: str) -> tuple[dict[str, str], bool, dict[str, dict[str, Any]]]:
    index_path = os.path.join(path, INDEX)
    names = sorted(name for name in os.listdir(path) if name.endswith(".safetensors"))
    if os.path.exists(index_path):
        weight_map = read_json_object(index_path, "target's weight index").get("weight_map", {})
        wanted = sorted(set(weight_map.values()))
        missing = [name for name in wanted if name not in names]
        if missing or not wanted:
            raise SpecDecodeError(
                f"The target {path} is not whole: {INDEX} names {len(wanted)} weight files,"
                f" of which {len(missing)} are missing ({', '.join(missing[:3]) or 'it names none'}).",
                "Copy the checkpoint again.",
            )
        headers = {name: read_header(os.path.join(path, name)) for name in wanted}
        for tensor, name in weight_map.items():
            if tensor not in headers[name]:
                raise SpecDecodeError(
                    f"The target {path} is not whole: {INDEX} places tensor {tensor} in {name}, which lacks it.",
                    "Copy the checkpoint again.",
                )
        return weight_map, True, headers
    if not names:
        raise SpecDecodeError(
            f"The target {path} has no safetensors weights.",
            "Convert the checkpoint to safetensors, or copy its weights.",
        )
    headers = {name: read_header(os.path.join(path, name)) for name in names}
    return {tensor: name for name, header in headers.items() for tensor in header}, False, headers


def _refuse_quantised(config: dict[str, Any], path: str) -> None:
    parts = [config, text_config(config)]  # a wrapper's language model may say it for itself
    keys = ("quantization_config", "compression_config")
    found: Any = next((part[key] for part in parts for key in keys if part.get(key)), {})
    if not isinstance(found, dict):
        return
    names = {str(found.get(key, "")).lower() for key in ("quant_method", "quant_algo", "format")} - {""}
    bad = {name for name in names for refused in SERVING_QUANTISATIONS if name.startswith(refused)}
    if bad and not any(fp8 in name for name in names for fp8 in FP8_NAMES):
        raise SpecDecodeError(
            f"The target {path} is quantised for serving ({', '.join(sorted(bad))}); a draft must be trained on the"
            " hidden states of the base checkpoint in BF16 or FP8.",
            "Give the base checkpoint.",
        )


def _key(weight_map: dict[str, str], suffixes: tuple[str, ...]) -> str:
    """The shortest tensor name with one of the suffixes: a nested tower's tensors have longer ones."""
    for suffix in suffixes:
        found = [name for name in weight_map if name == suffix or name.endswith(f".{suffix}")]
        if found:
            return min(found, key=lambda name: (name.count("vision") + name.count("audio"), len(name), name))
    return ""


def _main_dtype(tensors: dict[str, Any]) -> str:
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info["dtype"]] = sizes.get(info["dtype"], 0) + math.prod(info["shape"])
    return max(sizes, key=lambda name: sizes[name], default="BF16")


def _has_chat_template(path: str) -> bool:
    if os.path.isfile(os.path.join(path, "chat_template.jinja")):
        return True
    config = os.path.join(path, "tokenizer_config.json")
    return os.path.isfile(config) and bool(read_json_object(config, "tokenizer's config").get("chat_template"))


def _identity(path: str, headers: dict[str, dict[str, Any]], tokenizer: list[str]) -> str:
    """A checksum that costs no pass over the weights: small files by their bytes, weights by header, size and samples."""
    small = {name: sha256_file(os.path.join(path, name)) for name in ["config.json", *tokenizer]}
    if os.path.isfile(os.path.join(path, "chat_template.jinja")):
        small["chat_template.jinja"] = sha256_file(os.path.join(path, "chat_template.jinja"))
    weights = {name: [sha256_value(header), _sample(os.path.join(path, name))] for name, header in headers.items()}
    return sha256_value([small, weights])


def _sample(path: str, pieces: int = 16, length: int = 4096) -> str:
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        found = []
        for piece in range(pieces):
            stream.seek(max(0, size - length) * piece // (pieces - 1))
            found.append(stream.read(length).hex())
    return sha256_value([size, found])
