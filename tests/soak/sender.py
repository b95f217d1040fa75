"""Perimeters that send approved calls: the gatekeeper's own sender, link, spool and tickets, one process for each.

    python sender.py TOLD      prints "ready", works until its input ends or it is killed

TOLD is JSON (:class:`Told`). All processes of one call have the same certificate, so the broker sees one perimeter, and they
race for what is approved. In place of Envoy a relay asks for the ticket as Envoy's authorisation does, once, and brings the call
to the far end. In place of policy stands a judge that allows: what is looked at here is how often something is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import msgspec
from far_end import read_call

from saw.audit.events import EventFactory
from saw.gateway.config import GatekeeperConfig, Ring2Config
from saw.gateway.envoy_parts import LOCAL_MARK, SEND_TICKET
from saw.gateway.judge import Call, Judge, Verdict
from saw.gateway.link import BrokerLink
from saw.gateway.review_link import ReviewLink
from saw.gateway.review_send import Sender
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.gateway.view import ViewKeeper


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where everything is. ``ships``: the first process ships its audit events to the broker, as a gatekeeper does."""

    name: str
    broker_port: int
    far_port: int
    directory: str
    ca_file: str
    processes: int = 1
    ships: bool = True


class Allows:
    """A judge whose every verdict is yes."""

    async def decide_approved(
        self, call: Call, workspace_id: str, policy_digest: str, review: str, *, rule: str = ""
    ) -> Verdict:
        """Return a verdict that lets an approved call go, whatever ``rule`` asked for the review."""
        del rule
        host, _, port = call.authority.partition(":")
        return Verdict(
            call=call, time=datetime.now(UTC), allowed=True, host=host, port=int(port or 443), workspace_id=workspace_id,
            policy_digest=policy_digest, review=review,
        )  # fmt: skip

    async def give_back(self, verdict: Verdict, why: str) -> None:
        """Nothing was reserved."""


class Relay:
    """What Envoy is to a sender: takes a call on a Unix socket, has its ticket checked, brings it to the far end once."""

    def __init__(self, tickets: Tickets[Verdict], port: int) -> None:
        self._tickets = tickets
        self._port = port

    async def bring(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bring one call."""
        try:
            first, headers, body = await read_call(reader)
            method, path, _ = first.decode("latin-1").split(" ", 2)
            ticket = headers.pop(SEND_TICKET, "")
            if self._tickets.redeem(ticket, (method, headers["host"], path)) is None:
                writer.write(f"HTTP/1.1 403 Forbidden\r\n{LOCAL_MARK}: UAEX\r\ncontent-length: 0\r\n\r\n".encode())
                return
            answer, far = await asyncio.open_connection("127.0.0.1", self._port)
            lines = [first.decode("latin-1"), *(f"{name}: {value}" for name, value in headers.items())]
            far.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
            writer.write(await answer.read())
            far.close()
        finally:
            with contextlib.suppress(ConnectionError):
                writer.close()


def settings(told: Told, number: int) -> GatekeeperConfig:
    """Return the configuration of one process, in a directory of its own."""
    directory = Path(told.directory) / f"sender{number}"
    directory.mkdir(mode=0o700, exist_ok=True)
    certificate = Path(told.directory)
    return GatekeeperConfig(
        name=told.name, broker_url=f"https://127.0.0.1:{told.broker_port}", ca_file=Path(told.ca_file),
        cert_file=certificate / "cert.pem", key_file=certificate / "key.pem", tuf_root_file=certificate / "none",
        state_dir=directory, ring2=Ring2Config(broker_address="127.0.0.1:1", send_socket=directory / "send.sock"),
        poll_wait_s=10,
    )  # fmt: skip


async def work(told: Told, number: int) -> None:
    """Send for ever."""
    config = settings(told, number)
    spool = Spool(config.state_dir, config.name, config.spool_limit)
    tickets = Tickets[Verdict](time.monotonic)
    config.ring2.send_socket.unlink(missing_ok=True)
    await asyncio.start_unix_server(Relay(tickets, told.far_port).bring, config.ring2.send_socket)
    factory = EventFactory("saw-gatekeeper", host=config.name, new_uid=lambda: str(uuid.uuid4()))
    sender = Sender(
        cast(Judge, Allows()), ReviewLink(config), spool, factory, tickets, socket=config.ring2.send_socket,
        doubt=lambda: "", now=lambda: datetime.now(UTC), wait_s=config.poll_wait_s,
    )  # fmt: skip
    async with asyncio.TaskGroup() as group:
        group.create_task(sender.run_forever())
        if told.ships and number == 0:
            # Shipping needs no view of the workspaces.
            group.create_task(BrokerLink(config, cast(ViewKeeper, None), spool).ship_forever())


def main(told: Told) -> None:
    """Start every process, and end them with the standard input."""
    children = []
    for number in range(told.processes):
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            asyncio.run(work(told, number))
            os._exit(1)
        children.append(child)
    print("ready", *children, flush=True)
    sys.stdin.read()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Told))
