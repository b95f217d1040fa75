"""Signed calls, checked by the library on what would arrive; and what is refused because it cannot be signed."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.gateway.credentials import CredentialStore, Injection, header_names
from saw.gateway.errors import CallUnsignable, CredentialUnavailable
from saw.gateway.sigv4 import HEADERS, Outgoing
from saw.policy.governance import Credential
from saw.policy.paths import canonicalise_path
from saw.policy.providers import SigV4

KEY, SECRET, SESSION = "AKIAEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "session/token+of=mia" * 3


def outgoing(**changes: Any) -> Outgoing:
    told: dict[str, Any] = {
        "method": "GET", "scheme": "https", "authority": "bucket.s3.example.com", "target": "/a/b", "headers": {}, "body": b"",
        "body_complete": True,
    }  # fmt: skip
    return Outgoing(**{**told, **changes})


def signed(directory: Path, call: Outgoing, service: str = "s3", value: str = f"{KEY}:{SECRET}") -> Injection:
    (directory / "aws").write_text(value)
    (directory / "aws").chmod(0o600)
    wanted = Credential(id="aws", ref="file:aws", sigv4=SigV4(service=service, region="eu-central-1"))
    return asyncio.run(CredentialStore(directory).injection(wanted, {"sponsor": "mia", "workspace": "ws-1"}, call))


def verifies(call: Outgoing, found: Injection, service: str, session: str | None = None) -> bool:
    """What a service does with a call as it arrives: make the signature anew and compare."""
    arrived = {name: value for name, value in call.headers.items() if name not in found.replaces} | dict(found.headers)
    kind, _, rest = arrived["authorization"].partition(" ")
    told = dict(part.split("=", 1) for part in rest.split(", "))
    names = told["SignedHeaders"].split(";")
    date = arrived["x-amz-date"]
    assert kind == "AWS4-HMAC-SHA256"
    assert told["Credential"] == f"{KEY}/{date[:8]}/eu-central-1/{service}/aws4_request"
    assert {"host", *(name for name in arrived if name.startswith("x-amz-"))} <= {*names}
    path, _, query = call.target.partition("?")
    if service == "s3":
        path = quote(unquote(path), safe="/~")
    request = AWSRequest(
        call.method, f"{call.scheme}://{call.authority}{path}", data=call.body,
        headers={name: call.authority if name == "host" else arrived[name] for name in names},
        params=parse_qsl(query, keep_blank_values=True) if query else {},
    )  # fmt: skip
    if arrived["x-amz-content-sha256"] != hashlib.sha256(call.body).hexdigest():
        return False
    request.context["timestamp"] = date
    judge = (S3SigV4Auth if service == "s3" else SigV4Auth)(
        ReadOnlyCredentials(KEY, SECRET, session), service, "eu-central-1"
    )
    text = judge.string_to_sign(request, judge.canonical_request(request))
    return bool(judge.signature(text, request) == told["Signature"])


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("service", ["s3", "dynamodb", "execute-api"])
def test_the_service_accepts_the_call_and_no_other(tmp_path: Path, service: str) -> None:
    call = outgoing(
        method="POST", target="/a%20b/c%C3%A9/d?list-type=2&prefix=x/y&empty&a=%26", body=b"exactly these bytes",
        headers={"x-amz-target": "DynamoDB_20120810.GetItem", "accept": "*/*", "content-type": "text/plain"},
    )  # fmt: skip
    found = signed(tmp_path, call, service)
    assert verifies(call, found, service)
    for change in (
        {"method": "PUT"}, {"authority": "other.s3.example.com"}, {"target": "/a%20b/c%C3%A9/e?list-type=2"}, {"body": b"others"},
        {"target": call.target.replace("prefix=x", "prefix=z")}, {"headers": call.headers | {"x-amz-target": "x"}},
    ):  # fmt: skip
        other = {"method": "POST", "target": call.target, "body": call.body, "headers": call.headers} | change
        assert not verifies(outgoing(**other), found, service)


VISIBLE = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='/?#%\\;<>"{}|^`[]')
SEGMENTS = st.lists(st.text(VISIBLE, min_size=1), max_size=4)
QUERY = st.lists(
    st.tuples(st.text("ab-_.~:@!$*(),/", min_size=1, max_size=4), st.text("ab-_.~:@!$*(),/ é&=", max_size=6)),
    max_size=4,
)


@pytest.mark.control("CRED-01")
@given(SEGMENTS, QUERY, st.binary(max_size=30))
@settings(max_examples=examples(150), deadline=None)
def test_every_path_and_query_is_signed_as_the_service_reads_it(
    tmp_path_factory: pytest.TempPathFactory, segments: list[str], query: list[tuple[str, str]], body: bytes
) -> None:
    path = canonicalise_path(
        "/" + "/".join(quote(segment, safe="!$&'()*,:@~") for segment in segments if segment.strip("."))
    )
    target = path + (
        "?" + "&".join(f"{name}={quote(value, safe='/:@!$*(),')}" for name, value in query) if query else ""
    )
    call = outgoing(method="PUT", target=target, body=body)
    assert verifies(call, signed(tmp_path_factory.getbasetemp(), call), "s3")


@pytest.mark.control("CRED-01")
def test_temporary_keys_bring_their_token_and_the_clients_own_headers_give_way(tmp_path: Path) -> None:
    own = dict.fromkeys(HEADERS, "of the client")
    found = signed(tmp_path, outgoing(headers=own), value=f"{KEY}:{SECRET}:{SESSION}")
    assert dict(found.headers)["x-amz-security-token"] == SESSION
    assert verifies(outgoing(headers=own), found, "s3", SESSION)
    found = signed(tmp_path, outgoing(headers=own))
    assert "x-amz-security-token" not in dict(found.headers)
    assert "x-amz-security-token" in found.replaces, "or the service would read the client's"
    assert verifies(outgoing(headers=own), found, "s3")


@pytest.mark.control("CRED-01")
def test_signature_session_token_and_keys_are_starred_out_of_answers(tmp_path: Path) -> None:
    found = signed(tmp_path, outgoing(), value=f"{KEY}:{SECRET}:{SESSION}")
    authorisation = dict(found.headers)["authorization"]
    for word in (SECRET, SESSION, authorisation, authorisation.rpartition("=")[2], quote(SECRET, safe="")):
        assert word in found.reflections
    assert [len(one) for one in found.reflections] == sorted((len(one) for one in found.reflections), reverse=True)
    assert SECRET not in str(found.headers)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"body_complete": False}, "longer than what is seen"),
        ({"headers": {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}}, "streamed"),
        ({"headers": {"x-amz-content-sha256": "streaming-unsigned-payload-trailer"}}, "streamed"),
        ({"headers": {"content-encoding": "gzip, AWS-chunked"}}, "streamed"),
        ({"headers": {"x-amz-trailer": "x-amz-checksum-crc32"}}, "streamed"),
        ({"target": "/a?X-Amz-Signature=abc"}, "signature of its own"),
        ({"target": "/a?b=c&x-amz-%63redential=abc"}, "signature of its own"),
        ({"target": "/a?b=c+d"}, "plus sign"),
    ],
)
def test_what_cannot_be_signed_is_refused_with_what_would_do(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CallUnsignable, match=words) as caught:
        signed(tmp_path, outgoing(**changes))
    assert caught.value.cure


@pytest.mark.parametrize("value", ["AKIA", "AKIA:", ":secret", "a b:secret", "A:b:c:d", "AKIA:se cret"])
def test_a_value_that_is_no_pair_of_keys_is_refused_without_being_shown(tmp_path: Path, value: str) -> None:
    with pytest.raises(CredentialUnavailable, match="no pair of keys") as caught:
        signed(tmp_path, outgoing(), value=value)
    assert "secret" not in caught.value.message


def test_envoy_is_told_the_headers_of_a_signature() -> None:
    assert header_names(Credential(id="a", ref="file:a", sigv4=SigV4(service="s3", region="x"))) == set(HEADERS)
