"""The MCP mediator process: a Unix socket for the agent, one server instance per session, the policy between them.

It runs as a user of its own outside the sandbox. Clients (the sandbox's ``saw-mcp-connect``) connect to
``/run/saw/mcp/NAME.sock``; each connection is paired with a new connection to ``/run/saw/mcp-server/NAME.sock``, for which
systemd starts a confined instance of the server. A call that people decide on is held, and asked about through the policy agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from saw.errors import SawError
from saw.policy.governance import Governance
from saw.policy.model import Decision
from saw.policy.tool_rules import McpServer
from saw.runtime.decision_log import DecisionLog
from saw.runtime.mcp_conversation import Conversation
from saw.runtime.mcp_handed import HandedSource, outside
from saw.runtime.mcp_protocol import MAX_MESSAGE, Json, Out, Session
from saw.runtime.mcp_reviews import AskDesk, Reviews

MAX_SESSIONS = 16
DRAIN_S = 5.0

DecideTool = Callable[[Governance, str, str, Json], Decision]


class MediatorError(SawError):
    """The mediator cannot serve the MCP server that was named."""

    code = "mcp_mediator"


@dataclass
class GovernanceSource:
    """The loaded generation's ``governance.yaml``, read again whenever another generation is switched in.

    ``load`` parses the file's bytes. A file that cannot be read or parsed makes :meth:`server` raise, so calls are denied.
    """

    path: Path
    name: str
    load: Callable[[bytes], Governance]
    _stamp: tuple[int, int, int] | None = None
    _governance: Governance | None = None

    def current(self) -> Governance:
        """Return the current governance; raise :class:`MediatorError` when there is none."""
        try:
            status = self.path.stat()
            stamp = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if self._governance is None or stamp != self._stamp:
                self._governance, self._stamp = self.load(self.path.read_bytes()), stamp
        except OSError as error:
            raise MediatorError(f"{self.path}: {error.strerror}", cure="see `systemctl status saw-policyd`") from error
        return self._governance

    @property
    def digest(self) -> str:
        """The policy digest of the generation in force, which is the name of its folder; empty when it has none."""
        name = Path(os.path.realpath(self.path)).parent.name
        return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""

    def server(self) -> McpServer:
        """Return the entry of this server; raise :class:`MediatorError` when the policy has none."""
        found = self.current().mcp.servers.get(self.name)
        if found is None or found.transport != "stdio":
            raise MediatorError(
                f"the policy has no stdio MCP server {self.name!r}", cure="add it under mcp.servers in governance.yaml"
            )
        return found


@dataclass
class Mediator:
    """Serves sessions on ``listen_path``; see the module's text. ``client_uids`` may connect.

    ``ask`` asks people; without it calls that they must decide on are refused. ``handed`` says which tools the agent was handed;
    without it the policy alone counts.
    """

    name: str
    listen_path: str
    server_path: str
    source: GovernanceSource
    decide_tool: DecideTool
    client_uids: frozenset[int]
    log: Callable[[Json], None] = field(default_factory=lambda: DecisionLog(sys.stderr))
    maximum: int = MAX_MESSAGE
    ask: AskDesk | None = None
    handed: HandedSource | None = None
    _active: int = field(default=0, init=False)
    _reviews: Reviews | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Make the memory that all sessions share."""
        if self.ask is not None:
            self._reviews = Reviews(self.ask, self._log, pause=asyncio.sleep)

    def decide(self, tool: str, arguments: Json) -> Decision:
        """Judge a call by the current generation; anything that goes wrong is a denial."""
        try:
            self.source.server()
            decision = self.decide_tool(self.source.current(), self.name, tool, arguments)
            passes = decision.allowed or decision.reason == "review_required"
            why = self._refusal(tool) if passes else ""
            return outside(self.name, tool, why) if why else decision
        except Exception as error:  # noqa: BLE001 - the fail-closed edge
            return Decision(
                verdict="deny", reason="tool_not_allowed", detail=f"the policy could not be consulted: {error}"
            )

    async def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Listen until cancelled; the socket is mode 0660 and replaces a stale one."""
        Path(self.listen_path).unlink(missing_ok=True)  # noqa: ASYNC240 - before anything is served
        before = os.umask(0o117)
        try:
            listening = await asyncio.start_unix_server(self._client, self.listen_path, limit=self.maximum)
        finally:
            os.umask(before)
        ready()
        async with listening:
            await listening.serve_forever()

    def _refusal(self, tool: str) -> str:
        return "" if self.handed is None else self.handed.refusal(self.name, tool)

    def _log(self, record: Json) -> None:
        self.log({**record, "policy_digest": self.source.digest})

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = struct.unpack(
            "3i", writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )[1]
        if uid not in self.client_uids or self._active >= MAX_SESSIONS:
            reason = "too many sessions" if uid in self.client_uids else f"uid {uid} may not connect"
            self._log({"event": "session_refused", "server": self.name, "reason": reason})
            writer.close()
            return
        self._active += 1
        try:
            await self._session(reader, writer)
        except (OSError, SawError) as error:
            self._log({"event": "session_failed", "server": self.name, "reason": str(error)})
        finally:
            self._active -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.source.server()
        server_reader, server_writer = await asyncio.open_unix_connection(self.server_path, limit=self.maximum)
        session = Session(
            self.name, self.source.server, self.decide, self._log, shows=lambda tool: not self._refusal(tool)
        )
        writers = {"client": writer, "server": server_writer}
        reviewed = None
        if self._reviews is not None:
            reviewed = Conversation(session, self._reviews, lambda: self.source.digest, writers)
            session.hold = reviewed.hold
        answer = session.from_server if reviewed is None else reviewed.from_server
        from_client = asyncio.create_task(self._pump(reader, session.from_client, writers, "client"))
        from_server = asyncio.create_task(self._pump(server_reader, answer, writers, "server"))
        try:
            await asyncio.wait({from_client, from_server}, return_when=asyncio.FIRST_COMPLETED)
            if from_client.done() and not from_server.done():
                if reviewed is not None:
                    reviewed.leave()
                if server_writer.can_write_eof():
                    server_writer.write_eof()
                await asyncio.wait({from_server}, timeout=DRAIN_S)
        finally:
            if reviewed is not None:
                reviewed.close()
            for task in (from_client, from_server):
                task.cancel()
            await asyncio.gather(from_client, from_server, return_exceptions=True)
            server_writer.close()
            with contextlib.suppress(OSError):
                await server_writer.wait_closed()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        judge: Callable[[bytes], list[Out]],
        writers: dict[str, asyncio.StreamWriter],
        side: str,
    ) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                self._log(
                    {"event": "message_refused", "server": self.name, "from": side, "reason": "message too large"}
                )
                if side == "client":
                    text = f'{{"jsonrpc":"2.0","id":null,"error":{{"code":-32600,"message":"over {self.maximum} bytes"}}}}\n'
                    writers["client"].write(text.encode())
                    await writers["client"].drain()
                return
            if not line.strip():
                continue
            for to, out in judge(line):
                writers[to].write(out)
                await writers[to].drain()
