"""Credentials through Envoy and gatekeeper: signatures over what arrives, fetched tokens, scope by method, placeholders."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from ring2_rig import Rig, wait_for

from saw.policy.seen_body import LONGEST

KEY, KEY_SECRET, CLIENT_SECRET = "AKIAEXAMPLE", "key-secret-of-mia-0123456789", "client-secret-of-mia"
TOKEN = "access-token-of-the-endpoint-"
PLACEHOLDER = "openshell:resolve:env:STORE_KEYS"


def put(rig: Rig, name: str, value: str) -> Path:
    path = rig.directory / "credentials" / name
    path.write_text(value)
    path.chmod(0o600)
    return path


class Endpoint:
    """The far end as a token endpoint, and as a service that sends the client's credential back."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.given = 0
        self.status = 200

    async def __call__(self, scope: Mapping[str, Any], send: Any) -> None:
        if scope["path"] != "/oauth2/token":
            echo = dict(scope["headers"]).get(b"authorization", b"")
            await self.answer(send, 200, b"you sent " + echo)
            return
        self.given += 1
        told: dict[str, Any] = {"access_token": f"{TOKEN}{self.given}", "token_type": "Bearer", "expires_in": 300}
        if self.status != 200:
            told = {"error": "invalid_client", "error_description": f"not {CLIENT_SECRET}"}
        await self.answer(send, self.status, json.dumps(told).encode())

    @staticmethod
    async def answer(send: Any, status: int, body: bytes) -> None:
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(autouse=True)
def endpoint(rig: Rig) -> Iterator[Endpoint]:
    made = [
        put(rig, "store:mia@example.com", f"{KEY}:{KEY_SECRET}"),
        put(rig, "token:mia@example.com", CLIENT_SECRET),
        put(rig, "token:noa@example.com", "of somebody else"),
    ]
    far = Endpoint(rig)
    rig.far.respond = far
    yield far
    rig.far.respond = None
    for path in made:
        path.unlink(missing_ok=True)


def arrived(rig: Rig, target: str) -> dict[str, Any]:
    (found,) = (seen for seen in rig.far.arrived if seen["target"] == target)
    return {**found, "headers": dict(found["headers"])}


def verifies(seen: Mapping[str, Any]) -> bool:
    """What the service does with the request that reached it: sign it anew with the keys, and compare."""
    headers = seen["headers"]
    told = dict(part.split("=", 1) for part in headers["authorization"].partition(" ")[2].split(", "))
    request = AWSRequest(
        seen["method"], f"https://{headers['host']}{seen['target']}", data=seen["body"],
        headers={name: headers[name] for name in told["SignedHeaders"].split(";")},
    )  # fmt: skip
    request.context["timestamp"] = headers["x-amz-date"]
    judge = S3SigV4Auth(ReadOnlyCredentials(KEY, KEY_SECRET, None), "s3", "eu-central-1")
    text = judge.string_to_sign(request, judge.canonical_request(request))
    return bool(
        judge.signature(text, request) == told["Signature"] and headers["x-amz-content-sha256"] == seen["sha256"]
    )


@pytest.mark.control("CRED-01")
def test_the_service_can_verify_the_signature_over_what_reached_it(rig: Rig) -> None:
    own = {
        "authorization": f"AWS4-HMAC-SHA256 Credential={PLACEHOLDER}",
        "x-amz-security-token": "own",
        "x-amz-acl": "private",
    }
    target = "/store/keys/a%20b?list-type=2&prefix=x"
    assert rig.call(target=target, headers=own).status == 200
    seen = arrived(rig, target)
    assert verifies(seen)
    assert "x-amz-security-token" not in seen["headers"]
    assert "x-amz-acl" in seen["headers"]["authorization"]
    body = bytes(range(256)) * 1000
    assert rig.call("PUT", "/store/keys/object", body=body).status == 200
    seen = arrived(rig, "/store/keys/object")
    assert (verifies(seen), seen["size"]) == (True, len(body))


@pytest.mark.control("CRED-01")
def test_the_signature_does_not_come_back(rig: Rig) -> None:
    answer = rig.call(target="/store/keys/echo")
    signature = arrived(rig, "/store/keys/echo")["headers"]["authorization"]
    assert answer.body == b"you sent " + b"*" * len(signature)


@pytest.mark.control("CRED-01")
def test_a_body_that_cannot_be_signed_is_refused_and_not_sent(rig: Rig) -> None:
    answer = rig.call("PUT", "/store/keys/long", body=b"x" * (1024 * 1024 + 1))
    assert answer.outcome == (403, "credential_unavailable")
    assert answer.json["next_steps"] == ["send at most 1 MiB"]
    streamed = {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}
    assert rig.call("PUT", "/store/keys/long", body=b"x", headers=streamed).outcome == (403, "credential_unavailable")
    assert rig.far.arrived == []


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("first", [LONGEST, LONGEST + 1])
def test_a_beginning_that_ends_at_the_bound_is_not_taken_for_the_whole(rig: Rig, first: int) -> None:
    """Envoy marks what it cut; a beginning that came alone and fills its buffer to the byte it does not mark."""
    answer = rig.call("PUT", "/store/keys/pieces", pieces=[b"x" * first, b"x" * 100])
    assert answer.outcome == (403, "credential_unavailable")
    assert answer.json["next_steps"] == ["send at most 1 MiB"]
    assert rig.far.arrived == []
    assert rig.call("PUT", "/store/keys/pieces", pieces=[b"x" * (LONGEST - 100), b"x" * 100]).status == 200
    assert arrived(rig, "/store/keys/pieces")["size"] == LONGEST


@pytest.mark.control("CRED-01")
def test_a_token_is_fetched_once_sent_and_starred_out(rig: Rig, endpoint: Endpoint) -> None:
    answers = [rig.call(target=f"/store/tokens/{number}") for number in range(3)]
    asked = arrived(rig, "/oauth2/token")
    assert endpoint.given == 1
    assert (
        base64.b64decode(asked["headers"]["authorization"].removeprefix("Basic ")) == f"agents:{CLIENT_SECRET}".encode()
    )
    assert asked["body"] == b"grant_type=client_credentials"
    for number, answer in enumerate(answers):
        assert arrived(rig, f"/store/tokens/{number}")["headers"]["authorization"] == f"Bearer {TOKEN}1"
        assert answer.body == b"you sent Bearer " + b"*" * len(f"{TOKEN}1")
    put(rig, "token:mia@example.com", "exchanged")
    rig.call(target="/store/tokens/after")
    assert arrived(rig, "/store/tokens/after")["headers"]["authorization"] == f"Bearer {TOKEN}2"
    (rig.directory / "credentials" / "token:mia@example.com").unlink()
    assert rig.call(target="/store/tokens/none").outcome == (403, "credential_unavailable")


@pytest.mark.control("CRED-01")
def test_a_refusal_of_the_token_endpoint_is_in_the_trail_without_secrets(rig: Rig, endpoint: Endpoint) -> None:
    put(rig, "token:mia@example.com", CLIENT_SECRET + "-of-this-test")
    endpoint.status = 400
    answer = rig.call(target="/store/tokens/refused")
    assert answer.outcome == (403, "credential_unavailable")
    assert "answered 400 invalid_client" in answer.json["detail"]
    assert CLIENT_SECRET not in str(answer.json)
    assert CLIENT_SECRET not in (rig.directory / "gatekeeper.log").read_text()

    def told() -> list[str]:
        events = [event.event for event in list(rig.broker.events)]
        return [str(event) for event in events if "/store/tokens/refused" in str(event)]

    wait_for(told, "the refusal in the trail")
    (event,) = told()
    assert "answered 400 invalid_client" in event and "store-token" in event
    assert CLIENT_SECRET not in str([event.event for event in rig.broker.events])


@pytest.mark.control("CRED-01")
def test_a_credential_goes_with_its_methods_and_a_placeholder_nowhere(rig: Rig) -> None:
    assert rig.call("PUT", "/store/tokens/written", body=b"x").status == 200
    assert "authorization" not in arrived(rig, "/store/tokens/written")["headers"]
    basic = "Basic " + base64.b64encode(f"agent:{PLACEHOLDER}".encode()).decode()
    for headers in ({"authorization": basic}, {"x-api-key": PLACEHOLDER}):
        answer = rig.call("PUT", "/store/tokens/placeholder", body=b"x", headers=headers)
        assert answer.outcome == (403, "placeholder_unbound")
    assert rig.call(target=f"/store/keys/q?token={PLACEHOLDER}").outcome == (403, "placeholder_unbound")
    assert "openshell" not in str(rig.far.arrived)
