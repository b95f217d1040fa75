"""The pages on delegations, reviews and images, as they are written, against a real broker with one workspace."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from broker_rig import Lab, image_record
from cryptography.hazmat.primitives import serialization
from page import ROOT, run_page

from databases import beside
from saw.broker.client import BrokerRefusal
from saw.files import write_private
from saw.image.disk import digest_of
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
        with beside(lab.config) as store:
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
    assert len(ids) == 3
    found = [desk[0].operator.request("GET", f"/v1/delegations/{one}") for one in ids]
    states = [one["state"] for one in found if "tools" not in one]
    assert states == ["revoked", "revoked"], "the part ended with the whole"
    [named] = [one["tools"] for one in found if "tools" in one]
    assert named == [{"server": "tracker", "tools": ["search", "read_*"]}, {"server": "files", "tools": ["*"]}]


@pytest.mark.control("ID-04")
def test_the_page_on_agents(desk: tuple[Lab, Path]) -> None:
    ids: list[str] = []

    def noted(printed: str) -> Mapping[str, str]:
        ids.extend(
            found for found in re.findall(r"^(?:id: +)?(agent-[0-9]+)\b", printed, re.MULTILINE) if found not in ids
        )
        named = dict(zip(("AGENT", "OTHER", "NEXT"), ids, strict=False))
        return {name: named[name] for name in ("AGENT", "NEXT") if name in named}

    walk("docs/agents.md", desk, noted)
    lab, _ = desk
    states = [lab.operator.request("GET", f"/v1/agents/{one}")["state"] for one in (ids[0], ids[2], ids[3])]
    # Its last commands leave the workspace with an agent, for the other pages.
    assert states[:2] == ["retired", "retired"]
    assert states[2] != "retired"


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
        push = asked(edge, "/team/app.git/git-receive-pack")
        with beside(lab.config) as store:
            store.execute("UPDATE reviews SET state = 'unknown' WHERE id = ?", (push,))
        printed = walk("docs/review.md", desk, lambda _: {}, REVIEW=approved, OTHER=denied, PUSH=push)
        claimed = edge.post("/v1/perimeter/reviews/claim", json={"wait": 0}).json()["claimed"]
    assert claimed["id"] == approved
    assert approved in printed[0] and denied in printed[0], "both wait in the list"
    states = {one: lab.operator.request("GET", f"/v1/reviews/{one}")["state"] for one in (approved, denied)}
    assert states == {approved: "executing", denied: "denied"}
    assert "ben@example.com" in printed[-1], "the receipt names who decided"
    with pytest.raises(BrokerRefusal):
        key = {"groups": ["maintainers"], "public_key": (folder / "cleo.pub").read_text()}
        lab.operator.request("PUT", "/v1/reviewers/cleo@example.com", key)


def make_evidence(folder: Path, record: dict[str, Any]) -> None:
    """What the page's reader has beside the record: a bill of materials, the tracker's database, and the page's own waiver."""
    packages = [("linux", "6.12.10-1"), ("openssl", "3.5.1-1")]
    bill = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "components": [
            {
                "type": "library", "bom-ref": f"pkg:deb/debian/{name}@{version}?arch=source", "group": "debian", "name": name,
                "version": version, "purl": f"pkg:deb/debian/{name}@{version}?arch=source",
            }
            for name, version in packages
        ],
    }  # fmt: skip
    (folder / "sbom").mkdir()
    (folder / "sbom/debian.cdx.json").write_text(json.dumps(bill))
    record["evidence"] = {"sbom/debian.cdx.json": digest_of(folder / "sbom/debian.cdx.json")}
    settled = {"status": "resolved", "fixed_version": "6.1.1-1", "urgency": "low"}
    opened = {"status": "open", "urgency": "high"}
    (folder / "tracker.json").write_text(
        json.dumps(
            {
                "linux": {"CVE-2025-1000": {"releases": {"trixie": settled}}},
                "openssl": {"CVE-2026-12345": {"releases": {"trixie": opened}}},
            }
        )
    )
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    (folder / "waivers.yml").write_text(page.partition("```yaml\n")[2].partition("```")[0])


@pytest.mark.thorough
@pytest.mark.control("P0-04")
@pytest.mark.control("IMG-01")
def test_the_page_on_images(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk
    record = image_record("workspace-4f1c", "4" * 64)
    del record["not_after"]
    make_evidence(folder, record)
    (folder / "release.json").write_text(json.dumps(record))
    (folder / "build/images").mkdir(parents=True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for name, key in zip(("officer-a", "officer-b"), lab.officers.keys, strict=False):
        write_private(folder / f"{name}.key", key.private_bytes(*form))
    printed = walk("docs/images.md", desk, lambda _: {}, IMAGE="workspace-4f1c")
    assert re.search(r"workspace-4f1c +stable", printed[1])
    assert "waived: CVE-2026-12345 in openssl" in printed[-1]
    [image] = [one for one in lab.operator.request("GET", "/v1/images")["images"] if one["name"] == "workspace-4f1c"]
    assert (image["state"], image["signed"]) == ("revoked", True)
