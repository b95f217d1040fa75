"""A far end that counts: it writes down every call before it answers, so that a call that arrived twice is seen.

    python far_end.py FILE      prints the port, serves until its input ends

Each line of FILE is the idempotency key, a blank and the SHA-256 of the body. Now and then an answer takes longer, so that
brokers and perimeters are killed while a call is on its way.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path
from typing import BinaryIO

SLOW_EVERY, SLOW_S = 7, 0.3


async def read_call(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, str], bytes]:
    """Return first line, headers and body of one HTTP/1.1 call whose body has a length."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return first, headers, await reader.readexactly(int(headers.get("content-length", "0")))


async def serve(file: BinaryIO) -> None:
    """Serve until the standard input ends."""
    count = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            _, headers, body = await read_call(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        file.write(f"{headers['idempotency-key']} {hashlib.sha256(body).hexdigest()}\n".encode())
        file.flush()
        count += 1
        if count % SLOW_EVERY == 0:
            await asyncio.sleep(SLOW_S)
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def main(path: Path) -> None:
    """Serve, adding to the file."""
    with path.open("ab") as file:
        asyncio.run(serve(file))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
