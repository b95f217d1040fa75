"""Replay of the firmware's event log (TCG PC Client Platform Firmware Profile, section 10, crypto-agile format).

The log itself is not trusted: it is believed only where its replay equals the quoted PCR values. Integers are
little-endian.
"""

from __future__ import annotations

import struct

import msgspec

from saw.attest.policy_log import extend
from saw.errors import SawError

MAX_LOG = 512 * 1024
MAX_EVENTS = 4096

EV_NO_ACTION = 3
_SHA256 = 0x000B
_SIGNATURE = b"Spec ID Event03\0"
_LOCALITY = b"StartupLocality\0"
_PCR_COUNT = 24
_NO_PCR = 0xFFFFFFFF


class EventLogError(SawError):
    """The event log is malformed, cut, padded or oversize."""

    code = "event_log_malformed"


class Event(msgspec.Struct, frozen=True):
    """One measured event: its PCR, TCG type, SHA-256 digest and data."""

    pcr: int
    kind: int
    digest: bytes
    data: bytes


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.raw):
            raise EventLogError(f"the event log is cut short at byte {self.at}", cure="send the firmware's whole log")
        piece = self.raw[self.at : end]
        self.at = end
        return piece

    def words(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))

    def short(self) -> int:
        return int.from_bytes(self.take(2), "little")


def parse(raw: bytes) -> tuple[Event, ...]:
    """Parse a whole crypto-agile log; the specification event that opens it is not part of the result.

    Raises :class:`EventLogError` when it is longer than 512 KiB or 4096 events, of another format, cut, or followed by
    anything.
    """
    if len(raw) > MAX_LOG:
        raise EventLogError(f"an event log of {len(raw)} bytes is too long", cure=f"at most {MAX_LOG} bytes are read")
    reader = _Reader(raw)
    sizes = _header(reader)
    events: list[Event] = []
    while reader.at < len(raw):
        if len(events) >= MAX_EVENTS:
            raise EventLogError("the event log has too many events", cure=f"at most {MAX_EVENTS} are read")
        events.append(_event(reader, sizes))
    return tuple(events)


def replay(events: tuple[Event, ...]) -> dict[int, bytes]:
    """Return the SHA-256 PCR values 0–15 that follow from ``events``."""
    values = {pcr: bytes(32) for pcr in range(16)}
    for event in events:
        if event.kind == EV_NO_ACTION:
            # Section 10.4.5.3: a startup from a locality other than 0 is visible in the first value of PCR 0.
            if event.pcr == 0 and event.data[:16] == _LOCALITY and len(event.data) == 17 and values[0] == bytes(32):
                values[0] = bytes(31) + event.data[16:]
            continue
        values[event.pcr] = extend(values.get(event.pcr, bytes(32)), event.digest)
    return values


def _header(reader: _Reader) -> dict[int, int]:
    """Read TCG_PCClientPCREvent with TCG_EfiSpecIDEvent; return the digest size of each algorithm used."""
    pcr, kind = reader.words(2)
    reader.take(20)
    (size,) = reader.words(1)
    inner = _Reader(reader.take(size))
    if pcr != 0 or kind != EV_NO_ACTION or inner.take(16) != _SIGNATURE:
        raise EventLogError("the event log is not in the crypto-agile format", cure="boot with UEFI and a TPM 2.0")
    inner.take(8)
    (count,) = inner.words(1)
    if not 1 <= count <= 8:
        raise EventLogError(f"the event log names {count} algorithms", cure="send the firmware's own log")
    sizes = {inner.short(): inner.short() for _ in range(count)}
    inner.take(inner.take(1)[0])
    if (
        inner.at != size
        or sizes.get(_SHA256) != 32
        or len(sizes) != count
        or not all(1 <= s <= 64 for s in sizes.values())
    ):
        raise EventLogError("the event log's first event is malformed", cure="enable the SHA-256 bank of the TPM")
    return sizes


def _event(reader: _Reader, sizes: dict[int, int]) -> Event:
    """Read one TCG_PCR_EVENT2, which carries one digest for each algorithm of the header."""
    pcr, kind, count = reader.words(3)
    start = reader.at
    if (pcr >= _PCR_COUNT and not (kind == EV_NO_ACTION and pcr == _NO_PCR)) or count != len(sizes):
        raise EventLogError(f"the event log is padded or malformed at byte {start}", cure="send the firmware's own log")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        algorithm = reader.short()
        if algorithm not in sizes or algorithm in digests:
            raise EventLogError(f"the event log is padded or malformed at byte {start}", cure="send the firmware's log")
        digests[algorithm] = reader.take(sizes[algorithm])
    (length,) = reader.words(1)
    return Event(pcr=pcr, kind=kind, digest=digests[_SHA256], data=reader.take(length))
