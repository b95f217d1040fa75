"""The words of ``governance.yaml``: what the runtime policy has no words for.

Durations are written as a whole number with a unit (``120s``, ``5m``, ``8h``, ``30d``); :func:`duration` turns one into
seconds.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from saw.policy.model import Part

ActionClass = Literal["auto", "staged", "review", "deny"]

_DURATION = re.compile(r"(0|[1-9][0-9]{0,8})([smhd])\Z")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> int:
    """Return the seconds that ``text`` (such as ``120s`` or ``30d``) stands for; raise ``ValueError`` for other forms."""
    match = _DURATION.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 120s, 5m, 8h or 30d")
    return int(match[1]) * _UNITS[match[2]]


class Blueprint(Part, frozen=True):
    """Who owns this kind of workspace, and whom to call."""

    name: str
    version: str
    owner: str
    incident_contact: str = ""
    review_days: int = 90


class Lease(Part, frozen=True):
    """How long a workspace may act after its last good attestation (``ttl``), and extra time offline (``0s``)."""

    ttl: str = "120s"
    offline_ttl: str = "0s"

    @property
    def ttl_s(self) -> int:
        """Return the lease in seconds."""
        return duration(self.ttl)


class Inject(Part, frozen=True):
    """The header ring 2 sets, and its value with ``{secret}`` or ``{b64:prefix{secret}}`` filled in."""

    header: str
    format: str


class Credential(Part, frozen=True):
    """A credential that ring 2 adds to allowed calls to these ``host:port`` pairs and path globs.

    Without ``hosts`` the credential is used only where an inference route names it.
    """

    id: str
    ref: str
    inject: Inject
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ("/**",)


class InferenceRoute(Part, frozen=True):
    """A local host name that stands for a model service; ``models`` are globs over the request's ``model``."""

    alias: str
    models: tuple[str, ...]
    upstream: str
    credential: str | None = None
    port: int = 443

    @property
    def upstream_address(self) -> tuple[str, int]:
        """Return host and port of the model service."""
        parts = urlsplit(self.upstream)
        return (parts.hostname or "", parts.port or 443)

    @property
    def upstream_prefix(self) -> str:
        """Return the path that replaces the leading ``/v1`` of the agent's request, without a trailing slash."""
        return urlsplit(self.upstream).path.rstrip("/")


class Inference(Part, frozen=True):
    """All inference routes."""

    routes: tuple[InferenceRoute, ...] = ()


class GitMatch(Part, frozen=True):
    """A Git service and, for pushes, a glob over the full ref name and the kinds of change."""

    service: Literal["upload-pack", "receive-pack"]
    ref: str = "**"
    operation: tuple[Literal["create", "update", "delete"], ...] = ()


class ActionMatch(Part, frozen=True):
    """Which calls an action rule is about; everything that is written must match."""

    host: str
    port: int | None = None
    method: tuple[str, ...] = ()
    path: str = "/**"
    git: GitMatch | None = None


class Reviewers(Part, frozen=True):
    """Who decides on a reviewed action, and how many of them."""

    group: str
    quorum: int = 1


class Action(Part, frozen=True):
    """The class of the calls that match. The first matching rule decides; for a push the strictest of its refs."""

    match: ActionMatch
    class_: ActionClass = msgspec.field(name="class")
    reviewers: Reviewers | None = None
    expires: str = "24h"


class Argument(Part, frozen=True):
    """What one argument of a tool may be.

    ``under``: an absolute path at or below this directory. ``regex``: the whole string matches (linear-time subset).
    ``min``/``max``: inclusive range of a number. ``items``: what each element of an array must be.
    """

    type: Literal["string", "integer", "number", "boolean", "array", "object"] = "string"
    required: bool = False
    under: str | None = None
    regex: str | None = None
    enum: tuple[str | int | bool, ...] = ()
    min: int | float | None = None
    max: int | float | None = None
    max_length: int | None = None
    items: Argument | None = None


class Tool(Part, frozen=True):
    """The class of a tool's calls and its arguments; an argument that is not listed is refused."""

    class_: ActionClass = msgspec.field(name="class", default="deny")
    args: dict[str, Argument] = msgspec.field(default_factory=dict)


class McpServer(Part, frozen=True):
    """An MCP server that runs in the sandbox over stdio, and the tools that may be called."""

    transport: Literal["stdio", "http"]
    command: tuple[str, ...] = ()
    tools: dict[str, Tool] = msgspec.field(default_factory=dict)


class Mcp(Part, frozen=True):
    """All MCP servers by name."""

    servers: dict[str, McpServer] = msgspec.field(default_factory=dict)


class LandlockFloor(Part, frozen=True):
    """The smallest Landlock ABI that counts as enforced, and whether ``best_effort`` may load at all."""

    minimum_abi: int = 4
    allow_best_effort: bool = False


class Governance(Part, frozen=True):
    """A whole ``governance.yaml``."""

    schema: Literal[1]
    blueprint: Blueprint
    lease: Lease = Lease()
    landlock: LandlockFloor = LandlockFloor()
    allow_audit: bool = False
    plaintext: tuple[str, ...] = ()
    credentials: tuple[Credential, ...] = ()
    inference: Inference = Inference()
    actions: tuple[Action, ...] = ()
    mcp: Mcp = Mcp()

    def credential(self, identifier: str) -> Credential:
        """Return the credential with this id; raise ``KeyError`` when there is none."""
        for credential in self.credentials:
            if credential.id == identifier:
                return credential
        raise KeyError(identifier)

    def route(self, alias: str) -> InferenceRoute:
        """Return the inference route with this alias; raise ``KeyError`` when there is none."""
        for route in self.inference.routes:
            if route.alias == alias:
                return route
        raise KeyError(alias)
