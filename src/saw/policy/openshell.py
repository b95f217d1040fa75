"""The policy file that NVIDIA OpenShell loads, and what it cannot say.

Source: the public repository NVIDIA/OpenShell, schema reference and ``crates/openshell-policy`` (0.0.111), and the schema
reference of 0.1.x; ``docs/openshell.md`` names the differences. The file written keeps to what both accept.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from saw.policy import databases, globs
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Governance, Lease
from saw.policy.loader import POLICY_FILE, Bundle
from saw.policy.model import CALL_PROTOCOLS, READ_METHODS, AnyOf, Endpoint, Match, Policy
from saw.policy.openshell_calls import spoken
from saw.policy.openshell_finding import Effect, Finding
from saw.policy.sandbox_limits import SandboxLimits
from saw.policy.yamltext import dump

__all__ = ["SANDBOX_ACCOUNT", "Effect", "Exported", "Finding", "export"]

SANDBOX_ACCOUNT = "sandbox"
"""The only account name that OpenShell accepts; besides, it takes numbers."""

_HOST_LABEL = re.compile(r"\*\Z|\*\*\Z|[^*]+\Z")


class Exported(msgspec.Struct, frozen=True):
    """The text of the file, what it says as maps and lists, and the report."""

    text: str
    value: dict[str, Any]
    findings: tuple[Finding, ...]


def export(bundle: Bundle, *, only_01: bool = False) -> Exported:
    """Return the OpenShell file of a bundle; raise :class:`PolicyError` for what OpenShell would not load.

    The file keeps to what 0.0.x and 0.1.x both read; ``only_01`` adds what 0.1.x alone knows and reports for 0.1.x alone.
    """
    policy = bundle.policy
    problems = [
        Problem(
            POLICY_FILE,
            1,
            1,
            f"{where}.host",
            f"OpenShell refuses the host {endpoint.host}: {reason}",
            "name the hosts",
        )
        for where, endpoint in _endpoints(policy)
        if (reason := _host_refusal(endpoint.host))
    ]
    if problems:
        raise PolicyError(problems)
    findings: list[Finding] = []
    value: dict[str, Any] = {
        "version": 1,
        "filesystem_policy": msgspec.to_builtins(policy.filesystem_policy),
        "landlock": {"compatibility": policy.landlock.compatibility},
        "process": _process(policy, findings),
        "network_policies": {},
    }
    for key, rule in policy.network_policies.items():
        entry: dict[str, Any] = {"name": rule.name} if rule.name else {}
        entry["endpoints"] = [
            _endpoint(endpoint, f"network_policies.{key}.endpoints[{index}]", findings, only_01)
            for index, endpoint in enumerate(rule.endpoints)
        ]
        entry["binaries"] = [{"path": binary.path} for binary in rule.binaries]
        value["network_policies"][key] = entry
    findings += _governance(bundle)
    blueprint = bundle.governance.blueprint
    header = (
        f"# Policy of the blueprint {blueprint.name} {blueprint.version} (owner {blueprint.owner}) for NVIDIA OpenShell.\n"
        "# Made from a bundle; change the bundle instead. governance.yaml is not in this file: see the export's report.\n"
    )
    return Exported(header + dump(value), value, tuple(findings))


def _endpoints(policy: Policy) -> list[tuple[str, Endpoint]]:
    return [
        (f"network_policies.{key}.endpoints[{index}]", endpoint)
        for key, rule in policy.network_policies.items()
        for index, endpoint in enumerate(rule.endpoints)
    ]


def _host_refusal(host: str) -> str:
    """Return why OpenShell refuses this host glob, or ``""``: runs of characters only in the first label."""
    if globs.is_exact(host):
        return ""
    labels = host.split(".")
    if len(labels) < 3:
        return "a wildcard needs at least three labels"
    if any(not _HOST_LABEL.match(label) or label == "**" for label in labels[1:]):
        return "after the first label, a wildcard must be a whole label and not **"
    return ""


def _process(policy: Policy, findings: list[Finding]) -> dict[str, str]:
    for field in ("run_as_user", "run_as_group"):
        name = getattr(policy.process, field)
        if name != SANDBOX_ACCOUNT:
            reason = f"OpenShell knows no account {name}, so the file says {SANDBOX_ACCOUNT}"
            findings.append(Finding(f"process.{field}", "same", reason, "nothing to do; neither is root"))
    return {"run_as_user": SANDBOX_ACCOUNT, "run_as_group": SANDBOX_ACCOUNT}


def _endpoint(endpoint: Endpoint, where: str, findings: list[Finding], only_01: bool) -> dict[str, Any]:
    """Return one endpoint with everything written out that defaults differently there."""
    value: dict[str, Any] = {"host": endpoint.host.lower()}
    ports = list(dict.fromkeys(endpoint.all_ports))
    value |= {"port": ports[0]} if len(ports) == 1 else {"ports": ports}
    if endpoint.path:
        value["path"] = endpoint.path
        if endpoint.path.endswith("/**") or "*" in endpoint.path.removesuffix("/**"):
            reason = "there /a/** also selects /a, and * in this field crosses /"
            findings.append(Finding(f"{where}.path", "wider", reason, "repeat the path in the rules, which bound it"))
    value["protocol"] = endpoint.protocol or "rest"
    if endpoint.protocol == "websocket":
        reason = (
            "there a plain GET may pass as well, and frames inside a text message may be rewritten; here neither is so"
        )
        findings.append(
            Finding(f"{where}.protocol", "wider", reason, "give the host nothing else that a GET could reach")
        )
    value["enforcement"] = endpoint.enforcement
    if endpoint.protocol in CALL_PROTOCOLS:
        value |= spoken(endpoint, where, findings, only_01)
    elif endpoint.protocol == databases.PROTOCOL:
        reason = "there bytes are relayed to the server, and no runtime signs in for the client"
        findings.append(Finding(f"{where}.protocol", "wider", reason, "keep ring 2 in front of it"))
    elif not endpoint.protocol:
        value["access"] = "full"
        reason = "without a protocol OpenShell relays uninspected; the file asks for inspection and every method"
        findings.append(Finding(f"{where}.protocol", "same", reason, "nothing to do"))
    elif endpoint.rules is None:
        value["access"] = endpoint.access
    else:
        value["rules"] = [
            {"allow": _match(rule.allow, f"{where}.rules[{i}]", findings, only_01, deny=False)}
            for i, rule in enumerate(endpoint.rules)
        ]
    if endpoint.deny_rules and endpoint.protocol not in CALL_PROTOCOLS:
        value["deny_rules"] = denied = [
            _match(match, f"{where}.deny_rules[{i}]", findings, only_01, deny=True)
            for i, match in enumerate(endpoint.deny_rules)
        ]
        # What denies GET denies HEAD here; there each has to be said.
        heads = [{**one, "method": "HEAD"} for one in denied if one["method"] == "GET"]
        denied += [one for one in heads if one not in denied]
    if endpoint.allowed_ips:
        value["allowed_ips"] = list(endpoint.allowed_ips)
        reason = "there every address must lie in allowed_ips, here only private ones must"
        findings.append(
            Finding(f"{where}.allowed_ips", "narrower", reason, "list public networks too if they are needed")
        )
    if endpoint.allow_encoded_slash:
        value["allow_encoded_slash"] = True
    if endpoint.enforcement == "audit":
        reason = (
            "audit lets calls pass in both runtimes; the credential that ring 2 withholds then is not withheld there"
        )
        findings.append(Finding(f"{where}.enforcement", "wider", reason, "use enforce"))
    return value


def _match(match: Match, where: str, findings: list[Finding], only_01: bool, *, deny: bool) -> dict[str, Any]:
    path = "**" if match.path == "/**" else match.path
    value: dict[str, Any] = {"method": match.method.upper(), "path": path}
    segments = path.split("/")
    if "**" in segments[1:-1]:
        reason = "inside a path, ** is one or more segments there and zero or more here"
        effect: Effect = "wider" if deny else "narrower"
        findings.append(Finding(f"{where}.path", effect, reason, "add a rule without the segment"))
    if only_01 and "*" in segments and not deny:
        reason = "there * is also an empty segment, here one with at least a character"
        findings.append(Finding(f"{where}.path", "wider", reason, "deny the path with the empty segment"))
    if any("*" in segment and segment != "**" for segment in segments) and not deny and not only_01:
        reason = "the reference of 0.0.x says that * crosses /; 0.1.x and this project say that it does not"
        findings.append(Finding(f"{where}.path", "wider", reason, "run 0.1.x, or list the paths"))
    if match.query:
        value["query"] = {k: {"any": list(v.any)} if isinstance(v, AnyOf) else v for k, v in match.query.items()}
        values = [g for v in match.query.values() for g in (v.any if isinstance(v, AnyOf) else (v,))]
        if any("*" in glob for glob in values):
            reason = "in a query value, * does not match a dot there"
            effect = "wider" if deny else "narrower"
            findings.append(
                Finding(f"{where}.query", effect, reason, "list the values, or write the glob for each dot")
            )
    return value


def _writes(endpoint: Endpoint) -> bool:
    if endpoint.protocol in CALL_PROTOCOLS:
        return endpoint.access != "read-only"
    if endpoint.rules is not None:
        return any(rule.allow.method.upper() not in READ_METHODS for rule in endpoint.rules)
    return endpoint.access != "read-only"


def _governance(bundle: Bundle) -> list[Finding]:
    """Return what governance.yaml demands and the file cannot say, each with its consequence where OpenShell runs alone."""
    governance: Governance = bundle.governance
    ring2 = "keep ring 2 in front of it: it decides every call with the whole bundle"
    found: list[Finding] = []

    def lost(field: str, effect: Effect, reason: str, cure: str = ring2) -> None:
        found.append(Finding(f"governance.{field}", effect, reason, cure))

    blueprint = governance.blueprint
    lost(
        "blueprint", "lost", f"name, version, owner {blueprint.owner} and review date have no field", "keep the bundle"
    )
    lease = "" if governance.lease == Lease() else f" of {governance.lease.ttl}"
    lost("lease", "wider", f"no lease{lease}: a workspace that no longer attests goes on acting")
    lost(
        "landlock.minimum_abi",
        "wider",
        f"the kernel may offer less than Landlock ABI {governance.landlock.minimum_abi}",
    )
    if any(_writes(endpoint) for _, endpoint in _endpoints(bundle.policy)):
        lost("actions", "wider", "no action classes: writes that wait for a person here, or are denied, pass there")
    for index, action in enumerate(governance.actions):
        if action.match.git is not None:
            what = f"{action.match.git.service} of {action.match.git.ref} at {action.match.host}"
            lost(
                f"actions[{index}].match.git",
                "wider",
                f"Git refs are not read: {what} is class {action.class_} here only",
            )
    lost("persistence", "wider", "hooks of repositories and configuration of agents act on later sessions there")
    for name in governance.sandbox.agents:
        lost(
            f"sandbox.agents.{name}",
            "lost",
            f"the always-on agent {name} is not started there",
            "start it by other means",
        )
    if governance.sandbox.limits != SandboxLimits():
        reason = "limits of memory, processors, tasks and temporary files have no field"
        lost("sandbox.limits", "wider", reason, "set the limits of its containers")
    for name in governance.data_classes.handles:
        lost(f"data_classes.{name}", "lost", f"that {name} data is handled, and where it may go, has no field")
    for name in governance.data_classes.never:
        lost(f"data_classes.{name}", "lost", f"that {name} data is never handled has no field")
    for index, address in enumerate(governance.plaintext):
        lost(f"plaintext[{index}]", "wider", f"not only {address}: every endpoint may be used without TLS there")
    for credential in governance.credentials:
        where = f"credentials.{credential.id}"
        lost(where, "left_out", "calls go without it", "attach a provider, and bind it to the same hosts and paths")
    for route in governance.inference.routes:
        where = f"inference.{route.alias}"
        reason = f"the alias and its models ({', '.join(route.models)}) have no field, so calls to it are denied"
        lost(where, "left_out", reason, "configure inference at OpenShell's gateway; it does not check the model name")
        if any(way.data_classes is not None for way in route.ways):
            reason = "which service may see which class of data has no field"
            lost(f"{where}.data_classes", "left_out", reason, "keep ring 2 in front of it")
        if route.record is not None:
            reason = f"that {route.record.content} are kept for {route.record.keep} has no field"
            lost(f"{where}.record", "left_out", reason, "keep ring 2 in front of it")
    for name, server in governance.mcp.servers.items():
        tools = ", ".join(sorted(server.tools)) or "none"
        if server.transport == "http":
            reason = f"arguments and classes of its tools ({tools}) have no field: every argument passes there"
            lost(f"mcp.{name}", "wider", reason, "keep ring 2 in front of it")
            continue
        reason = f"tools ({tools}) and their arguments have no field for stdio servers"
        lost(f"mcp.{name}", "wider", reason, "start the server with saw mcp, which checks them")
    return found
