"""The gatekeeper's link for reviews against a real broker process: what one side says, the other takes, field by field.

The gateway's own tests run against a broker of theirs; the link they use is held against the real one here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import msgspec
import pytest
from broker_rig import NAME, Lab, cli

from databases import beside
from saw.gateway.config import GatekeeperConfig, Ring2Config
from saw.gateway.errors import ReviewRefused, ReviewUnavailable, UnknownReview
from saw.gateway.review_link import ReviewLink
from saw.identity.x509 import new_key_and_csr
from saw.policy.keys import create_key
from saw.review.digest import request_digest
from saw.review.messages import MAX_REVIEWED_BODY, OpenReview, ReviewedAnswer, ReviewedCall, ReviewResult

POLICY = "a" * 64
ASKED = OpenReview(
    workspace_id="ws-a",
    call=ReviewedCall(
        method="POST", scheme="https", host="api.example.com", port=443, path="/v1/items/1?draft=no",
        headers=(("content-type", "application/json"), ("accept", "*/*")), body=b'{"title": "one"}',
    ),
    policy_digest=POLICY, group="maintainers", quorum=1, expires_in_s=3600, rule="actions[0]", binary="/usr/bin/curl",
    request_id="r-1",
)  # fmt: skip
ANSWER = ReviewedAnswer(status=201, headers=(("etag", "1"),), body=b"\x00made", truncated=False)


@pytest.fixture
def link(own_broker: Lab, tmp_path: Path) -> Iterator[ReviewLink]:
    """The link of a perimeter that the broker knows, and two active workspaces."""
    lab = own_broker
    key, csr = new_key_and_csr("edge-link")
    body = {"csr_pem": csr.decode(), "kind": "perimeter", "name": "edge-link"}
    (tmp_path / "edge.pem").write_text(lab.operator.request("POST", "/v1/certificates/x509", body)["certificate"])
    (tmp_path / "edge.key").write_bytes(key)
    for name in ("ws-a", "ws-b"):
        lab.workspace(name, to="attesting")
    lease = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    with beside(lab.config) as store:
        store.execute(
            "UPDATE workspaces SET state = 'active', lease_expires_at = ?, policy_digest = ?", (lease, POLICY)
        )
    create_key(tmp_path, "ben")
    added = cli(
        lab,
        "review",
        "reviewer",
        "add",
        "ben@example.com",
        "--group",
        "maintainers",
        "--key",
        str(tmp_path / "ben.pub"),
    )
    assert added.returncode == 0, added.stderr
    yield ReviewLink(
        GatekeeperConfig(
            name="edge-link", broker_url=f"https://127.0.0.1:{lab.port}", broker_name=NAME, ca_file=lab.ca_file,
            cert_file=tmp_path / "edge.pem", key_file=tmp_path / "edge.key", tuf_root_file=tmp_path / "root.json",
            ring2=Ring2Config(broker_address="127.0.0.1:8443"),
        )
    )  # fmt: skip


def approve(lab: Lab, review: str, key: Path) -> dict[str, Any]:
    done = cli(lab, "review", "approve", review, "--key", str(key), "--json", "--yes")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.control("REV-02")
@pytest.mark.control("REV-03")
def test_from_opening_to_the_answer_both_sides_understand_each_other(
    own_broker: Lab, link: ReviewLink, tmp_path: Path
) -> None:
    async def opened() -> str:
        first, again = await link.open(ASKED), await link.open(ASKED)
        assert (first.id, first.state, first.quorum) == (again.id, "pending", 1)
        assert (await link.view(first.id, "ws-a", 0)).id == first.id
        with pytest.raises(UnknownReview):
            await link.view(first.id, "ws-b", 0)
        assert await link.claim(0, token_urlsafe(32)) is None
        await link.close()
        return first.id

    async def ended(review: str) -> None:
        waiting = asyncio.create_task(link.view(review, "ws-a", 25))
        claimed = await link.claim(20, token_urlsafe(32))
        assert claimed is not None
        assert (claimed.id, claimed.call, claimed.binary) == (review, ASKED.call, ASKED.binary)
        assert claimed.rule == "", "only a rule about a budget is told"
        assert claimed.policy_digest == POLICY
        assert claimed.request_digest == request_digest("ws-a", ASKED.call)
        assert datetime.fromisoformat(claimed.claim_ends_at) > datetime.now(UTC) + timedelta(seconds=30)
        assert await link.claim(0, token_urlsafe(32)) is None
        result = ReviewResult(claim=claimed.claim, outcome="done", answer=ANSWER)
        with pytest.raises(ReviewRefused, match="wrong_claim"):
            await link.tell(review, msgspec.structs.replace(result, claim="A" * 43))
        await link.tell(review, result)
        await link.tell(review, result)
        with pytest.raises(ReviewRefused, match="claim_ended"):
            await link.tell(review, ReviewResult(claim=claimed.claim, outcome="failed"))
        done = await waiting
        assert (done.state, done.answer) == ("done", ANSWER)
        await link.close()

    review = asyncio.run(opened())
    assert approve(own_broker, review, tmp_path / "ben.key")["state"] == "approved"
    asyncio.run(ended(review))


@pytest.mark.thorough
@pytest.mark.control("REV-01")
def test_what_the_broker_takes_in_for_no_review_is_told_apart_from_a_broker_that_is_away(
    own_broker: Lab, link: ReviewLink
) -> None:
    async def asked() -> None:
        with pytest.raises(ReviewRefused, match="policy_changed"):
            await link.open(msgspec.structs.replace(ASKED, policy_digest="b" * 64))
        largest = msgspec.structs.replace(
            ASKED, call=msgspec.structs.replace(ASKED.call, body=b"x" * MAX_REVIEWED_BODY)
        )
        assert (await link.open(largest)).state == "pending"
        own_broker.stop()
        with pytest.raises(ReviewUnavailable):
            await link.open(ASKED)
        await link.close()

    asyncio.run(asked())
    own_broker.start()
