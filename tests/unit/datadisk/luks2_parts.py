"""A LUKS2 volume for tests, laid out by the format's specification: both headers, key slots, and data behind them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

UUID = "6d0d0b7e-4a5a-4c1c-9a55-2f6f1a3f0c11"
SIZE, OFFSET = 0x4000, 1024 * 1024


def metadata(tokens: dict[str, Any] | None = None, offset: int = OFFSET) -> dict[str, Any]:
    return {
        "keyslots": {"0": {"type": "luks2"}, "1": {"type": "luks2"}},
        "tokens": tokens or {},
        "segments": {"0": {"type": "crypt", "offset": str(offset), "size": "dynamic"}},
        "digests": {}, "config": {},
    }  # fmt: skip


def header(at: int, said: dict[str, Any] | bytes, *, label: str = "saw-home", size: int = SIZE) -> bytes:
    """One copy of the header, for the place ``at``."""
    area = (said if isinstance(said, bytes) else json.dumps(said).encode()).ljust(size - 4096, b"\0")
    binary = bytearray(4096)
    struct.pack_into(">6sHQQ48s32s64s40s", binary, 0, (b"SKUL" if at else b"LUKS") + b"\xba\xbe", 2, size, 3, label.encode(),
                     b"sha256", b"salt" * 16, UUID.encode())  # fmt: skip
    struct.pack_into(">Q", binary, 256, at)
    binary[448:480] = hashlib.sha256(binary + area).digest()
    return bytes(binary) + area


def volume(path: Path, said: dict[str, Any] | None = None, *, length: int = 2 * OFFSET, **options: Any) -> Path:
    """Write a volume of 2 MiB, or of ``length`` bytes."""
    said = said or metadata()
    raw = bytearray(length)
    raw[:SIZE], raw[SIZE : 2 * SIZE] = header(0, said, **options), header(SIZE, said, **options)
    raw[2 * SIZE : OFFSET] = b"K" * (OFFSET - 2 * SIZE)
    raw[OFFSET:] = b"D" * (length - OFFSET)
    path.write_bytes(raw)
    return path
