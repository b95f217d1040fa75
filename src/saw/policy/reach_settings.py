"""Compare what is not a call: directories, the sandbox's account and Landlock, the lease, and fields not known here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import msgspec

from saw.policy import always_on, databases, model, persistence, providers, sandbox_limits, tool_rules
from saw.policy import governance as words
from saw.policy.governance import Governance, duration
from saw.policy.model import Policy
from saw.policy.persistence import Persistence
from saw.policy.reach_item import Item, Region, Risk, Witness
from saw.policy.sandbox_limits import SandboxLimits, amount

Access = Literal["read", "write"]

_KNOWN: dict[type, frozenset[str]] = {
    kind: frozenset(fields.split())
    for kind, fields in {
        model.Policy: "version filesystem_policy landlock process network_policies network_middlewares",
        model.FilesystemPolicy: "include_workdir read_only read_write",
        model.Landlock: "compatibility",
        model.Process: "run_as_user run_as_group",
        model.AnyOf: "any",
        model.Match: "method path query operation_type operation_name fields tool params",
        model.Params: "name",
        model.PersistedQuery: "operation_type operation_name fields",
        model.McpOptions: "max_body_bytes strict_tool_names allow_all_known_mcp_methods versions",
        model.JsonRpcOptions: "max_body_bytes",
        model.AllowRule: "allow",
        model.Endpoint: (
            "host port ports path protocol tls enforcement access rules deny_rules allowed_ips allow_encoded_slash "
            "websocket_credential_rewrite request_body_credential_rewrite allow_uninspected_credentials "
            "graphql_max_body_bytes persisted_queries graphql_persisted_queries mcp json_rpc"
        ),
        model.Binary: "path harness",
        model.NetworkRule: "endpoints binaries name",
        words.Governance: (
            "schema blueprint lease landlock allow_audit plaintext credentials inference actions mcp budgets limits data_classes "
            "persistence sandbox"
        ),
        always_on.Agent: "command restart",
        sandbox_limits.Sandbox: "limits agents",
        sandbox_limits.SandboxLimits: "memory swap tasks cpu cpu_weight io_weight tmp shm inodes files",
        words.Blueprint: "name version owner incident_contact review_days",
        words.DataClasses: "handles never only_to assumed",
        persistence.Persistence: "files writable git_hooks git_settings",
        words.Lease: "ttl offline_ttl",
        words.LandlockFloor: "minimum_abi allow_best_effort",
        words.Credential: "id ref inject hosts paths methods oauth2 sigv4 postgres",
        databases.Postgres: "user databases",
        providers.SigV4: "service region",
        providers.OAuth2: "token_url client_id grant client_secret scopes resource",
        words.Inject: "header format",
        words.Inference: "routes",
        words.InferenceRoute: (
            "alias models aliases upstream credential port limits budget prices max_input_tokens max_output_tokens "
            "data_classes upstreams record"
        ),
        words.Upstream: "upstream data_classes models aliases credential",
        words.Record: "content keep",
        words.CallLimit: "id scope per requests tokens",
        words.Price: "models input output cache_read cache_write",
        words.Budget: "id scope period limit on_exhaust",
        words.Limit: "currency amount",
        words.Action: "match class reviewers expires",
        words.ActionMatch: "host port method path git graphql mcp json_rpc",
        words.GraphqlMatch: "operation_type fields",
        words.McpMatch: "method tool",
        words.JsonRpcMatch: "method",
        words.GitMatch: "service ref operation",
        tool_rules.Reviewers: "group quorum",
        tool_rules.Mcp: "servers",
        tool_rules.McpServer: "transport command url tools",
        tool_rules.Tool: "class args definition reviewers expires",
        tool_rules.Argument: "type required under regex enum min max max_length items",
    }.items()
}
"""Every field whose meaning for reach is known; a field beyond these counts as wider whenever it changes."""


def inside(path: str, directory: str) -> bool:
    """Return whether ``path`` is ``directory`` or below it; both are absolute and plain."""
    root = directory.rstrip("/")
    return path.rstrip("/") == root or path.startswith(root + "/")


def directories(policy: Policy, access: Access) -> tuple[str, ...]:
    """Return the directories open for ``access``; what may be written may be read."""
    files = policy.filesystem_policy
    workdir = (f"/home/{policy.process.run_as_user}/project",) if files.include_workdir else ()
    writable = (*files.read_write, *workdir)
    return writable if access == "write" else (*files.read_only, *writable)


def permits(policy: Policy, access: Access, path: str) -> bool:
    """Return whether the sandbox may ``access`` the file ``path``."""
    return any(inside(path, directory) for directory in directories(policy, access))


def compare_directories(old: Policy, new: Policy) -> list[Item]:
    """Return the directories that ``new`` opens beyond ``old``."""
    items: list[Item] = []
    files = new.filesystem_policy
    table: tuple[tuple[Access, Risk, tuple[str, ...]], ...] = (
        ("write", "critical", files.read_write),
        ("read", "medium", files.read_only),
    )
    for access, risk, opened in table:
        for directory in sorted(set(opened)):
            if permits(old, access, directory):
                continue
            may = "read only" if access == "write" and permits(old, "read", directory) else "closed"
            file = f"{directory.rstrip('/')}/x"
            items.append(
                Item(
                    "disk",
                    access,
                    f"{access} {directory}",
                    f"was {may}",
                    Region(directory=directory),
                    risk,
                    (f"filesystem_policy.read_{'write' if access == 'write' else 'only'}",),
                    witness=Witness(file=file, old=f"deny: {may}", new=f"allow: {access}"),
                )
            )
    if new.filesystem_policy.include_workdir and not old.filesystem_policy.include_workdir:
        why = "the project folder of the account is opened, wherever its home is"
        region = Region(setting="include_workdir")
        what = "write the project folder of the account"
        items.append(
            Item("disk", "write", what, why, region, "critical", ("filesystem_policy.include_workdir",), exact=False)
        )
    return items


def _knobs(old: tuple[Policy, Governance], new: tuple[Policy, Governance]) -> Iterator[tuple[str, str, str, Risk]]:
    """Yield name, old value, new value and risk of each setting that was loosened."""
    (policy, rules), (policy_2, rules_2) = old, new
    for field in ("run_as_user", "run_as_group"):
        before, after = getattr(policy.process, field), getattr(policy_2.process, field)
        if before != after:
            yield f"process.{field}", before, after, "high"
    before_abi = 0 if policy.landlock.compatibility == "best_effort" else rules.landlock.minimum_abi
    after_abi = 0 if policy_2.landlock.compatibility == "best_effort" else rules_2.landlock.minimum_abi
    if after_abi < before_abi:
        yield "landlock", _abi(before_abi), _abi(after_abi), "high"
    for name, was, now in (
        ("ttl", rules.lease.ttl, rules_2.lease.ttl),
        ("offline_ttl", rules.lease.offline_ttl, rules_2.lease.offline_ttl),
    ):
        if duration(now) > duration(was):
            yield f"lease.{name}", was, now, "high" if name == "offline_ttl" else "medium"
    if rules_2.allow_audit and not rules.allow_audit:
        yield "allow_audit", "false", "true", "low"
    if rules_2.landlock.allow_best_effort and not rules.landlock.allow_best_effort:
        yield "landlock.allow_best_effort", "false", "true", "low"
    yield from _kept(rules.persistence, rules_2.persistence)
    yield from _limits(rules.sandbox.limits, rules_2.sandbox.limits)
    for name, before, after in always_on.more_agents(rules.sandbox.agents, rules_2.sandbox.agents):
        yield f"sandbox.agents[{name}]", before, after, "medium"


def _limits(old: SandboxLimits, new: SandboxLimits) -> Iterator[tuple[str, str, str, Risk]]:
    """Yield every limit of the sandbox that is wider: more of it may be used of what all of the workspace share."""
    for name in new.__struct_fields__:
        was, now = getattr(old, name), getattr(new, name)
        if amount(name, now) > amount(name, was):
            yield f"sandbox.limits.{name}", str(was), str(now), "low" if name.endswith("_weight") else "medium"


def _kept(old: Persistence, new: Persistence) -> Iterator[tuple[str, str, str, Risk]]:
    """Yield what of a session may act on a later one and could not before, and every text that is laid down anew."""
    held = {name for name, _ in old.places()} - {name for name, _ in new.places()}
    for name in sorted(held):
        yield f"persistence.writable[{name}]", "read-only", "the agent's, for later sessions", "high"
    for name, text in sorted(new.files.items()):
        if old.files.get(name) != text:
            yield f"persistence.files[{name}]", _text(old.files.get(name)), _text(text), "medium"
    for name in sorted({*new.git_settings} - {*old.git_settings}):
        yield f"persistence.git_settings[{name}]", "held", "each repository's own", "high"
    if new.git_hooks and new.git_hooks != old.git_hooks:
        yield "persistence.git_hooks", old.git_hooks or "no hooks", new.git_hooks, "medium"


def _text(content: str | None) -> str:
    if content is None:
        return "not in the bundle"
    return f"{len(content.encode())} bytes, SHA-256 {hashlib.sha256(content.encode()).hexdigest()}"


def _abi(version: int) -> str:
    return f"at least ABI {version}" if version else "best effort"


def _unknown(value: object, where: str) -> Iterator[tuple[str, object]]:
    """Yield place and value of every field that :data:`_KNOWN` does not list."""
    if isinstance(value, msgspec.Struct):
        known = _KNOWN.get(type(value), frozenset())
        for name, field in zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True):
            place = f"{where}.{name}" if where else name
            inner = getattr(value, field)
            if name not in known:
                yield place, msgspec.to_builtins(inner)
            else:
                yield from _unknown(inner, place)
    elif isinstance(value, dict):
        for name, inner in sorted(value.items()):
            yield from _unknown(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unknown(inner, f"{where}[{index}]")


def compare_settings(old: tuple[Policy, Governance], new: tuple[Policy, Governance]) -> list[Item]:
    """Return the settings that ``new`` loosens, and every change of a field whose meaning is not known here."""
    items = [
        Item(
            "setting",
            "setting",
            f"{name}: {after}",
            f"was {before}",
            Region(setting=name),
            risk,
            (name,),
        )
        for name, before, after, risk in _knobs(old, new)
    ]
    before_fields = {place: value for part in old for place, value in _unknown(part, "")}
    after_fields = {place: value for part in new for place, value in _unknown(part, "")}
    for place in sorted({*before_fields, *after_fields}):
        if before_fields.get(place) != after_fields.get(place):
            why = "the field changed, and what it means for reach is not known to this version"
            what = f"{place}: {str(after_fields.get(place, 'removed'))[:200]}"
            region = Region(setting=place)
            items.append(Item("setting", "possibly", what, why, region, "high", (place,), exact=False))
    return items
