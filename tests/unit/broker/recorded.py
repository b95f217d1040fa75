"""A recording as a bastion's recorder writes it, of a session that said one thing."""

from __future__ import annotations

import os
from pathlib import Path

from saw.identity.sealed import SealKey
from saw.sessions.messages import Closing
from saw.sessions.recording import Chunk, Ending, Event, Header, Writer


def record(file: Path, session: str, key: SealKey, said: str) -> Closing:
    """Write it, and return what the bastion then reports."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    writer = Writer(descriptor, session, key, 1024**3)
    writer.write(Chunk(header=Header(session, "ws-a", "ada", 0.0)))
    writer.write(Chunk(events=(Event(0.1, "o", said.encode()),)))
    writer.write(Chunk(ending=Ending("closed", 0, 0, len(said), "a" * 64, "b" * 64)))
    os.close(descriptor)
    return Closing("closed", 0, 0, len(said), writer.chunks, writer.digest)
