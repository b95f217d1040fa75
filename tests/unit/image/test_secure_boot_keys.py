"""The owner's keys of secure boot: made once, enrolled as they are, and taken for an image only when it would boot with them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from saw.attest.image_record import RecordInvalid, parse_record
from saw.cli import main as saw_main
from saw.image import build as image_build
from saw.image import inputs as image_inputs
from saw.image import secure_boot, uefi_keys
from saw.image.build import GoldenImage, ImageBuild
from saw.image.disk import ImageError
from saw.image.secure_boot import OwnerKey, SignedBy, chosen, owner_key

pytestmark = [
    pytest.mark.control("IMG-01"),
    pytest.mark.skipif(not uefi_keys.FACTORY.exists(), reason="the package ovmf is missing"),
]
ROOT = Path(__file__).resolve().parents[3]
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of one owner and the variable store with them, by the commands themselves."""
    place = tmp_path_factory.mktemp("owner")
    keys = place / "keys"
    assert saw_main.main(["image", "secure-boot", "keys", "--dir", str(keys), "--owner", "Example"]) == 0
    enrolled = [
        "--pk",
        f"{keys}/PK.crt",
        "--kek",
        f"{keys}/KEK.crt",
        "--db",
        f"{keys}/db.crt",
        "--out",
        f"{place}/owner.fd",
    ]
    assert saw_main.main(["image", "secure-boot", "enrol", *enrolled]) == 0
    return place


@pytest.fixture
def owner(made: Path, tmp_path: Path) -> OwnerKey:
    shutil.copytree(made, tmp_path / "own")
    keys = tmp_path / "own/keys"
    return OwnerKey(keys / "db.key", keys / "db.crt", tmp_path / "own/owner.fd")


def taken(owner: OwnerKey) -> OwnerKey | None:
    return owner_key(str(owner.key), str(owner.certificate), str(owner.variables))


# --- keys and store ----------------------------------------------------------------------------------------------------


def test_private_keys_are_private_and_never_overwritten(owner: OwnerKey, capsys: pytest.CaptureFixture[str]) -> None:
    folder = owner.key.parent
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {name for name in modes if modes[name] == 0o600} == {"PK.key", "KEK.key", "db.key"}
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in (folder / "PK.key", folder / "PK.crt"):
        path.unlink()
    assert saw_main.main(["image", "secure-boot", "keys", "--dir", str(folder), "--owner", "Other"]) != 0
    assert "is there already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == {
        path: content for path, content in before.items() if path.exists()
    }
    with pytest.raises(ImageError, match="does not fit"):
        uefi_keys.make_keys(folder / "long", "x" * 80)


def test_a_store_trusts_what_it_was_told_and_nobody_else(owner: OwnerKey, capsys: pytest.CaptureFixture[str]) -> None:
    keys, other = owner.key.parent, owner.key.parent.parent / "modules.der"
    subprocess.run(["openssl", "x509", "-in", f"{keys}/KEK.crt", "-outform", "DER", "-out", str(other)], check=True)
    target = other.with_name("two.fd")
    found = uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt", other], target)
    marks = {name: uefi_keys.fingerprint(uefi_keys.read_certificate(keys / f"{name}.crt")) for name in uefi_keys.ROLES}
    assert found == uefi_keys.Enrolled((marks["PK"],), (marks["KEK"],), (marks["db"], marks["KEK"]), on=True)
    capsys.readouterr()
    assert saw_main.main(["image", "secure-boot", "show", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["db"] == [marks["db"], marks["KEK"]]
    content = target.read_bytes()
    with pytest.raises(ImageError, match="is there already"):
        uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt"], target)
    assert target.read_bytes() == content
    with pytest.raises(ImageError, match="no certificate for db"):
        uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [], target.with_name("none.fd"))
    with pytest.raises(ImageError, match="is no certificate"):
        uefi_keys.enrol(keys / "PK.key", [keys / "KEK.crt"], [keys / "db.crt"], target.with_name("none.fd"))
    assert not target.with_name("none.fd").exists()


def test_a_store_that_was_written_otherwise_than_told_is_not_kept(
    owner: OwnerKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, target = owner.key.parent, owner.variables.with_name("new.fd")

    def without_kek(*argv: str, **options: object) -> str:
        at = argv.index("--add-kek-cert") if "--add-kek-cert" in argv else len(argv)
        return uefi_run(*argv[:at], *argv[at + 3 :])

    uefi_run = uefi_keys.run
    monkeypatch.setattr(uefi_keys, "run", without_kek)
    with pytest.raises(ImageError, match="wrote other keys than it was told"):
        uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt"], target)
    assert not target.exists()


def test_what_a_store_holds_besides_certificates_is_refused(owner: OwnerKey) -> None:
    hashed = owner.variables.with_name("hash.fd")
    program = Path(sys.executable).with_name("virt-fw-vars")
    guid = "11111111-2222-3333-4444-555555555555"
    subprocess.run(
        [program, "--input", owner.variables, "--output", hashed, "--add-db-hash", guid, "ab" * 32],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ImageError, match=r"db of .* has other things than certificates"):
        uefi_keys.read_store(hashed)
    assert uefi_keys.read_store(owner.variables).on
    owner.variables.write_bytes(b"x" * 1024)
    with pytest.raises(ImageError, match="cannot be read as a variable store"):
        uefi_keys.read_store(owner.variables)


def test_a_list_of_another_kind_is_refused_even_when_certificates_are_in_it(owner: OwnerKey) -> None:
    der = uefi_keys.read_certificate(owner.certificate).public_bytes(Encoding.DER)
    sizes = [(28 + 16 + len(der)).to_bytes(4, "little"), bytes(4), (16 + len(der)).to_bytes(4, "little")]
    body = b"".join(sizes) + bytes(16) + der
    kind = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072").bytes_le
    mark = uefi_keys.fingerprint(uefi_keys.read_certificate(owner.certificate))
    assert uefi_keys._certificates(kind + body, "db") == [(mark, bytes(16) + der)]
    for wrong in (bytes(16) + body, kind + body[:-1], kind + body + b"x", kind[:8]):
        with pytest.raises(ImageError, match="db has other things than certificates"):
            uefi_keys._certificates(wrong, "db")


def test_pcr_7_follows_store_and_certificate_and_is_what_a_boot_measured(owner: OwnerKey) -> None:
    keys = owner.key.parent
    seen = owner.signed_by
    two = owner.variables.with_name("two.fd")
    uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt", keys / "KEK.crt"], two)
    again = owner.variables.with_name("again.fd")
    uefi_keys.enrol(keys / "PK.crt", [keys / "KEK.crt"], [keys / "db.crt"], again)
    assert uefi_keys.expected_pcr_7(again, seen.certificate_sha256) == seen.pcr_7
    assert uefi_keys.expected_pcr_7(two, seen.certificate_sha256) != seen.pcr_7
    other = uefi_keys.fingerprint(uefi_keys.read_certificate(keys / "KEK.crt"))
    assert uefi_keys.expected_pcr_7(two, other) != uefi_keys.expected_pcr_7(two, seen.certificate_sha256)
    recorded = json.loads((Path(__file__).parent / "secure_boot_measured.json").read_text())
    store = owner.variables.with_name("recorded.fd")
    certificates = [owner.variables.with_name(f"{number}.crt") for number in range(4)]
    for path, pem in zip(certificates, recorded["certificates"], strict=True):
        path.write_text(pem)
    uefi_keys.enrol(certificates[0], [certificates[1]], certificates[2:], store)
    mark = uefi_keys.fingerprint(uefi_keys.read_certificate(certificates[2]))
    assert uefi_keys.expected_pcr_7(store, mark) == recorded["pcr_7"]


# --- what an image is signed with --------------------------------------------------------------------------------------


def test_nothing_chosen_means_unsigned_and_a_whole_choice_is_taken(owner: OwnerKey) -> None:
    assert chosen({}) is None
    named = {"KEY": owner.key, "CERTIFICATE": owner.certificate, "VARIABLES": owner.variables}
    environment = {f"SAW_IMAGE_SECURE_BOOT_{part}": str(path) for part, path in named.items()}
    assert chosen(environment) == owner
    for part in named:
        with pytest.raises(ImageError, match=f"needs a {part.lower()}, too: SECURE_BOOT_{part}"):
            chosen({**environment, f"SAW_IMAGE_SECURE_BOOT_{part}": ""})
        with pytest.raises(ImageError, match=f"is no file, and SECURE_BOOT_{part} names it"):
            chosen({**environment, f"SAW_IMAGE_SECURE_BOOT_{part}": "/nonexistent/file"})


def test_a_key_whose_images_would_not_boot_is_refused_before_anything_is_built(owner: OwnerKey) -> None:
    assert taken(owner) == owner
    keys = owner.key.parent
    with pytest.raises(ImageError, match="does not belong to"):
        taken(replace(owner, key=keys / "KEK.key"))
    with pytest.raises(ImageError, match=r"does not let .* in: an image signed with it would not boot"):
        taken(replace(owner, key=keys / "KEK.key", certificate=keys / "KEK.crt"))
    with pytest.raises(ImageError, match="has no owner"):
        taken(replace(owner, variables=uefi_keys.FACTORY))
    off = owner.variables.with_name("off.fd")
    program = Path(sys.executable).with_name("virt-fw-vars")
    subprocess.run(
        [program, "--input", owner.variables, "--output", off, "--set-false", "SecureBootEnable"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ImageError, match="secure boot is off"):
        taken(replace(owner, variables=off))
    masterless = owner.variables.with_name("masterless.fd")
    subprocess.run(
        [program, "--input", owner.variables, "--output", masterless, "--delete", "PK"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(ImageError, match=r"has no owner \(PK\)"):
        taken(replace(owner, variables=masterless))


def test_only_an_rsa_key_without_a_password_is_taken_and_no_message_shows_it(owner: OwnerKey) -> None:
    key = load_pem_private_key(owner.key.read_bytes(), None)
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - to be refused
    for other, words in (
        (key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")), "without a password"),
        (b"secret words", "is no private key"),
        (_pem(ec.generate_private_key(ec.SECP256R1())), "no RSA key of 2048 bits"),
        (_pem(weak), "no RSA key of 2048 bits"),
    ):
        owner.key.write_bytes(other)
        with pytest.raises(ImageError, match=words) as refused:
            taken(owner)
        assert other.decode() not in str(refused.value)


def test_a_certificate_that_the_signer_cannot_read_is_refused(owner: OwnerKey) -> None:
    der = owner.certificate.with_name("db.der")
    der.write_bytes(uefi_keys.read_certificate(owner.certificate).public_bytes(Encoding.DER))
    with pytest.raises(ImageError, match=r"db\.der is no certificate in PEM, and sbsign takes no other"):
        taken(replace(owner, certificate=der))


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.skipif(not STUB.exists() or not shutil.which("sbsign"), reason="systemd-boot-efi or sbsigntool is missing")
def test_a_boot_image_is_signed_in_place_and_verified(owner: OwnerKey, tmp_path: Path) -> None:
    program = tmp_path / "uki.efi"
    shutil.copyfile(STUB, program)
    secure_boot.sign(program, owner.key, owner.certificate)
    verify = ["sbverify", "--cert", str(owner.certificate), str(program)]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    assert program.read_bytes() != STUB.read_bytes()
    other = [*verify[:2], str(owner.key.with_name("KEK.crt")), str(program)]
    assert subprocess.run(other, capture_output=True, check=False).returncode != 0
    signed = program.read_bytes()
    program.write_bytes(b"no program")
    with pytest.raises(ImageError, match="`sbsign` failed"):
        secure_boot.sign(program, owner.key, owner.certificate)
    assert program.read_bytes() == b"no program"
    program.write_bytes(signed)
    assert sorted(path.name for path in tmp_path.glob("uki*")) == ["uki.efi"]


@pytest.mark.skipif(not STUB.exists() or not shutil.which("sbsign"), reason="systemd-boot-efi or sbsigntool is missing")
def test_a_signature_that_is_not_there_is_noticed(
    owner: OwnerKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, tools = tmp_path / "uki.efi", tmp_path / "tools"
    shutil.copyfile(STUB, program)
    tools.mkdir()
    (tools / "sbsign").write_text('#!/bin/sh\ncp "$7" "$6"\n')
    (tools / "sbsign").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(ImageError, match="`sbverify` failed"):
        secure_boot.sign(program, owner.key, owner.certificate)
    assert program.read_bytes() == STUB.read_bytes()


# --- build and record --------------------------------------------------------------------------------------------------


def test_certificate_and_store_are_inputs_and_the_key_is_not(owner: OwnerKey, tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("lock")
    build = ImageBuild(tmp_path, tmp_path / "build", owner=owner)
    before, plain = build.sources(), ImageBuild(tmp_path, tmp_path / "build").sources()
    assert before.options == {"secure_boot": "signed"}
    assert plain.options == {}
    assert before.changed_since(plain) == ["secure-boot-certificate", "secure-boot-variables"]
    assert plain == image_inputs.collect(tmp_path)
    owner.key.write_text("another key")
    assert build.sources() == before
    owner.variables.write_bytes(b"another store")
    assert build.sources().changed_since(before) == ["secure-boot-variables"]


def test_signed_and_unsigned_images_are_kept_apart(owner: OwnerKey, tmp_path: Path) -> None:
    unsigned, signed = ImageBuild(tmp_path, tmp_path / "build"), ImageBuild(tmp_path, tmp_path / "build", owner=owner)
    for build in (unsigned, signed):
        inputs = build.sources()
        folder = build.images / f"workspace-{inputs.digest[:12]}"
        folder.mkdir(parents=True)
        (folder / "image.qcow2").touch()
        by = owner.signed_by if build is signed else None
        image = GoldenImage(
            folder.name,
            str(folder),
            f"{folder}/image.qcow2",
            "0" * 64,
            inputs.digest,
            "2026-01-01",
            1.0,
            "6.12",
            secure_boot=by,
        )
        (folder / "build.json").write_bytes(msgspec.json.encode(image))
        (folder / "inputs.json").write_bytes(msgspec.json.encode(inputs))
    for build, by in ((unsigned, None), (signed, owner.signed_by)):
        [(mine, _)], matching = build.ours(), build.matching()
        assert matching == mine
        assert mine.secure_boot == by


def test_the_store_lies_beside_the_image_as_it_was_when_the_build_began(owner: OwnerKey, tmp_path: Path) -> None:
    expected = owner.signed_by
    assert secure_boot.place_store(owner, tmp_path, expected) == {"secure-boot.fd": expected.variables_sha256}
    assert (tmp_path / "secure-boot.fd").read_bytes() == owner.variables.read_bytes()
    owner.variables.write_bytes(b"another store")
    with pytest.raises(ImageError, match="changed during the build"):
        secure_boot.place_store(owner, tmp_path, expected)


@pytest.mark.parametrize("given", ["--secure-boot-key", "--secure-boot-certificate"])
def test_half_a_pair_assembles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    argv = ["assemble", "--root", str(tmp_path), "--output", str(tmp_path / "x/y"), "--seed", "s", given, "/file"]
    assert image_build.main(argv) == 1
    assert "a key needs its certificate" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_release_record_says_whose_key_it_is_and_contradicts_nothing() -> None:
    by = SignedBy("c" * 64, "d" * 64, "7" * 64)
    record = {
        "format": "saw-image-release/2", "name": "workspace-x", "image_sha256": "0" * 64, "inputs_digest": "d",
        "created": "2026-01-01T00:00:00Z", "not_after": "2027-01-01T00:00:00Z",
        "boot": {"pcrs": {**{str(number): "0" * 64 for number in (0, 2, 3, 4, 11, 12, 13)}, "7": by.pcr_7}},
        "secure_boot": msgspec.to_builtins(by), "evidence": {"secure-boot.fd": by.variables_sha256},
    }  # fmt: skip
    found = parse_record(rfc8785.dumps(record))
    assert found.secure_boot is not None
    assert found.secure_boot.certificate_sha256 == by.certificate_sha256
    assert found.missing(["secure_boot"]) == []
    for wrong in (
        {**record, "evidence": {}},
        {**record, "evidence": {"secure-boot.fd": "e" * 64}},
        {key: value for key, value in record.items() if key != "secure_boot"},
    ):
        with pytest.raises(RecordInvalid, match="are not one"):
            parse_record(rfc8785.dumps(wrong))
    with pytest.raises(RecordInvalid, match="PCR 7 of workspace-x is not what its owner's keys give"):
        parse_record(rfc8785.dumps({**record, "boot": {"pcrs": {**record["boot"]["pcrs"], "7": "0" * 64}}}))
    del record["secure_boot"]
    record["evidence"] = {}
    assert parse_record(rfc8785.dumps(record)).missing(["secure_boot"]) == ["secure_boot"]
