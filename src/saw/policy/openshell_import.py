"""An OpenShell policy, read into a bundle that never allows more than it did; what is not carried is named.

The file is first brought into our spelling. Then our own loader judges it: whatever it refuses is left out in the smallest
part that can be left out without granting more, and told in the loader's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from saw.policy.checks_policy import check_absolute
from saw.policy.errors import PolicyError, Problem
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, load_members, load_policy
from saw.policy.openshell import SANDBOX_ACCOUNT, Effect, Finding
from saw.policy.openshell_calls import imported
from saw.policy.openshell_matchers import allow_match, covered, deny_match, takes_over
from saw.policy.yamltext import dump, read

Dialect = Literal["0.0", "0.1", "either"]

_PART = re.compile(
    r"network_policies\.(?P<rule>.+?)(?:\.(?P<list>endpoints|binaries)\[(?P<index>\d+)\](?P<rest>.*))?\Z"
)
_ALLOW = re.compile(r"\.rules\[(\d+)\]")
_TOP = frozenset({"version", "filesystem_policy", "landlock", "process", "network_policies", "network_middlewares"})
_FLAGS = ("websocket_credential_rewrite", "request_body_credential_rewrite", "allow_uninspected_credentials")


class Imported(msgspec.Struct, frozen=True):
    """The files of the new bundle by name, which dialect the file shows, and what was not carried as it stood."""

    files: dict[str, bytes]
    dialect: Dialect
    findings: tuple[Finding, ...]


def import_policy(raw: bytes, source: str, *, name: str, owner: str, dialect: Dialect = "either") -> Imported:
    """Return the bundle of the OpenShell policy in ``raw`` (``source`` names it in messages).

    ``dialect`` ``either`` reads every pattern in the way that grants less. Raises :class:`PolicyError` when the file is
    no policy at all, or nothing is left that loads.
    """
    return import_tree(read(raw, source), source, name=name, owner=owner, dialect=dialect)


def import_tree(tree: dict[str, Any], source: str, *, name: str, owner: str, dialect: Dialect = "either") -> Imported:
    """Return the bundle of an OpenShell policy that is already read into maps and lists."""
    if tree.get("version") != 1 or isinstance(tree.get("version"), bool):
        reason = f"version is {tree.get('version')!r}; only version 1 is known"
        raise PolicyError([Problem(source, 1, 1, "version", reason, "give a policy of version 1")])
    shown = _shown(tree)
    reader = _Reader(source, shown if dialect == "either" else dialect)
    policy = reader.policy(tree)
    policy = reader.loadable(policy)
    text = (
        f"# Imported from the OpenShell policy {source}; see import.json for what was not carried over.\n{dump(policy)}"
    ).encode()
    governance = (
        f"# Made by an import; nobody has reviewed it yet. Writes wait for review until actions class them.\n"
        f"{dump({'schema': 1, 'blueprint': {'name': name, 'version': '0.1.0-draft', 'owner': owner}})}"
    ).encode()
    bundle = load_members({POLICY_FILE: text, GOVERNANCE_FILE: governance})
    if any(e.access != "read-only" for rule in bundle.policy.network_policies.values() for e in rule.endpoints):
        reason = "OpenShell has no action classes; here a write waits for a person unless an action rule says otherwise"
        reader.note("network_policies", "narrower", reason, "add actions to governance.yaml")
    return Imported({POLICY_FILE: text, GOVERNANCE_FILE: governance}, shown, tuple(reader.findings))


def _shown(tree: Mapping[str, Any]) -> Dialect:
    """Return the dialect that the file gives away by fields that only one of the two knows."""
    for rule in _maps(tree.get("network_policies")):
        if any("harness" in binary for binary in _items(rule, "binaries")):
            return "0.0"
        for endpoint in _items(rule, "endpoints"):
            if endpoint.get("protocol") == "sql" or endpoint.get("tls") in {"terminate", "passthrough"}:
                return "0.0"
            if isinstance(endpoint.get("mcp"), dict) and "versions" in endpoint["mcp"]:
                return "0.1"
    return "either"


def _maps(value: object) -> list[dict[str, Any]]:
    return [item for item in value.values() if isinstance(item, dict)] if isinstance(value, dict) else []


def _items(value: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = value.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


class _Reader:
    """Turns one file; ``findings`` collects what does not stay as it is."""

    def __init__(self, source: str, dialect: Dialect) -> None:
        self.source = source
        self.dialect = dialect
        self.findings: list[Finding] = []
        self.gone: list[dict[str, Any]] = []
        """Endpoints left out so far: others must not take over the calls they decided."""

    def note(self, field: str, effect: Effect, reason: str, cure: str) -> None:
        """Add one finding."""
        self.findings.append(Finding(field, effect, reason, cure))

    def policy(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return the policy in our spelling."""
        result: dict[str, Any] = {"version": 1}
        if "filesystem_policy" in tree:
            result["filesystem_policy"] = self._filesystem(tree["filesystem_policy"])
        self._landlock(tree.get("landlock"))
        result["landlock"] = {"compatibility": "hard_requirement"}
        self._process(tree.get("process"))
        for key in sorted(set(tree) - _TOP):
            self.note(
                key,
                "left_out",
                "the field is not known in either dialect",
                "move what it means into the bundle by hand",
            )
        rules = tree.get("network_policies") or {}
        result["network_policies"] = (
            {str(key): self._rule(rule, f"network_policies.{key}") for key, rule in rules.items()}
            if isinstance(rules, dict)
            else rules
        )
        self._middlewares(tree.get("network_middlewares"), result["network_policies"])
        return result

    def _filesystem(self, value: object) -> object:
        if not isinstance(value, dict):
            return value
        kept = dict(value)
        for field in ("read_only", "read_write"):
            paths = kept.get(field)
            if isinstance(paths, list):
                kept[field] = [path for path in paths if self._path_is_good(path, f"filesystem_policy.{field}", field)]
        return kept

    def _path_is_good(self, path: object, where: str, field: str) -> bool:
        wrong: list[tuple[str, str]] = []
        if isinstance(path, str):
            check_absolute(path, lambda reason, cure: wrong.append((reason, cure)))
            if field == "read_write" and not path.rstrip("/"):
                wrong.append(("the whole file system would be writable", "list the directories to write to"))
        for reason, cure in wrong:
            self.note(f"{where}: {path}", "left_out", reason, cure)
        return not wrong

    def _landlock(self, value: object) -> None:
        said = value.get("compatibility") if isinstance(value, dict) else None
        self._unknown(value, "landlock", {"compatibility"})
        if said != "hard_requirement":
            reason = f"{said or 'best_effort, the default there,'} lets a sandbox start without protection"
            self.note(
                "landlock.compatibility", "narrower", reason, "the bundle says hard_requirement; see docs/policy.md"
            )

    def _process(self, value: object) -> None:
        for field in ("run_as_user", "run_as_group"):
            said = value.get(field) if isinstance(value, dict) else None
            if said is not None:
                known = "its account" if said == SANDBOX_ACCOUNT else "a number, which is refused here,"
                reason = f"{said} is {known} there; here the sandbox runs as agent"
                self.note(f"process.{field}", "same", reason, "name another account of the image if agent is wrong")
        self._unknown(value, "process", {"run_as_user", "run_as_group"})

    def _unknown(self, value: object, where: str, known: set[str]) -> None:
        """Tell what a section holds that neither dialect knows."""
        cure = "move what it means into the bundle by hand"
        if value is not None and not isinstance(value, dict):
            self.note(where, "left_out", "it is not a map of fields", cure)
        for field in sorted(set(value) - known) if isinstance(value, dict) else []:
            self.note(f"{where}.{field}", "left_out", "the field is not known", cure)

    def _rule(self, value: object, where: str) -> object:
        if not isinstance(value, dict):
            return value
        rule = dict(value)
        if isinstance(rule.get("binaries"), list):
            rule["binaries"] = [self._binary(b, f"{where}.binaries[{i}]") for i, b in enumerate(rule["binaries"])]
        if isinstance(rule.get("endpoints"), list):
            made: list[object] = []
            for index, endpoint in enumerate(rule["endpoints"]):
                made += self._endpoint(endpoint, f"{where}.endpoints[{index}]")
            rule["endpoints"] = made
        return rule

    def _binary(self, value: object, where: str) -> object:
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, dict):
            return value
        if "harness" in value:
            reason = "0.0.x ignores the field and 0.1.x refuses it"
            self.note(f"{where}.harness", "same", reason, "nothing to do")
        return {key: item for key, item in value.items() if key != "harness"}

    def _endpoint(self, value: object, where: str) -> list[object]:
        if not isinstance(value, dict):
            return [value]
        endpoint = dict(value)
        for flag in _FLAGS:
            if endpoint.get(flag) is False:
                del endpoint[flag]
                self.note(f"{where}.{flag}", "same", "false is what holds here anyway", "nothing to do")
        if isinstance(endpoint.get("protocol"), str):
            endpoint["protocol"] = endpoint["protocol"].lower()
        if endpoint.get("protocol") == "tcp":
            reason = "bytes are relayed there without a look inside; here a session is opened with a credential, or not at all"
            cure = "add it by hand, with a credential that says postgres, if it is a server of PostgreSQL"
            self._leave_out(endpoint, f"{where}.protocol", reason, cure)
            return []
        if endpoint.get("tls") == "passthrough":
            del endpoint["tls"]
            self.note(f"{where}.tls", "same", "passthrough has no effect there since it is deprecated", "nothing to do")
        if endpoint.get("enforcement") != "enforce":
            said = endpoint.get("enforcement") or "audit, the default there,"
            endpoint["enforcement"] = "enforce"
            self.note(
                f"{where}.enforcement", "narrower", f"{said} lets refused calls pass", "write rules for what is needed"
            )
        if not endpoint.get("protocol") and not {"rules", "access", "deny_rules"} & set(endpoint):
            reason = "it was relayed without a look inside; here only HTTP passes, call by call"
            self.note(f"{where}.protocol", "narrower", reason, "add protocol: rest with rules")
        if "allowed_ips" in endpoint:
            reason = "there every address must lie in allowed_ips; here only private ones must, and public ones may be dialled"
            self.note(f"{where}.allowed_ips", "wider", reason, "check that the host resolves to private addresses only")
        self._matches(endpoint, where)
        path = endpoint.get("path")
        if path == "**":
            endpoint["path"] = "/**"
        elif isinstance(path, str) and path not in {"", "/**"} and "*" in path:
            return self._split(endpoint, path, where)
        return [endpoint]

    def _split(self, endpoint: dict[str, Any], path: str, where: str) -> list[object]:
        stem = path.removesuffix("/**")
        if "*" in stem:
            reason = "in this field * crosses / there and not here, so it would select other calls"
            self._leave_out(endpoint, f"{where}.path", reason, "write the endpoint by hand")
            return []
        self.note(
            f"{where}.path", "same", f"{path} also selects {stem} there", "nothing to do: there are two endpoints now"
        )
        return [endpoint, {**endpoint, "path": stem}]

    def _matches(self, endpoint: dict[str, Any], where: str) -> None:
        self.findings += imported(endpoint, where)
        rules = endpoint.get("rules")
        if isinstance(rules, list) and endpoint.get("protocol") in {"rest", "websocket"}:
            kept = []
            for index, rule in enumerate(rules):
                match = rule.get("allow") if isinstance(rule, dict) else None
                wrong = allow_match(match, self.dialect) if isinstance(match, dict) else None
                if isinstance(wrong, tuple):
                    self.note(f"{where}.rules[{index}]", "left_out", *wrong)
                else:
                    kept.append(rule if wrong is None else {**rule, "allow": wrong})
            endpoint["rules"] = kept
        denials = endpoint.get("deny_rules")
        if isinstance(denials, list) and endpoint.get("protocol") in {"rest", "websocket"}:
            for index, match in enumerate(denials):
                if isinstance(match, dict):
                    denials[index], change = deny_match(match, self.dialect)
                    if change:
                        self.note(f"{where}.deny_rules[{index}]", "narrower", *change)

    def _middlewares(self, value: object, rules: object) -> None:
        for key, middleware in (value or {}).items() if isinstance(value, dict) else []:
            cure = "decide whether the calls may pass without it, and add the endpoints by hand"
            self.note(
                f"network_middlewares.{key}", "lost", "there is nothing here that looks into or changes bodies", cure
            )
            scope = middleware.get("endpoints") if isinstance(middleware, dict) else None
            include = scope.get("include") if isinstance(scope, dict) else None
            for name, rule in rules.items() if isinstance(rules, dict) else ():
                kept = []
                for endpoint in rule.get("endpoints", []) if isinstance(rule, dict) else []:
                    host = endpoint.get("host") if isinstance(endpoint, dict) else None
                    if covered(include, host):
                        reason = f"its calls went through the middleware {key}"
                        self._leave_out(endpoint, f"network_policies.{name}.endpoints ({host})", reason, cure)
                    else:
                        kept.append(endpoint)
                if isinstance(rule, dict) and "endpoints" in rule:
                    rule["endpoints"] = kept

    def _leave_out(self, endpoint: dict[str, Any], where: str, reason: str, cure: str) -> None:
        """Tell that an endpoint is left out, and remember what it decided."""
        self.note(where, "left_out", reason, cure)
        self.gone.append(endpoint)

    def loadable(self, policy: dict[str, Any]) -> dict[str, Any]:
        """Return ``policy`` without what our loader refuses; every round leaves something out, so it ends."""
        while True:
            rules: dict[str, Any] = policy["network_policies"]
            before = -1
            while before != len(self.gone):
                before = len(self.gone)
                self._drop_empty(rules)
                self._drop_takeovers(rules)
            try:
                load_policy(dump(policy).encode(), self.source)
            except PolicyError as error:
                self._drop(rules, error)
                continue
            return policy

    def _drop(self, rules: Any, error: PolicyError) -> None:
        """Leave out the parts that ``error`` names; raise it again when one of them cannot be left out."""
        done: set[int] = set()
        names = dict(rules) if isinstance(rules, dict) else {}
        for problem in error.problems:
            match = _PART.match(problem.field)
            if not isinstance(rules, dict) or match is None:
                raise error
            self.note(problem.field, "left_out", problem.reason, problem.cure)
            key, rule = _owner(names, match)
            if key in rules:
                done.add(self._part(rules, key, rule, match))
        if not done:
            raise error
        for rule in _maps(rules):
            for endpoint in _items(rule, "endpoints"):
                if isinstance(endpoint.get("rules"), list):
                    endpoint["rules"] = [item for item in endpoint["rules"] if id(item) not in done]
            for field in ("endpoints", "binaries"):
                if isinstance(rule.get(field), list):
                    rule[field] = [item for item in rule[field] if id(item) not in done]

    def _part(self, rules: dict[str, Any], key: str, rule: Any, match: re.Match[str]) -> int:
        """Return the id of the part of ``rule`` to leave out; a whole rule is taken out at once."""
        if not match["list"]:
            self.gone += _items(rules.pop(key), "endpoints") if isinstance(rule, dict) else []
            rules.pop(key, None)
            return id(rule)
        part = rule[match["list"]][int(match["index"])]
        if match["list"] == "binaries":
            # Without its stricter endpoints, the program must not fall to wider ones.
            self.gone += [dict(endpoint) for endpoint in _items(rule, "endpoints")]
            return id(part)
        allow = _ALLOW.match(match["rest"])
        if allow and isinstance(part, dict):
            return id(part["rules"][int(allow[1])])
        if isinstance(part, dict):
            self.gone.append(part)
        return id(part)

    def _drop_takeovers(self, rules: Any) -> None:
        """Leave out endpoints that would now decide the calls of a more specific one that was left out."""
        found = True
        while found:
            found = False
            for key, rule in rules.items() if isinstance(rules, dict) else ():
                for endpoint in list(_items(rule, "endpoints")) if isinstance(rule, dict) else []:
                    if any(endpoint is not lost and takes_over(endpoint, lost) for lost in self.gone):
                        rule["endpoints"].remove(endpoint)
                        reason = (
                            "it would decide the calls of an endpoint that was left out, which was stricter or closer"
                        )
                        where = f"network_policies.{key}.endpoints ({endpoint.get('host')})"
                        self._leave_out(endpoint, where, reason, "solve the other finding first")
                        found = True

    def _drop_empty(self, rules: Any) -> None:
        for key in [k for k, rule in rules.items() if isinstance(rule, dict)] if isinstance(rules, dict) else []:
            rule = rules[key]
            for endpoint in list(_items(rule, "endpoints")):
                if endpoint.get("rules") == []:
                    rule["endpoints"].remove(endpoint)
                    where = f"network_policies.{key}.endpoints ({endpoint.get('host')})"
                    self._leave_out(endpoint, where, "none of its rules is left", "solve the findings on its rules")
            if rule.get("endpoints") == [] or rule.get("binaries") == []:
                self.note(
                    f"network_policies.{key}", "left_out", "no endpoint or no program is left", "see its findings"
                )
                self.gone += _items(rules.pop(key), "endpoints")


def _owner(rules: dict[str, Any], match: re.Match[str]) -> tuple[str, Any]:
    """Return the rule that a field of the loader is about; names may hold dots."""
    field = match.string.removeprefix("network_policies.")
    names = [name for name in rules if field == name or field.startswith(f"{name}.")]
    key = max(names, key=len, default="")
    return key, rules.get(key)
