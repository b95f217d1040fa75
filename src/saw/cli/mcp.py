"""``saw mcp run SERVER``: the mediator of one stdio MCP server (a service of its own, outside the sandbox)."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

from saw.policy.loader import load_governance
from saw.policy.mcp import decide_tool
from saw.runtime.mcp_handed import FILE, HandedSource
from saw.runtime.mcp_mediator import GovernanceSource, Mediator
from saw.runtime.mcp_reviews import SOCKET, desk_client


def main(argv: list[str]) -> int:
    """Serve until stopped; raises ``SawError`` when the policy does not know the server."""
    parser = argparse.ArgumentParser(prog="saw mcp", description=__doc__)
    run = parser.add_subparsers(dest="command", required=True).add_parser("run", help="mediate one server")
    run.add_argument("server")
    run.add_argument("--governance", type=Path, default=Path("/run/saw/generations/current/governance.yaml"))
    run.add_argument("--listen", help="socket for the agent (default /run/saw/mcp/SERVER.sock)")
    run.add_argument("--server-socket", help="socket that starts the server (default /run/saw/mcp-server/SERVER.sock)")
    run.add_argument("--client-uid", type=int, action="append", help="user that may connect (default: 2000)")
    run.add_argument("--reviews", default=SOCKET, help="socket of the policy agent, through which people are asked")
    run.add_argument("--handed", type=Path, default=FILE, help="file with the tools that the agent was handed")
    options = parser.parse_args(argv)
    source = GovernanceSource(options.governance, options.server, load_governance)
    source.server()
    mediator = Mediator(
        options.server,
        options.listen or f"/run/saw/mcp/{options.server}.sock",
        options.server_socket or f"/run/saw/mcp-server/{options.server}.sock",
        source,
        decide_tool,
        frozenset(options.client_uid or [2000, os.getuid()]),
        ask=desk_client(options.reviews),
        handed=HandedSource(options.handed),
    )
    asyncio.run(mediator.serve())
    return 0
