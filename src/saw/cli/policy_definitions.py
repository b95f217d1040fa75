"""``saw policy definitions``: the hashes by which a policy pins what an MCP server says of its tools."""

from __future__ import annotations

import argparse
from typing import Any

from saw.cli.answers import Add, Answer, read_file
from saw.errors import ConfigError
from saw.policy.mcp_answers import definition_digest
from saw.policy.mcp_messages import MAX_MESSAGE
from saw.policy.strict_json import NotStrict, loads


def _tools(path: str) -> list[dict[str, Any]]:
    try:
        value = loads(read_file(path), limit=MAX_MESSAGE)
    except NotStrict as error:
        raise ConfigError(f"{path}: {error}", cure="save the server's answer to tools/list as it came") from error
    result = value.get("result", value) if isinstance(value, dict) else None
    tools = result.get("tools") if isinstance(result, dict) else None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools
    ):
        raise ConfigError(
            f"{path} is no answer to tools/list", cure="save the server's answer as it came, with its tools"
        )
    names = [tool["name"] for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path} has {twice[0]!r} twice", cure="have the server list each tool once")
    return tools


def definitions(options: argparse.Namespace) -> Answer:
    """Print for each tool in an answer to tools/list the hash that `definition` in governance.yaml takes.

    Read the definitions before you sign their hashes: they are what the agent is told about the tools.
    """
    found = {tool["name"]: definition_digest(tool) for tool in _tools(options.file)}
    return {"definitions": found}, "\n".join(f"{name}: {digest}" for name, digest in sorted(found.items())), 0


def register(add: Add) -> None:
    """Add the command."""
    sub = add("definitions", definitions, "print the hashes that pin the definitions of MCP tools")
    sub.add_argument("file", help="the server's answer to tools/list, as JSON")
