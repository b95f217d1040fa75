"""Sessions of PostgreSQL in policy: what loads, what is refused by name, who may open one, and how reach and diff see it."""

from __future__ import annotations

import pytest

from saw.policy.casefile import split_url, upgrade_of
from saw.policy.errors import PolicyError
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.reach_diff import diff_bundles as diff

ENDPOINT = "host: db.example.com, port: 5432, protocol: tcp"
CREDENTIAL = 'id: db, ref: "file:db", hosts: ["db.example.com:5432"], postgres: {user: agent, databases: [orders]}'
ACTION = "actions: [{match: {host: db.example.com, method: [POSTGRES]}, class: auto}]\n"


def files(
    endpoint: str = ENDPOINT, credential: str = CREDENTIAL, actions: str = ACTION, more: str = ""
) -> dict[str, bytes]:
    policy = f"""version: 1
network_policies:
  db:
    endpoints: [{{{endpoint}}}]
    binaries: [{{path: /usr/bin/psql}}]
  api:
    endpoints: [{{host: api.example.com, port: 443, protocol: rest, access: full}}{more}]
    binaries: [{{path: /usr/bin/psql}}]
"""
    governance = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n" + actions
    governance += f"credentials: [{{{credential}}}]\n" if credential else ""
    return {"policy.yaml": policy.encode(), "governance.yaml": governance.encode()}


def matcher(**changes: str) -> Matcher:
    bundle = load_members(files(**changes))
    return Matcher.compile(bundle.policy, bundle.governance)


def opening(**changes: object) -> Request:
    given = {"scheme": "http", "host": "db.example.com", "port": 5432, "method": "GET", "path": "/", "binary": "/usr/bin/psql",
             "upgrade": "postgres"}  # fmt: skip
    return Request(**{**given, **changes})  # type: ignore[arg-type]


def problems(**changes: str) -> str:
    try:
        load_members(files(**changes))
    except PolicyError as error:
        return str(error)
    return ""


@pytest.mark.control("CRED-01")
def test_a_session_that_policy_names_is_opened_with_its_credential() -> None:
    decision: Decision = matcher().decide(opening())
    assert (decision.verdict, decision.credential, decision.action_class) == ("allow", "db", "auto")
    assert matcher().opens_sessions
    assert matcher().decide(opening(upgrade="Postgres", binary="/bin/x", ancestors=("/usr/bin/psql",))).allowed


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"upgrade": ""}, "host_not_allowed"),
        ({"upgrade": "", "scheme": "https"}, "method_or_path_not_allowed"),
        ({"upgrade": "", "method": "POSTGRES", "scheme": "https"}, "method_or_path_not_allowed"),
        ({"method": "POST"}, "host_not_allowed"),
        ({"method": "POST", "scheme": "https"}, "method_or_path_not_allowed"),
        ({"upgrade": "websocket", "scheme": "https"}, "method_or_path_not_allowed"),
        ({"binary": "/usr/bin/curl"}, "binary_not_allowed"),
        ({"host": "api.example.com", "port": 443}, "method_or_path_not_allowed"),
        ({"host": "other.example.com"}, "host_not_allowed"),
        ({"port": 5433}, "host_not_allowed"),
        ({"host": "127.0.0.1"}, "destination_blocked"),
        ({"path": "/a/.."}, ""),
        ({"path": "/a/../b"}, "method_or_path_not_allowed"),
        ({"path": "/orders"}, "method_or_path_not_allowed"),
        ({"path": "/?database=orders"}, "method_or_path_not_allowed"),
        ({"path": "//"}, ""),
    ],
)
def test_no_other_request_is_taken_for_one(changes: dict[str, object], reason: str) -> None:
    decision = matcher().decide(opening(**changes))
    assert decision.allowed == (not reason)
    assert decision.reason == reason


@pytest.mark.control("REV-01")
def test_a_session_may_write_so_it_wants_an_action_rule() -> None:
    for actions in ("", ACTION.replace("class: auto", "class: review"), ACTION.replace("POSTGRES", "GET")):
        decision = matcher(actions=actions).decide(opening())
        assert (decision.verdict, decision.reason) == ("deny", "action_denied"), actions
        assert matcher(actions=actions).decide(opening(), approved=True).reason == "action_denied"
    assert matcher(actions=ACTION.replace("class: auto", "class: deny")).decide(opening()).reason == "action_denied"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"credential": ""}, "no credential with postgres is for db.example.com:5432"),
        ({"endpoint": ENDPOINT.replace("5432", "5433")}, "no credential with postgres is for db.example.com:5433"),
        ({"endpoint": ENDPOINT + ", access: full"}, "nothing looks into a session"),
        ({"endpoint": ENDPOINT + ", path: /x"}, "nothing looks into a session"),
        ({"endpoint": ENDPOINT + ", enforcement: audit"}, "a session is opened with a credential, or not at all"),
        (
            {"endpoint": ENDPOINT.replace("db.example", "'*.example").replace(".com", ".com'")},
            "a session needs one exact host",
        ),
        ({"endpoint": ENDPOINT.replace("tcp", "rest, access: full")}, "takes sessions of PostgreSQL"),
        (
            {"more": ", {host: '*.example.com', port: 5432, protocol: rest, access: full}"},
            "takes sessions of PostgreSQL",
        ),
        ({"credential": CREDENTIAL.replace("[orders]", "[]")}, "1 to 32 databases"),
        ({"credential": CREDENTIAL.replace("[orders]", '["a b"]')}, "is not a name"),
        ({"credential": CREDENTIAL.replace("user: agent", 'user: ""')}, "is not a name"),
        ({"credential": CREDENTIAL + ", methods: [GET]"}, "a session has no method and no path"),
        ({"credential": CREDENTIAL + ", paths: [/x]"}, "a session has no method and no path"),
        ({"credential": CREDENTIAL + ", inject: {header: A, format: '{secret}'}"}, "signs in with the secret itself"),
        ({"credential": CREDENTIAL.replace('["db.example.com:5432"]', "[]")}, "which server takes the secret"),
        ({"actions": ACTION + 'plaintext: ["db.example.com:5432"]\n'}, "would travel unencrypted"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_name(changes: dict[str, str], says: str) -> None:
    assert says in problems(**changes)
    assert problems() == ""


@pytest.mark.control("POL-04")
def test_a_client_chooses_no_action_rule_by_a_path() -> None:
    rules = "actions: [{match: {host: db.example.com, path: /x, method: [POSTGRES]}, class: auto}]\n"
    held = matcher(actions=rules)
    assert held.decide(opening(path="/x")).reason == "method_or_path_not_allowed"
    assert held.decide(opening()).reason == "action_denied"
    assert matcher(actions=rules.replace("/x", "/")).decide(opening()).allowed


@pytest.mark.control("CRED-01")
def test_a_route_to_a_model_service_takes_no_credential_for_sessions() -> None:
    route = """inference:
  routes: [{alias: inference.local, models: [m], upstream: "https://models.example.com", credential: NAME}]
"""
    plain = '}, {id: models, ref: "file:m", inject: {header: A, format: "{secret}"}'
    wrong, right = ACTION + route.replace("NAME", "db"), ACTION + route.replace("NAME", "models")
    assert "this one opens sessions of PostgreSQL" in problems(actions=wrong)
    assert problems(actions=right, credential=CREDENTIAL + plain) == ""


@pytest.mark.control("POL-01")
def test_a_new_database_or_another_role_is_a_widening_of_reach() -> None:
    old = load_members(
        files(endpoint="host: old.example.com, port: 443, protocol: rest, access: read-only", credential="")
    )
    new = load_members(files())
    gained = diff(old, new)
    assert gained.widening
    words = "\n".join(str(item) for item in gained.gained)
    assert "db.example.com" in words and "as agent of PostgreSQL to orders" in words
    other = load_members(files(credential=CREDENTIAL.replace("user: agent", "user: owner")))
    assert diff(new, other).widening
    assert not diff(new, load_members(files())).widening


@pytest.mark.control("POL-01")
@pytest.mark.parametrize(
    ("changed", "wider", "narrower"),
    [
        (("[orders, stock]", "[stock, orders]"), False, False),
        (("[orders, stock]", "[orders]"), False, True),
        (("[orders, stock]", "[orders, stock, staff]"), True, False),
        (("[orders, stock]", "[orders, staff]"), True, True),
        (("user: agent, databases: [orders, stock]", "user: owner, databases: [orders]"), True, True),
        (('ref: "file:db"', 'ref: "file:other"'), True, True),
    ],
    ids=["in another order", "fewer", "more", "others", "fewer for another role", "another secret"],
)
def test_databases_are_compared_as_sets(changed: tuple[str, str], wider: bool, narrower: bool) -> None:
    credential = CREDENTIAL.replace("[orders]", "[orders, stock]")
    old, new = load_members(files(credential=credential)), load_members(files(credential=credential.replace(*changed)))
    found = diff(old, new)
    assert (found.widening, bool(found.gained), bool(found.lost)) == (wider, wider, narrower)


def test_a_case_file_names_a_session_by_its_url() -> None:
    assert split_url("postgres://db.example.com/") == ("https", "db.example.com", 5432, "/")
    assert upgrade_of("postgres://db.example.com/") == "postgres"
    assert upgrade_of("wss://a.example.com/") == "websocket"
    assert upgrade_of("https://a.example.com/") == ""
