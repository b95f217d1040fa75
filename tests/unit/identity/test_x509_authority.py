"""The X.509 authority: what it issues verifies; whatever else is presented does not."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from saw.identity.x509 import (
    POLICY_DIGEST_OID,
    Authority,
    IdentityError,
    new_key_and_csr,
    parse_spiffe_id,
    parse_svid,
    verify_peer,
    verify_svid,
)

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("ca") / "x509"


@pytest.fixture(scope="module")
def authority(directory):
    return Authority.create(directory, "saw.example", NOW)


@pytest.fixture(scope="module")
def csr():
    return new_key_and_csr("ws-demo", uri="spiffe://other.example/workspace/someone-else")[1]


def tailored(authority, csr, *, names, digest=b"ab" * 32, usage=(ExtendedKeyUsageOID.CLIENT_AUTH,), ca=False):
    """A certificate that the authority signed but would never issue."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .issuer_name(x509.load_pem_x509_certificate(authority.ca_pem).subject)
        .public_key(x509.load_pem_x509_csr(csr).public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(minutes=5))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    if digest is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(POLICY_DIGEST_OID, b"\x0c\x40" + digest), False)
    return builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def uri(value):
    return x509.UniformResourceIdentifier(value)


@pytest.mark.control("POL-03")
def test_an_svid_names_the_workspace_and_its_policy_and_verifies(authority, csr):
    pem = authority.issue_svid(csr, "ws-demo", DIGEST, NOW, timedelta(seconds=120))
    svid = verify_svid(pem, authority.ca_pem, NOW)
    certificate = x509.load_pem_x509_certificate(pem)
    assert (svid.workspace_id, svid.policy_digest, svid.trust_domain) == ("ws-demo", DIGEST, "saw.example")
    assert svid.not_after == NOW + timedelta(seconds=120)
    assert svid.sha256 == certificate.fingerprint(hashes.SHA256()).hex()
    assert svid.serial == certificate.serial_number
    assert not certificate.extensions.get_extension_for_oid(POLICY_DIGEST_OID).critical
    assert verify_peer(pem, authority.ca_pem, NOW).uri == "spiffe://saw.example/workspace/ws-demo"
    assert authority.issue_svid(csr, "ws-demo", DIGEST, NOW, 120) != pem


@pytest.mark.control("POL-05")
@pytest.mark.parametrize("seconds", [-60, 121])
def test_an_svid_is_refused_outside_its_lifetime(authority, csr, seconds):
    pem = authority.issue_svid(csr, "ws-demo", DIGEST, NOW, 120)
    assert verify_svid(pem, authority.ca_pem, NOW)
    with pytest.raises(IdentityError, match="expired"):
        verify_svid(pem, authority.ca_pem, NOW + timedelta(seconds=seconds))


def test_an_svid_of_another_authority_is_refused(authority, csr, tmp_path):
    other = Authority.create(tmp_path / "ca", "saw.example", NOW)
    pem = other.issue_svid(csr, "ws-demo", DIGEST, NOW)
    assert verify_svid(pem, other.ca_pem, NOW)
    with pytest.raises(IdentityError):
        verify_svid(pem, authority.ca_pem, NOW)


@pytest.mark.parametrize("ttl", [0, -1, 601, timedelta(minutes=10, seconds=1)])
def test_an_svid_never_lives_longer_than_ten_minutes(authority, csr, ttl):
    assert authority.issue_svid(csr, "ws-demo", DIGEST, NOW, 600)
    with pytest.raises(IdentityError, match="cannot live"):
        authority.issue_svid(csr, "ws-demo", DIGEST, NOW, ttl)


@pytest.mark.parametrize(
    ("workspace", "digest"),
    [("ws/other", DIGEST), ("", DIGEST), ("WS", DIGEST), ("ws-demo", "AB" * 32), ("ws-demo", "")],
)
def test_an_svid_needs_a_usable_name_and_digest(authority, csr, workspace, digest):
    with pytest.raises(IdentityError):
        authority.issue_svid(csr, workspace, digest, NOW)


def test_the_twin_of_the_tailored_certificates_parses(authority, csr):
    good = tailored(authority, csr, names=[uri("spiffe://saw.example/workspace/ws-demo")])
    assert parse_svid(good).workspace_id == "ws-demo"


@pytest.mark.parametrize(
    "change",
    [
        {"names": [uri("spiffe://saw.example/perimeter/edge")]},
        {"names": [uri("spiffe://saw.example/workspace/a"), uri("spiffe://saw.example/workspace/b")]},
        {"names": [uri("spiffe://saw.example/workspace/a"), x509.DNSName("broker.saw.internal")]},
        {"names": [x509.DNSName("broker.saw.internal")]},
        {"names": [uri("https://saw.example/workspace/a")]},
        {"digest": None},
        {"digest": b"zz" * 32},
        {"digest": b"ab" * 31},
        {"usage": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]},
        {"ca": True},
    ],
)
def test_what_is_not_exactly_an_svid_is_refused(authority, csr, change):
    with pytest.raises(IdentityError):
        parse_svid(tailored(authority, csr, **{"names": [uri("spiffe://saw.example/workspace/a")]} | change))


def test_several_certificates_or_none_are_refused(authority, csr):
    pem = authority.issue_svid(csr, "ws-demo", DIGEST, NOW)
    for raw in (b"", pem + pem, pem * 100):
        with pytest.raises(IdentityError):
            parse_svid(raw)


def test_a_perimeter_certificate_is_no_svid(authority, csr):
    pem = authority.issue_perimeter(csr, "edge", NOW, 3600)
    assert verify_peer(pem, authority.ca_pem, NOW).uri == "spiffe://saw.example/perimeter/edge"
    with pytest.raises(IdentityError):
        verify_svid(pem, authority.ca_pem, NOW)


def test_a_server_certificate_serves_tls_and_an_svid_does_not(tmp_path):
    authority = Authority.create(tmp_path / "ca", "saw.example", datetime.now(UTC))
    key, csr = new_key_and_csr("broker", dns=["broker.saw.internal"])
    certificates = {
        "server": authority.issue_server(csr, ["broker.saw.internal"], datetime.now(UTC), 3600, "perimeter/ring2"),
        "svid": authority.issue_svid(csr, "ws-demo", DIGEST, datetime.now(UTC)),
    }
    for kind, pem in certificates.items():
        (tmp_path / kind).write_bytes(key + pem)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / kind)
        client = ssl.create_default_context(cadata=authority.ca_pem.decode())
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        if kind == "server":
            assert handshake(client, server) == (
                ("DNS", "broker.saw.internal"),
                ("URI", "spiffe://saw.example/perimeter/ring2"),
            )
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                handshake(client, server)


def handshake(client, server):
    """Run a TLS handshake in memory; return the server's names."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="broker.saw.internal"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].getpeercert()["subjectAltName"]


def test_a_server_never_carries_a_workspace_name(authority, csr):
    with pytest.raises(IdentityError, match="no workspace"):
        authority.issue_server(csr, ["a.example"], NOW, 60, "workspace/ws-demo")
    with pytest.raises(IdentityError, match="DNS name"):
        authority.issue_server(csr, [], NOW, 60)


def test_requests_with_other_keys_or_foreign_signatures_are_refused(authority, csr):
    def request(key):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
        built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        return built.public_bytes(serialization.Encoding.DER)

    def pem(der):
        return x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)

    der = request(ec.generate_private_key(ec.SECP256R1()))
    assert authority.issue_svid(pem(der), "ws-demo", DIGEST, NOW)
    flipped = der[:-1] + bytes([der[-1] ^ 1])
    for bad in (
        pem(request(rsa.generate_private_key(65537, 2048))),
        pem(request(ec.generate_private_key(ec.SECP384R1()))),
        pem(flipped),
        b"-----BEGIN",
    ):
        with pytest.raises(IdentityError):
            authority.issue_svid(bad, "ws-demo", DIGEST, NOW)


def test_the_authority_survives_a_restart_with_private_files(authority, directory, csr):
    assert (directory.stat().st_mode & 0o777, (directory / "ca-key.pem").stat().st_mode & 0o777) == (0o700, 0o600)
    again = Authority.load(directory)
    assert (again.ca_pem, again.trust_domain) == (authority.ca_pem, "saw.example")
    assert verify_svid(again.issue_svid(csr, "ws-demo", DIGEST, NOW), authority.ca_pem, NOW)
    with pytest.raises(IdentityError, match="already holds"):
        Authority.create(directory, "saw.example", NOW)


def test_an_authority_open_to_others_is_not_loaded(tmp_path, csr):
    Authority.create(tmp_path / "ca", "saw.example", NOW)
    assert Authority.load(tmp_path / "ca")
    (tmp_path / "ca" / "ca-key.pem").chmod(0o640)
    with pytest.raises(IdentityError, match="open to group"):
        Authority.load(tmp_path / "ca")


def test_a_time_without_zone_is_refused(authority, csr):
    with pytest.raises(IdentityError, match="time zone"):
        authority.issue_svid(csr, "ws-demo", DIGEST, NOW.replace(tzinfo=None))


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://a.example",
        "spiffe://a.example/workspace",
        "spiffe://a.example/workspace/a/b",
        "spiffe://A/workspace/a",
        "spiffe://a/workspace/%61",
        "spiffe://a/workspace/../x",
        "spiffe://a:1/workspace/a",
        "http://a/workspace/a",
        "spiffe://a/workspace/a?x=1",
        "spiffe://a/workspace/a#f",
        "spiffe://u@a/workspace/a",
        "spiffe://a//a",
        "",
    ],
)
def test_other_names_are_no_spiffe_ids(text):
    assert parse_spiffe_id("spiffe://a.example/workspace/a").name == "a"
    with pytest.raises(IdentityError):
        parse_spiffe_id(text)
