"""What a browser would refuse is refused before it takes the place of a certificate that works."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from saw.broker.pages_certificate import CertificateRefused, check_pages_certificate

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
NAME = "saw.example.com"
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Authority:
    """An authority and one below it that issues for servers."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now
        self.root_key, self.key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        self.root = self.issue("root", self.root_key, "root", self.root_key, ca=True)
        self.below = self.issue("below", self.key, "root", self.root_key, ca=True)

    def issue(
        self, name: str, key: Key, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, ca: bool = False,
        names: tuple[str, ...] = (NAME,), days: tuple[int, int] = (-1, 90), use: Any = ExtendedKeyUsageOID.SERVER_AUTH,
    ) -> x509.Certificate:  # fmt: skip
        held = [x509.IPAddress(ip_address(one)) if one[0].isdigit() else x509.DNSName(one) for one in names]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + timedelta(days=days[0]))
            .not_valid_after(self.now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            if held:
                builder = builder.add_extension(x509.SubjectAlternativeName(held), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    def server(self, key: Key, **how: Any) -> x509.Certificate:
        return self.issue("server", key, "below", self.key, **how)


def pem(*parts: Any, **how: Any) -> bytes:
    """Write keys and certificates one after the other."""
    form, secret = how.get("form", PrivateFormat.PKCS8), how.get("secret", NoEncryption())
    return b"".join(
        one.public_bytes(Encoding.PEM)
        if isinstance(one, x509.Certificate)
        else one.private_bytes(Encoding.PEM, form, secret)
        for one in parts
    )


AUTHORITY = Authority()
KEY = ec.generate_private_key(ec.SECP256R1())
SERVER = AUTHORITY.server(KEY)
GOOD = pem(KEY, SERVER, AUTHORITY.below)
ROOT = pem(AUTHORITY.root)


def check(raw: bytes = GOOD, *names: str, **how: Any) -> Any:
    return check_pages_certificate(raw, names or (NAME,), NOW, **how)


def test_what_browsers_take_is_taken() -> None:
    found = check(ca_pem=ROOT, min_days=14)
    assert (found.names, found.days_left, found.chain) == ((NAME,), 90, 2)
    assert check(pem(KEY, SERVER, AUTHORITY.below, form=PrivateFormat.TraditionalOpenSSL)).days_left == 90
    big = rsa.generate_private_key(65537, 2048)
    assert check(pem(big, AUTHORITY.server(big), AUTHORITY.below), ca_pem=ROOT).chain == 2
    wild = pem(KEY, AUTHORITY.server(KEY, names=("*.example.com", "10.0.0.7")), AUTHORITY.below)
    assert check(wild, "SAW.example.com", "10.0.0.7", ca_pem=ROOT).names == ("*.example.com", "10.0.0.7")


def test_a_wildcard_is_for_one_label() -> None:
    wild = pem(KEY, AUTHORITY.server(KEY, names=("*.example.com",)), AUTHORITY.below)
    for name in ("a.b.example.com", "example.com", ".example.com"):
        with pytest.raises(CertificateRefused, match="it is not for"):
            check(wild, name)
    assert check(wild, "a.example.com").chain == 2


OTHER = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no certificate"),
        (b"x" * (256 * 1024 + 1), "has 262145 bytes"),
        (pem(SERVER), "0 private keys"),
        (pem(KEY, KEY, SERVER), "2 private keys"),
        (pem(KEY, SERVER, secret=BestAvailableEncryption(b"secret")), "key cannot be read"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" + pem(SERVER), "key cannot be read"),
        (pem(OTHER, SERVER), "not that of the first certificate"),
        (pem(KEY, AUTHORITY.below, SERVER), "not that of the first certificate"),
        (pem(KEY, AUTHORITY.server(KEY, names=("other.example.com",))), "not for saw.example.com, but for other"),
        (pem(KEY, AUTHORITY.server(KEY, names=())), "names no server"),
        (pem(KEY, AUTHORITY.server(KEY, days=(-90, -1))), "counts from"),
        (pem(KEY, AUTHORITY.server(KEY, days=(1, 90))), "counts from"),
        (pem(KEY, AUTHORITY.server(KEY, days=(-1, 13))), "counts from"),
        (pem(KEY, AUTHORITY.server(KEY, use=ExtendedKeyUsageOID.CLIENT_AUTH)), "not for servers"),
        (pem(KEY, SERVER, AUTHORITY.root), "not issued by the one that follows"),
    ],
    ids=[
        "empty", "huge", "no key", "two keys", "passphrase", "broken key", "another key", "order", "another name", "no name",
        "past", "not yet", "soon", "client", "gap",
    ],
)  # fmt: skip
def test_what_browsers_refuse_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(CertificateRefused, match=why):
        check(raw, min_days=14)


def test_a_key_that_is_too_short_is_refused() -> None:
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505 - it is the one that is refused
    with pytest.raises(CertificateRefused, match="a key of this kind"):
        check(pem(short, AUTHORITY.server(short), AUTHORITY.below))


def test_a_chain_that_leads_elsewhere_or_lacks_a_link_is_refused() -> None:
    with pytest.raises(CertificateRefused, match="do not vouch"):
        check(ca_pem=pem(Authority().root))
    with pytest.raises(CertificateRefused, match="do not vouch"):
        check(pem(KEY, SERVER), ca_pem=ROOT)
    with pytest.raises(CertificateRefused, match="authorities cannot be read"):
        check(ca_pem=b"nothing")
    assert check(pem(KEY, SERVER)).chain == 1


def test_the_command_says_why_and_shows_no_key(tmp_path: Path) -> None:
    authority = Authority(datetime.now(UTC))
    file = tmp_path / "pages.pem"
    file.write_bytes(pem(KEY, authority.server(KEY), authority.below))
    (tmp_path / "ca.pem").write_bytes(pem(authority.root))
    command = [
        sys.executable,
        "-m",
        "saw.cli.main",
        "broker",
        "certificate",
        str(file),
        "--ca",
        str(tmp_path / "ca.pem"),
    ]
    done = subprocess.run([*command, "--name", NAME], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"for {NAME}; counts until ")
    bad = subprocess.run([*command, "--name", "other.example.com"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "it is not for other.example.com" in bad.stderr
    secret = file.read_text().splitlines()[2]
    assert secret not in done.stdout + bad.stdout + bad.stderr
