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

from saw.policy.databases import Postgres
from saw.policy.model import Part, says
from saw.policy.persistence import Persistence
from saw.policy.providers import OAuth2, SigV4
from saw.policy.sandbox_limits import Sandbox
from saw.policy.tool_rules import ActionClass, Mcp, Reviewers

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
    """A credential that ring 2 adds to allowed calls to these ``host:port`` pairs, path globs and methods.

    Without ``hosts`` the credential is used only where an inference route names it.
    """

    id: Annotated[str, says("Name of the credential in this file and in the audit trail.", "git-token")]
    ref: Annotated[
        str,
        says(
            "Where the secret lies, never the secret itself: file:NAME or vault:MOUNT/PATH#ENTRY; {sponsor} and {workspace} "
            "are whole parts of a path.",
            "file:git-token",
            "vault:kv/git/{sponsor}",
        ),
    ]
    inject: Annotated[
        Inject | None,
        says(
            "How it is put into a call; absent only with sigv4 and postgres.",
            {"header": "Authorization", "format": "Bearer {secret}"},
        ),
    ] = None
    hosts: Annotated[
        tuple[str, ...], says("Exact host and port of each service that may receive it.", ["git.example.com:443"])
    ] = ()
    paths: Annotated[tuple[str, ...], says("Globs over the paths that receive it.", ["/team/**"])] = ("/**",)
    methods: Annotated[
        tuple[str, ...], says("HTTP methods that receive it, HEAD with GET; empty: all.", ["GET", "POST"])
    ] = ()
    oauth2: Annotated[
        OAuth2 | None,
        says(
            "The secret is not sent: it is handed in for an access token, which is.",
            {"token_url": "https://id.example.com/oauth2/token", "client_id": "agents"},
        ),
    ] = None
    sigv4: Annotated[
        SigV4 | None,
        says("The secret is not sent: calls are signed with it.", {"service": "s3", "region": "eu-central-1"}),
    ] = None
    postgres: Annotated[
        Postgres | None,
        says(
            "The secret is a password of PostgreSQL: ring 2 signs in with it where a session is opened.",
            {"user": "agent", "databases": ["orders"]},
        ),
    ] = None


class Price(Part, frozen=True):
    """What a million tokens of these models cost, in the currency of the route's budget; the first price that fits counts.

    Tokens that the service reads from its cache count as other input unless ``cache_read`` says less, those that it writes
    there as twice the input unless ``cache_write`` says something else.
    """

    models: Annotated[tuple[str, ...], says("Globs over the model that a request names.", ["demo-*"])]
    input: Annotated[str, says("A million tokens of input: a decimal number in quotes.", "0.15")]
    output: Annotated[str, says("A million tokens of output.", "0.60")]
    cache_read: Annotated[str | None, says("A million tokens read from the service's cache.", "0.015")] = None
    cache_write: Annotated[str | None, says("A million tokens written to the service's cache.", "0.30")] = None


class Upstream(Part, frozen=True):
    """A further model service of a route, for calls that the ones before it are not for. Prices are those of the route."""

    upstream: Annotated[str, says("The model service, as in the route.", "https://models.internal.example.com/v1")]
    data_classes: Annotated[
        tuple[str, ...] | None,
        says("Classes of data that may be sent there; absent: every class.", ["internal", "confidential"]),
    ] = None
    models: Annotated[
        tuple[str, ...], says("Globs over the models that it serves; empty: those of the route.", ["local-*"])
    ] = ()
    aliases: Annotated[
        dict[str, str],
        says(
            "Names that agents may ask for, and the model that is asked here in their place.", {"fast": "local-small"}
        ),
    ] = msgspec.field(default_factory=dict)
    credential: Annotated[str | None, says("Id of the credential for the service.", "local-key")] = None


Recorded = Literal["metadata", "prompts", "prompts-and-responses"]


class Record(Part, frozen=True):
    """What of a route's calls is kept at the perimeter, encrypted, for auditors. Without it nothing is."""

    content: Annotated[
        Recorded,
        says(
            "metadata: who asked which model, and how much; prompts: the call as well; or the answer, too.", "prompts"
        ),
    ]
    keep: Annotated[str, says("How long it is kept; 1d to 3650d.", "30d")]

    @property
    def keep_s(self) -> int:
        """Return how long it is kept in seconds."""
        return duration(self.keep)


class InferenceRoute(Part, frozen=True):
    """A local host name that stands for a model service; ``models`` are globs over the request's ``model``.

    A route with a budget needs ``prices``; a call of a model without a price is refused. A model under ``aliases`` is sent as the
    model that it stands for, which is the one that must be allowed and has a price. A call goes to the first of ``upstream`` and
    ``upstreams`` that serves its model and is for every class of data that it holds.
    """

    alias: Annotated[str, says("The exact host name that the agent calls.", "inference.local")]
    models: Annotated[tuple[str, ...], says("Globs over the model that a request names.", ["demo-*"])]
    upstream: Annotated[
        str, says("The model service; its path takes the place of the leading /v1.", "https://models.example.com/v1")
    ]
    aliases: Annotated[
        dict[str, str],
        says("Names that agents may ask for, and the model that is asked in their place.", {"fast": "demo-small"}),
    ] = msgspec.field(default_factory=dict)
    credential: Annotated[str | None, says("Id of the credential for the service.", "model-key")] = None
    port: Annotated[int, says("Port of the alias.", 443)] = 443
    limits: Annotated[
        tuple[str, ...], says("Ids of the limits that count the calls. They are counted at the perimeter.", ["burst"])
    ] = ()
    budget: Annotated[
        str | None,
        says("Id of the budget that pays for the calls. They are counted at the perimeter.", "spend"),
    ] = None
    prices: Annotated[
        tuple[Price, ...],
        says("What calls cost; only with a budget.", [{"models": ["demo-*"], "input": "0.15", "output": "0.60"}]),
    ] = ()
    max_input_tokens: Annotated[
        int | None,
        says("Most input that the service takes; set aside where the size of a call does not bound it.", 131072),
    ] = None
    max_output_tokens: Annotated[
        int | None,
        says("Most output that the service gives; set aside where a call does not say how much it wants.", 4096),
    ] = None
    data_classes: Annotated[
        tuple[str, ...] | None,
        says("Classes of data that may be sent to the upstream; absent: every class.", ["public", "internal"]),
    ] = None
    upstreams: Annotated[
        tuple[Upstream, ...],
        says(
            "Further services, in the order in which they are tried.",
            [{"upstream": "https://models.internal.example.com/v1", "data_classes": ["internal", "confidential"]}],
        ),
    ] = ()
    record: Annotated[
        Record | None,
        says("What of the calls is kept for auditors; absent: nothing.", {"content": "prompts", "keep": "30d"}),
    ] = None

    @property
    def ways(self) -> tuple[InferenceRoute, ...]:
        """Return the route once for each of its services, in order, as if that were its only one."""
        others = [
            msgspec.structs.replace(
                self,
                upstream=way.upstream,
                data_classes=way.data_classes,
                models=way.models or self.models,
                aliases={**self.aliases, **way.aliases},
                credential=way.credential,
                upstreams=(),
            )
            for way in self.upstreams
        ]
        return (msgspec.structs.replace(self, upstreams=()), *others)

    def model(self, asked: str) -> str:
        """Return the model that a call which asks for ``asked`` is sent for."""
        return self.aliases.get(asked, asked)

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


class GraphqlMatch(Part, frozen=True):
    """Which root fields of GraphQL operations an action rule is about. Each field is classed by itself."""

    operation_type: Annotated[
        tuple[Literal["query", "mutation", "subscription"], ...],
        says("Types of operations; empty: any.", ["mutation"]),
    ] = ()
    fields: Annotated[tuple[str, ...], says("Globs over root fields; empty: any.", ["createIssue", "add*"])] = ()


class McpMatch(Part, frozen=True):
    """Which calls of an MCP endpoint an action rule is about; with ``tool`` only ``tools/call``."""

    method: Annotated[tuple[str, ...], says("Globs over methods; empty: any.", ["tools/call"])] = ()
    tool: Annotated[tuple[str, ...], says("Globs over tools; empty: any.", ["search_*"])] = ()


class JsonRpcMatch(Part, frozen=True):
    """Which calls of a JSON-RPC endpoint an action rule is about."""

    method: Annotated[tuple[str, ...], says("Globs over methods; empty: any.", ["reports.*"])] = ()


class ActionMatch(Part, frozen=True):
    """Which calls an action rule is about; everything that is written must match."""

    host: Annotated[str, says("Host name or glob.", "git.example.com")]
    port: Annotated[int | None, says("Port; absent: any.", 443)] = None
    method: Annotated[
        tuple[str, ...],
        says("HTTP methods, WEBSOCKET_TEXT for messages, POSTGRES for sessions; empty: any.", ["POST", "PUT"]),
    ] = ()
    path: Annotated[str, says("Glob over the canonical path.", "/team/**")] = "/**"
    git: Annotated[
        GitMatch | None,
        says(
            "Only this Git service, and for pushes only these refs.", {"service": "receive-pack", "ref": "refs/tags/**"}
        ),
    ] = None
    graphql: Annotated[
        GraphqlMatch | None,
        says("Only GraphQL, and of its operations these.", {"operation_type": ["mutation"], "fields": ["addComment"]}),
    ] = None
    mcp: Annotated[McpMatch | None, says("Only MCP over HTTP, and of its calls these.", {"tool": ["search_*"]})] = None
    json_rpc: Annotated[
        JsonRpcMatch | None, says("Only JSON-RPC, and of its calls these.", {"method": ["reports.list"]})
    ] = None


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
    """What inference may cost; a route names it under ``budget``, and the perimeter counts its calls against it.

    What is spent is counted for each perimeter host.
    """

    id: Annotated[str, says("Name of the budget; lower-case letters, digits and dashes.", "spend")]
    scope: Annotated[
        BudgetScope, says("Who shares one limit: an engagement, a workspace, or all of the blueprint.", "engagement")
    ]
    period: Annotated[
        BudgetPeriod, says("After which the count starts anew: calendar day, week or month in UTC.", "day")
    ]
    limit: Annotated[Limit, says("The most that may be spent in one period.", {"currency": "USD", "amount": "20.00"})]
    on_exhaust: Annotated[
        OnExhaust,
        says("deny: a hard stop; report: it is only counted; review: a call beyond it waits for a person.", "deny"),
    ] = "deny"


LimitScope = Literal["engagement", "agent", "workspace", "sponsor", "blueprint"]
CALENDAR = ("day", "week", "month")
"""The periods of a limit that are of the calendar, in UTC; every other one is a number of seconds that slides."""


class CallLimit(Part, frozen=True):
    """How many requests and tokens calls of inference may take; a route names it under ``limits``.

    What is taken is counted for each perimeter host.
    """

    id: Annotated[str, says("Name of the limit; lower-case letters, digits and dashes.", "burst")]
    scope: Annotated[
        LimitScope,
        says("Who shares one count: an engagement, agent, workspace, sponsor, or all of the blueprint.", "workspace"),
    ]
    per: Annotated[
        str,
        says(
            "Any stretch of that length, 1s to 1h (a rate), or the calendar's day, week or month in UTC (a quota).",
            "1m",
            "month",
        ),
    ]
    requests: Annotated[int | None, says("Most calls.", 60)] = None
    tokens: Annotated[int | None, says("Most tokens, of input and output together.", 200000)] = None

    @property
    def span(self) -> int | BudgetPeriod:
        """Return the length of the window that slides, in seconds, or the calendar period."""
        for period in ("day", "week", "month"):
            if self.per == period:
                return period
        return duration(self.per)


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
    assumed: Annotated[
        tuple[str, ...] | None,
        says(
            "Classes that a call of a model holds unless it, or a delegation, says more; absent: all handled.",
            ["internal"],
        ),
    ] = None

    @property
    def held(self) -> tuple[str, ...]:
        """Return the classes that every call of a model holds."""
        return self.handles if self.assumed is None else self.assumed


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
            [{"id": "model-key", "ref": "file:model-key", "inject": {"header": "X-Key", "format": "{secret}"}}],
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
    limits: Annotated[
        tuple[CallLimit, ...],
        says("Rates and quotas of inference.", [{"id": "burst", "scope": "workspace", "per": "1m", "requests": 60}]),
    ] = ()

    data_classes: Annotated[
        DataClasses,
        says("What kind of data it works with.", {"handles": ["internal"], "never": ["restricted"]}),
    ] = DataClasses()
    persistence: Annotated[
        Persistence, says("What of a session may act on a later one.", {"git_settings": ["core.fsmonitor"]})
    ] = Persistence()
    sandbox: Annotated[
        Sandbox, says("How the sandbox is run.", {"limits": {"memory": "3GiB", "tasks": 1024, "cpu": "1.5"}})
    ] = Sandbox()

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

    def paying(self, route: InferenceRoute) -> Budget | None:
        """Return the budget that ``route`` draws on, or None."""
        return None if route.budget is None else self.budget(route.budget)

    def counting(self, route: InferenceRoute) -> tuple[CallLimit, ...]:
        """Return the limits that count the calls of ``route``."""
        return tuple(limit for limit in self.limits if limit.id in route.limits)

    def way(self, alias: str, port: int, place: int) -> InferenceRoute:
        """Return the route at this alias and port as it is for its service at ``place``."""
        return self.route(alias, port).ways[place]

    def route(self, alias: str, port: int) -> InferenceRoute:
        """Return the inference route at this alias and port; raise ``KeyError`` when there is none."""
        for route in self.inference.routes:
            if route.alias == alias and route.port == port:
                return route
        raise KeyError(alias)
