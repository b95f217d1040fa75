"""Services of an inference route by class of data, and what is kept of calls, at the real ring 2."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ring2_inference import (
    CHAT,
    EVENTS,
    JSON,
    OPENAI,
    answering,
    context,
    governed,
    networks,
    release,
    unused,
    usage,
)  # fmt: skip
from ring2_policy import GOVERNANCE
from ring2_rig import SECRET, Rig, wait_for
from ring2_sponsor import Sponsor

from saw.gateway.record_filter import PIECE_BYTES
from saw.policy.delegation import Resource

pytestmark = pytest.mark.control("INF-01")

DATA = {"handles": ["internal", "confidential"], "assumed": ["internal"]}
LOCAL = {
    "upstream": "https://api.example.com/local/v1", "data_classes": ["internal", "confidential"], "models": ["local-*"],
    "aliases": {"demo-1": "local-1"},
}  # fmt: skip


def use(rig: Rig, *, budget: bool = False, data: dict[str, Any] | None = None, **route: Any) -> None:
    """Release a route that sends internal data to one service, and confidential data to a local one."""
    whole = {
        "alias": "inference.local", "models": ["demo-*"], "upstream": "https://models.example.com/api/v1",
        "credential": "model-key", "data_classes": ["internal"], "upstreams": [LOCAL], **route,
    }  # fmt: skip
    spend = unused("spend")
    if budget:
        free = {"models": ["local-*"], "input": "0", "output": "0"}
        whole |= {"budget": spend, "prices": [free, {"models": ["*"], "input": "0.01", "output": "10000"}]}
    money = {"scope": "workspace", "period": "day", "limit": {"currency": "USD", "amount": "1.00"}}
    before, _, after = GOVERNANCE.partition("inference:\n")
    text = f"{before}inference: {json.dumps({'routes': [whole]})}\n"
    text += f"budgets: {json.dumps([{'id': spend, **money}] if budget else [])}\n"
    text += f"data_classes: {json.dumps(DATA if data is None else data)}\n"
    release(rig, text + after.partition("\n")[2])
    rig.budget = f"coding/{spend}"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def _places(ring2: Rig) -> Iterator[None]:
    yield from networks(ring2)


@pytest.fixture(autouse=True)
def _as_before(rig: Rig, _places: None) -> Iterator[None]:
    yield
    rig.far.respond = None


def send(rig: Rig, held: str | None = None, *, model: str = "demo-1", words: str = "hello", **body: Any) -> Any:
    raw = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": words}], "max_tokens": 10, **body}
    ).encode()
    headers = {"content-type": "application/json", "accept-encoding": "gzip"}
    if held is not None:
        headers["saw-data-class"] = held
    return rig.call("POST", CHAT, host="inference.local", headers=headers, body=raw, number=5, context=context(rig))


def arrived(rig: Rig) -> tuple[str, str, dict[str, str]]:
    last = rig.far.arrived[-1]
    headers = dict(last["headers"])
    return headers["host"], last["target"], headers


def test_what_a_call_holds_decides_which_service_sees_it(rig: Rig) -> None:
    use(rig)
    assert send(rig).status == 200
    host, path, headers = arrived(rig)
    assert (host, path) == ("models.example.com", "/api/v1/chat/completions")
    assert SECRET["model-key"] in " ".join(headers.values())
    assert send(rig, "confidential").status == 200
    host, path, headers = arrived(rig)
    assert (host, path) == ("api.example.com", "/local/v1/chat/completions")
    assert "saw-data-class" not in headers, "what a call holds is not the service's to know"
    assert SECRET["model-key"] not in " ".join(headers.values()), "the key of one service does not go to another"
    assert send(rig, "internal").status == 200
    assert arrived(rig)[0] == "models.example.com", "naming less lowers nothing, naming the same changes nothing"
    count = len(rig.far.arrived)
    refused = send(rig, "confidential", model="demo-2")
    assert refused.outcome == (403, "data_class_not_allowed")
    assert "models.example.com is not for confidential data" in refused.json["detail"]
    assert "local-*" in refused.json["next_steps"][0]
    assert send(rig, "restricted").outcome == (403, "data_class_not_allowed")
    assert len(rig.far.arrived) == count, "nothing that is refused leaves"
    assert send(rig, model="demo-2").status == 200, "the same call with what policy assumes passes"


def test_a_workspace_that_works_with_confidential_data_reaches_the_local_service_alone(rig: Rig) -> None:
    use(rig, data={"handles": ["internal", "confidential"]})
    rig.far.arrived.clear()
    for held in (None, "", "internal"):
        assert send(rig, held).status == 200
        assert arrived(rig)[0] == "api.example.com", held
    assert send(rig, "internal", model="demo-2").outcome == (403, "data_class_not_allowed")


def test_a_delegation_raises_what_calls_hold_whichever_of_them_covers_a_call(rig: Rig) -> None:
    sponsor = Sponsor(rig)
    here = {"workspace": "ws-5", "agent": "agent-5"}
    plain = sponsor.hand(**here, resources=(Resource(host="inference.local"), Resource(host="api.example.com")))
    other = (Resource(host="nowhere.example.com"),)
    raised = sponsor.hand("dlg-2", **here, resources=other, data_classes=("confidential",))
    use(rig)
    rig.broker.put("ws-5", delegations=[plain], delegation_required=True)
    rig.settled()
    assert send(rig).status == 200
    assert arrived(rig)[0] == "models.example.com"
    rig.broker.put("ws-5", delegations=[plain, raised], delegation_required=True)
    rig.settled()
    for held in (None, "internal"):
        assert send(rig, held).status == 200
        assert arrived(rig)[0] == "api.example.com"


def balances(rig: Rig) -> list[tuple[int, int]]:
    database = sqlite3.connect(f"file:{rig.directory}/state/budget.db?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT key, held, spent FROM account ORDER BY rowid").fetchall()
    finally:
        database.close()
    return [(held // 10_000, spent // 10_000) for key, held, spent in rows if key.startswith(f"{rig.budget}|")]  # type: ignore[attr-defined]


def test_a_local_service_costs_what_policy_says_of_its_model(rig: Rig) -> None:
    use(rig, budget=True)
    answering(rig, [usage(500, 3)], JSON)
    assert send(rig, "confidential").status == 200
    assert balances(rig) == [(0, 0)]
    assert send(rig).status == 200
    assert balances(rig) == [(0, 3)]


def test_a_call_that_a_service_drops_is_neither_sent_nor_billed_again(rig: Rig) -> None:
    """Ring 2 itself never repeats a call; the agent may, and pays for each answer once."""
    use(rig, budget=True)
    go_on = answering(rig, [b'{"id": 1, '], JSON, end=False)
    rig.far.arrived.clear()
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(send(rig)))
    caller.start()
    wait_for(lambda: len(rig.far.arrived) == 1, "the call")
    assert balances(rig) == [(10, 0)], "one reservation for one call on its way"
    go_on.set()
    caller.join(60)
    wait_for(lambda: balances(rig) == [(0, 10)], "the reservation counts as spent")
    assert len(rig.far.arrived) == 1
    answering(rig, [b"{}"], JSON, status=503)
    assert send(rig).status == 503
    assert len(rig.far.arrived) == 2, "an error of the service is not tried again either"
    assert balances(rig) == [(0, 20)]
    answering(rig, [usage(1, 2)], JSON)
    assert send(rig).status == 200
    assert balances(rig) == [(0, 22)], "the agent's own second try costs what it used, once"


def test_a_call_that_could_not_leave_and_comes_again_is_billed_once(rig: Rig) -> None:
    use(rig, budget=True)
    answering(rig, [usage(1, 2)], JSON)
    rig.name_hosts(models_example_com="10.99.0.77")
    try:
        assert send(rig).status in {403, 503}
    finally:
        rig.name_hosts()
    assert balances(rig) in ([], [(0, 0)])
    wait_for(lambda: send(rig).status == 200, "the service")
    assert balances(rig)[0][1] % 2 == 0
    assert balances(rig)[0][0] == 0


# -- what is kept


def log(rig: Rig, *arguments: str) -> list[dict[str, Any]]:
    answer = json.loads(
        rig.saw("inference", "log", "--json", "--socket", str(rig.config.sockets().records), *arguments)
    )
    return list(answer["records"])


def shown(rig: Rig, record: str) -> dict[str, Any]:
    text = rig.saw("inference", "show", "--json", "--socket", str(rig.config.sockets().records), record)
    return dict(json.loads(text))


def newest(rig: Rig) -> dict[str, Any]:
    return log(rig, "--limit", "1")[0]


def calls(rig: Rig) -> list[dict[str, Any]]:
    """Return what the audit trail says of calls that were kept."""
    told = [event.event.get("unmapped", {}).get("saw", {}) for event in rig.broker.events]
    return [one for one in told if one.get("record")]


def readings(rig: Rig) -> list[Any]:
    return [e.event for e in rig.broker.events if e.event.get("api", {}).get("operation") == "inference.record.read"]


def keep(content: str) -> dict[str, Any]:
    return {"content": content, "keep": "30d"}


def test_nothing_is_kept_unless_policy_says_so(rig: Rig) -> None:
    use(rig)
    before = len(log(rig))
    assert send(rig).status == 200
    assert len(log(rig)) == before


@pytest.mark.parametrize("content", ["metadata", "prompts", "prompts-and-responses"])
def test_what_policy_says_is_kept_encrypted_and_no_credential_is_in_it(rig: Rig, content: str) -> None:
    use(rig, record=keep(content))
    secret = SECRET["model-key"]
    reflected = json.dumps({"said": f"your key is {secret}", "words": "an answer " * 400}).encode()
    answering(rig, [reflected[at : at + 700] for at in range(0, len(reflected), 700)], JSON)
    words = f"a prompt of {content}"
    answer = send(rig, words=words)
    assert answer.status == 200
    one = newest(rig)
    facts = one["facts"]
    assert (facts["workspace"], facts["model"], facts["content"]) == ("ws-5", "demo-1", content)
    assert facts["data_classes"] == ["internal"]
    assert facts["service"] == "https://models.example.com/api/v1"
    if content == "prompts-and-responses":
        wait_for(lambda: newest(rig)["answer"] == "whole", "the whole answer")
    whole = shown(rig, one["id"])
    if content == "metadata":
        assert (whole["body"], whole["answer"]) == (None, "")
    else:
        assert json.loads(whole["body"])["messages"][0]["content"] == words
    if content == "prompts-and-responses":
        assert whole["answer"].encode() == answer.body, "what is kept is what the workspace got"
        assert "*" * len(secret) in whole["answer"]
        assert whole["record"]["status"] == 200
    else:
        assert whole["answer"] == ""
    assert secret not in json.dumps(whole)
    raw = b"".join(path.read_bytes() for path in (rig.directory / "state").glob("records.db*"))
    assert raw
    assert words.encode() not in raw
    assert b"an answer an answer" not in raw
    wait_for(lambda: any(told["record"] == one["id"] for told in calls(rig)), "the record's name in the trail")
    wait_for(lambda: any(e["resources"][0]["uid"] == one["id"] for e in readings(rig)), "the reading in the trail")
    read = next(e for e in readings(rig) if e["resources"][0]["uid"] == one["id"])
    assert read["actor"]["user"]["uid"].startswith("local:")


def test_a_stream_is_kept_and_arrives_as_it_was_sent(rig: Rig) -> None:
    use(rig, record=keep("prompts-and-responses"))
    pieces = [*(f'data: {{"choices": [{{"delta": {{"content": "w{n}"}}}}]}}\n\n'.encode() for n in range(200)), *OPENAI]
    answering(rig, pieces, EVENTS)
    answer = send(rig, stream=True)
    assert answer.body == b"".join(pieces)
    wait_for(lambda: newest(rig)["answer"] == "whole", "the whole answer")
    assert shown(rig, newest(rig)["id"])["answer"].encode() == answer.body


def left_open(rig: Rig) -> dict[str, Any]:
    """Leave in the middle of an answer of 5000 times x; return its record."""
    go_on = answering(rig, [b"x" * 5000], JSON, end=False)
    body = json.dumps({"model": "demo-1", "messages": []}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: inference.local\r\ncontent-length: {len(body)}\r\n\r\n"
    with context(rig).wrap_socket(rig.connect("10.210.5.1", 8443), server_hostname="ring2.saw.internal") as sock:
        sock.settimeout(60)
        sock.sendall(head.encode() + body)
        got = b""
        while got.count(b"x" * 1000) < 5:
            piece = sock.recv(65536)
            assert piece, got
            got += piece
    go_on.set()
    wait_for(lambda: newest(rig)["answer_bytes"] > 5000 - PIECE_BYTES, "what was passed on")
    return newest(rig)


def test_what_a_client_got_before_it_left_is_kept(rig: Rig) -> None:
    use(rig, record=keep("prompts-and-responses"))
    one = left_open(rig)
    assert one["answer"] == "open", "nobody said that it is whole"
    assert set(shown(rig, one["id"])["answer"]) == {"x"}


def test_a_workspace_cannot_write_into_records_itself(rig: Rig) -> None:
    use(rig, record=keep("prompts-and-responses"))
    one = left_open(rig)
    before = shown(rig, one["id"])
    use(rig)  # the next call is not kept, so that whatever is written there is forged
    answering(rig, [b"y" * 2000] * 200, JSON)
    headers = {
        "x-saw-listener": "record", "x-saw-record": one["id"], "x-saw-piece": "900", "x-saw-pieces": "1",
        "content-type": "application/json",
    }  # fmt: skip
    body = json.dumps({"model": "demo-1", "messages": []}).encode()
    answer = rig.call("POST", CHAT, host="inference.local", headers=headers, body=body, number=5, context=context(rig))
    assert (answer.status, len(answer.body)) == (200, 400_000)
    assert "x-saw-record" not in arrived(rig)[2]
    assert shown(rig, one["id"]) == before


def test_a_call_that_cannot_be_kept_is_refused_and_costs_nothing(rig: Rig) -> None:
    use(rig, budget=True, record=keep("prompts"))
    answering(rig, [usage(1, 2)], JSON)
    assert send(rig).status == 200
    assert balances(rig) == [(0, 2)]
    config = json.loads(rig.config_path.read_text())
    held = config["records"]
    try:
        rig.config_path.write_text(json.dumps({**config, "records": None}))
        rig.stop_gatekeeper(signal.SIGTERM)
        rig.start_gatekeeper()
        wait_for(lambda: governed(rig), "the gatekeeper")
        rig.far.arrived.clear()
        refused = send(rig)
        assert refused.outcome == (403, "record_unavailable")
        assert not rig.far.arrived
        assert balances(rig) == [(0, 2)]
    finally:
        rig.config_path.write_text(json.dumps({**config, "records": held}))
        rig.stop_gatekeeper(signal.SIGTERM)
        rig.start_gatekeeper()
    wait_for(lambda: governed(rig), "the gatekeeper")
    assert send(rig).status == 200, "and its twin passes once calls are kept again"
    assert newest(rig)["facts"]["model"] == "demo-1"
