"""Reviews at a real broker process: the perimeter's calls over mTLS, the commands of operators and reviewers, receipts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from broker_rig import Lab, cli

from databases import beside
from saw.policy.keys import create_key
from saw.review.messages import MAX_REVIEWED_BODY, ClaimAnswer, ReviewView

POLICY = "a" * 64
HEADERS = [["content-type", "application/json"]]
LEASE = "2099-01-01T00:00:00.000Z"


def activate(lab: Lab, name: str) -> None:
    """What an attestation leaves behind in the register."""
    with beside(lab.config) as store:
        values = "state = 'active', lease_expires_at = ?, policy_digest = ?"
        store.execute(f"UPDATE workspaces SET {values} WHERE id = ?", (LEASE, POLICY, name))  # noqa: S608


def opening(workspace: str, body: bytes = b'{"amount": 12}', **changes: Any) -> dict[str, Any]:
    call = {"method": "POST", "scheme": "https", "host": "api.example.com", "port": 443, "path": "/v1/pay"}
    call |= {"headers": HEADERS, "body": base64.b64encode(body).decode()}
    asked = {"workspace_id": workspace, "call": call, "policy_digest": POLICY, "group": "maintainers", "quorum": 1}
    return {**asked, "expires_in_s": 3600, "rule": "actions[0]", "request_id": "call-1", **changes}


@pytest.fixture(scope="module")
def keys(broker: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two reviewers who are registered by the command."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ben", "cleo"):
        create_key(folder, name)
        added = cli(
            broker,
            *("review", "reviewer", "add", f"{name}@example.com", "--group", "maintainers"),
            *("--key", str(folder / f"{name}.pub"), "--json"),
        )
        assert json.loads(added.stdout)["changed"], added.stderr
    return folder


@pytest.fixture(scope="module")
def edge(broker: Lab) -> Iterator[httpx.Client]:
    with broker.tls("perimeter", "edge-reviews") as client:
        yield client


@pytest.fixture
def workspace(broker: Lab, request: pytest.FixtureRequest) -> str:
    name = "rv-" + hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    broker.workspace(name)
    activate(broker, name)
    return name


def opened(edge: httpx.Client, workspace: str, **changes: Any) -> str:
    answer = edge.post("/v1/perimeter/reviews", json=opening(workspace, **changes))
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ReviewView).id


def decide(lab: Lab, word: str, identifier: str, key: Path, *more: str) -> dict[str, Any]:
    done = cli(lab, "review", word, identifier, "--key", str(key), "--json", *more)
    return dict(json.loads(done.stdout))


def view(edge: httpx.Client, identifier: str, workspace: str, wait: int = 0) -> ReviewView:
    answer = edge.get(f"/v1/perimeter/reviews/{identifier}", params={"workspace_id": workspace, "wait": wait})
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ReviewView)


def claim(edge: httpx.Client, wait: int = 0) -> ClaimAnswer:
    answer = edge.post("/v1/perimeter/reviews/claim", json={"wait": wait})
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=ClaimAnswer)


def while_waiting(wait: Callable[[], Any], act: Callable[[], None]) -> tuple[Any, float]:
    """Start ``wait`` in a thread, then ``act``; return what the first gave and how long after the act."""
    found: list[tuple[Any, float]] = []
    thread = threading.Thread(target=lambda: found.append((wait(), time.monotonic())))
    thread.start()
    act()
    acted = time.monotonic()
    thread.join(60)
    return found[0][0], found[0][1] - acted


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-03")
def test_from_the_agents_call_to_its_answer_and_receipt(
    broker: Lab, edge: httpx.Client, keys: Path, workspace: str, tmp_path: Path
) -> None:
    identifier = opened(edge, workspace)
    shown = cli(broker, "review", "show", identifier).stdout
    assert "POST https://api.example.com/v1/pay" in shown
    assert '"amount": 12' in shown
    assert identifier in cli(broker, "review", "list", "--state", "pending", "--workspace", workspace).stdout
    assert not claim(edge).claimed
    saved = tmp_path / "body"
    cli(broker, "review", "show", identifier, "--body", str(saved))
    assert saved.read_bytes() == b'{"amount": 12}'

    answer, after = while_waiting(
        lambda: claim(edge, 25), lambda: decide(broker, "approve", identifier, keys / "ben.key", "--yes")
    )
    assert answer.claimed is not None
    assert (answer.claimed.id, answer.claimed.call.body, after < 10) == (identifier, b'{"amount": 12}', True)
    result = {"claim": answer.claimed.claim, "outcome": "done", "answer": {"status": 201, "body": "b2s="}}
    done, after = while_waiting(
        lambda: view(edge, identifier, workspace, 25),
        lambda: edge.post(f"/v1/perimeter/reviews/{identifier}/result", json=result).raise_for_status(),
    )
    assert (done.state, done.answer.status, done.answer.body, after < 10) == ("done", 201, b"ok", True)

    receipt = tmp_path / "receipt"
    assert cli(broker, "review", "receipt", identifier, "--out", str(receipt)).returncode == 0
    verified = cli(broker, "review", "verify", str(receipt), "--ca", str(broker.ca_file), "--json")
    told = json.loads(verified.stdout)
    assert (told["outcome"], told["answer_status"], told["workspace"]) == ("done", 201, workspace)
    assert [(one["approver"], one["decision"]) for one in told["decisions"]] == [("ben@example.com", "approve")]
    text = receipt.read_text()
    receipt.write_text(text[:-40] + ("A" if text[-40] != "A" else "B") + text[-39:])
    assert cli(broker, "review", "verify", str(receipt), "--ca", str(broker.ca_file)).returncode == 1


@pytest.mark.control("REV-02")
def test_only_perimeters_open_claim_see_and_end(broker: Lab, edge: httpx.Client, workspace: str) -> None:
    identifier = opened(edge, workspace)
    with broker.tls() as anonymous, broker.tls("ring2", "edge-reviews") as other:
        for client in (anonymous, other):
            for answer in (
                client.post("/v1/perimeter/reviews", json=opening(workspace)),
                client.post("/v1/perimeter/reviews/claim", json={}),
                client.get(f"/v1/perimeter/reviews/{identifier}?workspace_id={workspace}"),
                client.post(
                    f"/v1/perimeter/reviews/{identifier}/result", json={"claim": "A" * 43, "outcome": "failed"}
                ),
                client.get("/v1/reviews"),
            ):
                assert answer.status_code in {403, 404}
                assert answer.json()["code"] in {"not_a_perimeter", "certificate_refused", "no_such_call"}
    assert view(edge, identifier, workspace).state == "pending"


@pytest.mark.control("REV-01")
def test_an_unknown_workspace_and_a_larger_body_are_refused(edge: httpx.Client, workspace: str) -> None:
    answer = edge.post("/v1/perimeter/reviews", json=opening("rv-none"))
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_workspace")
    answer = edge.post("/v1/perimeter/reviews", json=opening(workspace, bytes(MAX_REVIEWED_BODY + 1)))
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")
    answer = edge.post("/v1/perimeter/reviews", content=b" " * (14 * 1024 * 1024))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert opened(edge, workspace, body=bytes(MAX_REVIEWED_BODY)).startswith("rv-")


def test_nothing_is_signed_unless_somebody_confirms_and_is_a_reviewer(
    broker: Lab, edge: httpx.Client, keys: Path, workspace: str, tmp_path: Path
) -> None:
    identifier = opened(edge, workspace)
    assert decide(broker, "approve", identifier, keys / "ben.key")["error"]["code"] == "not_confirmed"
    create_key(tmp_path, "mallory")
    assert decide(broker, "approve", identifier, tmp_path / "mallory.key", "--yes")["error"]["code"] == "not_a_reviewer"
    assert view(edge, identifier, workspace).state == "pending"
    denied = decide(broker, "deny", identifier, keys / "cleo.key", "--yes", "--comment", "not this account")
    assert (denied["state"], denied["decisions"][0]["comment"]) == ("denied", "not this account")


def at_terminal(lab: Lab, typed: str, *arguments: str) -> tuple[int, str]:
    """Run ``saw`` on a terminal where somebody types ``typed`` when asked; return exit code and what it showed."""
    context = lab.directory / "terminal.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "saw.cli.main", *arguments],
            env={**os.environ, "SAW_CONTEXT": str(context)},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose other end is closed
            while part := terminal.read(4096):
                shown += part
                if shown.endswith(b"it: "):
                    terminal.write(typed.encode() + b"\n")
        return process.wait(60), shown.decode()


def test_a_person_at_a_terminal_sees_the_call_and_types_its_id(
    broker: Lab, edge: httpx.Client, keys: Path, workspace: str
) -> None:
    identifier = opened(edge, workspace)
    asked = ("review", "approve", identifier, "--key", str(keys / "ben.key"))
    code, shown = at_terminal(broker, "yes", *asked)
    assert (code, view(edge, identifier, workspace).state) == (1, "pending")
    assert shown.index('"amount": 12') < shown.index("type the id of the review to approve it: ")
    code, shown = at_terminal(broker, identifier, *asked)
    assert (code, view(edge, identifier, workspace).state) == (0, "approved")
    assert f"{identifier} is approved; approved by ben@example.com" in shown
    broker.operator.request("POST", f"/v1/reviews/{identifier}/cancel", {"reason": "test"})


def test_a_program_that_keeps_the_key_signs(
    broker: Lab, edge: httpx.Client, keys: Path, workspace: str, tmp_path: Path
) -> None:
    program = tmp_path / "token"
    key, public = keys / "cleo.key", keys / "cleo.pub"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --public ] && exec cat {public}\ncat > {tmp_path}/in\n'
        f"exec openssl pkeyutl -sign -inkey {key} -rawin -in {tmp_path}/in\n"
    )
    program.chmod(0o755)
    identifier = opened(edge, workspace)
    denied = cli(broker, "review", "deny", identifier, "--key", f"exec:{program}", "--yes", "--json")
    assert json.loads(denied.stdout)["state"] == "denied", denied.stderr


@pytest.mark.control("REV-02")
def test_a_receipt_of_another_authority_or_with_a_decision_taken_out_does_not_hold(
    broker: Lab, edge: httpx.Client, keys: Path, workspace: str, tmp_path: Path
) -> None:
    from saw.identity.names import IdentityError
    from saw.identity.statement import sign_statement
    from saw.identity.x509 import Authority
    from saw.review.receipt import RECEIPT_TYPE, verify_receipt
    from saw.review.statement import StatementRefused

    identifier = opened(edge, workspace)
    early = cli(broker, "review", "receipt", identifier, "--json")
    assert json.loads(early.stdout)["error"]["code"] == "review_not_ended"
    decide(broker, "approve", identifier, keys / "ben.key", "--yes")
    claimed = claim(edge, 10).claimed
    edge.post(
        f"/v1/perimeter/reviews/{identifier}/result", json={"claim": claimed.claim, "outcome": "failed"}
    ).raise_for_status()
    token = broker.operator.request("GET", f"/v1/reviews/{identifier}/receipt")["receipt"]
    ca = broker.ca_file.read_bytes()
    found = verify_receipt(token, ca)
    assert (found.receipt.outcome, found.decisions[0].said.approver) == ("failed", "ben@example.com")
    stranger = Authority.create(tmp_path / "ca", "saw.example", datetime.now(UTC))
    with pytest.raises(IdentityError):
        verify_receipt(token, stranger.ca_pem)
    signer = (broker.config.keys / "signer.pem").read_bytes()
    plain = msgspec.to_builtins(found.receipt)
    for change in (
        {"decisions": []},
        {"request_digest": "f" * 64},
        {"policy_digest": "f" * 64},
        {"quorum": 2},
        {"outcome": "denied"},
        {"decisions": plain["decisions"] * 2, "quorum": 2},
        {"claimed_at": None},
        {"surprise": 1},
    ):
        forged = sign_statement(msgspec.json.encode({**plain, **change}), RECEIPT_TYPE, signer, signer)
        with pytest.raises(StatementRefused):
            verify_receipt(forged, ca)
    same = sign_statement(msgspec.json.encode(plain), RECEIPT_TYPE, signer, signer)
    assert verify_receipt(same, ca).receipt == found.receipt


@pytest.mark.control("REV-02")
def test_a_kill_wakes_whoever_waits_for_the_review(broker: Lab, edge: httpx.Client, workspace: str) -> None:
    identifier = opened(edge, workspace)
    found, after = while_waiting(
        lambda: view(edge, identifier, workspace, 25),
        lambda: broker.operator.request("POST", f"/v1/workspaces/{workspace}/kill", {"reason": "drill"}),
    )
    assert (found.state, after < 10) == ("cancelled", True)


@pytest.mark.control("REV-03")
def test_a_claim_is_not_given_to_somebody_who_has_hung_up(broker: Lab, keys: Path, workspace: str) -> None:
    with broker.tls("perimeter", "edge-hangs-up") as client:
        identifier = opened(client, workspace)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/perimeter/reviews/claim", json={"wait": 25}, timeout=0.5)
        decide(broker, "approve", identifier, keys / "ben.key", "--yes")
        found = claim(client, 10).claimed
        assert found is not None
        assert found.id == identifier


@pytest.mark.control("REV-03")
def test_a_broker_that_is_killed_knows_what_was_claimed(own_broker: Lab, tmp_path: Path) -> None:
    lab = own_broker
    lab.workspace("rv-crash")
    activate(lab, "rv-crash")
    create_key(tmp_path, "ben")
    cli(lab, "review", "reviewer", "add", "ben", "--group", "maintainers", "--key", str(tmp_path / "ben.pub"))
    with lab.tls("perimeter", "edge") as client:
        first, second = (opened(client, "rv-crash", body=body) for body in (b"1", b"2"))
        assert decide(lab, "approve", first, tmp_path / "ben.key", "--yes")["state"] == "approved"
        taken = claim(client).claimed
        assert taken.id == first
        decide(lab, "approve", second, tmp_path / "ben.key", "--yes")
    lab.process.send_signal(signal.SIGKILL)
    lab.process.wait(15)
    lab.start()
    with lab.tls("perimeter", "edge") as client:
        assert view(client, first, "rv-crash").state == "executing"
        assert claim(client).claimed.id == second
        assert claim(client).claimed is None
        result = {"claim": taken.claim, "outcome": "done", "answer": {"status": 200}}
        client.post(f"/v1/perimeter/reviews/{first}/result", json=result).raise_for_status()
        assert view(client, first, "rv-crash").state == "done"
    assert lab.operator.request("GET", "/v1/audit/verify")["complete"]
