"""What a VM was told at creation: check it strictly, then lay it out for every component.

The input is the systemd credential ``saw.workspace``: public data, but the trust anchors in it decide whom the VM believes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from cryptography import x509

from saw import jsontext
from saw.addressing import Number
from saw.errors import ConfigError
from saw.files import write_atomic

CREDENTIAL = "saw.workspace"

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*")


class WorkspaceSeed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The credential, as docs/architecture.md describes it. ``number`` fixes the VM's network."""

    workspace_id: Name
    number: Number
    trust_domain: str
    broker_url: str
    broker_name: str
    ring2: str
    ring2_name: str
    ca_pem: Annotated[str, msgspec.Meta(max_length=16384)]
    tuf_root: dict[str, Any]
    blueprint: Name
    ring: Name


def credential_path(environ: Mapping[str, str]) -> Path:
    """Return where systemd put the credential; raise :class:`ConfigError` when the unit was given none."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise ConfigError(
            "there is no credentials directory", cure=f"run in a unit with ImportCredential={CREDENTIAL}, or use --from"
        )
    return Path(directory) / CREDENTIAL


def parse_seed(raw: bytes) -> WorkspaceSeed:
    """Parse and check the credential; raise :class:`ConfigError` that names every wrong field."""
    try:
        seed = jsontext.decode(raw, kind=WorkspaceSeed)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the workspace credential is not valid: {error}", cure="create the workspace again"
        ) from error
    problems = [
        f"{name} is not a lower-case DNS name"
        for name in ("trust_domain", "broker_name", "ring2_name")
        if not _DNS_NAME.fullmatch(getattr(seed, name))
    ]
    problems += _check_broker_url(seed.broker_url)
    if not _is_address(seed.ring2):
        problems.append("ring2 is not address:port")
    problems += _check_authority(seed)
    if not isinstance(seed.tuf_root.get("signed"), dict) or seed.tuf_root["signed"].get("_type") != "root":
        problems.append("tuf_root is no TUF root")
    if problems:
        raise ConfigError(
            f"the workspace credential is not valid: {'; '.join(problems)}", cure="create the workspace again"
        )
    return seed


def bootstrap(source: Path, directory: Path) -> list[Path]:
    """Check ``source`` and write ``workspace.json`` and ``ca.pem`` (0644) into ``directory``; return what was written.

    Nothing is written unless everything is valid. ``workspace.json`` is written last, so that its presence means done.
    """
    try:
        raw = source.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {source}: {error.strerror}", cure="pass the credential saw.workspace to the VM"
        ) from error
    seed = parse_seed(raw)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    authority, workspace = directory / "ca.pem", directory / "workspace.json"
    write_atomic(authority, seed.ca_pem)
    write_atomic(workspace, msgspec.json.format(msgspec.json.encode(seed), indent=1))
    return [authority, workspace]


def _check_broker_url(text: str) -> list[str]:
    try:
        url = urlsplit(text)
    except ValueError:
        return ["broker_url is not https://address:port"]
    if url.scheme != "https" or url.path not in {"", "/"} or url.query or url.fragment or url.username is not None:
        return ["broker_url is not https://address:port"]
    return [] if _is_address(url.netloc) else ["broker_url does not name an address and a port"]


def _check_authority(seed: WorkspaceSeed) -> list[str]:
    try:
        certificates = x509.load_pem_x509_certificates(seed.ca_pem.encode())
        constraints = certificates[0].extensions.get_extension_for_class(x509.BasicConstraints).value
        names = certificates[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, IndexError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ["ca_pem is no certificate of an authority"]
    if len(certificates) != 1 or not constraints.ca:
        return ["ca_pem is not exactly one authority"]
    if names.get_values_for_type(x509.UniformResourceIdentifier) != [f"spiffe://{seed.trust_domain}"]:
        return [f"ca_pem is not the authority of {seed.trust_domain}"]
    return []


def _is_address(text: str) -> bool:
    host, separator, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return bool(separator) and port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535
