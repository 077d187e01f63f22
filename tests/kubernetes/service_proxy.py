# Copyright (c) inference.spec_decode contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Service's address: each connection goes to the first of its pods. A process of its own, so that no other part of the
double holds up the tokens that pass through.

``service_proxy.py ADDRESS PORT`` prints ``listening``, then takes its targets as JSON from each line of its standard
input, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

Target = tuple[str, int]


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.write_eof()


async def main(address: str, port: int) -> None:
    targets: list[Target] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            pod_reader, pod_writer = await asyncio.open_connection(*targets[0])
        except (IndexError, OSError):
            writer.close()
            return
        await asyncio.gather(pump(reader, pod_writer), pump(pod_reader, writer))
        for each in (writer, pod_writer):
            each.close()

    await asyncio.start_server(serve, address, port)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print("listening", flush=True)
    while line := await lines.readline():
        targets[:] = map(tuple, json.loads(line))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
