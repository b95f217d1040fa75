"""The reference SDK of MCP on both sides of ring 2: a client and a server over streamable HTTP, with tools that policy bounds."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mcp_packages import mcp_packages
from ring2_rig import Rig

pytestmark = [pytest.mark.control("RUN-05"), pytest.mark.control("POL-04")]

HERE = Path(__file__).parent
ADDRESS = "10.99.0.4"


class Node:
    """A Node.js process that speaks in lines of JSON."""

    def __init__(self, rig: Rig, stack: ExitStack, script: str, *arguments: object) -> None:
        words = [str(HERE / script), str(mcp_packages()), *map(str, arguments)]
        self.process = rig.namespace.popen("node", *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lines: queue.Queue[bytes] = queue.Queue()
        reader = threading.Thread(target=self._read)
        reader.start()
        stack.callback(reader.join)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def line(self) -> str:
        """Return the next line, which may take a loaded machine a minute."""
        return self._lines.get(timeout=60).decode().strip()

    def ask(self, **said: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(said).encode() + b"\n")
        self.process.stdin.flush()
        return dict(json.loads(self.line()))

    @property
    def silent(self) -> bool:
        return self._lines.empty()


@pytest.fixture(scope="module")
def sides(ring2: Rig) -> Iterator[tuple[Node, Node]]:
    """Return client and server, with the client's session open."""
    with ExitStack() as stack:
        ring2.namespace.ip("addr", "add", f"{ADDRESS}/24", "dev", "far0")
        stack.callback(ring2.namespace.ip, "addr", "del", f"{ADDRESS}/24", "dev", "far0")
        directory = ring2.directory
        server = Node(ring2, stack, "mcp_server.mjs", ADDRESS, directory / "far.pem", directory / "far.key")
        assert server.line() == "ready"
        ring2.reset()
        ring2.settled()
        ring2.name_hosts(api_example_com=ADDRESS)
        identity = ring2.svid_files()
        authority = directory / "ca/ca.pem"
        client = Node(
            ring2, stack, "mcp_client.mjs", "10.210.1.1", authority, *identity, "https://api.example.com/tools"
        )
        assert client.line() == '{"ready":true}'
        yield client, server
        ring2.name_hosts()


@pytest.fixture
def pair(rig: Rig, sides: tuple[Node, Node]) -> tuple[Node, Node]:
    rig.name_hosts(api_example_com=ADDRESS)
    return sides


def text(answer: dict[str, Any]) -> str:
    return str(answer["result"]["content"][0]["text"])


def test_a_tool_works_with_the_arguments_that_it_may_have_and_is_refused_with_others(pair: tuple[Node, Node]) -> None:
    client, server = pair
    assert {tool["name"] for tool in client.ask()["result"]["tools"]} == {"read", "publish"}
    assert text(client.ask(tool="read", args={"path": "/srv/docs/a.md"})) == "did read"
    assert json.loads(server.line()) == {"tool": "read", "arguments": {"path": "/srv/docs/a.md"}}
    for tool, args, reason in (
        ("read", {"path": "/srv/keys"}, "argument_not_allowed"),
        ("read", {"path": "/srv/docs/a.md", "mode": "raw"}, "argument_not_allowed"),
        ("erase", {}, "tool_not_allowed"),
    ):
        refused = client.ask(tool=tool, args=args)["error"]
        assert reason in refused, refused
    assert text(client.ask(tool="read", args={"path": "/srv/docs"})) == "did read", "the session goes on"
    assert json.loads(server.line())["arguments"] == {"path": "/srv/docs"}
    assert server.silent


@pytest.mark.control("REV-01")
def test_a_reviewed_tool_is_asked_again_until_a_person_has_decided_and_runs_once(
    rig: Rig, pair: tuple[Node, Node]
) -> None:
    client, server = pair
    args = {"path": "/srv/docs/a.md", "tags": ["new"]}
    waiting = client.ask(tool="publish", args=args)
    review = rig.broker.reviews.one.view.id
    assert waiting["result"]["isError"] and review in text(waiting)
    assert review in text(client.ask(tool="publish", args=args)), "asked again, under another number"
    assert server.silent
    rig.broker.reviews.move(review, "approved")
    rig.call("GET", f"/.well-known/saw/reviews/{review}?wait=20")
    done = client.ask(tool="publish", args=args)
    assert (text(done), done["result"].get("isError")) == ("did publish", None)
    assert json.loads(server.line()) == {"tool": "publish", "arguments": args}
    assert server.silent
    assert rig.broker.reviews.one.claims == 1
