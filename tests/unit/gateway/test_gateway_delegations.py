"""What the gatekeeper makes of signed delegations: whose they are, whether their line holds, and which calls they cover."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from saw.gateway.delegations import Engagement, OutsideDelegation, cover, engagements, shown, verify_statements
from saw.gateway.judge import Refused, _delegated
from saw.gateway.state import WorkspaceEntry
from saw.identity.statement import sign_statement
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.delegation import STATEMENT_TYPE, Delegation, Resource, Tools
from saw.policy.model import Decision, Operation, Request

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Broker:
    """Signs records as the broker does, with an authority of its own."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority.create(directory, "saw.test", NOW - timedelta(days=1))
        self.key, csr = new_key_and_csr("broker statements")
        self.certificate = self.authority.issue_signer(csr, "broker", NOW, timedelta(days=20))

    def sign(self, record: Delegation) -> str:
        return sign_statement(msgspec.json.encode(record), STATEMENT_TYPE, self.key, self.certificate)

    def engagement(self, *records: Delegation, **fields: Any) -> Engagement:
        """What workspace ws-1 holds when the broker tells these records."""
        return self.told([self.sign(record) for record in records], **fields)

    def told(self, statements: list[str], **fields: Any) -> Engagement:
        entry = msgspec.structs.replace(
            WorkspaceEntry(id="ws-1", number=1, state="active", agent="agent-1", delegations=tuple(statements)),
            **fields,
        )
        verified, _ = verify_statements([entry], {}, self.authority.ca_pem, NOW)
        return engagements([entry], verified).get("ws-1", Engagement())


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Broker:
    return Broker(tmp_path_factory.mktemp("delegations") / "ca")


def record(identifier: str = "dlg-1", parent: str = "", **fields: Any) -> Delegation:
    base = Delegation(
        format="saw-delegation/1", id=identifier, parent=parent, sponsor="mia", workspace="ws-1", agent="agent-1",
        task="notes", not_before=NOW - HOUR, expires=NOW + HOUR,
        resources=(Resource(host="api.example.com", paths=("/v1/**",)),),
    )  # fmt: skip
    return msgspec.structs.replace(base, **fields)


def outcome(
    engagement: Engagement,
    method: str = "GET",
    path: str = "/v1/x",
    *,
    host: str = "api.example.com",
    at: datetime = NOW,
) -> str:
    """The id of the covering delegation, or the reason of the refusal."""
    request = Request(scheme="https", host=host, port=443, method=method, path=path)
    decision = Decision(verdict="allow", canonical_path=path)
    try:
        return cover(engagement, request, decision, git_host=host == "git.example.com", now=at)
    except OutsideDelegation as refusal:
        return refusal.code


@pytest.mark.control("DEL-01")
def test_a_call_needs_a_delegation_that_covers_it(broker: Broker) -> None:
    held = broker.engagement(record())
    assert outcome(held) == "dlg-1"
    assert outcome(held, path="/v2/x") == "outside_delegation"
    assert outcome(held, host="other.example.com") == "outside_delegation"
    assert outcome(held, path="/v1/x?page=2") == "dlg-1"


@pytest.mark.control("DEL-01")
def test_a_workspace_that_was_never_given_one_needs_none_unless_all_do(broker: Broker) -> None:
    assert outcome(broker.told([])) == ""
    assert outcome(broker.told([], delegation_required=True)) == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_it_counts_between_its_beginning_and_its_end(broker: Broker) -> None:
    held = broker.engagement(record())
    assert outcome(held, at=NOW + HOUR - timedelta(seconds=1)) == "dlg-1"
    for when in (NOW + HOUR, NOW - 2 * HOUR):
        assert outcome(held, at=when) == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_a_record_of_another_workspace_or_agent_covers_nothing(broker: Broker) -> None:
    for other in ({"workspace": "ws-2"}, {"agent": "agent-2"}):
        assert outcome(broker.engagement(record(**other))) == "outside_delegation"
    assert outcome(broker.engagement(record())) == "dlg-1"


@pytest.mark.control("DEL-01")
def test_what_the_broker_says_without_its_signature_grants_nothing(broker: Broker, tmp_path: Path) -> None:
    stranger = Broker(tmp_path / "ca")
    good = broker.sign(record())
    for bad in (stranger.sign(record()), good[:-8] + "AAAAAAAA", "nonsense"):
        assert outcome(broker.told([bad])) == "outside_delegation"
    assert outcome(broker.told([good])) == "dlg-1"


@pytest.mark.control("DEL-01")
def test_a_record_that_outlives_its_signers_certificate_is_refused(broker: Broker) -> None:
    assert outcome(broker.engagement(record(expires=NOW + timedelta(days=21)))) == "outside_delegation"
    assert outcome(broker.engagement(record(expires=NOW + timedelta(days=19)))) == "dlg-1"


@pytest.mark.control("DEL-02")
def test_a_part_counts_only_with_its_whole_line(broker: Broker) -> None:
    whole = record(workspace="ws-9", agent="agent-9")
    part = record("dlg-2", "dlg-1", resources=(Resource(host="api.example.com", paths=("/v1/a/*",)),))
    held = broker.engagement(whole, part)
    assert outcome(held, path="/v1/a/b") == "dlg-2"
    assert outcome(held, path="/v1/x") == "outside_delegation"
    assert outcome(broker.engagement(part), path="/v1/a/b") == "outside_delegation"


@pytest.mark.control("DEL-02")
def test_a_part_that_is_wider_than_the_whole_covers_nothing_even_when_signed(broker: Broker) -> None:
    whole = record(workspace="ws-9", agent="agent-9")
    wide = record("dlg-2", "dlg-1", resources=(Resource(host="api.example.com", paths=("/**",)),))
    assert outcome(broker.engagement(whole, wide)) == "outside_delegation"
    longer = record("dlg-2", "dlg-1", expires=NOW + 2 * HOUR)
    assert outcome(broker.engagement(whole, longer)) == "outside_delegation"
    assert outcome(broker.engagement(whole, record("dlg-2", "dlg-1"))) == "dlg-2"


def tool_call(held: Engagement, *tools: str, server: str = "docs", protocol: str = "mcp", at: datetime = NOW) -> str:
    """The delegation that covers a POST in which these tools are called, or the reason of the refusal."""
    request = Request(scheme="https", host="api.example.com", port=443, method="POST", path="/v1/mcp")
    asked = tuple(Operation("tools/call", tool) for tool in tools) or (Operation("tools/list"),)
    decision = Decision(verdict="allow", canonical_path="/v1/mcp", protocol=protocol, operations=asked)
    try:
        return cover(held, request, decision, git_host=False, now=at, server=server)
    except OutsideDelegation as refusal:
        return refusal.code


@pytest.mark.control("DEL-01")
def test_a_call_of_a_tool_needs_a_delegation_that_names_it_where_one_names_tools(broker: Broker) -> None:
    assert tool_call(broker.engagement(record()), "publish") == "dlg-1"
    held = broker.engagement(record(tools=(Tools(server="docs", tools=("read*",)),)))
    assert tool_call(held, "read_all") == "dlg-1"
    assert tool_call(held) == "dlg-1", "a list is no call"
    for refused in (("publish",), ("read_all", "publish")):
        assert tool_call(held, *refused) == "outside_delegation"
    assert tool_call(held, "read_all", server="other") == "outside_delegation"
    assert tool_call(held, "read_all", server="") == "outside_delegation"
    assert tool_call(held, "", server="docs", protocol="json-rpc") == "outside_delegation"
    assert tool_call(broker.engagement(record(tools=())), "read_all") == "outside_delegation"
    with pytest.raises(OutsideDelegation, match="covers the tool publish of docs"):
        cover(
            held,
            Request(scheme="https", host="api.example.com", port=443, method="POST", path="/v1/mcp"),
            Decision(verdict="allow", canonical_path="/v1/mcp", operations=(Operation("tools/call", "publish"),)),
            git_host=False, now=NOW, server="docs",
        )  # fmt: skip


@pytest.mark.control("DEL-01")
def test_resources_and_tools_are_those_of_one_delegation(broker: Broker) -> None:
    elsewhere = record("dlg-2", resources=(Resource(host="other.example.com"),), tools=(Tools(server="docs"),))
    held = broker.engagement(record(tools=(Tools(server="docs", tools=("read",)),)), elsewhere)
    assert tool_call(held, "read") == "dlg-1"
    assert tool_call(held, "publish") == "outside_delegation"
    assert tool_call(broker.engagement(record(tools=()), record("dlg-3")), "publish") == "dlg-3"


@pytest.mark.control("DEL-02")
def test_a_part_that_names_more_tools_than_the_whole_covers_nothing_even_when_signed(broker: Broker) -> None:
    whole = record(workspace="ws-9", agent="agent-9", tools=(Tools(server="docs", tools=("read",)),))
    good = record("dlg-2", "dlg-1", tools=(Tools(server="docs", tools=("read",)),))
    assert tool_call(broker.engagement(whole, good), "read") == "dlg-2"
    for wide in (record("dlg-2", "dlg-1", tools=(Tools(server="docs"),)), record("dlg-2", "dlg-1")):
        assert tool_call(broker.engagement(whole, wide), "read") == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_the_list_has_the_tools_that_were_handed_out(broker: Broker) -> None:
    request = Request(scheme="https", host="API.example.com", port=443, method="GET", path="/v1/mcp")

    def listed(held: Engagement, at: datetime = NOW) -> set[str]:
        shows = shown(held, request, "/v1/mcp", "docs", at)
        return {tool for tool in ("read", "publish") if shows(tool)}

    assert listed(Engagement()) == listed(broker.engagement(record())) == {"read", "publish"}
    held = broker.engagement(record(tools=(Tools(server="docs", tools=("read",)),)))
    assert listed(held) == {"read"}
    assert listed(held, NOW + HOUR) == set()
    assert listed(broker.engagement(record(tools=(Tools(server="other"),)))) == set()
    other = record(resources=(Resource(host="other.example.com"),))
    assert listed(broker.engagement(other)) == set()


@pytest.mark.control("DEL-02")
def test_records_that_point_at_each_other_cover_nothing(broker: Broker) -> None:
    assert outcome(broker.engagement(record("dlg-1", "dlg-2"), record("dlg-2", "dlg-1"))) == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_approval_bounds_what_the_agent_does_on_its_own(broker: Broker) -> None:
    reads = broker.engagement(record(approval="read-only"))
    assert outcome(reads) == "dlg-1"
    assert outcome(reads, "POST") == "outside_delegation"
    reviewed = broker.engagement(record(approval="review"))
    assert outcome(reviewed) == "dlg-1"
    assert outcome(reviewed, "POST") == "review_required"
    assert outcome(broker.engagement(record()), "POST") == "dlg-1"
    both = broker.engagement(record(approval="read-only"), record("dlg-3"))
    assert outcome(both, "POST") == "dlg-3"


@pytest.mark.control("DEL-01")
def test_a_grpc_call_that_a_person_would_have_to_decide_on_is_refused(broker: Broker) -> None:
    reviewed = broker.engagement(record(approval="review"))
    case: Any = SimpleNamespace(
        view=SimpleNamespace(engagements={"ws-1": reviewed}), now=NOW, approved=False, server=""
    )
    release: Any = SimpleNamespace(matcher=SimpleNamespace(speaks_git=lambda _: False))
    entry: Any = SimpleNamespace(id="ws-1")
    decision = Decision(verdict="allow", canonical_path="/v1/x")
    request = Request(scheme="https", host="api.example.com", port=443, method="POST", path="/v1/x")
    assert _delegated(case, entry, request, release, decision)[0] == "dlg-1"
    grpc = msgspec.structs.replace(request, headers={"content-type": "application/grpc"})
    with pytest.raises(Refused, match="a gRPC client cannot wait") as refusal:
        _delegated(case, entry, grpc, release, decision)
    assert refusal.value.reason == "outside_delegation"


@pytest.mark.control("DEL-01")
@pytest.mark.parametrize(
    ("approval", "outcome"),
    [("policy", "dlg-1"), ("review", "outside_delegation"), ("read-only", "outside_delegation")],
)
def test_a_session_of_a_database_is_a_write_that_nobody_can_review(broker: Broker, approval: Any, outcome: str) -> None:
    held = broker.engagement(record(resources=(Resource(host="db.example.com", ports=(5432,)),), approval=approval))
    case: Any = SimpleNamespace(view=SimpleNamespace(engagements={"ws-1": held}), now=NOW, approved=False, server="")
    release: Any = SimpleNamespace(matcher=SimpleNamespace(speaks_git=lambda _: False))
    entry: Any = SimpleNamespace(id="ws-1")
    decision = Decision(verdict="allow", canonical_path="/")
    request = Request(scheme="http", host="db.example.com", port=5432, method="GET", path="/", upgrade="postgres")
    try:
        found = _delegated(case, entry, request, release, decision)[0]
    except Refused as refusal:
        found = refusal.reason
    assert found == outcome
    elsewhere = msgspec.structs.replace(request, port=5433)
    with pytest.raises(Refused, match="covers it"):
        _delegated(case, entry, elsewhere, release, decision)


@pytest.mark.control("DEL-01")
def test_a_fetch_is_a_read_only_where_the_host_speaks_git(broker: Broker) -> None:
    hosts = tuple(Resource(host=f"{name}.example.com") for name in ("git", "api"))
    held = broker.engagement(record(approval="read-only", resources=hosts))
    assert outcome(held, "POST", "/team/a.git/git-upload-pack", host="git.example.com") == "dlg-1"
    assert outcome(held, "POST", "/team/a.git/git-receive-pack", host="git.example.com") == "outside_delegation"
    assert outcome(held, "POST", "/team/a.git/git-upload-pack") == "outside_delegation"


@pytest.mark.control("DEL-01")
def test_what_a_body_asks_for_is_a_read_or_a_write_by_its_protocol(broker: Broker) -> None:
    held = broker.engagement(record(approval="read-only"))
    request = Request("https", "api.example.com", 443, "POST", "/v1/x")

    def of(protocol: str, *operations: Operation) -> str:
        decision = Decision(verdict="allow", canonical_path="/v1/x", protocol=protocol, operations=operations)
        try:
            return cover(held, request, decision, git_host=False, now=NOW)
        except OutsideDelegation as error:
            return error.code

    assert of("graphql", Operation("query", "", ("a",))) == "dlg-1"
    assert of("graphql", Operation("query", "", ("a",)), Operation("mutation", "", ("b",))) == "outside_delegation"
    assert of("mcp", Operation("tools/list")) == "dlg-1"
    assert of("mcp", Operation("tools/call", "a")) == "outside_delegation"
    assert of("json-rpc", Operation("list")) == "outside_delegation"
    assert of("mcp") == "dlg-1", "the stream of a session asks for nothing"
