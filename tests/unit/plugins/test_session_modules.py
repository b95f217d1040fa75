"""The modules about sessions and the trail against a real broker: check run, run, second run, and every refusal."""

from __future__ import annotations

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import audit_query, session_info, session_revoke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from databases import beside
from saw.broker.session_views import key_digest


def public_key() -> str:
    return Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def execute(lab, query: str, *values: str) -> None:
    with beside(lab.config) as store:
        store.execute(query, values)


@pytest.fixture(scope="module")
def place(broker_context):
    """A broker with two active workspaces; gives a way to open a session."""
    lab = broker_context
    for name in ("ws-ses-a", "ws-ses-b"):
        lab.workspace(name)
        execute(lab, "UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = ?", "a" * 64, name)
    with lab.tls("bastion", "edge-modules") as bastion:

        def opened(workspace: str, person: str = "", *, redeem: bool = True) -> str:
            key = public_key()
            body = {"workspace_id": workspace, "public_key": key}
            session = str(lab.operator.request("POST", "/v1/sessions", body)["session_id"])
            if redeem:
                told = {"session_id": session, "key_sha256": key_digest(key), "address": "192.0.2.7"}
                told |= {"leg_key": public_key(), "terminal": True}
                answer = bastion.post("/v1/bastion/sessions/redeem", json=told)
                assert answer.status_code == 200, answer.text
            # As if they had signed in; what the provider takes for that is tested with the provider.
            execute(lab, "UPDATE sessions SET person = ? WHERE id = ?", person, session)
            return session

        yield opened


def ids(outcome) -> set[str]:
    return {session["id"] for session in outcome["sessions"]}


def test_sessions_are_read_by_id_workspace_and_person(broker_context, run_module, place) -> None:
    context = broker_context.context
    ada, ben = place("ws-ses-a", "ada"), place("ws-ses-b", "ben")
    found = run_module(session_info, context=context, id=ada)
    assert not found["changed"]
    assert (found["sessions"][0]["who"], found["sessions"][0]["state"]) == ("user:ada", "open")
    assert ids(run_module(session_info, context=context, workspace="ws-ses-b", live=True)) == {ben}
    assert ids(run_module(session_info, context=context, person="ada")) == {ada}
    assert ids(run_module(session_info, context=context, person="ada", workspace="ws-ses-b")) == set()
    assert ids(run_module(session_info, context=context, id="ses-none")) == set()
    assert run_module(session_info, context=context, id=ada, person="ada").failed
    run_module(session_revoke, context=context, id=ben)
    assert {ada, ben} <= ids(run_module(session_info, context=context))


@pytest.mark.control("ID-03")
@pytest.mark.parametrize("by", ["id", "workspace", "person"])
def test_sessions_are_ended_once_by(broker_context, run_module, place, by: str) -> None:
    context, person = broker_context.context, f"cleo-{by}"
    mine, waiting = place("ws-ses-a", person), place("ws-ses-a", person, redeem=False)
    other = place("ws-ses-b", "dan")
    wanted = {"context": context, "reason": "left", by: {"id": mine, "workspace": "ws-ses-a", "person": person}[by]}
    expected = {mine} if by == "id" else {mine, waiting}
    forecast = run_module(session_revoke, check=True, **wanted)
    assert forecast["changed"]
    assert set(forecast["revoked"]) >= expected
    assert run_module(session_info, context=context, id=mine)["sessions"][0]["state"] == "open"
    done = run_module(session_revoke, **wanted)
    assert done["changed"]
    assert set(done["revoked"]) == set(forecast["revoked"])
    assert (done["diff"]["before"][mine], done["diff"]["after"][mine]) == ("open", "ending")
    assert run_module(session_info, context=context, id=mine)["sessions"][0]["reason"] == "ended_by_operator"
    assert run_module(session_info, context=context, id=other)["sessions"][0]["state"] == "open"
    if by != "id":
        assert run_module(session_info, context=context, id=waiting)["sessions"][0]["state"] == "closed"
    for check in (False, True):
        again = run_module(session_revoke, check=check, **wanted)
        assert (again["changed"], again["revoked"]) == (False, [])
    run_module(session_revoke, context=context, workspace="ws-ses-a")
    run_module(session_revoke, context=context, workspace="ws-ses-b")


def test_a_session_that_does_not_exist_is_not_revoked(broker_context, run_module, place, monkeypatch) -> None:
    context = broker_context.context
    refused = run_module(session_revoke, context=context, id="ses-none")
    assert refused["failure"]["code"] == "unknown_session"
    assert "saw sessions lists them" in refused["msg"]
    assert run_module(session_revoke, context=context).failed
    said: list[str] = []
    monkeypatch.setattr(session_revoke.AnsibleModule, "warn", lambda _self, text: said.append(text))
    assert not run_module(session_revoke, context=context, person="nobody")["changed"]
    assert said == ["nobody never had a session here; people have the whole name that they signed in with"]


def test_more_live_sessions_than_a_list_shows_are_all_found(broker_context, run_module, place) -> None:
    first = place("ws-ses-b", "eve")
    with beside(broker_context.config) as store:
        store.executemany(
            "INSERT INTO sessions (id, workspace_id, principal, key_fingerprint, issued_at, expires_at, closed_at, kind, person)"
            " VALUES (?, 'ws-ses-b', 'operator:root', '0', '9', '9', '9', 'bastion', 'eve')",
            [(f"ses-old-{n}",) for n in range(1001)],
        )
    context = broker_context.context
    assert first not in ids(run_module(session_info, context=context, person="eve"))
    assert ids(run_module(session_info, context=context, person="eve", live=True)) == {first}
    assert run_module(session_revoke, context=context, person="eve")["revoked"] == [first]


def test_a_filter_of_sessions_that_does_not_exist_is_refused(broker_context) -> None:
    from saw.broker.client import BrokerRefusal

    with pytest.raises(BrokerRefusal, match="unknown field `who`"):
        broker_context.operator.request("GET", "/v1/sessions?who=ada")


# --- audit_query ------------------------------------------------------------------------------------------------------


def test_the_trail_is_searched_as_the_command_does(broker_context, run_module, place) -> None:
    broker_context.operator.request("POST", "/v1/workspaces/ws-ses-b/kill", {"reason": "a drill of the modules"})
    wanted = {"context": broker_context.context, "workspace": "ws-ses-b", "text": "A DRILL", "since": "1h"}
    found = run_module(audit_query, **wanted, verify=True)
    assert not found["changed"]
    assert {one["event"]["unmapped"]["saw"]["workspace"] for one in found["events"]} == {"ws-ses-b"}
    assert "workspace.kill" in {one["event"].get("api", {}).get("operation") for one in found["events"]}
    assert found["trail"]["complete"]
    first = run_module(audit_query, **wanted, limit=1)
    rest = run_module(audit_query, **wanted, after=first["next"])
    assert first["events"] + rest["events"] == found["events"]
    api = run_module(audit_query, **wanted, **{"class": "api activity"})["events"]
    assert {one["event"]["class_uid"] for one in api} == {6003}
    assert run_module(audit_query, **wanted, until="1h")["events"] == []


@pytest.mark.parametrize(
    ("told", "code"), [({"since": "yesterday"}, "config_invalid"), ({"limit": 0}, "range"), ({"after": -1}, "range")]
)
def test_a_search_that_makes_no_sense_is_refused(broker_context, run_module, told, code) -> None:
    refused = run_module(audit_query, context=broker_context.context, **told)
    assert refused["failure"]["code"] == code
    assert refused["failure"]["cure"]


@pytest.mark.control("AUD-02")
def test_a_trail_with_a_hole_ends_the_task_when_it_is_verified(broker_context, run_module) -> None:
    context = broker_context.context
    with beside(broker_context.config) as store:
        [row] = store.execute("SELECT * FROM audit_events WHERE source = 'broker' AND seq = 2").fetchall()
        store.execute("DELETE FROM audit_events WHERE source = 'broker' AND seq = 2")
    try:
        refused = run_module(audit_query, context=context, verify=True)
        assert refused["failure"]["code"] == "trail_incomplete"
        assert refused["failure"]["details"]["findings"]
        assert not run_module(audit_query, context=context).failed
    finally:
        with beside(broker_context.config) as store:
            store.execute(f"INSERT INTO audit_events VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608 - marks
    assert not run_module(audit_query, context=context, verify=True).failed
