"""What ``governance.yaml`` says of MCP servers: their tools, and what the arguments of a tool may be."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

import msgspec

from saw.policy import globs
from saw.policy.errors import NotCanonical
from saw.policy.model import Part, says
from saw.policy.paths import canonicalise_path

ActionClass = Literal["auto", "staged", "review", "deny"]
_PORTS = {"https": 443, "http": 80}


class HttpAddress(NamedTuple):
    """Where an MCP server over HTTP is called: ``scheme``, ``host`` in lower case, ``port`` and the one canonical ``path``."""

    scheme: str
    host: str
    port: int
    path: str


def http_address(url: str) -> HttpAddress:
    """Return where ``url`` leads to; raise ``ValueError`` with the reason for anything but one plain address."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it holds characters that a URL does not have")
    parts = urlsplit(url)
    host, port = (parts.hostname or "").lower(), parts.port
    port = _PORTS.get(parts.scheme, 0) if port is None else port
    if parts.scheme not in _PORTS or "@" in parts.netloc or "?" in url or "#" in url or not 0 < port < 65536:
        raise ValueError("it is not https://host[:port]/path and nothing else")
    try:
        globs.host_glob(host)
        path = canonicalise_path(parts.path or "/", allow_encoded_slash=False)
    except globs.GlobError as error:
        raise ValueError(str(error)) from None
    except NotCanonical as error:
        raise ValueError(error.message) from None
    if not globs.is_exact(host) or "*" in path or path != (parts.path or "/"):
        raise ValueError("it names one host and one path in canonical form, without wildcards")
    return HttpAddress(parts.scheme, host, port, path)


class Argument(Part, frozen=True):
    """What one argument of a tool may be.

    ``under``: an absolute path at or below this directory. ``regex``: the whole string matches (linear-time subset).
    ``min``/``max``: inclusive range of a number. ``items``: what each element of an array must be.
    """

    type: Annotated[
        Literal["string", "integer", "number", "boolean", "array", "object"],
        says("Type of the value. Objects are refused by name.", "string"),
    ] = "string"
    required: Annotated[bool, says("Whether a call without it is refused.", True)] = False
    under: Annotated[str | None, says("Directory at or below which the path must lie.", "/workspace")] = None
    regex: Annotated[str | None, says("Expression that the whole text must match.", "[A-Z]+-[0-9]{1,5}")] = None
    enum: Annotated[tuple[str | int | bool, ...], says("The values that are allowed.", ["open", "closed"])] = ()
    min: Annotated[int | float | None, says("Smallest number.", 1)] = None
    max: Annotated[int | float | None, says("Largest number.", 100)] = None
    max_length: Annotated[int | None, says("Most characters of a text, or elements of an array.", 4096)] = None
    items: Annotated[Argument | None, says("What each element of an array must be.", {"under": "/workspace"})] = None


class Reviewers(Part, frozen=True):
    """Who decides on a reviewed action, and how many of them."""

    group: Annotated[str, says("Group of the people who may decide.", "maintainers")]
    quorum: Annotated[int, says("How many of them must agree, 1 to 16.", 2)] = 1


class Tool(Part, frozen=True):
    """The class of a tool's calls and its arguments; an argument that is not listed is refused.

    ``definition`` pins what the server says of the tool (:func:`saw.policy.mcp_answers.definition_digest`).
    """

    class_: Annotated[ActionClass, says("What happens to a call with allowed arguments.", "auto")] = msgspec.field(
        name="class", default="deny"
    )
    args: Annotated[
        dict[str, Argument],
        says("The arguments by name.", {"path": {"under": "/workspace", "required": True}}),
    ] = msgspec.field(default_factory=dict)
    definition: Annotated[
        str | None,
        says(
            "Hash of the tool's definition as `saw policy definitions` prints it; another definition is not shown, and the tool "
            "refused while the server has it.",
            f"sha256:{'0' * 64}",
        ),
    ] = None
    reviewers: Annotated[
        Reviewers | None,
        says(
            "Who decides, over stdio with class review; else one of the blueprint's owners. Over HTTP an action rule says it.",
            {"group": "maintainers", "quorum": 2},
        ),
    ] = None
    expires: Annotated[str | None, says("How long such a request stays open; without it a day.", "8h")] = None


class McpServer(Part, frozen=True):
    """An MCP server, beside the sandbox over stdio or at an ``mcp`` endpoint of the policy, and the tools that may be called."""

    transport: Annotated[
        Literal["stdio", "http"], says("stdio: started beside the sandbox; http: called at its url.", "stdio")
    ]
    command: Annotated[
        tuple[str, ...],
        says("stdio: the executable and its arguments.", ["/usr/bin/mcp-server-filesystem", "/workspace"]),
    ] = ()
    url: Annotated[
        str,
        says("http: host, port and path of the mcp endpoint that is held to the tools.", "https://mcp.example.com/mcp"),
    ] = ""
    tools: Annotated[
        dict[str, Tool],
        says(
            "The tools that may be called.", {"read_file": {"class": "auto", "args": {"path": {"under": "/workspace"}}}}
        ),
    ] = msgspec.field(default_factory=dict)

    @property
    def address(self) -> HttpAddress | None:
        """Return where the server is called over HTTP, or ``None`` for one over stdio."""
        return http_address(self.url) if self.transport == "http" else None


class Mcp(Part, frozen=True):
    """All MCP servers by name."""

    servers: Annotated[
        dict[str, McpServer],
        says(
            "The servers.",
            {"files": {"transport": "stdio", "command": ["/usr/bin/mcp-server-filesystem", "/workspace"]}},
        ),
    ] = msgspec.field(default_factory=dict)
