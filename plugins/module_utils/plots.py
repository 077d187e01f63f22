# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Small plots as SVG, for a page that needs no script and no network. Pure; private to the collection.

Colours are classes that the page's style sheet defines, so that a plot follows its reader's light or dark mode.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 16, 62
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """One set of points: drawn as ``line``, ``dots``, ``bars`` or ``dashed``; ``style`` is a class of the page."""

    name: str
    points: Sequence[Point]
    kind: str = "line"
    style: str = "s1"
    spread: float | None = None


class _Frame:
    """Maps values to places, and draws the axes."""

    def __init__(self, series: Sequence[Series], x_label: str, y_label: str, y_from: float | None, whole_x: bool) -> None:
        xs = [x for each in series for x, _y in each.points]
        ys = [y + sign * (each.spread or 0) for each in series for _x, y in each.points for sign in (-1, 1)]
        pad = 0.6 if whole_x else 0.0
        self.x0, self.x1 = min(xs) - pad, max(xs) + pad
        self.ticks = _ticks(min(ys) if y_from is None else y_from, max(ys))
        self.y0, self.y1 = self.ticks[0], self.ticks[-1]
        self.x_ticks: list[float] = (
            [float(x) for x in sorted(set(xs))] if whole_x else [t for t in _ticks(self.x0, self.x1) if self.x0 <= t <= self.x1]
        )
        self._labels = x_label, y_label

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / ((self.y1 - self.y0) or 1) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> list[str]:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
        for tick in self.x_ticks:
            x, y = self.x(tick), HEIGHT - BOTTOM + 16
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{_number(tick)}</text>')
        x_label, y_label = self._labels
        middle = (LEFT + WIDTH - RIGHT) / 2
        bottom = HEIGHT - BOTTOM + 33
        parts.append(f'<text class="label" x="{middle}" y="{bottom}" text-anchor="middle">{html.escape(x_label)}</text>')
        parts.append(
            f'<text class="label" x="13" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle"'
            f' transform="rotate(-90 13 {(TOP + HEIGHT - BOTTOM) / 2})">{html.escape(y_label)}</text>'
        )
        return parts


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_from: float | None = 0.0,
    whole_x: bool = True,
    level: tuple[float, str] | None = None,
) -> str:
    """One plot; ``level`` is a horizontal line with its name. An empty text if there is nothing to draw."""
    drawn = [each for each in series if each.points]
    if not drawn:
        return ""
    extent = [*drawn, Series("", [(drawn[0].points[0][0], level[0])])] if level else drawn
    frame = _Frame(extent, x_label, y_label, y_from, whole_x)
    parts = frame.draw()
    if level:
        y = frame.y(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{html.escape(level[1])}</text>')
    bars = [each for each in drawn if each.kind == "bars"]
    for each in drawn:
        parts += _series(each, frame, bars)
    parts += _legend(drawn)
    name = html.escape(title)
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg" aria-label="{name}">'
        f"<title>{name}</title>{''.join(parts)}</svg>"
    )


def _series(each: Series, frame: _Frame, bars: list[Series]) -> list[str]:
    style = each.style
    if each.kind == "bars":
        wide = 0.7 / len(bars)
        shift = (bars.index(each) - (len(bars) - 1) / 2) * wide
        return [
            f'<rect class="{style} fill" x="{frame.x(x + shift - 0.45 * wide):.1f}" y="{frame.y(y):.1f}"'
            f' width="{frame.x(0.9 * wide) - frame.x(0):.1f}" height="{max(0.0, frame.y(frame.y0) - frame.y(y)):.1f}" rx="2"/>'
            for x, y in each.points
        ]
    parts = []
    if each.spread is not None:
        mean = sum(y for _x, y in each.points) / len(each.points)
        top, bottom = frame.y(mean + each.spread), frame.y(mean - each.spread)
        parts.append(
            f'<rect class="{style} band" x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{bottom - top:.1f}"/>'
        )
        parts.append(
            f'<line class="{style} thin" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(mean):.1f}" y2="{frame.y(mean):.1f}"/>'
        )
    if each.kind in ("line", "dashed"):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in each.points)
        parts.append(f'<polyline class="{style} {each.kind}" points="{path}"/>')
    else:
        parts += [f'<circle class="{style} fill" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4.5"/>' for x, y in each.points]
    return parts


def _legend(series: Sequence[Series]) -> list[str]:
    parts, x, y = [], float(LEFT), HEIGHT - 10
    for each in series:
        parts.append(f'<rect class="{each.style} fill" x="{x:.0f}" y="{y - 9}" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="label" x="{x + 15:.0f}" y="{y}">{html.escape(each.name)}</text>')
        x += 15 + 6.4 * len(each.name) + 16
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that enclose the range."""
    span = high - low
    if span <= 1e-9 * max(1.0, abs(high)):
        span = max(abs(high), 1e-3)  # all values are one
    raw = span / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [round(number * step, 10) for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:g}"


def acceptance_by_position(shape: dict[str, Any], gaps: list[dict[str, float]]) -> str:
    """Share of drafts accepted up to each position: both arms, and what training's accuracies would give."""
    series = [
        Series(name, list(enumerate(arm["acceptance_per_position"], 1)), "bars", style)
        for (name, arm), style in zip(shape["arms"].items(), ("s1", "s2"))
    ]
    reached, points = 1.0, []
    for gap in gaps:
        reached *= gap["training"]
        points.append((gap["position"], reached))
    series.append(Series("by training's accuracy", points, "dots", "s3"))
    return chart("Acceptance by position", series, x_label="position in the draft", y_label="share accepted",
                 level=None)  # fmt: skip


def tpot_by_trial(shape: dict[str, Any]) -> str:
    """Each trial's median TPOT, with mean and standard deviation of its arm."""
    series = [
        Series(name, list(enumerate(arm["tpot_ms"]["trials"], 1)), "dots", style, arm["tpot_ms"]["std"])
        for (name, arm), style in zip(shape["arms"].items(), ("s1", "s2"))
    ]
    return chart("TPOT by trial", series, x_label="pair of trials", y_label="median TPOT, ms")


def speedup_by_k(shape: dict[str, Any]) -> str:
    """Speed-up against K: measured, fitted, and the line it must exceed."""
    lengths = shape["draft_lengths"]
    if not lengths:
        return ""
    series = [
        Series("measured", [(point["k"], point["speedup"]) for point in lengths["points"]], "dots", "s2"),
        Series("by the fitted step cost", [(point["k"], point["speedup"]) for point in lengths["curve"]], "dashed", "s3"),
    ]
    return chart("Speed-up against K", series, x_label="K, tokens drafted a step", y_label="TPOT speed-up",
                 level=(1.0, "break-even"))  # fmt: skip


def training_curves(curve: list[dict[str, Any]]) -> list[str]:
    """Loss and accuracies by step."""

    def of(key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in curve if isinstance(row.get(key), (int, float))]

    keys = sorted({key for row in curve for key in row if key.startswith("acc")})
    shown = keys[:4]
    names = {key: "accuracy" if key == "acc" else f"position {int(key.removeprefix('acc_')) + 1}" for key in shown}
    found = [
        chart("Training loss", [Series("loss", of("loss"), "line", "s1")], x_label="step", y_label="loss", whole_x=False),
        chart("Training accuracy", [Series(names[key], of(key), "line", f"s{place}") for place, key in enumerate(shown, 1)],
              x_label="step", y_label="accuracy", whole_x=False),
    ]  # fmt: skip
    return [each for each in found if each]


def figures(verdict: dict[str, Any]) -> list[dict[str, str]]:
    """All plots of a report with their captions, those that have something to show."""
    found = []
    for shape in verdict["shapes"]:
        where = f"concurrency {shape['concurrency']}"
        head = shape is verdict["shapes"][0]
        for caption, svg in (
            (f"Accepted by position, {where}", acceptance_by_position(shape, verdict["training"]["gaps"] if head else [])),
            (f"TPOT of each trial, with mean and standard deviation of its arm, {where}", tpot_by_trial(shape)),
            (f"Speed-up against K, {where}", speedup_by_k(shape)),
        ):
            if svg:
                found.append({"caption": caption, "svg": svg})
    captions = ("Training: loss", "Training: accuracy by position")
    found += [{"caption": caption, "svg": svg} for caption, svg in zip(captions, training_curves(verdict["training"]["curve"]))]
    return found
