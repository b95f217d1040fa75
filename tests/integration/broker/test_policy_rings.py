"""Rings, rollback, revocation and a ring's own officers against a running broker, by the commands that people use."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from broker_rig import POLICY, Lab, cli, encode
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.broker.client import BrokerRefusal
from saw.policy.bundle import good_signers
from saw.policy.keys import key_id, public_pem
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_fetcher import PinnedFetcher
from saw.policy.tuf_metadata import trusted_policy_keys
from saw.policy.tuf_repository import adopt_publication, read_target

pytestmark = pytest.mark.control("POL-01")
STABLE = "rings/stable/coding.bundle.json"
OTHER = POLICY.replace("read-only", "full")


class Desk:
    """The officers' key files and their copy, which follows every publication."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        for name, key in zip(("ada", "ben", "cleo"), lab.officers.keys, strict=True):
            self.keep(name, key)

    def keep(self, name: str, key: Ed25519PrivateKey) -> None:
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (self.folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        (self.folder / f"{name}.pub").write_bytes(public_pem(key.public_key()))

    def release(self, revision: int, ring: str = "stable", content: str = POLICY) -> str:
        digest, publication = self.lab.officers.publication(revision, ring=ring, content=content)
        self.lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        adopt_publication(self.lab.officers.directory, publication)
        return digest

    def saw(self, *arguments: object, signers: tuple[str, ...] = ()) -> tuple[int, dict]:
        keys = [part for name in signers for part in ("--key", str(self.folder / f"{name}.key"))]
        done = cli(self.lab, "policy", *map(str, arguments), *keys, "--json")
        return done.returncode, json.loads(done.stdout)

    @property
    def copy(self) -> Path:
        return self.lab.officers.directory


@pytest.fixture
def desk(own_broker: Lab, tmp_path: Path) -> Desk:
    return Desk(own_broker, tmp_path)


def test_rings_are_told_with_signers_and_history(desk: Desk) -> None:
    first, second = desk.release(1), desk.release(2, content=OTHER)
    desk.release(1, "canary")
    code, answer = desk.saw("rings")
    assert code == 0 and [(one["ring"], one["current"]["revision"]) for one in answer["rings"]] == [
        ("canary", 1),
        ("stable", 2),
    ]
    stable = answer["rings"][1]
    assert (stable["current"]["policy_digest"], stable["history"][0]["policy_digest"]) == (second, first)
    assert stable["current"]["signers"] == sorted(key_id(key.public_key()) for key in desk.lab.officers.keys[:2])
    assert stable["current"]["released_at"] and stable["current"]["not_after"]
    offline = desk.saw("rings", "--repository", desk.copy)[1]["rings"][1]
    assert offline["current"]["policy_digest"] == second and offline["history"][0]["policy_digest"] == first


def test_a_rollback_is_published_by_its_last_signature(desk: Desk) -> None:
    desk.release(1)
    desk.release(2, content=OTHER)
    back = ("rollback", "--repository", desk.copy, "--ring", "stable", "--to", 1, "--out", desk.folder / "back")
    code, answer = desk.saw(*back, signers=("ada",))
    assert code == 1 and not answer["published"] and answer["owed"]
    assert desk.saw(*back, signers=("ben",))[0] == 1
    code, answer = desk.saw(*back, signers=("ada",))
    assert code == 0 and answer["published"]
    code, answer = desk.saw("rings")
    assert [one["revision"] for one in answer["rings"][0]["history"]] == [2, 1]
    assert answer["rings"][0]["current"]["revision"] == 3
    held = read_target(desk.lab.config.tuf_dir, STABLE)
    assert held == read_target(desk.copy, STABLE)


def test_a_revoked_officer_counts_nowhere_and_perimeters_get_the_new_signatures(desk: Desk) -> None:
    digest = desk.release(1)
    _, late = desk.lab.officers.publication(2)
    out = desk.folder / "revoked"
    revoke = ("keys", "revoke", "--repository", desk.copy, "--officer", desk.folder / "ada.pub", "--out", out)
    code, answer = desk.saw(*revoke, signers=("ben",))
    assert code == 0 and not answer["complete"] and answer["signed_anew"] == [STABLE]
    code, answer = desk.saw("publish", out)
    assert code == 1 and answer["error"]["code"] == "threshold"
    assert desk.saw("stage", "--out", out, signers=("cleo",))[0] == 0
    assert desk.saw("stage", "--out", out, signers=("ben",))[1]["complete"]
    code, answer = desk.saw("publish", out, "--repository", desk.copy)
    assert code == 0, answer
    state = desk.lab.operator.request("GET", "/v1/policy/state")
    assert state["root_version"] == 2
    assert [(one["revision"], one["policy_digest"]) for one in state["releases"]] == [(1, digest)]
    # What perimeters verify under the new root bears its officers' signatures.
    raw = read_target(desk.lab.config.tuf_dir, STABLE)
    keys, threshold = trusted_policy_keys((desk.copy / "metadata" / "2.root.json").read_bytes())
    assert len(good_signers(raw, keys)) == threshold == 2
    with desk.lab.tls("perimeter", "edge") as client:
        sent = base64.b64decode(client.get("/v1/perimeter/state").json()["releases"][digest])
    assert sent == raw
    events = [event["event"].get("message", "") for event in desk.lab.events()]
    assert "policy of ring stable signed anew" in events
    # And what ada had signed for the next release is refused.
    with pytest.raises(BrokerRefusal) as caught:
        desk.lab.operator.request("POST", "/v1/policy/publish", encode(late))
    assert caught.value.code in {"threshold", "stale_base"}


def test_one_officer_releases_to_canary_and_not_to_stable(desk: Desk) -> None:
    desk.release(1)
    desk.release(1, "canary")
    desk.keep("dora", Ed25519PrivateKey.generate())
    out = desk.folder / "delegated"
    delegate = (
        "keys",
        "delegate",
        "--repository",
        desk.copy,
        "--ring",
        "canary",
        "--officer-pub",
        desk.folder / "dora.pub",
    )
    assert desk.saw(*delegate, "--out", out, signers=("ada", "ben"))[0] == 0
    assert desk.saw("stage", "--out", out, signers=("dora",))[1]["complete"]
    assert desk.saw("publish", out, "--repository", desk.copy)[0] == 0
    _, raw = desk.lab.officers.bundle(2, OTHER)
    (desk.folder / "2.bundle.json").write_bytes(raw)
    stage = ("stage", "--repository", desk.copy, "--bundle", desk.folder / "2.bundle.json")
    assert desk.saw(*stage, "--ring", "stable", "--out", desk.folder / "no", signers=("dora",))[0] == 0
    code, answer = desk.saw("publish", desk.folder / "no")
    assert code == 1 and answer["error"]["code"] == "threshold"
    assert desk.saw(*stage, "--ring", "canary", "--out", desk.folder / "yes", signers=("dora",))[0] == 0
    code, answer = desk.saw("publish", desk.folder / "yes", "--repository", desk.copy)
    assert code == 0, answer
    state = desk.lab.operator.request("GET", "/v1/policy/state")
    assert [(one["ring"], one["revision"]) for one in state["releases"]] == [("canary", 2), ("stable", 1)]


def test_the_brokers_online_key_is_changed_as_the_guide_says(desk: Desk, tmp_path: Path) -> None:
    digest = desk.release(1)
    lab, out = desk.lab, desk.folder / "online"
    successor = Ed25519PrivateKey.generate()
    desk.keep("next", successor)
    rotate = ("keys", "rotate", "--repository", desk.copy, "--online-pub", desk.folder / "next.pub", "--out", out)
    assert desk.saw(*rotate, signers=("ada", "ben"))[1]["complete"]
    code, answer = desk.saw("publish", out)
    assert code == 1 and answer["error"]["code"] == "online_key"
    lab.stop()
    (lab.config.keys / "tuf-online.key").write_bytes((desk.folder / "next.key").read_bytes())
    lab.start()
    code, answer = desk.saw("publish", out, "--repository", desk.copy)
    assert code == 0, answer
    for name in ("m", "t"):
        (tmp_path / name).mkdir()
    ca = lab.ca_file.read_text()
    fetcher = PinnedFetcher(ca, "broker.saw.internal")
    try:
        url = f"https://127.0.0.1:{lab.port}/tuf"
        updater = refresh(tmp_path / "m", tmp_path / "t", url, lab.officers.root, fetcher)
        assert fetch_target(updater, STABLE)[1]["policy_digest"] == digest
    finally:
        fetcher.close()
