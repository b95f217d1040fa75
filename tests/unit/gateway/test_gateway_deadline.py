"""Secrets, token and address of one call share one time, which ends before Envoy's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_gateway_judge import DIGEST, Bench, entry, release, view

from saw.gateway import judge
from saw.gateway.credentials import CredentialStore
from saw.gateway.envoy_parts import AUTHZ_TIMEOUT
from saw.gateway.judge import Verdict
from saw.gateway.metering import Reserved
from saw.gateway.oauth2 import Answer, TokenKeeper
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.references import Place

GOVERNANCE = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
credentials:
  - id: model
    ref: vault:kv/refresh
    oauth2: {token_url: "https://id.example.com/t", client_id: a, grant: refresh_token, client_secret: "vault:kv/client"}
    inject: {header: Authorization, format: "Bearer {secret}"}
inference:
  routes:
    - {alias: m.local, models: ["*"], upstream: "https://m.example.com/v1", credential: model, budget: spend,
       max_input_tokens: 10, max_output_tokens: 10, prices: [{models: ["*"], input: "1", output: "1"}]}
budgets: [{id: spend, scope: workspace, period: day, limit: {currency: USD, amount: "1"}}]
"""


class Slow:
    """A vault, a token endpoint, a resolver and a meter; ``hangs`` is the step that never ends."""

    def __init__(self, hangs: str) -> None:
        self.hangs = hangs
        self.reserved = 0

    async def step(self, name: str) -> None:
        if name == self.hangs:
            await asyncio.Event().wait()

    async def read(self, _identifier: str, place: Place, _workspace: str) -> str:
        await self.step(place.segments[-1])
        return "secret"

    async def token(self, _url: str, _form: dict[str, str], _headers: dict[str, str]) -> Answer:
        await self.step("token")
        return Answer(200, b'{"access_token": "t", "token_type": "bearer"}')

    async def chosen(self, _host: str, **_how: object) -> str:
        await self.step("address")
        return "192.0.2.1"

    async def reserve(self, *_: object, **_named: object) -> Reserved:
        self.reserved += 1
        return Reserved("charge-1", {})


def decided(directory: Path, slow: Slow) -> Verdict:
    bench = Bench(directory)
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": GOVERNANCE})
    loaded = msgspec.structs.replace(
        release(), governance=bundle.governance, matcher=Matcher.compile(bundle.policy, bundle.governance)
    )
    bench.view = view(entry(), {DIGEST: loaded})
    inside: Any = bench.judge
    inside._resolver = inside._meter = slow
    inside._credentials = CredentialStore(directory, vault=slow, tokens=TokenKeeper(slow.token, lambda: 0.0))
    call = msgspec.structs.replace(
        bench.call(), authority="m.local", method="POST", target="/v1/chat/completions",
        headers={"content-type": "application/json"}, body=b'{"model": "x"}',
    )  # fmt: skip
    return asyncio.run(bench.judge.decide(call))


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("hangs", "reason"),
    [
        ("refresh", "credential_unavailable"),
        ("client", "credential_unavailable"),
        ("token", "credential_unavailable"),
        ("address", "resolution_failed"),
        ("", ""),
    ],
)
def test_a_call_that_waits_too_long_is_refused_before_anything_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str, reason: str
) -> None:
    if hangs:
        monkeypatch.setattr(judge, "DIAL_DEADLINE_S", 0.2)
    slow = Slow(hangs)
    found = decided(tmp_path, slow)
    assert (found.reason, found.allowed, slow.reserved) == (reason, not hangs, 0 if hangs else 1)


def test_the_shared_time_ends_before_envoys() -> None:
    assert float(AUTHZ_TIMEOUT.removesuffix("s")) > judge.DIAL_DEADLINE_S + 1
