"""``saw agent`` at a real broker, the feed of changes, and what a perimeter hears when an agent is retired."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, cli, cli_here

from saw.broker.agent_views import Agent, Changed, Changes, Page
from saw.broker.client import BrokerRefusal
from saw.gateway.state import WorkspaceEntry, parse_state

pytestmark = pytest.mark.control("ID-04")
V1 = {"host": "api.example.com", "paths": ["/v1/**"]}


@pytest.fixture
def saw(broker: Lab, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``saw agent`` in this process; a refusal has exit code 1."""
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"socket": broker.config.operator_socket}}))
    monkeypatch.setenv("SAW_CONTEXT", str(context))

    def run(*arguments: str, answer: str | None = None) -> Any:
        class Keyboard(io.StringIO):
            def isatty(self) -> bool:
                return answer is not None

        monkeypatch.setattr("sys.stdin", Keyboard(answer or ""))
        done = cli_here("agent", *arguments, "--json")
        assert done.returncode in {0, 1}
        return json.loads(done.stdout)

    return run


def hand(broker: Lab, workspace: str) -> str:
    body = {"workspace_id": workspace, "task": "tidy the notes", "resources": [V1], "duration_s": 3600}
    return str(broker.operator.request("POST", "/v1/delegations", body)["id"])


def told(broker: Lab, workspace: str) -> tuple[int, WorkspaceEntry]:
    with broker.tls("perimeter", "edge") as client:
        state = parse_state(client.get("/v1/perimeter/state?after=0&wait=0").content)
    return state.seq, next(entry for entry in state.workspaces if entry.id == workspace)


def test_an_agent_is_registered_found_changed_and_retired_from_the_command_line(broker: Lab, saw: Any) -> None:
    made = saw(
        "register", "--sponsor", "ada@example.com", "--name", "cmd-one", "--harness", "codex 1.2", "--key", "cmd-key-1"
    )
    again = saw(
        "register", "--sponsor", "ada@example.com", "--name", "cmd-one", "--harness", "codex 1.2", "--key", "cmd-key-1"
    )
    assert (again["id"], again["changed"]) == (made["id"], False)
    assert [one["id"] for one in saw("list", "--name", "cmd-one")["agents"]] == [made["id"]]
    changed = saw("change", made["id"], "--purpose", "keeps notes", "--version", "1")
    assert (changed["version"], saw("show", made["id"])["purpose"]) == (2, "keeps notes")
    assert saw("change", made["id"], "--purpose", "x", "--version", "1")["error"]["code"] == "version_conflict"
    assert saw("retire", made["id"], "--reason", "over")["state"] == "retired"
    assert saw("change", made["id"], "--purpose", "x")["error"]["code"] == "agent_retired"
    assert saw("show", "agent-0")["error"]["code"] == "unknown_agent"
    table = cli(broker, "agent", "list", "--name", "cmd-one").stdout.splitlines()
    assert table[0].split() == ["ID", "NAME", "STATE", "WORKSPACE", "SPONSOR", "HARNESS", "MODEL", "SUCCESSOR"]
    assert table[1].split()[:3] == [made["id"], "cmd-one", "retired"]


def test_the_register_answers_in_the_words_of_the_one_that_made_the_workspace(broker: Lab, saw: Any) -> None:
    workspace = broker.workspace("cmd-made")
    assert saw("show", workspace["agent_id"])["workspace"] == "cmd-made"
    with pytest.raises(BrokerRefusal, match="unknown field"):
        broker.operator.request("POST", "/v1/agents", {"sponsor": "ada@example.com", "colour": "red"})
    with pytest.raises(BrokerRefusal) as caught:
        broker.operator.request("POST", "/v1/agents", {"sponsor": "ada@example.com", "harness": "a\u202eb"})
    assert (caught.value.code, caught.value.status) == ("malformed", 400)


@pytest.mark.control("DEL-01")
def test_a_perimeter_hears_at_once_that_an_agent_is_retired(broker: Lab, saw: Any) -> None:
    agent = broker.workspace("cmd-gone")["agent_id"]
    hand(broker, "cmd-gone")
    seq, entry = told(broker, "cmd-gone")
    assert (entry.agent_retired, len(entry.delegations)) == (False, 1)
    saw("retire", agent, "--reason", "over")
    with broker.tls("perimeter", "edge") as client:
        assert client.get(f"/v1/perimeter/state?after={seq}&wait=30").json()["seq"] > seq
    _, entry = told(broker, "cmd-gone")
    assert (entry.agent_retired, entry.delegations) == (True, ())


@pytest.mark.control("DEL-01")
def test_what_is_issued_anew_is_shown_and_agreed_to_first(
    broker: Lab, saw: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = broker.workspace("cmd-next")["agent_id"]
    handed = hand(broker, "cmd-next")
    follow = ("succeed", first, "--reason", "newer", "--reissue")
    assert saw(*follow)["error"]["code"] == "not_confirmed"
    assert saw(*follow, answer="no\n")["error"]["code"] == "not_confirmed"
    assert saw("show", first)["state"] == "registered"
    done = saw(*follow, answer="y\n")
    assert (done["predecessor"], done["revoked"], len(done["reissued"])) == (first, [handed], 1)
    second = saw("succeed", done["id"], "--reason", "newer still", "--reissue", "--yes")
    assert (second["revoked"], len(second["reissued"])) == (done["reissued"], 1)
    bare = saw("succeed", second["id"], "--reason", "from nothing")
    assert (bare["revoked"], bare["reissued"]) == (second["reissued"], [])
    _, entry = told(broker, "cmd-next")
    assert (entry.agent, entry.agent_retired, entry.delegations) == (bare["id"], False, ())


def test_the_feed_waits_for_a_change_and_tells_it(broker: Lab, saw: Any) -> None:
    seq = broker.operator.request("GET", "/v1/agents?limit=1")["seq"]
    assert broker.operator.request("GET", f"/v1/agents/changes?after={seq}")["agents"] == []
    made = saw("register", "--sponsor", "ada@example.com")
    found = broker.operator.request("GET", f"/v1/agents/changes?after={seq}&wait=30")
    assert made["id"] in [one["id"] for one in found["agents"]]
    assert found["next"] > seq


def test_the_document_of_the_calls_says_what_they_take_and_answer(broker: Lab) -> None:
    document = broker.operator.request("GET", "/v1/openapi.json")
    taken = document["components"]["schemas"]["RegisterAgent"]
    assert (taken["required"], taken["additionalProperties"]) == (["sponsor"], False)
    named = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(named) <= set(document["components"]["schemas"])
    ask = broker.operator.request
    made = ask("POST", "/v1/agents", {"sponsor": "ada@example.com", "purpose": "is looked at"})
    msgspec.convert(made, Changed)
    msgspec.convert(ask("GET", f"/v1/agents/{made['id']}"), Agent)
    msgspec.convert(ask("POST", f"/v1/agents/{made['id']}/retire", {"reason": "over"}), Changed)
    page = ask("GET", "/v1/agents?text=looked")
    assert msgspec.convert(page, Page).agents[0].id == made["id"]
    assert msgspec.convert(ask("GET", f"/v1/agents/changes?after={page['seq'] - 1}"), Changes).agents
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**made, "colour": "red"}, Changed)
