"""The socket on which auditors of a perimeter host read what is kept of calls: one line of JSON asks, one answers.

Who asks is the user at the other end of the socket, as the kernel says (SO_PEERCRED, unix(7)). Nothing is answered before the
reading is in the audit trail.
"""

from __future__ import annotations

import asyncio
import base64
import pwd
import socket
import struct
from typing import Literal

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.gateway.recording import Recorder
from saw.gateway.records import MAX_LISTED, Listed

LONGEST_QUESTION = 4096
"""Longest line that asks (bytes)."""
QUESTION_S = 10.0
"""How long the desk waits for it (seconds)."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``list`` records (of one ``workspace``, older than ``before``, seconds since 1970), or ``show`` one (``record``)."""

    action: Literal["list", "show"]
    workspace: str = ""
    before: float | None = None
    limit: int = 50
    record: str = ""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A whole record. ``body`` and ``answer`` are text where they are UTF-8, else Base64, as ``encoded`` says of each."""

    record: Listed
    body: str | None
    answer: str
    encoded: tuple[str, ...] = ()


class RecordDesk:
    """Answers one question on each connection, and ends it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one question."""
        try:
            who = _user(writer)
            async with asyncio.timeout(QUESTION_S):
                line = await reader.readline()
            answer: object = await self._answer(who, line)
        except SawError as error:
            answer = {"ok": False, "error": error.code, "detail": error.message, "cure": error.cure}
        except (msgspec.DecodeError, ValueError, TimeoutError):
            answer = {
                "ok": False,
                "error": "malformed",
                "detail": "the question cannot be read",
                "cure": "use `saw inference`",
            }
        try:
            writer.write(msgspec.json.encode(answer) + b"\n")
            await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()

    async def _answer(self, who: str, line: bytes) -> dict[str, object]:
        asked = jsontext.decode(line, kind=Question)
        if asked.action == "list":
            found = await self._recorder.listed(
                who, workspace=asked.workspace, before=asked.before, limit=max(1, min(asked.limit, MAX_LISTED))
            )
            return {"ok": True, "records": found}
        whole = await self._recorder.read(who, asked.record)
        body, body_coded = (None, "") if whole.body is None else _text(whole.body)
        answer, answer_coded = _text(whole.answer)
        encoded = tuple(name for name, coded in (("body", body_coded), ("answer", answer_coded)) if coded)
        return {"ok": True, "shown": Shown(record=whole.listed, body=body, answer=answer, encoded=encoded)}


def _text(raw: bytes) -> tuple[str, str]:
    try:
        return raw.decode(), ""
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode(), "base64"


def _user(writer: asyncio.StreamWriter) -> str:
    """Return the name of the user at the other end, or its number."""
    peer: socket.socket = writer.get_extra_info("socket")
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
