"""The words of ``governance.yaml``: what the runtime policy has no words for.

Durations are written as a whole number with a unit (``120s``, ``5m``, ``8h``, ``30d``); :func:`duration` turns one into
seconds.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from saw.policy.model import Part, says

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

    name: Annotated[str, says("Name of the blueprint; lower-case letters, digits and dashes.", "coding")]
    version: Annotated[str, says("Version of this text: three numbers, as in semantic versioning.", "1.0.0")]
    owner: Annotated[str, says("The team that answers for the blueprint.", "team-dev-platform")]
    incident_contact: Annotated[str, says("Whom to call when a workspace misbehaves.", "soc@example.com")] = ""
    review_days: Annotated[int, says("Days after which the owner looks at the blueprint again.", 90)] = 90


LONGEST_TRUST_S = 600
"""Life of a workspace's certificate (seconds): how long anything can follow from one attestation."""


class Lease(Part, frozen=True):
    """How long a workspace may act after its last good attestation (``ttl``), and how much longer in an outage of the broker.

    ``offline_ttl`` counts only while the perimeter cannot reach the broker. Both together are bounded by
    :data:`LONGEST_TRUST_S` where there is an ``offline_ttl``.
    """

    ttl: Annotated[str, says("Time from one good attestation to the refusal of calls; 30s to 1h.", "120s")] = "120s"
    offline_ttl: Annotated[
        str, says("Extra time while the perimeter has lost the broker; with ttl at most 10m.", "0s", "5m")
    ] = "0s"

    @property
    def ttl_s(self) -> int:
        """Return the lease in seconds."""
        return duration(self.ttl)

    @property
    def offline_ttl_s(self) -> int:
        """Return the extra time without a broker in seconds."""
        return duration(self.offline_ttl)


class Inject(Part, frozen=True):
    """The header ring 2 sets, and its value with ``{secret}`` or ``{b64:prefix{secret}}`` filled in."""

    header: Annotated[str, says("Name of the header.", "Authorization")]
    format: Annotated[
        str,
        says("Its value, with the secret in place.", "Bearer {secret}", "Basic {b64:x-access-token:{secret}}"),
    ]


class Credential(Part, frozen=True):
    """A credential that ring 2 adds to allowed calls to these ``host:port`` pairs and path globs.

    Without ``hosts`` the credential is used only where an inference route names it.
    """

    id: Annotated[str, says("Name of the credential in this file and in the audit trail.", "git-token")]
    ref: Annotated[str, says("Where the secret lies: store and path, never the secret itself.", "local:git-token")]
    inject: Annotated[
        Inject, says("How it is put into a call.", {"header": "Authorization", "format": "Bearer {secret}"})
    ]
    hosts: Annotated[
        tuple[str, ...], says("Exact host and port of each service that may receive it.", ["git.example.com:443"])
    ] = ()
    paths: Annotated[tuple[str, ...], says("Globs over the paths that receive it.", ["/team/**"])] = ("/**",)


class InferenceRoute(Part, frozen=True):
    """A local host name that stands for a model service; ``models`` are globs over the request's ``model``."""

    alias: Annotated[str, says("The exact host name that the agent calls.", "inference.local")]
    models: Annotated[tuple[str, ...], says("Globs over the model that a request names.", ["demo-*"])]
    upstream: Annotated[
        str, says("The model service; its path takes the place of the leading /v1.", "https://models.example.com/v1")
    ]
    credential: Annotated[str | None, says("Id of the credential for the service.", "model-key")] = None
    port: Annotated[int, says("Port of the alias.", 443)] = 443
    budget: Annotated[
        str | None,
        says("Id of the budget that pays. This version does not meter: every call of the route is refused.", "spend"),
    ] = None

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

    routes: Annotated[
        tuple[InferenceRoute, ...],
        says(
            "The routes, each with its own alias and port.",
            [{"alias": "inference.local", "models": ["demo-*"], "upstream": "https://models.example.com/v1"}],
        ),
    ] = ()


class GitMatch(Part, frozen=True):
    """A Git service and, for pushes, a glob over the full ref name and the kinds of change."""

    service: Annotated[
        Literal["upload-pack", "receive-pack"],
        says("receive-pack for pushes, upload-pack for fetches.", "receive-pack"),
    ]
    ref: Annotated[str, says("Glob over the full name of the ref that is pushed.", "refs/heads/agent/**")] = "**"
    operation: Annotated[
        tuple[Literal["create", "update", "delete"], ...],
        says("What happens to the ref; empty: anything.", ["create", "update"]),
    ] = ()


class ActionMatch(Part, frozen=True):
    """Which calls an action rule is about; everything that is written must match."""

    host: Annotated[str, says("Host name or glob.", "git.example.com")]
    port: Annotated[int | None, says("Port; absent: any.", 443)] = None
    method: Annotated[tuple[str, ...], says("HTTP methods; empty: any.", ["POST", "PUT"])] = ()
    path: Annotated[str, says("Glob over the canonical path.", "/team/**")] = "/**"
    git: Annotated[
        GitMatch | None,
        says(
            "Only this Git service, and for pushes only these refs.", {"service": "receive-pack", "ref": "refs/tags/**"}
        ),
    ] = None


class Reviewers(Part, frozen=True):
    """Who decides on a reviewed action, and how many of them."""

    group: Annotated[str, says("Group of the people who may decide.", "maintainers")]
    quorum: Annotated[int, says("How many of them must agree, 1 to 16.", 2)] = 1


class Action(Part, frozen=True):
    """The class of the calls that match. The first matching rule decides; for a push the strictest of its refs."""

    match: Annotated[
        ActionMatch,
        says("The calls that the rule is about.", {"host": "git.example.com", "git": {"service": "receive-pack"}}),
    ]
    class_: Annotated[
        ActionClass, says("auto and staged pass, review waits for a person, deny is refused.", "review")
    ] = msgspec.field(name="class")
    reviewers: Annotated[
        Reviewers | None, says("Who decides; only with class review.", {"group": "maintainers", "quorum": 1})
    ] = None
    expires: Annotated[str, says("How long a request for review stays open.", "24h")] = "24h"


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


class Tool(Part, frozen=True):
    """The class of a tool's calls and its arguments; an argument that is not listed is refused."""

    class_: Annotated[ActionClass, says("What happens to a call with allowed arguments.", "auto")] = msgspec.field(
        name="class", default="deny"
    )
    args: Annotated[
        dict[str, Argument],
        says("The arguments by name.", {"path": {"under": "/workspace", "required": True}}),
    ] = msgspec.field(default_factory=dict)


class McpServer(Part, frozen=True):
    """An MCP server that runs in the sandbox over stdio, and the tools that may be called."""

    transport: Annotated[Literal["stdio", "http"], says("stdio; MCP over HTTP is refused by name.", "stdio")]
    command: Annotated[
        tuple[str, ...],
        says("The executable and its arguments.", ["/usr/bin/mcp-server-filesystem", "/workspace"]),
    ] = ()
    tools: Annotated[
        dict[str, Tool],
        says(
            "The tools that may be called.", {"read_file": {"class": "auto", "args": {"path": {"under": "/workspace"}}}}
        ),
    ] = msgspec.field(default_factory=dict)


class Mcp(Part, frozen=True):
    """All MCP servers by name."""

    servers: Annotated[
        dict[str, McpServer],
        says(
            "The servers.",
            {"files": {"transport": "stdio", "command": ["/usr/bin/mcp-server-filesystem", "/workspace"]}},
        ),
    ] = msgspec.field(default_factory=dict)


class LandlockFloor(Part, frozen=True):
    """The smallest Landlock ABI that counts as enforced, and whether ``best_effort`` may load at all."""

    minimum_abi: Annotated[int, says("Version of the kernel's Landlock interface, 1 to 16.", 4)] = 4
    allow_best_effort: Annotated[
        bool, says("Whether policy.yaml may say landlock.compatibility: best_effort.", False)
    ] = False


BudgetScope = Literal["engagement", "workspace", "blueprint"]
BudgetPeriod = Literal["day", "week", "month"]
OnExhaust = Literal["deny", "review", "report"]


class Limit(Part, frozen=True):
    """An amount of money. Text, so that no reader turns it into an inexact number."""

    currency: Annotated[str, says("Currency by its three letters (ISO 4217).", "USD")]
    amount: Annotated[str, says("A decimal number above zero, in quotes.", "20.00")]

    @property
    def value(self) -> Decimal:
        """Return the amount as an exact number."""
        return Decimal(self.amount)


class Budget(Part, frozen=True):
    """What inference may cost; a route names it under ``budget``. Not enforced yet: see the route's field."""

    id: Annotated[str, says("Name of the budget; lower-case letters, digits and dashes.", "spend")]
    scope: Annotated[
        BudgetScope, says("Who shares one limit: an engagement, a workspace, or all of the blueprint.", "engagement")
    ]
    period: Annotated[
        BudgetPeriod, says("After which the count starts anew: calendar day, week or month in UTC.", "day")
    ]
    limit: Annotated[Limit, says("The most that may be spent in one period.", {"currency": "USD", "amount": "20.00"})]
    on_exhaust: Annotated[
        OnExhaust, says("deny: a hard stop; review: a person decides; report: it is only told.", "deny")
    ] = "deny"


class DataClasses(Part, frozen=True):
    """What kind of data a workspace works with, and where it may go.

    It is declared, and destinations are held to it: nothing looks into calls to find out what they carry.
    """

    handles: Annotated[tuple[str, ...], says("Classes of data that the workspace works with.", ["internal"])] = ()
    never: Annotated[tuple[str, ...], says("Classes that it must not work with.", ["restricted"])] = ()
    only_to: Annotated[
        dict[str, tuple[str, ...]],
        says(
            "For a class that is handled, host globs that every endpoint and model service lies within.",
            {"internal": ["**.example.com"]},
        ),
    ] = msgspec.field(default_factory=dict)


class Governance(Part, frozen=True):
    """A whole ``governance.yaml``."""

    schema: Annotated[Literal[1], says("Version of the format.", 1)]
    blueprint: Annotated[
        Blueprint, says("What this bundle is.", {"name": "coding", "version": "1.0.0", "owner": "team-dev-platform"})
    ]
    lease: Annotated[Lease, says("How long an attestation counts.", {"ttl": "120s"})] = Lease()
    landlock: Annotated[LandlockFloor, says("What is asked of the kernel.", {"minimum_abi": 4})] = LandlockFloor()
    allow_audit: Annotated[bool, says("Whether endpoints may say enforcement: audit.", False)] = False
    plaintext: Annotated[
        tuple[str, ...], says("Host and port of endpoints that speak HTTP without TLS.", ["mirror.example.com:80"])
    ] = ()
    credentials: Annotated[
        tuple[Credential, ...],
        says(
            "What is added to allowed calls outside the VM.",
            [{"id": "model-key", "ref": "local:model-key", "inject": {"header": "X-Key", "format": "{secret}"}}],
        ),
    ] = ()
    inference: Annotated[
        Inference,
        says(
            "Model services under local names.",
            {
                "routes": [
                    {
                        "alias": "inference.local",
                        "models": ["demo-*"],
                        "upstream": "https://models.example.com/v1",
                        "credential": "model-key",
                    }
                ]
            },
        ),
    ] = Inference()
    actions: Annotated[
        tuple[Action, ...],
        says(
            "Classes of allowed calls; the first match decides.",
            [{"match": {"host": "api.example.com", "method": ["POST"]}, "class": "auto"}],
        ),
    ] = ()
    mcp: Annotated[
        Mcp,
        says(
            "MCP servers, their tools and arguments.",
            {"servers": {"files": {"transport": "stdio", "command": ["/usr/bin/files"]}}},
        ),
    ] = Mcp()
    budgets: Annotated[
        tuple[Budget, ...],
        says(
            "What inference may cost.",
            [{"id": "spend", "scope": "engagement", "period": "day", "limit": {"currency": "USD", "amount": "20.00"}}],
        ),
    ] = ()

    data_classes: Annotated[
        DataClasses,
        says("What kind of data it works with.", {"handles": ["internal"], "never": ["restricted"]}),
    ] = DataClasses()

    def credential(self, identifier: str) -> Credential:
        """Return the credential with this id; raise ``KeyError`` when there is none."""
        for credential in self.credentials:
            if credential.id == identifier:
                return credential
        raise KeyError(identifier)

    def budget(self, identifier: str) -> Budget:
        """Return the budget with this id; raise ``KeyError`` when there is none."""
        for budget in self.budgets:
            if budget.id == identifier:
                return budget
        raise KeyError(identifier)

    def route(self, alias: str) -> InferenceRoute:
        """Return the inference route with this alias; raise ``KeyError`` when there is none."""
        for route in self.inference.routes:
            if route.alias == alias:
                return route
        raise KeyError(alias)
