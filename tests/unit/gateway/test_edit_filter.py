"""A call whose model stands for another one: signed as it leaves, and what the filter is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_gateway_judge import DIGEST, Bench, entry, release, view

from saw.gateway.credentials import Injection
from saw.gateway.edit_filter import EDIT_FILTER, edit_value
from saw.gateway.sigv4 import Outgoing
from saw.policy.inference import Edit
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher

pytestmark = pytest.mark.control("INF-01")

GOVERNANCE = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
credentials: [{id: signed, ref: "file:signed", sigv4: {service: models, region: eu-central-1}}]
inference:
  routes:
    - {alias: m.local, models: ["demo-*"], aliases: {fast: demo-1}, upstream: "https://m.example.com/v1", credential: signed}
"""


@pytest.mark.parametrize(("asked", "sent"), [("fast", "demo-1"), ("demo-2", "demo-2")])
def test_what_is_signed_is_what_leaves(tmp_path: Path, asked: str, sent: str) -> None:
    bench, signed = Bench(tmp_path), []
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": GOVERNANCE})
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    loaded = msgspec.structs.replace(release(), governance=bundle.governance, matcher=matcher)
    bench.view = view(entry(), {DIGEST: loaded})

    class Signing:
        async def injection(self, _credential: Any, _caller: Any, outgoing: Outgoing) -> Injection:
            signed.append(outgoing.body)
            return Injection((), ())

    inside: Any = bench.judge
    inside._credentials = Signing()
    body = json.dumps({"model": asked}).encode()
    call = msgspec.structs.replace(
        bench.call(), authority="m.local", method="POST", target="/v1/messages", binary="", body=body
    )
    verdict = asyncio.run(bench.judge.decide(call))
    assert verdict.allowed, verdict.detail
    assert signed == [json.dumps({"model": sent}).encode()]
    assert verdict.dial is not None
    assert (verdict.dial.edit is None) == (asked == sent)


def test_the_filter_is_told_places_and_plain_text() -> None:
    assert edit_value(Edit(10, 16, 99, '"demo-1"')) == '10,16,99,"demo-1"'
    assert "EDIT_HEADER" not in EDIT_FILTER
    assert 'headers:remove("x-saw-edit")' in EDIT_FILTER
