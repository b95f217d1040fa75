"""A credential at the judge: bound by host, port, path and method, each caller's own; and placeholders that go nowhere."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_gateway_judge import DIGEST, NOW, Bench, entry, release, view

from saw.gateway.app import refusal_body
from saw.gateway.judge import Dial, Verdict
from saw.gateway.placeholders import holds_placeholder
from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher

POLICY = b"""
version: 1
network_policies:
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, access: read-write}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
credentials:
  - {id: reader, ref: "file:git/{sponsor}", hosts: ["api.example.com:443"], paths: ["/v1/**"], methods: [GET],
     inject: {header: Authorization, format: "Bearer {secret}"}}
  - {id: writer, ref: "file:writer", hosts: ["api.example.com:443"], paths: ["/v1/**"], methods: [POST],
     inject: {header: X-Api-Key, format: "{secret}"}}
actions:
  - {match: {host: api.example.com}, class: auto}
"""
PLACEHOLDER = "openshell:resolve:env:READER"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    governance = load_governance(GOVERNANCE.encode())
    matcher = Matcher.compile(load_policy(POLICY), governance)
    made.view = view(entry(), {DIGEST: msgspec.structs.replace(release(), governance=governance, matcher=matcher)})
    for name, value in (("git:mia", "token-of-mia"), ("git:noa", "token-of-noa"), ("writer", "key-of-the-writer")):
        (tmp_path / name).write_text(value)
        (tmp_path / name).chmod(0o600)
    return made


def ask(bench: Bench, **changes: Any) -> Verdict:
    return asyncio.run(bench.judge.decide(msgspec.structs.replace(bench.call(), **changes)))


def dial(bench: Bench, **changes: Any) -> Dial:
    verdict = ask(bench, **changes)
    assert verdict.dial is not None, verdict.detail
    return verdict.dial


def injected(bench: Bench, **changes: Any) -> tuple[tuple[str, str], ...]:
    found = dial(bench, **changes).inject
    return () if found is None else found.headers


@pytest.mark.control("CRED-01")
def test_a_credential_goes_with_its_methods_only(bench: Bench) -> None:
    assert injected(bench) == (("authorization", "Bearer token-of-mia"),)
    assert injected(bench, method="HEAD") == (("authorization", "Bearer token-of-mia"),)
    assert injected(bench, method="POST") == (("x-api-key", "key-of-the-writer"),)
    assert injected(bench, method="PUT") == ()
    assert injected(bench, target="/v2/x") == ()


@pytest.mark.control("CRED-01")
def test_the_sponsor_whose_secret_is_used_is_that_of_the_attested_workspace(bench: Bench) -> None:
    headers = {"x-sponsor": "noa", "sponsor": "noa"}
    assert injected(bench, headers=headers) == (("authorization", "Bearer token-of-mia"),)
    bench.view = view(entry(sponsor="noa"), bench.view.releases)
    assert injected(bench) == (("authorization", "Bearer token-of-noa"),)
    bench.view = view(entry(sponsor="eve"), bench.view.releases)
    assert ask(bench).reason == "credential_unavailable"
    bench.view = view(entry(sponsor=""), bench.view.releases)
    assert ask(bench).reason == "credential_unavailable"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {PLACEHOLDER}"},
        {"x-other": PLACEHOLDER},
        {"cookie": f"token={PLACEHOLDER.replace(':', '%3A')}"},
        {"authorization": "Basic " + base64.b64encode(f"x-access-token:{PLACEHOLDER}".encode()).decode()},
        {"proxy-authorization": "bAsIc  " + base64.b64encode(f"{PLACEHOLDER}:".encode()).decode()},
    ],
)
def test_a_placeholder_goes_nowhere(bench: Bench, headers: Mapping[str, str]) -> None:
    with_credential = dial(bench, headers=headers)
    assert set(headers) <= {*with_credential.remove, *(with_credential.inject.names if with_credential.inject else ())}
    verdict = ask(bench, headers=headers, target="/v2/x")
    assert (verdict.allowed, verdict.reason) == (False, "placeholder_unbound")
    body = refusal_body(verdict)
    assert min(headers) in str(body["detail"])
    assert body["next_steps"] == ["leave the credential out of this call, or ask the policy's owner to bind one to it"]


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("target", [f"/v1/x?key={PLACEHOLDER}", f"/v1/x?a=b&key={PLACEHOLDER.replace(':', '%3A')}"])
def test_a_placeholder_in_the_query_is_refused_with_and_without_a_credential(bench: Bench, target: str) -> None:
    assert ask(bench, target=target).reason == "placeholder_unbound"
    assert ask(bench, target=target.replace("/v1", "/v2")).reason == "placeholder_unbound"


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer own"}, {"x-other": "openshell"}, {"authorization": "Basic %%%"}, {}]
)
def test_calls_without_placeholder_pass_without_credential(bench: Bench, headers: Mapping[str, str]) -> None:
    found = dial(bench, headers=headers, target="/v2/x", body=PLACEHOLDER.encode(), method="PUT")
    assert (found.inject, found.remove) == (None, ())


@pytest.mark.control("CRED-01")
def test_a_value_that_was_removed_or_exchanged_counts_at_the_next_call(bench: Bench, tmp_path: Path) -> None:
    assert injected(bench) == (("authorization", "Bearer token-of-mia"),)
    (tmp_path / "git:mia").write_text("exchanged")
    assert injected(bench) == (("authorization", "Bearer exchanged"),)
    (tmp_path / "git:mia").unlink()
    assert ask(bench).reason == "credential_unavailable"
    assert bench.now == NOW, "no time went by"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("before", ["", "a:", "ab:", "abc:", "\xff\xfe:", "?>?>:"])
@pytest.mark.parametrize("behind", ["TOKEN", "TOKENS", "TOKENS!", "TOKEN~~~"])
def test_base64_is_read_as_the_most_lenient_service_may(before: str, behind: str) -> None:
    raw = before.encode("latin-1") + f"{PLACEHOLDER}{behind}".encode()
    padded, other = base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()
    bare = padded.rstrip("=")
    spread = " ".join(bare[at : at + 5] for at in range(0, len(bare), 5))
    forms = (padded, bare, other, other.rstrip("="), f"{bare}=", f"{bare}====", spread, f"{bare}!", f"YQ=={padded}")
    for form in forms:
        assert holds_placeholder(f"Basic {form}"), form
        assert holds_placeholder(f"bAsIc\t{form}"), form
    harmless = base64.b64encode(raw.replace(b"openshell", b"openshelf")).decode()
    for form in (harmless, harmless.rstrip("="), "", "=", "A", "%%%"):
        assert not holds_placeholder(f"Basic {form}"), form
