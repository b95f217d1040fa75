"""The people of the demonstration: who they are, how they sign in, and the names under which a browser finds the pages.

Their identity provider belongs to the demonstration's far end, as its git server does. Passwords are made on the spot.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joserfc.jwk import RSAKey

from saw.errors import UnavailableError
from saw.files import write_atomic, write_private
from saw.lab import demo_pki
from saw.lab.topology import BASTION_PORT, Lab

PAGES, IDENTITY = "saw.example.com", "idp.example.com"
"""Names of the portal and of the identity provider; nobody but this machine and the lab's hosts knows their addresses."""
PORT = 8445
ORIGIN = f"https://{PAGES}:{PORT}"
CLIENT_SECRET_FILE, CA_FILE = "/etc/saw-demo-oidc.secret", "/etc/saw-demo-people-ca.pem"
"""On the control host: what the broker shows the provider, and the authority of the provider's certificate."""
PAGES_FILE = "/etc/saw/pages.pem"
"""Key and certificate of the pages on the control host, as the role ``portal_tls`` places them."""
GRANTS = ("authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code")


@dataclass(frozen=True)
class Person:
    """Somebody of the demonstration enterprise: ``part`` says what they do here, ``groups`` are those of the provider."""

    name: str
    part: str
    groups: tuple[str, ...]


PEOPLE = (
    Person("demo.user@example.com", "sponsor of the workspace", ("staff",)),
    Person("approver@example.com", "approves what the agent asks for", ("maintainers",)),
    Person("operator@example.com", "operates", ("platform",)),
    Person("auditor@example.com", "audits", ("audit",)),
)
ROLES = {"user": ["staff"], "approver": ["maintainers"], "operator": ["platform"], "auditor": ["audit"]}


def need_provider(lab: Lab) -> None:
    """Raise :class:`UnavailableError` when the identity provider's program is not there."""
    tree = lab.repository / "tests/oidc"
    if not all((place / "node_modules/.locked").exists() for place in (tree, tree / "node")):
        raise UnavailableError(f"the identity provider is missing in {tree}", cure="scripts/bootstrap.sh workspace")


def people_file(lab: Lab) -> Path:
    """Names and passwords, for whoever signs in (0600)."""
    return lab.directory / "people.json"


def context_file(lab: Lab) -> Path:
    """Context of the ``saw`` command for somebody who signed in."""
    return lab.directory / "person.json"


def tls_directory(lab: Lab) -> Path:
    """Certificates of pages and identity provider, and their authority as ``ca.pem``."""
    return lab.directory / "people-tls"


def passwords(lab: Lab) -> dict[str, str]:
    """Return everybody's password, making those that are missing."""
    path = people_file(lab)
    known = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    wanted = {one.name: known.get(one.name) or secrets.token_urlsafe(15) for one in PEOPLE}
    if known != wanted:
        write_private(path, json.dumps(wanted, indent=2) + "\n")
    return wanted


def provider_settings(lab: Lab) -> dict[str, Any]:
    """Return what the identity provider reads: its client, its people, and keys that are made once."""
    path = lab.directory / "secrets-identity.json"
    if not path.exists():
        key = RSAKey.generate_key(2048, {"alg": "RS256", "use": "sig", "kid": secrets.token_hex(4)})
        made = {
            "client_secret": secrets.token_urlsafe(32),
            "cookie_keys": [secrets.token_urlsafe(32)],
            "jwk": key.as_dict(private=True),
        }
        write_private(path, json.dumps(made))
    kept = json.loads(path.read_text(encoding="utf-8"))
    given = passwords(lab)
    return {
        "issuer": f"https://{IDENTITY}",
        "socket": "/run/saw-identity/provider.sock",
        "jwks": {"keys": [kept["jwk"]]},
        "cookie_keys": kept["cookie_keys"],
        "client": {
            "client_id": "saw", "client_secret": kept["client_secret"], "redirect_uris": [f"{ORIGIN}/callback"],
            "grant_types": list(GRANTS), "backchannel_logout_uri": f"{ORIGIN}/logout/backchannel",
            "backchannel_logout_session_required": True,
        },
        "people": {one.name: {"password": given[one.name], "groups": list(one.groups)} for one in PEOPLE},
    }  # fmt: skip


def variables(lab: Lab) -> dict[str, Any]:
    """Return the variables of sign-in, pages and terminal for the inventory; it is private."""
    addresses = {host.name: host.address for host in lab.hosts()}
    tls = demo_pki.servers(tls_directory(lab), {"pages": (PAGES,), "identity": (IDENTITY,)})
    return {
        "demo_identity": {
            "settings": provider_settings(lab), "tls": str(tls), "name": IDENTITY, "pages": PAGES,
            "address": addresses["enterprise"], "pages_address": addresses["control"],
            "client_secret_file": CLIENT_SECRET_FILE, "ca_file": CA_FILE,
        },
        "broker_sso": {
            "origin": ORIGIN,
            "provider": {
                "issuer": f"https://{IDENTITY}", "client_id": "saw", "client_secret_file": CLIENT_SECRET_FILE, "ca_file": CA_FILE,
                "scopes": ["openid", "email", "groups", "offline_access"],
            },
            "roles": ROLES, "operate": True, "certificate_file": PAGES_FILE, "key_file": PAGES_FILE,
        },
        "broker_terminal": {"bastion": {"host": addresses["edge"], "port": BASTION_PORT}},
        "portal_tls_certificate": str(tls / "pages.pem"),
        "portal_tls_key": str(tls / "pages.key"),
        "portal_tls_names": [PAGES],
        "portal_tls_min_days": 1,
    }  # fmt: skip


def write_context(lab: Lab) -> None:
    """Write the context of people: the broker as whoever signed in, sessions through the bastion as the same."""
    edge = next(host.address for host in lab.hosts() if host.name == "edge")
    context = {
        "broker": {"sign_in": True},
        "bastion": {"host": edge, "port": BASTION_PORT, "sign_in": True},
    }
    write_atomic(context_file(lab), json.dumps(context, indent=2) + "\n")


def hosts_lines(lab: Lab) -> str:
    """Return the lines of ``/etc/hosts`` with which a browser on this machine finds pages and identity provider."""
    addresses = {host.name: host.address for host in lab.hosts()}
    return f"{addresses['control']} {PAGES}\n{addresses['enterprise']} {IDENTITY}\n"


def how_to_open(lab: Lab) -> str:
    """Return what the main job says at its end: where the pages are, and what a person needs for them."""
    control, enterprise = hosts_lines(lab).splitlines()
    names = "\n".join(f"    {one.name:<24} {one.part}" for one in PEOPLE)
    return "\n".join(
        (
            "",
            f"pages: {ORIGIN}/ (docs/first-day.md). A browser on this machine needs",
            "  in /etc/hosts:",
            f"    {control}",
            f"    {enterprise}",
            f"  the authority:  {tls_directory(lab) / 'ca.pem'}",
            f"  the passwords:  {people_file(lab)}",
            names,
        )
    )
