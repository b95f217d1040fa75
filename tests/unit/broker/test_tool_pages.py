"""A call of a tool over stdio on the pages: what is asked, who makes the call, and what the workspace told of its end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from portal_world import START, World
from tool_world import ANSWER, ME, MEMBERS, PIN

from saw.broker.clock import iso
from saw.broker.schema import releases, reviews, workspaces
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.loader import load_members
from saw.review.tool import AskTool, params_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.close()


def ask(world: World) -> str:
    bundle = load_members(MEMBERS)
    manifest = build_manifest(bundle, 1, START, START + timedelta(days=90))
    digest = policy_digest(manifest)
    with world.broker.services.store.write() as tx:
        tx.connection.execute(
            releases.insert().values(
                ring="stable", blueprint="coding", revision=9, policy_digest=digest, lease_ttl_s=90, released_at=iso(START),
                bundle=sign(manifest, bundle.members, [Ed25519PrivateKey.generate()]),
            )
        )  # fmt: skip
        tx.connection.execute(
            workspaces.update().where(workspaces.c.id == "ws-a").values(policy_digest=digest, state="active")
        )
    params = params_of("publish", {"path": "/workspace/<b>notes</b>"})
    asked = AskTool(workspace_id="ws-a", policy_digest=digest, server="files", params=params)
    return world.broker.tools.ask(ME, asked).id


@pytest.mark.control("REV-02")
def test_the_page_names_the_tool_who_calls_it_and_every_argument(world: World) -> None:
    identifier = ask(world)
    page = world["eve"].get(f"/reviews/{identifier}").text
    assert "May this tool be called?" in page
    assert "<strong>files/publish</strong>" in page
    assert "not whoever is root in the workspace" in page
    assert PIN in page
    assert "/workspace/&lt;b&gt;notes&lt;/b&gt;" in page
    assert "TOOL files/publish" in world["eve"].get("/reviews?show=open").text
    assert "Answer that the workspace told of" not in page


def test_the_page_has_the_digest_of_the_answer_as_the_workspaces_word(world: World) -> None:
    identifier = ask(world)
    with world.broker.services.store.write() as tx:
        ended = {"state": "done", "answer_sha256": ANSWER, "ended_at": iso(world.now)}
        tx.connection.execute(reviews.update().where(reviews.c.id == identifier).values(**ended))
    page = world["eve"].get(f"/reviews/{identifier}").text
    assert "Answer that the workspace told of" in page
    assert f"sha256 {ANSWER}" in page
