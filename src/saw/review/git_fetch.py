"""How a far end is asked for the state that a push would change: Git's protocol version 2, over HTTP.

Sources: Git's ``gitprotocol-v2``, ``gitprotocol-http`` and ``gitprotocol-common``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from saw.review.messages import ReadContext, ReviewedAnswer, ReviewedCall

ADVERTISED = "application/x-git-upload-pack-advertisement"
RESULT = "application/x-git-upload-pack-result"
_FLUSH, _DELIMITER, _END = 0, 1, 2
_VERSION = ("git-protocol", "version=2")
_HEX = re.compile(rb"[0-9a-fA-F]{4}")


class NotOffered(ValueError):
    """The far end does not tell what is asked of it; the text says why."""


class Offers(msgspec.Struct, frozen=True):
    """What a far end can do: leave out contents, and the name of its object format."""

    filters: bool
    shallow: bool
    hash_name: str


def first_question(asked: ReadContext) -> ReviewedCall:
    """Return the call that asks a far end what it can do."""
    return ReviewedCall(
        method="GET", scheme=asked.scheme, host=asked.host, port=asked.port,
        path=f"{asked.repository}/info/refs?service=git-upload-pack", headers=(("accept", "*/*"), _VERSION),
    )  # fmt: skip


def second_question(asked: ReadContext, offers: Offers) -> ReviewedCall:
    """Return the call that asks for the wanted objects: with one commit of history, and without contents where that is offered.

    Contents that are wanted by name come also then.
    """
    lines = [b"command=fetch"]
    if offers.hash_name != "sha1":
        lines.append(f"object-format={offers.hash_name}".encode())
    body = b"".join(_packet(line + b"\n") for line in lines) + b"0001"
    rest = ["no-progress", "ofs-delta"]
    if asked.step == 1 and offers.shallow:
        rest.append("deepen 1")
    if offers.filters:
        rest.append("filter blob:none")
    rest += [*(f"want {name}" for name in asked.wants), "done"]
    body += b"".join(_packet(f"{line}\n".encode()) for line in rest) + b"0000"
    headers = (("content-type", "application/x-git-upload-pack-request"), ("accept", RESULT), _VERSION)
    return ReviewedCall(
        method="POST", scheme=asked.scheme, host=asked.host, port=asked.port,
        path=f"{asked.repository}/git-upload-pack", headers=headers, body=body,
    )  # fmt: skip


def offers_of(answer: ReviewedAnswer) -> Offers:
    """Return what the far end says it can do; raise :class:`NotOffered`."""
    _require(answer, ADVERTISED)
    lines = [line for line in _packets(answer.body) if isinstance(line, bytes)]
    if b"version 2" not in lines[:2]:
        raise NotOffered("the far end does not speak version 2 of Git's protocol")
    found = dict(line.partition(b"=")[::2] for line in lines)
    if b"fetch" not in found:
        raise NotOffered("the far end offers no fetch")
    features = found[b"fetch"].split()
    hash_name = found.get(b"object-format", b"sha1").decode("ascii", "replace")
    if hash_name not in {"sha1", "sha256"}:
        raise NotOffered("the far end names its objects in another way")
    return Offers(b"filter" in features, b"shallow" in features, hash_name)


def pack_of(answer: ReviewedAnswer) -> bytes:
    """Return the packfile in the far end's answer; raise :class:`NotOffered`."""
    _require(answer, RESULT)
    begun, pack = False, bytearray()
    for line in _packets(answer.body):
        if isinstance(line, int):
            continue
        if not begun:
            if line.startswith(b"ERR "):
                raise NotOffered(f"the far end says: {line[4:204].decode('utf-8', 'backslashreplace')}")
            begun = line == b"packfile"
        elif line[:1] == b"\x01":
            pack += line[1:]
        elif line[:1] == b"\x03":
            raise NotOffered(f"the far end says: {line[1:201].decode('utf-8', 'backslashreplace').strip()}")
    if not begun:
        raise NotOffered("the far end's answer has no packfile")
    return bytes(pack)


def _require(answer: ReviewedAnswer, media: str) -> None:
    kind = next((value for name, value in answer.headers if name.lower() == "content-type"), "")
    if answer.status != 200 or kind.partition(";")[0].strip() != media:
        raise NotOffered(f"the far end answered {answer.status} {kind[:80]}".rstrip())
    if answer.truncated:
        raise NotOffered(f"the far end's answer is longer than the {len(answer.body)} bytes that are read")


def _packets(data: bytes) -> Iterator[bytes | int]:
    """Yield the pkt-lines of ``data``, text without its line end, and special packets as their number."""
    at = 0
    while at < len(data):
        prefix = data[at : at + 4]
        if not _HEX.fullmatch(prefix):
            raise NotOffered("the far end's answer is not in pkt-lines")
        length = int(prefix, 16)
        if length in {_FLUSH, _DELIMITER, _END}:
            yield length
            at += 4
            continue
        if length < 4 or at + length > len(data):
            raise NotOffered("a pkt-line of the far end's answer is cut")
        line = data[at + 4 : at + length]
        # What is in a band is bytes; everything else is a line of text.
        yield line if line[:1] in {b"\x01", b"\x02", b"\x03"} else line.removesuffix(b"\n")
        at += length


def _packet(line: bytes) -> bytes:
    return f"{len(line) + 4:04x}".encode() + line
