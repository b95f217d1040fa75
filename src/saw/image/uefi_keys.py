"""Keys of secure boot that the owner has: made for a test or a small shop, and enrolled into a variable store of the firmware.

Four words of the UEFI specification (2.10, chapter 32): ``PK`` is who owns the machine, ``KEK`` who may change the lists, ``db``
what may boot. A store made here holds the owner's certificates and nobody else's. Variables are written by the program
``virt-fw-vars`` (virt-firmware); what it wrote is read back here before anybody relies on it.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from saw import jsontext
from saw.files import write_atomic, write_private
from saw.image.disk import ImageError, run
from saw.image.sbom import tool

FACTORY = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
"""A variable store without any key, of the package ``ovmf``."""
ROLES = ("PK", "KEK", "db")
YEARS = 10
"""Life of a certificate that is made here; firmware does not look at it."""
_X509 = uuid.UUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072").bytes_le
"""EFI_CERT_X509_GUID (UEFI 2.10, 32.4.1.1)."""
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_DATABASE = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
_GUIDS = {"PK": _GLOBAL, "KEK": _GLOBAL, "db": _DATABASE}
_ENABLE = ("SecureBootEnable", "f0a30bc7-af08-4556-99c4-001009c93a44")
"""OVMF's own switch; without it the firmware checks nothing, whatever keys it has."""


class _Variable(msgspec.Struct):
    name: str
    guid: str
    data: str


class _Store(msgspec.Struct):
    variables: list[_Variable]


class Enrolled(msgspec.Struct, frozen=True):
    """What a variable store trusts: SHA-256 of each certificate (DER, lower-case hex) by role, and whether it checks at all."""

    pk: tuple[str, ...]
    kek: tuple[str, ...]
    db: tuple[str, ...]
    on: bool


def read_certificate(path: Path) -> x509.Certificate:
    """Read an X.509 certificate in PEM or DER; raise :class:`ImageError`."""
    try:
        raw = path.read_bytes()
        return (x509.load_pem_x509_certificate if b"-----BEGIN" in raw else x509.load_der_x509_certificate)(raw)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", cure="name the certificate's file") from error
    except ValueError as error:
        raise ImageError(f"{path} is no certificate", cure="give an X.509 certificate, PEM or DER") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate's DER form, lower-case hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def make_keys(directory: Path, owner: str) -> dict[str, str]:
    """Make a private key and a certificate for each role in ``directory``; return role → SHA-256 of the certificate.

    Keys are RSA-2048, which every UEFI firmware takes, in PEM and 0600. Raises :class:`ImageError` when a file is there
    already.
    """
    files = {role: (directory / f"{role}.key", directory / f"{role}.crt") for role in ROLES}
    for path in (path for pair in files.values() for path in pair):
        if path.exists() or path.is_symlink():
            raise ImageError(f"{path} is there already", cure="name another directory; a key is never overwritten")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = {}
    for role, (key_file, certificate_file) in files.items():
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        certificate = _self_signed(key, f"{owner} secure boot {role}", signs_code=role == "db")
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(key_file, pem)
        write_atomic(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
        made[role] = fingerprint(certificate)
    return made


def _self_signed(key: rsa.RSAPrivateKey, name: str, *, signs_code: bool) -> x509.Certificate:
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError as error:
        raise ImageError(f"the owner's name does not fit: {error}", cure="take a shorter name") from error
    built = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=not signs_code, path_length=None), critical=True)
    )
    if signs_code:
        built = built.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return built.sign(key, hashes.SHA256())


def enrol(pk: Path, kek: list[Path], db: list[Path], output: Path) -> Enrolled:
    """Make the variable store ``output`` with these certificates and secure boot on; return what it holds, read back.

    Raises :class:`ImageError`; a file that is there is never overwritten.
    """
    if output.exists() or output.is_symlink():
        raise ImageError(f"{output} is there already", cure="name a new file; a store that VMs came from is kept")
    wanted = {
        role: [read_certificate(path) for path in paths] for role, paths in zip(ROLES, ([pk], kek, db), strict=True)
    }
    for role, certificates in wanted.items():
        if not certificates:
            raise ImageError(f"there is no certificate for {role}", cure=f"give at least one with --{role.lower()}")
    # The owner's id is measured into PCR 7 with the certificates; one that derives from PK is the same whenever it is made.
    owner = str(uuid.uuid5(uuid.NAMESPACE_OID, fingerprint(wanted["PK"][0])))
    options = {"PK": "--set-pk-cert", "KEK": "--add-kek-cert", "db": "--add-db-cert"}
    with tempfile.TemporaryDirectory(prefix=".enrol-", dir=output.parent) as scratch:
        work = Path(scratch)
        argv: list[str] = []
        for role, certificates in wanted.items():
            for number, certificate in enumerate(certificates):
                file = work / f"{role}-{number}.pem"
                file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
                argv += [options[role], owner, str(file)]
        made = work / "vars.fd"
        run(
            tool("virt-fw-vars"), "--input", str(FACTORY), "--output", str(made), *argv, "--secure-boot",
            "--no-microsoft",
        )  # fmt: skip
        found = read_store(made)
        expected = {role: tuple(fingerprint(one) for one in certificates) for role, certificates in wanted.items()}
        if found != Enrolled(expected["PK"], expected["KEK"], expected["db"], on=True):
            raise ImageError("virt-fw-vars wrote other keys than it was told", cure="take the version that is locked")
        write_atomic(output, made.read_bytes())
    return found


def read_store(path: Path) -> Enrolled:
    """Return what the variable store at ``path`` trusts.

    Raises :class:`ImageError` when it is no store, or trusts anything but certificates.
    """
    values = _variables(path)
    pk, kek, db = (
        tuple(mark for mark, _ in _certificates(values.get((role, _GUIDS[role]), b""), f"{role} of {path}"))
        for role in ROLES
    )
    return Enrolled(pk, kek, db, on=values.get(_ENABLE, b"") == b"\1")


def expected_pcr_7(path: Path, mark: str) -> str:
    """Return PCR 7 (SHA-256 bank, hex) after a boot with the store at ``path`` of an image that the certificate ``mark`` let in.

    The firmware measures SecureBoot, PK, KEK, db and dbx, a separator, and the entry of db that it used, each but the separator
    as UEFI_VARIABLE_DATA (TCG PC Client Platform Firmware Profile 1.05, PCR[7]). ``mark`` is the SHA-256 of the certificate,
    which has to be in db.
    """
    values = _variables(path)
    told = [("SecureBoot", _GLOBAL, b"\1")]
    told += [(name, guid, values.get((name, guid), b"")) for name, guid in (*_GUIDS.items(), ("dbx", _DATABASE))]
    used = dict(_certificates(values.get(("db", _DATABASE), b""), f"db of {path}"))[mark]
    events = [*(_event(*one) for one in told), hashlib.sha256(bytes(4)).digest(), _event("db", _DATABASE, used)]
    pcr = bytes(32)
    for event in events:
        pcr = hashlib.sha256(pcr + event).digest()
    return pcr.hex()


def _event(name: str, guid: str, data: bytes) -> bytes:
    sizes = len(name).to_bytes(8, "little") + len(data).to_bytes(8, "little")
    return hashlib.sha256(uuid.UUID(guid).bytes_le + sizes + name.encode("utf-16-le") + data).digest()


def _variables(path: Path) -> dict[tuple[str, str], bytes]:
    if not path.is_file():
        raise ImageError(f"{path} is no file", cure="name a variable store: saw image secure-boot enrol makes one")
    with tempfile.TemporaryDirectory(prefix="saw-store-") as scratch:
        listing = Path(scratch) / "store.json"
        try:
            run(tool("virt-fw-vars"), "--input", str(path), "--output-json", str(listing))
            store = jsontext.decode(listing.read_bytes(), kind=_Store)
            return {(one.name, one.guid): bytes.fromhex(one.data) for one in store.variables}
        except (ImageError, OSError, ValueError) as error:
            raise ImageError(
                f"{path} cannot be read as a variable store: {error}", cure="make one: saw image secure-boot enrol"
            ) from error


def _certificates(raw: bytes, where: str) -> list[tuple[str, bytes]]:
    """Read one EFI_SIGNATURE_LIST after another (UEFI 2.10, 32.4.1): type, sizes of list, header and each one, all of them.

    Returns the SHA-256 of each certificate with its EFI_SIGNATURE_DATA, which begins with the owner's id.
    """
    found: list[tuple[str, bytes]] = []
    wrong = ImageError(f"{where} has other things than certificates", cure="enrol certificates alone")
    while raw:
        sizes = [int.from_bytes(raw[at : at + 4], "little") for at in (16, 20, 24)]
        length, header, each = sizes
        body = length - 28 - header
        if raw[:16] != _X509 or len(raw) < length or each <= 16 or body <= 0 or body % each:
            raise wrong
        for at in range(28 + header, length, each):
            try:
                certificate = x509.load_der_x509_certificate(raw[at + 16 : at + each])
                found.append((fingerprint(certificate), raw[at : at + each]))
            except ValueError as error:
                raise wrong from error
        raw = raw[length:]
    return found
