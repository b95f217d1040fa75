"""``saw expose``: look at a server that runs in a workspace, from this machine, by a grant and through the bastion.

One session carries all connections to one port. It listens on this machine's loopback address alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from saw.broker.client import load_context
from saw.cli.operator_options import add_options, show
from saw.cli.ssh import certify
from saw.errors import ConfigError, SawError
from saw.mux import Mux
from saw.ports import listen_tcp
from saw.sessions.ssh_client import ssh_line

LOOPBACK = "127.0.0.1"


class Ended(SawError):
    """What carried the connections has ended."""

    code = "forward_ended"


def main(argv: list[str]) -> int:
    """Run ``saw expose``; it ends with an interrupt or with the session."""
    parser = argparse.ArgumentParser(prog="saw expose", description=__doc__)
    parser.add_argument("workspace", help="workspace id")
    parser.add_argument("--port", type=int, required=True, help="port of the server in the workspace, 1024 to 65535")
    parser.add_argument("--local", type=int, help="port on this machine (default: the same)")
    add_options(parser)
    options = parser.parse_args(argv)
    context = load_context(options.context)
    if context.bastion is None:
        raise ConfigError("the context names no bastion", cure="ports are reached through one alone: write it there")
    local = options.port if options.local is None else options.local
    # Before a certificate is used up: nothing is asked for that could not be used.
    listener = listen_tcp("saw expose", LOOPBACK, local, backlog=64, setting="--local")
    with listener, tempfile.TemporaryDirectory(prefix="saw-expose-") as name:
        directory = Path(name)  # 0700, removed with the key
        to = certify(context, options.workspace, directory, 120, forward_port=options.port)
        line = ssh_line(directory, to.alias, to.user, to.address, [], terminal=False)
        address = f"http://localhost:{listener.getsockname()[1]}"
        told: dict[str, Any] = {"workspace": options.workspace, "port": options.port, "url": address}
        text = f"port {options.port} of {options.workspace} is at {address} until you interrupt this"

        def ready() -> None:
            show(told, text, as_json=options.json)
            sys.stdout.flush()

        return asyncio.run(_carry(line, listener, ready))


async def _carry(line: list[str], listener: Any, ready: Any) -> int:
    """Carry connections of ``listener`` through ``line`` until it ends (:class:`Ended`) or a signal comes (0)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    # What ssh and the bastion say goes to the person's terminal as it comes.
    ssh = await asyncio.create_subprocess_exec(
        *line, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert ssh.stdin and ssh.stdout  # noqa: S101 - they were asked for
    mux = Mux(ssh.stdout, ssh.stdin)
    running = asyncio.create_task(mux.run())
    spoken, stopped = asyncio.create_task(mux.ready.wait()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, spoken, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if spoken.done() and not stopped.done():
            server = await asyncio.start_server(mux.carry, sock=listener)
            ready()
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            server.close()
        if stopped.done():
            return 0
        running.result()
        raise Ended("the session has ended", cure="what the bastion said stands above; saw sessions lists it")
    finally:
        for task in (running, spoken, stopped):
            task.cancel()
        await asyncio.gather(running, spoken, stopped, return_exceptions=True)
        with contextlib.suppress(ProcessLookupError):
            ssh.terminate()
        await ssh.wait()
