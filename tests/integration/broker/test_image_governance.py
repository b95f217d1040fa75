"""Images at a real broker: only a signed, current, admitted record lets a workspace be made or attest."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, cli, image_record, signed_record
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from saw.attest.image_record import PAYLOAD_TYPE
from saw.broker.client import BrokerRefusal
from saw.broker.config import ImageSettings
from saw.policy.envelope import verify_envelope
from saw.policy.tuf_repository import trusted_policy_keys


def refusal(call: Any, *arguments: Any, **fields: Any) -> BrokerRefusal:
    with pytest.raises(BrokerRefusal) as caught:
        call(*arguments, **fields)
    return caught.value


def put(broker: Lab, record: dict[str, Any], keys: Any) -> dict[str, Any]:
    return broker.operator.request("PUT", "/v1/images", signed_record(record, keys))


def create(broker: Lab, name: str, image: str, ring: str = "stable") -> dict[str, Any]:
    body = {"id": name, "sponsor": "ada@example.com", "blueprint": "coding", "ring": ring, "image": image}
    return broker.operator.request("POST", "/v1/workspaces", body)


@pytest.mark.control("P0-04")
def test_only_a_record_that_enough_officers_signed_is_registered(broker: Lab, tmp_path: Path) -> None:
    keys = broker.officers.keys
    record = image_record("gov-signed", "a" * 64)
    assert refusal(put, broker, record, keys[:1]).code == "record_threshold"
    assert refusal(put, broker, record, []).code == "record_unsigned"
    assert refusal(put, broker, record, [keys[0], keys[0]]).code == "record_threshold"
    changed = signed_record(record, keys[:2])
    changed["payload"] = signed_record(image_record("gov-signed", "b" * 64), [])["payload"]
    assert refusal(broker.operator.request, "PUT", "/v1/images", changed).code == "record_threshold"
    other = signed_record(record, keys[:2]) | {"payloadType": "application/vnd.saw.policy-manifest+json"}
    assert refusal(broker.operator.request, "PUT", "/v1/images", other).code == "record_malformed"
    assert refusal(broker.operator.request, "PUT", "/v1/images", record).code == "malformed"
    assert put(broker, record, keys[1:])["state"] == "candidate"
    event = broker.events()[-1]["event"]
    assert len(event["unmapped"]["saw"]["signers"]) == 2


@pytest.mark.control("P0-04")
def test_without_a_root_of_trust_no_image_is_registered(own_broker: Lab) -> None:
    assert refusal(put, own_broker, image_record("early"), own_broker.officers.keys[:2]).code == "no_root"
    assert own_broker.register_image(image_record("early"))["changed"]


@pytest.mark.control("P0-04")
def test_an_ended_record_is_refused(broker: Lab) -> None:
    past = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT00:00:00Z")
    ended = {**image_record("gov-ended", "c" * 64), "created": "2026-01-01T00:00:00Z", "not_after": past}
    assert refusal(put, broker, ended, broker.officers.keys[:2]).code == "record_expired"
    for wrong in ({"not_after": "2026-01-01T00:00:00"}, {"not_after": "2020-01-01T00:00:00Z"}, {"unheard": 1}):
        record = {**image_record("gov-ended", "c" * 64), **wrong}
        assert refusal(put, broker, record, broker.officers.keys[:2]).code == "record_malformed"


@pytest.mark.control("IMG-01")
def test_a_record_without_what_the_broker_asks_for_is_refused(own_broker: Lab) -> None:
    bills = (
        "sbom/debian.cdx.json",
        "sbom/debian.spdx.json",
        "sbom/python.cdx.json",
        "sbom/npm.cdx.json",
        "sbom/npm.spdx.json",
    )
    now = datetime.now(UTC)
    scan = {
        "database_sha256": "4" * 64, "scanned_at": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "fail_on": "high", "open": 0,
        "image_sha256": "c" * 64, "advisories": {"sha256": "5" * 64, "records": {"npm": 1, "pypi": 1}},
    }  # fmt: skip
    bare = image_record("gov-bare", "c" * 64)
    own_broker.register_image(image_record("gov-first", "d" * 64))  # brings the officers' keys
    assert put(own_broker, bare, own_broker.officers.keys[:2])["state"] == "candidate"
    own_broker.stop()
    asked = msgspec.structs.replace(
        own_broker.config, image=ImageSettings(require=("sbom", "provenance", "scan", "advisories"))
    )
    own_broker.config_file.write_bytes(msgspec.json.encode(asked))
    own_broker.start()
    files = [*bills, "provenance.json", "vulnerabilities-333333333333.json"]
    whole = {**bare, "evidence": dict.fromkeys(files, "3" * 64), "scan": scan}

    def searched(**changed: Any) -> dict[str, Any]:
        told = {name: value for name, value in {**scan, **changed}.items() if value is not None}
        return {**whole, "scan": told}

    for lacking, words in (
        (bare, "lacks sbom/debian.cdx.json"),
        ({**whole, "evidence": {"provenance.json": "3" * 64}}, "lacks sbom/debian.cdx.json"),
        ({**whole, "evidence": dict.fromkeys(bills, "3" * 64)}, "lacks provenance.json"),
        ({name: value for name, value in whole.items() if name != "scan"}, "lacks scan"),
        ({**whole, "evidence": dict.fromkeys(files[:-1], "3" * 64)}, "lacks scan"),
        (searched(image_sha256=None), "lacks scan"),
        (searched(advisories=None), "lacks advisories"),
    ):
        found = refusal(put, own_broker, lacking, own_broker.officers.keys[:2])
        assert (found.code, words in found.message) == ("record_incomplete", True), found.message
    assert (
        refusal(put, own_broker, searched(image_sha256="d" * 64), own_broker.officers.keys[:2]).code
        == "record_malformed"
    )
    for moved in (-timedelta(days=7, hours=1), timedelta(hours=3)):
        other = searched(scanned_at=(now + moved).strftime("%Y-%m-%dT%H:%M:%SZ"))
        assert refusal(put, own_broker, other, own_broker.officers.keys[:2]).code == "scan_not_current"
    young = searched(scanned_at=(now - timedelta(days=6)).strftime("%Y-%m-%dT%H:%M:%SZ"))
    assert put(own_broker, young, own_broker.officers.keys[:2])["changed"]
    assert put(own_broker, whole, own_broker.officers.keys[:2])["changed"]


@pytest.mark.control("IMG-01")
def test_an_image_without_a_score_or_with_one_below_the_floor_is_refused(own_broker: Lab) -> None:
    def scored(name: str, score: int, scanner: str = "lynis") -> dict[str, Any]:
        told = {"scanner": scanner, "version": "3.0.8", "score": score, "tests": 250}
        return {**image_record(name, "c" * 64), "baseline": told, "evidence": {"baseline.dat": "3" * 64}}

    low, bare = scored("gov-low", 73), image_record("gov-no-score", "d" * 64)
    own_broker.register_image(low)  # where no score is asked for
    own_broker.register_image(bare)
    own_broker.stop()
    asked = msgspec.structs.replace(own_broker.config, image=ImageSettings(require=("baseline",), baseline_floor=74))
    own_broker.config_file.write_bytes(msgspec.json.encode(asked))
    own_broker.start()
    officers = own_broker.officers.keys[:2]
    lacking = refusal(put, own_broker, image_record("gov-no-score-2", "e" * 64), officers)
    assert (lacking.code, "lacks baseline" in lacking.message) == ("record_incomplete", True)
    below = refusal(put, own_broker, scored("gov-low-2", 73), officers)
    assert (below.code, below.message) == (
        "baseline_below_floor", "the hardening index of gov-low-2 is 73, below the floor of 74",
    )  # fmt: skip
    other = refusal(put, own_broker, scored("gov-other", 100, "mine"), officers)
    assert (other.code, "of the scanner 'mine'" in other.message) == ("baseline_of_another_scanner", True)
    assert not put(own_broker, low, officers)["changed"]
    assert put(own_broker, scored("gov-high", 74), officers)["changed"]


@pytest.mark.control("IMG-01")
def test_a_registered_record_stays_when_its_search_grows_old(own_broker: Lab) -> None:
    scan = {
        "database_sha256": "4" * 64, "scanned_at": "2026-01-02T00:00:00Z", "fail_on": "high", "open": 0,
        "image_sha256": "c" * 64,
    }  # fmt: skip
    evidence = {"vulnerabilities-333333333333.json": "3" * 64}
    old = {**image_record("gov-old-scan", "c" * 64), "scan": scan, "evidence": evidence}
    own_broker.register_image(old)  # where no search is asked for
    own_broker.stop()
    asked = msgspec.structs.replace(own_broker.config, image=ImageSettings(require=("scan",)))
    own_broker.config_file.write_bytes(msgspec.json.encode(asked))
    own_broker.start()
    assert not put(own_broker, old, own_broker.officers.keys[:2])["changed"]
    other = {**old, "name": "gov-old-scan-2"}
    assert refusal(put, own_broker, other, own_broker.officers.keys[:2]).code == "scan_not_current"


@pytest.mark.control("P0-04")
def test_a_candidate_is_for_its_rings_and_a_promoted_image_for_all(broker: Lab) -> None:
    put(broker, image_record("gov-new", "d" * 64), broker.officers.keys[:2])
    assert refusal(create, broker, "gov-new-1", "gov-new").code == "image_candidate"
    assert create(broker, "gov-new-2", "gov-new", "canary")["image"] == "gov-new"
    broker.move_image("gov-new", "stable")
    assert create(broker, "gov-new-1", "gov-new")["image"] == "gov-new"


@pytest.mark.control("P0-04")
def test_a_deprecated_image_takes_no_further_workspace_and_a_revoked_one_never_returns(broker: Lab) -> None:
    broker.register_image(image_record("gov-old", "e" * 64))
    create(broker, "gov-old-1", "gov-old")
    assert broker.move_image("gov-old", "deprecated")["changed"]
    assert not broker.move_image("gov-old", "deprecated")["changed"]
    assert refusal(create, broker, "gov-old-2", "gov-old").code == "image_deprecated"
    broker.register_image(image_record("gov-other", "f" * 64))
    reprovision = ("PUT", "/v1/workspaces/gov-old-1/image", {"image": "gov-other"})
    assert broker.operator.request(*reprovision)["changed"]
    assert broker.move_image("gov-old", "revoked")["changed"]
    back = ("PUT", "/v1/workspaces/gov-old-1/image", {"image": "gov-old"})
    assert refusal(broker.operator.request, *back).code == "image_revoked"
    assert refusal(broker.move_image, "gov-old", "stable").code == "transition_refused"
    assert refusal(put, broker, image_record("gov-old", "e" * 64), broker.officers.keys[:2]).code == "image_revoked"
    assert refusal(broker.move_image, "gov-none", "stable").code == "unknown_image"


@pytest.mark.control("LIF-03")
def test_the_command_says_why_a_workspace_has_no_image_to_go_back_to(broker: Lab) -> None:
    broker.register_image(image_record("gov-first", "7" * 64))
    broker.register_image(image_record("gov-next", "8" * 64))
    create(broker, "gov-back", "gov-first")
    assert "it is the first that it was bound to" in cli(broker, "workspace", "way-back", "gov-back").stderr
    assert cli(broker, "workspace", "reprovision", "gov-back", "--image", "gov-next").returncode == 0
    done = cli(broker, "workspace", "way-back", "gov-back", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "no_earlier_image"
    assert "gov-first: the workspace never ran it" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.control("P0-04")
def test_a_workspace_is_not_started_on_a_revoked_image_and_starts_on_another_one(broker: Lab) -> None:
    for name, digest in (("gov-gone", "1a" * 32), ("gov-next", "1b" * 32)):
        broker.register_image(image_record(name, digest))
    create(broker, "gov-start", "gov-gone")
    assert broker.step("gov-start", "provisioning")["state"] == "provisioning"
    broker.move_image("gov-gone", "revoked")
    refused = refusal(broker.step, "gov-start", "attesting")
    assert refused.code == "image_revoked"
    assert "gov-start may not run on gov-gone: the image is revoked" in str(refused)
    assert "saw workspace reprovision" in refused.cure
    assert broker.operator.request("GET", "/v1/workspaces/gov-start")["state"] == "provisioning"
    broker.step("gov-start", "stopped")
    broker.operator.request("PUT", "/v1/workspaces/gov-start/image", {"image": "gov-next"})
    assert broker.step("gov-start", "attesting")["state"] == "attesting"


@pytest.mark.control("P0-04")
def test_two_officers_sign_one_after_the_other_on_the_command_line(broker: Lab, tmp_path: Path) -> None:
    record, signed = tmp_path / "image.release.json", tmp_path / "image.signed.json"
    plain = image_record("gov-cli", "9" * 64)
    del plain["not_after"]
    record.write_text(json.dumps(plain))
    for index, key in enumerate(broker.officers.keys[:2]):
        file = tmp_path / f"officer-{index}.key"
        file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.chmod(0o600)
        source = record if index == 0 else signed
        done = cli(broker, "image", "sign", str(source), "--key", str(file), "--out", str(signed), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["signatures"] == index + 1
        registered = cli(broker, "image", "register", str(signed))
        assert registered.returncode == (1 if index == 0 else 0), registered.stderr
    assert cli(broker, "image", "promote", "gov-cli", "--reason", "tested").returncode == 0
    assert "gov-cli" in cli(broker, "image", "list").stdout
    assert cli(broker, "image", "revoke", "gov-cli", "--reason", "test").returncode == 0
    assert "cannot become" in cli(broker, "image", "deprecate", "gov-cli", "--reason", "test").stderr
    assert "signed envelope" in cli(broker, "image", "register", str(record)).stderr


@pytest.mark.control("P0-04")
def test_a_hypervisor_is_handed_roots_signed_records_and_what_was_revoked(own_broker: Lab) -> None:
    def handed(*words: str) -> dict[str, Any]:
        done = cli(own_broker, "image", "hand-over", *words)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    assert handed("hand-none") == {"roots": [], "records": [], "revoked": []}
    good, bad = image_record("hand-good", "a1" * 32), image_record("hand-bad", "a2" * 32)
    for record in (good, {**good, "image_sha256": "a3" * 32}, bad):
        own_broker.register_image(record)
    found = handed("hand-good", "--sha256", "a1" * 32)
    assert [one["signed"]["version"] for one in found["roots"]] == [1]
    assert (len(found["records"]), found["revoked"]) == (1, [])
    # It is what the officers signed, to the letter.
    envelope = msgspec.json.encode(found["records"][0])
    payload, signers = verify_envelope(envelope, PAYLOAD_TYPE, *trusted_policy_keys(own_broker.officers.root))
    assert (json.loads(payload), len(signers)) == (good, 2)
    assert len(handed("hand-good")["records"]) == 2
    assert handed()["records"] == []
    own_broker.move_image("hand-bad", "revoked")
    own_broker.move_image("hand-good", "deprecated")  # what runs on it goes on
    assert handed("hand-bad")["records"] == []
    assert handed("hand-good")["revoked"] == [{"name": "hand-bad", "image_sha256": "a2" * 32}]
    assert len(handed("hand-good")["records"]) == 2
