"""``saw policy learn``: the smallest rules for what was denied, never more, and what rules must not undo stays undone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.audit.chain import Chain
from saw.audit.events import EventFactory, Subject
from saw.cli.main import main
from saw.policy.denials import Denial, read_denials
from saw.policy.draft import build_draft, draft_version
from saw.policy.errors import PolicyError
from saw.policy.learn import learn, request_of
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.policy.yamltext import dump, read

ROOT = Path(__file__).parents[3]
CODING = ROOT / "policies" / "coding"
CURL = "/usr/bin/curl"


def denial(path: str = "/x", **more: Any) -> Denial:
    values: dict[str, Any] = {
        "where": "test:1",
        "reason": "host_not_allowed",
        "scheme": "https",
        "host": "new.example.com",
        "port": 443,
        "method": "GET",
        "path": path,
        "query_known": True,
        "binary": CURL,
    }
    return Denial(**{**values, **more})


def draft_of(base: Bundle, lesson: Any) -> Matcher:
    draft = build_draft(base, lesson, None)
    bundle = load_members({name: draft.files[name] for name in ("policy.yaml", "governance.yaml")})
    return Matcher.compile(bundle.policy, bundle.governance)


def allows(matcher: Matcher, host: str, method: str, path: str, binary: str = CURL, *, port: int = 443) -> bool:
    return matcher.decide(Request("https", host, port, method, path, binary)).allowed


@pytest.mark.control("POL-05")
def test_a_learned_rule_allows_the_call_and_its_neighbours_stay_denied(coding: Bundle) -> None:
    lesson = learn(coding, [denial("/v1/jobs/7")])
    matcher = draft_of(coding, lesson)
    assert allows(matcher, "new.example.com", "GET", "/v1/jobs/7")
    assert not allows(matcher, "new.example.com", "GET", "/v1/jobs/8")
    assert not allows(matcher, "new.example.com", "GET", "/v1/jobs/7/")
    assert not allows(matcher, "new.example.com", "OPTIONS", "/v1/jobs/7")
    assert not allows(matcher, "new.example.com", "GET", "/v1/jobs/7", port=8443)
    assert not allows(matcher, "new.example.com", "GET", "/v1/jobs/7", "/usr/bin/wget")
    assert not allows(matcher, "other.example.com", "GET", "/v1/jobs/7")


def test_a_named_query_is_pinned(coding: Bundle) -> None:
    matcher = draft_of(coding, learn(coding, [denial("/find?kind=open&q=a%20b")]))
    assert allows(matcher, "new.example.com", "GET", "/find?kind=open&q=a%20b")
    assert not allows(matcher, "new.example.com", "GET", "/find?kind=all&q=a%20b")
    assert not allows(matcher, "new.example.com", "GET", "/find")


def test_programs_that_asked_the_same_share_a_rule_and_others_do_not(coding: Bundle) -> None:
    wget = {"binary": "/usr/bin/wget"}
    lesson = learn(coding, [denial("/a"), denial("/a", **wget), denial("/b"), denial("/b", **wget), denial("/c")])
    assert sorted(len(rule["binaries"]) for rule in lesson.rules.values()) == [1, 2]
    matcher = draft_of(coding, lesson)
    assert allows(matcher, "new.example.com", "GET", "/b", "/usr/bin/wget")
    assert not allows(matcher, "new.example.com", "GET", "/c", "/usr/bin/wget")


API = {"host": "api.example.com", "reason": "method_or_path_not_allowed"}
REFUSED = [
    (denial(host="169.254.169.254"), "blocked"),
    (denial(host="metadata.google.internal"), "metadata"),
    (denial(host="localhost"), "the machine itself"),
    (denial(host="93.184.216.34"), "an address instead of a host"),
    (denial(reason="destination_blocked"), "blocked whatever a policy says"),
    (denial("/v1/admin/users", **API), "a deny rule"),
    (
        denial("/v1/admin/users", host="api.example.com", reason="binary_not_allowed", binary="/usr/bin/wget"),
        "a deny rule",
    ),
    (
        denial("/v1/other", host="api.example.com", method="POST", reason="method_or_path_not_allowed"),
        "a person decides",
    ),
    (
        denial("/v1/items", host="api.example.com", reason="binary_not_allowed", binary="/usr/bin/wget"),
        "credential api-token",
    ),
    (denial(method="POST"), "a person decides"),
    (denial(reason="review_required"), "a person decides"),
    (denial(reason="action_denied"), "an action rule denies"),
    (denial(reason="lease_expired"), "not in a state to act"),
    (denial(reason="credential_unavailable"), "its credential was missing"),
    (denial(reason="tool_not_allowed", tool="move_file"), "granted by hand"),
    (denial(host="inference.local", reason="model_not_allowed"), "inference route"),
    (denial(method="CONNECT", path=""), "tunnel"),
    (denial(upgrade="websocket"), "asked to switch to websocket"),
    (denial(binary=""), "does not name the binary"),
    (denial(port=0), "does not name the port"),
    (denial(scheme="http", port=80), "plain text"),
    (denial(scheme="", port=80), "plain text"),
    (denial("/a*b"), "more than was asked"),
    (denial("/a?x=*"), "more than was asked"),
    (denial("/a?x=[1]"), "cannot be written as a rule"),
    (denial("/a?x=1;y=2"), "more than one way"),
    (denial("/a%2Fb"), "two parsers"),
    (denial("/../a"), "two parsers"),
    (denial(binary="/opt/*/run"), "more than was asked"),
    (denial(cut="path"), "only the beginning of the path"),
    (denial(reason="operation_not_allowed"), "does not hold what the body asked for"),
    (denial(reason="body_unreadable"), "could not be read"),
    (denial(reason="body_too_large"), "longer than the endpoint reads"),
]


@pytest.mark.control("POL-05")
@pytest.mark.parametrize(("record", "reason"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_rules_must_not_undo_is_told_instead(coding: Bundle, record: Denial, reason: str) -> None:
    lesson = learn(coding, [record, denial("/twin")])
    assert [left.denial for left in lesson.left] == [record]
    assert reason in lesson.left[0].reason and lesson.left[0].cure
    assert [proposal.path for proposal in lesson.proposals] == ["/twin"]


def test_the_same_refusal_again_and_again_is_told_once(coding: Bundle) -> None:
    again = [denial(where=f"log:{number}", reason="deny_rule") for number in range(1, 501)]
    lesson = learn(coding, again)
    assert [(left.denial.where, left.times) for left in lesson.left] == [("log:1", 500)]


def test_a_credential_travels_only_with_consent(coding: Bundle) -> None:
    record = denial("/v1/items", host="api.example.com", reason="binary_not_allowed", binary="/usr/bin/wget")
    assert not learn(coding, [record]).proposals
    lesson = learn(coding, [record], allow_credentials=frozenset({"api-token"}))
    decision = draft_of(coding, lesson).decide(request_of(lesson.proposals[0].asked[0]))
    assert decision.allowed and decision.credential == "api-token"


def test_a_rule_that_would_take_the_place_of_a_wildcard_is_not_proposed() -> None:
    base = load_bundle_folder(ROOT / "policies/operations")
    record = denial("/x", host="m.observe.example.com", method="OPTIONS")
    assert learn(base, [record]).already_allowed == 1
    asked = denial("/x", host="m.observe.example.com", method="PROPFIND", reason="method_or_path_not_allowed")
    assert "would take its place" in learn(base, [asked]).left[0].reason


def test_generalising_is_asked_for_and_needs_enough_paths(coding: Bundle) -> None:
    records = [denial(f"/jobs/{number}/log") for number in (1, 2, 3)]
    assert [p.path for p in learn(coding, records).proposals] == [f"/jobs/{number}/log" for number in (1, 2, 3)]
    assert len(learn(coding, records, generalise_from=4).proposals) == 3
    lesson = learn(coding, records, generalise_from=3)
    assert [p.path for p in lesson.proposals] == ["/jobs/*/log"]
    matcher = draft_of(coding, lesson)
    assert allows(matcher, "new.example.com", "GET", "/jobs/9/log")
    assert not allows(matcher, "new.example.com", "GET", "/jobs/9/10/log")
    assert not allows(matcher, "new.example.com", "GET", "/jobs/9/key")


def test_generalising_never_reaches_over_a_deny_rule_or_a_credential(coding: Bundle) -> None:
    records = [
        denial(f"/v1/{name}/users", host="api.example.com", reason="binary_not_allowed", binary="/usr/bin/wget")
        for name in ("a", "b", "c")
    ]
    lesson = learn(coding, records, generalise_from=3, allow_credentials=frozenset({"api-token"}))
    assert sorted(p.path for p in lesson.proposals) == ["/v1/a/users", "/v1/b/users", "/v1/c/users"]
    outside = [denial(f"/{name}/list", **{**API, "binary": "/usr/bin/wget"}) for name in ("a", "b", "c")]
    assert len(learn(coding, outside, generalise_from=3).proposals) == 3, (
        "/*/list would reach /v1/list with its credential"
    )


# ---------------------------------------------------------------- the promise as a property

HOSTS = ["api.example.com", "git.example.com", "x.wild.example.com", "new.example.com", "inference.local", "127.0.0.1"]
PATHS = ["/", "/v1/items", "/v1/admin/users", "/v1/notes", "/v2/items", "/v2/a", "/v2/b", "/v1//items", "/v1/items?a=1"]
BINARIES = [CURL, "/usr/bin/python3.13", "/usr/bin/wget", "/usr/bin/git"]
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


def broad() -> Bundle:
    """The coding bundle with a wildcard host, two layers of endpoints on one host, and writes that need no review."""
    members = dict(load_bundle_folder(CODING).members)
    tree = read(members["policy.yaml"], "policy.yaml")
    tree["network_policies"]["wild"] = {
        "endpoints": [{"host": "*.wild.example.com", "port": 443, "protocol": "rest", "access": "read-only"}],
        "binaries": [{"path": CURL}],
    }
    tree["network_policies"]["layer"] = {
        "endpoints": [
            {
                "host": "new.example.com",
                "port": 443,
                "protocol": "rest",
                "rules": [{"allow": {"method": "PUT", "path": "/**"}}],
            },
            {"host": "new.example.com", "port": 443, "path": "/v2/**", "protocol": "rest", "access": "read-only"},
        ],
        "binaries": [{"path": CURL}],
    }
    members["policy.yaml"] = dump(tree).encode()
    governance = read(members["governance.yaml"], "governance.yaml")
    governance["actions"].append({"match": {"host": "new.example.com", "method": ["PUT", "POST"]}, "class": "auto"})
    members["governance.yaml"] = dump(governance).encode()
    return load_members(members)


BROAD = broad()
CALLS = st.tuples(*(st.sampled_from(v) for v in (HOSTS, [443, 8443], METHODS, PATHS, BINARIES)))


def as_call(call: tuple[str, int, str, str, str]) -> Request:
    host, port, method, path, binary = call
    return Request("https", host, port, method, path, binary)


@pytest.mark.control("POL-05")
@settings(max_examples=examples(150), deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=6), st.lists(CALLS, min_size=1, max_size=40))
def test_the_draft_allows_what_was_asked_and_the_base_allows_and_nothing_else(
    calls: list[Any], probes: list[Any]
) -> None:
    base = Matcher.compile(BROAD.policy, BROAD.governance)
    records = []
    for call in calls:
        host, port, method, path, binary = call
        reason = base.decide(as_call(call)).reason
        records.append(denial(path, host=host, port=port, method=method, binary=binary, reason=reason))
    lesson = learn(BROAD, records, allow_credentials=frozenset({"api-token", "git-token"}))
    draft = draft_of(BROAD, lesson)
    asked = {item for proposal in lesson.proposals for item in proposal.asked}
    assert len(lesson.left) + lesson.already_allowed + len(asked) <= len(records)
    for item in asked:
        assert draft.decide(request_of(item)).allowed
    known = {(a.host, a.port, a.method, a.path, a.binary) for a in asked}
    known |= {(a.host, a.port, "HEAD", a.path, a.binary) for a in asked if a.method == "GET"}
    for probe in [*probes, *calls]:
        before, after = base.decide(as_call(probe)), draft.decide(as_call(probe))
        if before.allowed:
            assert after.allowed and (after.credential, after.action_class) == (before.credential, before.action_class)
        elif after.allowed:
            host, port, method, _, binary = probe
            assert (host, port, method, after.canonical_path.partition("?")[0], binary) in known


def test_the_property_has_something_to_say() -> None:
    """Without proposals the property would hold for a command that never proposes anything."""
    lesson = learn(
        BROAD, [denial("/v1/items", method="PUT"), denial("/v2/a", method="POST"), denial("/v2/a", method="PUT")]
    )
    assert lesson.already_allowed == 1
    assert {proposal.asked[0].method for proposal in lesson.proposals} == {"POST", "PUT"}


# ---------------------------------------------------------------- records


def test_every_form_of_record_is_read_alike(coding: Bundle) -> None:
    body = {
        "error": "policy_denied",
        "layer": "ring1",
        "protocol": "https",
        "reason": "host_not_allowed",
        "host": "new.example.com",
        "port": 443,
        "method": "GET",
        "path": "/x",
        "binary": CURL,
    }
    line = {**body, "event": "ring1_decision", "verdict": "deny"}
    del line["error"]
    factory = EventFactory("saw-gatekeeper", host="gw", new_uid=lambda: "u")
    event = factory.http_activity(
        datetime(2026, 1, 1, tzinfo=UTC),
        Subject(workspace="w1"),
        method="GET",
        scheme="https",
        host="new.example.com",
        port=443,
        path="/x",
        allowed=False,
        reason="host_not_allowed",
        detail={"layer": "ring2", "reason": "host_not_allowed", "binary": CURL},
    )
    chained = _chained(event)
    forms = [
        json.dumps(body),
        json.dumps(line),
        json.dumps(event),
        json.dumps(chained),
        json.dumps({"events": [chained]}),
    ]
    for text in forms:
        found = read_denials(text.encode(), "f").denials
        assert [p.asked[0].path for p in learn(coding, found).proposals] == ["/x"]


def _chained(event: dict[str, Any]) -> dict[str, Any]:
    chained = Chain("gateway-1").append(event)
    return {field: getattr(chained, field) for field in chained.__struct_fields__}


def test_other_records_are_counted_and_rubbish_is_refused_by_line() -> None:
    allowed = {"event": "ring1_decision", "verdict": "allow", "host": "a.example.com"}
    found = read_denials(f"{json.dumps(allowed)}\n\n{json.dumps(allowed)}\n".encode(), "f")
    assert (found.denials, found.others) == ((), 2)
    with pytest.raises(PolicyError, match="f:2:1") as caught:
        read_denials(f'{json.dumps(allowed)}\nnot json\n{{"a": 1}}\n'.encode(), "f")
    assert [problem.line for problem in caught.value.problems] == [2, 3]


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["policy", "learn", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "denials.jsonl"
    calls = [
        {"path": "/v1/jobs", "host": "jobs.example.com", "reason": "host_not_allowed"},
        {"path": "/", "host": "example.org", "reason": "host_not_allowed"},
        {"path": "/v1/admin/users", "host": "api.example.com", "reason": "deny_rule"},
    ]
    common = {
        "error": "policy_denied",
        "layer": "ring1",
        "protocol": "https",
        "port": 443,
        "method": "GET",
        "binary": CURL,
    }
    path.write_text("".join(json.dumps({**common, **call}) + "\n" for call in calls))
    return path


def test_the_command_writes_a_draft_that_passes_its_own_tests(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "draft"
    code, answer = run(capsys, "--denials", records, "--base", CODING, "--out", out)
    assert code == 0 and answer["name"] == "coding-draft" and answer["version"] == "1.1.0-draft"
    assert len(answer["proposed"]) == 2 and len(answer["not_proposed"]) == 1
    assert answer["broken_cases"] == ["another host"], "the base wants example.org refused: the reviewer must see that"
    assert main(["policy", "check", str(out)]) == 0
    assert main(["policy", "test", str(out)]) == 1
    text = (out / "policy.yaml").read_text()
    assert text.startswith((CODING / "policy.yaml").read_text().rstrip()), "comments and order of the base are kept"
    assert json.loads((out / "learned.json").read_text())["not_proposed"][0]["denied_as"] == "deny_rule"


def test_the_command_writes_nothing_in_place_and_nothing_for_nothing(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = run(capsys, "--denials", records, "--base", CODING, "--out", CODING)
    assert code == 1 and "exists already" in answer["error"]["message"]
    records.write_text(records.read_text().splitlines()[2])
    code, answer = run(capsys, "--denials", records, "--base", CODING, "--out", tmp_path / "none")
    assert code == 1 and not answer["ok"] and not (tmp_path / "none").exists()
    code, answer = run(
        capsys, "--denials", records, "--base", CODING, "--out", tmp_path / "n", "--allow-credential", "typo"
    )
    assert code == 1 and "no credential typo" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("before", "after"), [("1.4.2", "1.5.0-draft"), ("0.0.1", "0.1.0-draft"), ("1.0.0-rc.1", "1.1.0-draft")]
)
def test_the_version_is_marked_and_grows(before: str, after: str) -> None:
    assert draft_version(before) == after


POLICY_OF_CALLS = b"""\
version: 1
network_policies:
  g:
    binaries: [{path: /usr/bin/curl}]
    endpoints: [{host: g.example.com, port: 443, protocol: graphql, access: read-only}]
"""


@pytest.mark.control("POL-05")
@pytest.mark.parametrize(
    ("method", "reason"), [("OPTIONS", "does not hold what the body asked for"), ("POST", "could not be read")]
)
def test_no_rule_is_learned_for_an_endpoint_that_looks_into_bodies(method: str, reason: str) -> None:
    governance = b"schema: 1\nblueprint: {name: x, version: 1.0.0, owner: o}\n"
    base = load_members({"policy.yaml": POLICY_OF_CALLS, "governance.yaml": governance})
    asked = denial("/graphql", host="g.example.com", method=method, reason="method_or_path_not_allowed")
    lesson = learn(base, [asked, denial("/other")])
    assert reason in lesson.left[0].reason
    assert [rule["endpoints"][0]["host"] for rule in lesson.rules.values()] == ["new.example.com"]
