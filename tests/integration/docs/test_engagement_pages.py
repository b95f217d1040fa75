"""The pages on delegations, reviews and images, as they are written, against a real broker with one workspace."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from broker_rig import Lab, image_record
from cryptography.hazmat.primitives import serialization
from page import run_page

from saw.broker.client import BrokerRefusal
from saw.files import write_private
from saw.policy.keys import create_key

POLICY = "a" * 64


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[Lab, Path]]:
    """A broker with the workspace ``ws-demo``, whose attestation is written into the register, and the reviewer ben."""
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab = Lab(directory)
    try:
        lab.start()
        lab.workspace("ws-demo", to="attesting")
        with closing(sqlite3.connect(lab.config.database, timeout=30)) as store, store:
            store.execute(
                "UPDATE workspaces SET state = 'active', lease_expires_at = '2099-01-01T00:00:00.000Z', policy_digest = ?"
                " WHERE id = 'ws-demo'",
                (POLICY,),
            )
        folder = directory / "desk"
        folder.mkdir()
        create_key(folder, "ben")
        body = {"groups": ["maintainers"], "public_key": (folder / "ben.pub").read_text()}
        lab.operator.request("PUT", "/v1/reviewers/ben@example.com", body)
        (folder / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        yield lab, folder
    finally:
        lab.stop()
        shutil.rmtree(directory)


def walk(page: str, desk: tuple[Lab, Path], read: Callable[[str], Mapping[str, str]], **told: str) -> list[str]:
    lab, folder = desk
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"SAW_CONTEXT": str(folder / "context.json"), "PATH": path, **told}
    return run_page(page, folder, environment, read, {"/var/lib/saw/broker": str(lab.config.state)})


@pytest.mark.control("DEL-01")
@pytest.mark.control("DEL-02")
def test_the_page_on_delegations(desk: tuple[Lab, Path]) -> None:
    ids: list[str] = []

    def noted(printed: str) -> Mapping[str, str]:
        ids.extend(found for found in re.findall(r"dlg-[a-z0-9]+", printed) if found not in ids)
        return {"DELEGATION": ids[0]} if ids else {}

    walk("docs/delegation.md", desk, noted)
    assert len(ids) == 2
    states = [desk[0].operator.request("GET", f"/v1/delegations/{one}")["state"] for one in ids]
    assert states == ["revoked", "revoked"], "the part ended with the whole"


def asked(edge: httpx.Client, path: str) -> str:
    """Let the perimeter bring a call of the agent that only a person may decide on; return the id of its review."""
    call = {"method": "POST", "scheme": "https", "host": "api.example.com", "port": 443, "path": path}
    call |= {"headers": [["content-type", "application/json"]], "body": base64.b64encode(b'{"amount": 12}').decode()}
    body = {"workspace_id": "ws-demo", "call": call, "policy_digest": POLICY, "group": "maintainers", "quorum": 1}
    answer = edge.post("/v1/perimeter/reviews", json={**body, "expires_in_s": 3600, "rule": "actions[0]"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
def test_the_page_on_reviews(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk
    with lab.tls("perimeter", "edge") as edge:
        approved, denied = asked(edge, "/v1/pay"), asked(edge, "/v1/pay/again")
        printed = walk("docs/review.md", desk, lambda _: {}, REVIEW=approved, OTHER=denied)
        claimed = edge.post("/v1/perimeter/reviews/claim", json={"wait": 0}).json()["claimed"]
    assert claimed["id"] == approved
    assert approved in printed[0] and denied in printed[0], "both wait in the list"
    states = {one: lab.operator.request("GET", f"/v1/reviews/{one}")["state"] for one in (approved, denied)}
    assert states == {approved: "executing", denied: "denied"}
    assert "ben@example.com" in printed[-1], "the receipt names who decided"
    with pytest.raises(BrokerRefusal):
        key = {"groups": ["maintainers"], "public_key": (folder / "cleo.pub").read_text()}
        lab.operator.request("PUT", "/v1/reviewers/cleo@example.com", key)


@pytest.mark.control("P0-04")
def test_the_page_on_images(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk
    record = image_record("workspace-4f1c", "4" * 64)
    del record["not_after"]
    (folder / "image.release.json").write_text(json.dumps(record))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for name, key in zip(("officer-a", "officer-b"), lab.officers.keys, strict=False):
        write_private(folder / f"{name}.key", key.private_bytes(*form))
    printed = walk("docs/images.md", desk, lambda _: {}, IMAGE="workspace-4f1c")
    assert re.search(r"workspace-4f1c +stable", printed[1])
    [image] = [one for one in lab.operator.request("GET", "/v1/images")["images"] if one["name"] == "workspace-4f1c"]
    assert (image["state"], image["signed"]) == ("revoked", True)
