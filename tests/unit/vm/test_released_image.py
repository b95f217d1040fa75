"""No VM is made of, and none started on, an image without a current record that enough officers signed: judged on the hypervisor.

Real keys, roots and signatures, real qemu-img; the far end is the service manager and the emulator.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_reference_boot import MACHINE

from saw.attest.image_record import PAYLOAD_TYPE
from saw.attest.verifier import RELEASED_PCRS
from saw.cli import vm as vm_cli
from saw.errors import ConfigError
from saw.policy.envelope import seal
from saw.policy.tuf_metadata import Metadata, Root, sign_metadata, signing_key
from saw.policy.tuf_repository import init_repository
from saw.vm import accel, measure, qemu, released, trust
from saw.vm.spec import VmError, VmSpec, load_spec, parse_spec
from saw.vm.trust import RecordRefusedError

Make = Callable[..., VmSpec]
NOW = datetime(2026, 11, 30, tzinfo=UTC)
PCRS = {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}


class Desk:
    """Three officers, two of whom sign, and what they hand to this hypervisor."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.keys = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.online = Ed25519PrivateKey.generate()
        self.root = init_repository(place / "officers", self.keys, self.online, 2, now=NOW - timedelta(days=1))

    def signed(self, sha256: str, *, keys: list[Any] | None = None, name: str = "workspace-1", **fields: Any) -> bytes:
        """A record of the image ``sha256`` in its envelope."""
        record = {
            "format": "saw-image-release/2", "name": name, "image_sha256": sha256, "inputs_digest": "inputs",
            "created": "2026-11-01T00:00:00Z", "not_after": "2027-01-01T00:00:00Z", "boot": {"pcrs": PCRS}, **fields,
        }  # fmt: skip
        return seal(rfc8785.dumps(record), PAYLOAD_TYPE, self.keys[:2] if keys is None else keys)

    def next_root(self, keys: list[Any], signers: list[Any], *, version: int = 2) -> bytes:
        """A root that gives both roles to ``keys``, two of whom have to sign."""
        root = Root(version=version, expires=NOW + timedelta(days=300), consistent_snapshot=True)
        for role, holders, threshold in (
            ("root", keys, 2), ("targets", keys, 2), ("snapshot", [self.online], 1), ("timestamp", [self.online], 1),
        ):  # fmt: skip
            for key in holders:
                root.add_key(signing_key(key.public_key()), role)
            root.roles[role].threshold = threshold
        return sign_metadata(Metadata(root), signers)

    @staticmethod
    def handed(roots: tuple[bytes, ...] = (), records: tuple[bytes, ...] = (), revoked: tuple[Any, ...] = ()) -> bytes:
        """What ``saw image hand-over`` would print."""
        given = {"roots": [json.loads(one) for one in roots], "records": [json.loads(one) for one in records]}
        return json.dumps({**given, "revoked": [{"name": name, "image_sha256": sha} for name, sha in revoked]}).encode()


@pytest.fixture
def desk(hypervisor: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A hypervisor that asks for records and has the root of these officers."""
    released.SETTINGS.unlink()
    monkeypatch.setattr(released, "present", lambda: NOW)
    made = Desk(hypervisor)
    assert released.accept(made.handed((made.root,)), pin=True).root_version == 1
    return made


def beside(spec: VmSpec, envelope: bytes, name: str = "release.signed.json") -> Path:
    """Put a signed record beside the image."""
    file = Path(spec.image).with_name(name)
    file.write_bytes(envelope)
    return file


def refused(spec: VmSpec, code: str, words: str) -> RecordRefusedError:
    """A creation is refused, and leaves nothing."""
    with pytest.raises(RecordRefusedError, match=words) as found:
        qemu.create(spec)
    assert (found.value.code, bool(found.value.cure)) == (code, True), found.value
    assert not (spec.directory / "root.qcow2").exists()
    return found.value


@pytest.mark.control("P0-04")
def test_a_released_image_becomes_a_vm_and_one_without_a_record_does_not(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    gone = msgspec.structs.replace(spec, image="/nowhere")
    with pytest.raises(VmError, match="image /nowhere is not on this hypervisor"):
        qemu.create(gone)
    told = refused(spec, "record_missing", "golden.qcow2 has no signed release record")
    assert told.details == {"image": spec.image, "image_sha256": spec.image_sha256}
    beside(spec, desk.signed(spec.image_sha256))
    assert qemu.create(spec)["changed"]
    assert not qemu.create(spec)["changed"]
    assert qemu.start(spec)


def tampered(envelope: bytes) -> bytes:
    """The envelope with another end of its record; the signatures stay."""
    found = json.loads(envelope)
    record = json.loads(base64.b64decode(found["payload"]))
    found["payload"] = base64.b64encode(rfc8785.dumps({**record, "not_after": "2029-01-01T00:00:00Z"})).decode()
    return json.dumps(found).encode()


BAD: dict[str, tuple[str, str, Callable[[Desk, str], bytes]]] = {
    "wrong key": (
        "record_threshold", "0 of 2 signatures are good",
        lambda desk, sha: desk.signed(sha, keys=[Ed25519PrivateKey.generate() for _ in range(2)]),
    ),
    "below the threshold": ("record_threshold", "1 of 1", lambda desk, sha: desk.signed(sha, keys=desk.keys[:1])),
    "one officer twice": (
        "record_threshold", "1 of 1", lambda desk, sha: desk.signed(sha, keys=[desk.keys[0], desk.keys[0]])
    ),
    "the online key": (
        "record_threshold", "1 of 2", lambda desk, sha: desk.signed(sha, keys=[desk.keys[0], desk.online])
    ),
    "no signature": ("record_unsigned", "no signature", lambda desk, sha: desk.signed(sha, keys=[])),
    "expired": (
        "record_expired", "counted until 2026-11-30",
        lambda desk, sha: desk.signed(sha, not_after="2026-11-30T00:00:00Z"),
    ),
    "another image": (
        "record_other_image", "is about another image, workspace-1 [(]0000", lambda desk, _sha: desk.signed("0" * 64)
    ),
    "tampered": ("record_threshold", "0 of 2 signatures are good", lambda desk, sha: tampered(desk.signed(sha))),
    "a policy's envelope": (
        "record_malformed", "the envelope holds",
        lambda desk, sha: desk.signed(sha).replace(b"image-release", b"policy-bundle"),
    ),
    "too little": ("record_incomplete", "lacks PCR", lambda desk, sha: desk.signed(sha, boot={"pcrs": {}})),
    "no record": ("record_malformed", "is no signed envelope", lambda _desk, _sha: b"{}"),
    "too long": ("record_malformed", "is no signed envelope", lambda desk, sha: desk.signed(sha) + b" " * 300_000),
}  # fmt: skip


@pytest.mark.control("P0-04")
@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_record_that_does_not_count_is_refused_with_the_reason(make_spec: Make, desk: Desk, kind: str) -> None:
    spec = make_spec(tpm=True)
    code, words, bad = BAD[kind]
    beside(spec, bad(desk, spec.image_sha256))
    refused(spec, code, words)
    # A good one under another name beside it is enough.
    beside(spec, desk.signed(spec.image_sha256), "other.release.signed.json")
    assert qemu.create(spec)["changed"]


@pytest.mark.control("P0-04")
def test_it_is_looked_at_again_at_each_start_whoever_starts_it(
    make_spec: Make, desk: Desk, hypervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tpm=True, network=False, accel="tcg")
    file = beside(spec, desk.signed(spec.image_sha256))
    qemu.create(spec)
    machine = hypervisor / "tools/qemu-system-x86_64"
    machine.write_text(f"#!/bin/sh\ntouch {hypervisor}/ran\necho hello > {spec.directory}/console.log\n")
    machine.chmod(0o755)
    assert qemu.execute(spec) == 0
    (hypervisor / "ran").unlink()
    monkeypatch.setattr(released, "present", lambda: datetime(2027, 1, 1, tzinfo=UTC))
    for step in (qemu.start, qemu.execute, qemu.rebuild):
        with pytest.raises(RecordRefusedError, match="counted until 2027-01-01") as told:
            step(spec)
        assert told.value.details["record"] == str(file)
    assert not (hypervisor / "ran").exists()
    assert not qemu.active(spec.id)
    released.accept(desk.handed(records=(desk.signed(spec.image_sha256, not_after="2027-04-01T00:00:00Z"),)))
    assert qemu.execute(spec) == 0
    assert (hypervisor / "ran").exists()


@pytest.mark.control("P0-04")
def test_a_revoked_image_is_not_started_and_stays_revoked(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    record = desk.signed(spec.image_sha256)
    beside(spec, record)
    qemu.create(spec)
    gone = ("workspace-1", spec.image_sha256)
    assert released.accept(desk.handed(revoked=(("workspace-2", spec.image_sha256), ("workspace-1", "0" * 64)))).changed
    qemu.startable(spec)
    assert released.accept(desk.handed(revoked=(gone,))).revoked == 3
    with pytest.raises(RecordRefusedError, match="image workspace-1 is revoked") as told:
        qemu.start(spec)
    assert told.value.code == "image_revoked"
    # A list that forgets it, and the record again, change nothing: it only grows.
    assert not released.accept(desk.handed()).changed
    with pytest.raises(RecordRefusedError, match="is revoked"):
        released.accept(desk.handed(records=(record,)))
    with pytest.raises(RecordRefusedError, match="is revoked"):
        qemu.rebuild(spec)
    # A release of the same bytes under another name is another decision of the officers, as the broker has it.
    beside(spec, desk.signed(spec.image_sha256, name="workspace-3"), "again.release.signed.json")
    qemu.startable(spec)


def test_a_revocation_is_kept_though_the_record_beside_it_is_refused(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    bad = desk.signed(spec.image_sha256, keys=desk.keys[:1])
    with pytest.raises(RecordRefusedError, match="1 of 1"):
        released.accept(desk.handed(records=(bad,), revoked=(("workspace-1", spec.image_sha256),)))
    assert trust.revoked() == {trust.Revoked("workspace-1", spec.image_sha256)}
    assert not list((trust.place() / "records").iterdir())
    (trust.place() / "revoked.json").write_text("[")
    refused(spec, "revocations_unreadable", "cannot be read")


def test_records_are_handed_over_verified_and_by_name(
    make_spec: Make, desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, other = make_spec(tpm=True), make_spec(name="next")
    good = desk.handed(records=(desk.signed(spec.image_sha256),))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(good)))
    assert vm_cli.main(["accept", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"]
    refused(spec, "record_missing", "no signed release record")
    for changed in (True, False):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(good)))
        assert vm_cli.main(["accept", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["changed"], answer["records"]) == (changed, ["workspace-1"])
    assert qemu.create(spec)["changed"]
    # One that is named with the verb, as by hand.
    file = desk.place / "named.json"
    file.write_bytes(desk.signed(other.image_sha256, name="workspace-2", keys=desk.keys[:1]))
    words = ["rebuild", spec.id, "--image", other.image, "--image-sha256", other.image_sha256, "--record", str(file)]
    with pytest.raises(RecordRefusedError, match="1 of 1"):
        vm_cli.main(words)
    assert load_spec(spec.id).image == spec.image
    file.write_bytes(desk.signed(other.image_sha256, name="workspace-2"))
    assert vm_cli.main(words) == 0
    assert load_spec(spec.id).image == other.image
    # Both releases have their record here: there is a way back.
    assert qemu.rebuild(spec, spec.image, spec.image_sha256)["changed"]


def test_without_a_root_nothing_boots_and_only_the_role_pins_one(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    beside(spec, desk.signed(spec.image_sha256))
    shutil.rmtree(trust.place())
    told = refused(spec, "no_root", "has no root of the officers")
    assert "control_plane" in told.cure
    with pytest.raises(RecordRefusedError, match="has no root of the officers"):
        released.accept(desk.handed((desk.root,)))
    with pytest.raises(RecordRefusedError, match="there is no root of the officers yet"):
        released.accept(desk.handed(), pin=True)
    assert released.accept(desk.handed((desk.root,)), pin=True, dry=True).changed
    assert not trust.place().joinpath("root.json").exists()
    assert released.accept(desk.handed((desk.root,)), pin=True).changed
    assert qemu.create(spec)["changed"]


@pytest.mark.control("P0-04")
def test_a_root_is_followed_by_its_signatures_and_never_overwritten(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    fresh = [Ed25519PrivateKey.generate() for _ in range(3)]
    by_both = desk.next_root(fresh, [*desk.keys[:2], *fresh[:2]])
    stranger = Desk(desk.place / "elsewhere")
    held = trust.pinned_root()
    for offered, code in (
        ((stranger.root,), "another_root"),
        ((stranger.root, stranger.next_root(fresh, [*stranger.keys[:2], *fresh[:2]])), "another_root"),
        ((desk.next_root(fresh, fresh[:2]),), "root_threshold"),  # signed by themselves alone
        ((desk.next_root(fresh, [desk.keys[0], *fresh[:2]]),), "root_threshold"),  # one of the old is too few
        ((desk.next_root(fresh, [*desk.keys[:2], fresh[0]]),), "root_threshold"),  # and one of the new
        ((desk.next_root(fresh, [*desk.keys[:2], *fresh[:2]], version=3),), "root_stale_base"),
        ((b'{"signed": {}, "signatures": []}',), "root_malformed"),
    ):
        for pin in (False, True):
            with pytest.raises(RecordRefusedError) as told:
                released.accept(desk.handed(offered, revoked=(("workspace-1", "0" * 64),)), pin=pin)
            assert told.value.code == code, told.value
    assert trust.pinned_root() == held
    assert not trust.revoked()
    beside(spec, desk.signed(spec.image_sha256))
    qemu.create(spec)
    assert released.accept(desk.handed((desk.root, by_both))).root_version == 2
    # An older state of the broker changes nothing.
    assert released.accept(desk.handed((desk.root,))) == trust.Taken(False, 2, (), 0)
    # Officers who left do not count any more: what they signed is signed anew by those who came.
    with pytest.raises(RecordRefusedError, match="0 of 2 signatures are good"):
        qemu.start(spec)
    beside(spec, desk.signed(spec.image_sha256, keys=fresh[:2]))
    assert qemu.start(spec)


def test_the_owners_store_beside_the_image_is_the_one_that_the_record_names(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    beside(spec, desk.signed(spec.image_sha256))
    store = Path(spec.image).with_name("secure-boot.fd")
    store.write_bytes(b"store")
    refused(spec, "record_other_image", "the variable store beside .* is not the one")
    digest = hashlib.sha256(b"store").hexdigest()
    signed = {"certificate_sha256": "1" * 64, "variables_sha256": digest, "pcr_7": PCRS["7"]}
    beside(spec, desk.signed(spec.image_sha256, secure_boot=signed, evidence={"secure-boot.fd": digest}))
    assert qemu.create(spec)["changed"]
    store.unlink()
    with pytest.raises(RecordRefusedError, match="the variable store"):
        qemu.startable(spec)


def test_an_image_is_measured_before_it_has_a_record_and_that_makes_no_workspace(
    make_spec: Make, desk: Desk, hypervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "probe", lambda *_: accel.Acceleration("tcg", "asked by the test"))
    program = hypervisor / "tools/qemu-system-x86_64"
    program.write_text(MACHINE.format(before="", a="a" * 64))
    program.chmod(0o755)
    spec = make_spec(tpm=True)
    assert measure.reference_boot(Path(spec.image), patience=60)["pcrs"] == {"0": "a" * 64}
    refused(spec, "record_missing", "no signed release record")
    # Nobody says of a workspace that it is such a boot.
    with pytest.raises(ConfigError, match="needs_record"):
        parse_spec(msgspec.json.encode({**msgspec.to_builtins(spec), "needs_record": False}))


def test_what_is_stopped_or_removed_needs_no_record(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    file = beside(spec, desk.signed(spec.image_sha256))
    qemu.create(spec)
    assert qemu.start(spec)
    file.unlink()
    assert qemu.status(spec)["active"]
    assert qemu.stop(spec, patience=0)
    with pytest.raises(RecordRefusedError):
        qemu.start(spec)
    assert qemu.destroy(spec)


@pytest.mark.parametrize("text", ["{", '{"image_records": "no"}', '{"records": "unchecked"}'])
def test_settings_that_cannot_be_read_are_no_way_out(make_spec: Make, desk: Desk, text: str) -> None:
    spec = make_spec(tpm=True)
    released.SETTINGS.write_text(text)
    with pytest.raises(ConfigError, match="cannot be used: "):
        qemu.create(spec)
    released.SETTINGS.write_text('{"image_records": "required"}')
    refused(spec, "record_missing", "no signed release record")
    # Written down by the role, where an installation goes without.
    released.SETTINGS.write_text('{"image_records": "unchecked"}')
    assert qemu.create(spec)["changed"]
    shutil.rmtree(trust.place())
    assert released.accept(b"{}") == trust.Taken(False, 0, (), 0)


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"ok": true}', b'{"roots": [1]}', b'{"revoked": [{"name": "a"}]}'])
def test_a_hand_over_is_read_strictly(desk: Desk, raw: bytes) -> None:
    with pytest.raises((ConfigError, RecordRefusedError)):
        released.accept(raw)
    assert not trust.revoked()


@pytest.mark.control("P0-04")
def test_one_record_that_has_ended_does_not_keep_out_those_that_count(make_spec: Make, desk: Desk) -> None:
    spec = make_spec(tpm=True)
    ended = desk.signed("0" * 64, not_after="2026-11-30T00:00:00Z")
    for given in ((ended, desk.signed(spec.image_sha256)), (desk.signed(spec.image_sha256), ended)):
        taken = released.accept(desk.handed(records=given))
        assert taken.records == ("workspace-1",)
        assert [text for text in taken.refused if "counted until 2026-11-30" in text] == list(taken.refused)
        assert len(taken.refused) == 1
    assert [one.name for one in (trust.place() / "records").iterdir()] == [f"{spec.image_sha256}.workspace-1.json"]
    assert qemu.create(spec)["changed"]
    with pytest.raises(RecordRefusedError, match="counted until 2026-11-30") as found:
        released.accept(desk.handed(records=(ended, ended)))
    assert found.value.code == "record_expired"
