# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the device's own counters say while something is measured, from a DCGM exporter. Private to the collection."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .errors import SpecDecodeError
from .vllm_metrics import Access, short

#: the exporter's gauges that tell what a decode was bound by
GAUGES = ("DCGM_FI_PROF_DRAM_ACTIVE", "DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
          "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_POWER_USAGE")  # fmt: skip
#: seconds between two looks; the exporter refreshes its gauges no oftener
EVERY_S = 1.0


def parse(text: str) -> dict[str, float]:
    """The mean over the devices of each gauge that an exporter's answer holds."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[str, list[float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in GAUGES:
                    values.setdefault(sample.name, []).append(float(sample.value))
    except ValueError as error:
        raise SpecDecodeError(f"The DCGM exporter's answer is no Prometheus text: {error}.") from error
    return {name: sum(found) / len(found) for name, found in values.items()}


class Watch:
    """Looks at an exporter again and again, and keeps the means."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen: dict[str, list[float]] = {}
        self._over = threading.Event()
        self._error: SpecDecodeError | None = None

    @property
    def means(self) -> dict[str, float]:
        """Each gauge's mean over the looks."""
        return {name: round(sum(values) / len(values), 5) for name, values in sorted(self._seen.items())}

    def look(self) -> None:
        try:
            found = parse(Access().get(self._url).text)
        except OSError as error:
            raise SpecDecodeError(
                f"The DCGM exporter at {self._url} does not answer: {short(error)}.",
                "Mend spec_device_metrics, or leave it empty.",
            ) from error
        if not found:
            raise SpecDecodeError(f"{self._url} holds none of {', '.join(GAUGES)}.", "Give the DCGM exporter's /metrics.")
        for name, value in found.items():
            self._seen.setdefault(name, []).append(value)

    def run(self) -> None:
        try:
            while not self._over.wait(EVERY_S):
                self.look()
        except SpecDecodeError as error:
            self._error = error

    def stop(self) -> None:
        self._over.set()

    def check(self) -> None:
        """Raise what went wrong while nobody was looking."""
        if self._error:
            raise self._error


@contextlib.contextmanager
def watching(url: str) -> Iterator[Watch]:
    """A watch over what happens inside; without an address there is nothing to see."""
    watch = Watch(url)
    if not url:
        yield watch
        return
    watch.look()
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()
    watch.check()
