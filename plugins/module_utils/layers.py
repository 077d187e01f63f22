# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which of a target's layers a draft reads, and how each program counts them. Private to the collection."""

from __future__ import annotations

from typing import Any

from .errors import SpecDecodeError
from .target_config import layer_count

#: SpecForge's rules, as experiment.json states them
AUX_RULE = "[1, L//2-1, L-4]"
DFLASH_RULE = "[L//2] for one draft layer, else round(1 + i*(L-4)/(D-1))"
DFLASH_LAYERS = 5


def aux_layers(config_or_count: Any) -> list[int]:
    """EAGLE3's three layers ``[1, L//2 - 1, L - 4]``: outputs of decoder layers, counted from 0 (SpecForge)."""
    count = layer_count(config_or_count)
    layers = [1, count // 2 - 1, count - 4]
    if not 0 <= layers[0] < layers[1] < layers[2] < count:
        raise SpecDecodeError(
            f"A target with {count} layers is too shallow for the aux layers [1, L//2-1, L-4] = {layers},"
            " which must be distinct and ascending (from 7 layers on they are).",
            "Give the layers yourself, for example -e aux_layers=0,1,2.",
        )
    return layers


def dflash_target_layers(config_or_count: Any, draft_layers: int = DFLASH_LAYERS) -> list[int]:
    """DFlash's layers for a draft of D layers: ``[L//2]`` for D = 1, else ``round(1 + i*(L-4)/(D-1))`` (SpecForge)."""
    count = layer_count(config_or_count)
    if isinstance(draft_layers, bool) or not isinstance(draft_layers, int) or draft_layers < 1:
        raise SpecDecodeError(f"A DFlash draft needs at least one layer, not {draft_layers!r}.", "Mend num_hidden_layers.")
    layers = (
        [count // 2]
        if draft_layers == 1
        else [round(1 + index * (count - 4) / (draft_layers - 1)) for index in range(draft_layers)]
    )
    if sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= count:
        raise SpecDecodeError(
            f"A target with {count} layers is too shallow for a DFlash draft of {draft_layers} layers, whose target"
            f" layers would be {layers}; they must be distinct and ascending.",
            "Give fewer draft layers, or the layers yourself with -e aux_layers=.",
        )
    return layers


def checked_layers(layers: list[int], count: int) -> list[int]:
    """Explicit layers, refused unless they are distinct, ascending and the target's."""
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= count:
        raise SpecDecodeError(
            f"The aux layers {layers} must be distinct, ascending and between 0 and {count - 1}.", "Mend aux_layers."
        )
    return list(layers)


def served_aux_layers(layers: list[int], method: str = "eagle3") -> list[int]:
    """The same layers in vLLM's convention. For EAGLE3 its id k is "after k layers": plus one. For DFlash it adds that itself."""
    return [layer + 1 for layer in layers] if method == "eagle3" else list(layers)


def as_layers(value: Any) -> list[int]:
    """Layer ids from a list or a text such as ``1,7,12``."""
    items = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    try:
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise SpecDecodeError(f"The aux layers {value!r} are no list of layer ids.", "Write them as 1,7,12.") from None
