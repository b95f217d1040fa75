"""Whatever stands where others may write is read, or refused by the error that the parser names: no other error, for any text.

Each parser gets rubbish and texts that are nearly right. Parsers that have properties of their own (policies, pushes, events,
records, evidence, metadata) are fuzzed beside them; here are those of calls, of identities, and of what far ends answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from attest_lab import NONCE, SoftTpm, boot_events, boot_pcrs
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from damage import near
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples import examples
from saw.attest import verifier
from saw.attest.credential import load_ek
from saw.attest.structures import StructureError, parse_attestation_key, parse_quote, parse_signature
from saw.audit import note, otlp
from saw.audit.note import NoteError
from saw.audit.otlp import OtlpError, parse_export
from saw.audit.tiles import Leaf, TreeError
from saw.broker.errors import MalformedError
from saw.broker.http import decode as read_body
from saw.budget.usage import read_usage
from saw.conformance import transfer
from saw.errors import ConfigError
from saw.gateway import oauth2, pg_login, pg_wire
from saw.gateway.errors import PeerRefused, StateRefused
from saw.gateway.peer import PeerReader
from saw.gateway.placeholders import holds_placeholder
from saw.gateway.state import decode_release, parse_state
from saw.gpu.check import GpuError, read_gpus
from saw.identity.names import IdentityError, parse_spiffe_id
from saw.identity.ssh import parse_public_key as parse_ssh_key
from saw.identity.x509 import Authority, load_csr, new_key_and_csr, parse_svid, verify_svid
from saw.policy.casefile import load_cases
from saw.policy.denials import read_denials
from saw.policy.errors import PolicyError
from saw.policy.handed_tools import HandedInvalid, read_handed
from saw.policy.keys import KeyFileError, parse_private_key, parse_public_key, private_pem, public_pem
from saw.policy.reach_invariants import load_invariants
from saw.policy.references import parse_reference
from saw.runtime.attribution import Attribution
from saw.runtime.bootstrap import parse_seed
from saw.runtime.decide import Asked, Refused, target_of
from saw.runtime.pg_connect import fatal, parse_place
from saw.runtime.policy_local import PolicyLocal
from saw.runtime.request_desk import AskRefused
from saw.runtime.shell_execd import RequestInvalid, parse_request
from saw.secrets.vault_calls import errors_of
from saw.vm.measure import parse_report, saw_secure_boot

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
POLICIES = Path(__file__).resolve().parents[3] / "policies"
LATER = (NOW + timedelta(hours=1)).isoformat()


@dataclass(frozen=True)
class Parser:
    """A parser: what it reads when all is well, made when it is needed, and the errors by which it refuses everything else."""

    read: Callable[[bytes], object]
    good: Callable[[], tuple[bytes, ...]]
    refuses: tuple[type[Exception], ...] = ()
    reads: bool = True
    """Whether it reads anything at all: one that tells why something was refused does not."""


@cache
def authority() -> tuple[bytes, bytes, bytes]:
    """An authority's certificate, a request and a workspace's certificate."""
    with TemporaryDirectory() as folder:
        made = Authority.create(Path(folder) / "x509", "saw.example", NOW)
        csr = new_key_and_csr("ws-demo")[1]
        return made.ca_pem, csr, made.issue_svid(csr, "ws-demo", "ab" * 32, NOW, timedelta(minutes=5))


@cache
def reader() -> PeerReader:
    return PeerReader(authority()[0])


def in_header(pem: bytes) -> bytes:
    svid = parse_svid(pem)
    return f'Hash={svid.sha256};Cert="{quote(pem.decode(), safe="")}"'.encode()


def peer(raw: bytes) -> object:
    return reader().read(raw.decode("latin-1"), NOW)


def peer_of_certificate(raw: bytes) -> object:
    """The certificate as Envoy hands it over, with a hash that fits, so that what is in it is looked at."""
    return verify_svid(raw, authority()[0], NOW)


def text(call: Callable[[str], object]) -> Callable[[bytes], object]:
    """``call`` of the text that a header or an argument has."""
    return lambda raw: call(raw.decode("latin-1"))


def utf8(call: Callable[[str], object]) -> Callable[[bytes], object]:
    """``call`` of the text that a file or a field has."""
    return lambda raw: call(raw.decode("utf-8", "replace"))


def json_of(*values: object) -> Callable[[], tuple[bytes, ...]]:
    return lambda: tuple(json.dumps(value).encode() for value in values)


def public(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def ssh_line(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def keys_of_notes() -> tuple[bytes, ...]:
    return (note.Signer("trail.example.com", note.LOG, bytes(range(32))).public.line.encode(),)


def private_notes() -> tuple[bytes, ...]:
    return (note.Signer("trail.example.com", note.LOG, bytes(range(32))).private_line().encode(),)


LOG_KEY = note.Signer("trail.example.com", note.LOG, bytes(range(32)))


def checkpoints() -> tuple[bytes, ...]:
    checkpoint = note.Checkpoint("trail.example.com", 7, bytes(range(32)))
    return tuple(note.sign_checkpoint(checkpoint, LOG_KEY, time).encode() for time in (None, 1_700_000_000))


def export() -> tuple[bytes, ...]:
    fields = {"source": "s", "prev": "p", "hash": "h"}
    attributes: list[object] = [{"key": f"saw.{name}", "value": {"stringValue": one}} for name, one in fields.items()]
    attributes.append({"key": "saw.seq", "value": {"intValue": "1"}})
    record = {"body": {"stringValue": "{}"}, "attributes": attributes}
    return json_of({"resourceLogs": [{"scopeLogs": [{"scope": {"name": otlp._SCOPE}, "logRecords": [record]}]}]})()


def seeds() -> tuple[bytes, ...]:
    return json_of(
        {
            "workspace_id": "ws-demo", "number": 1, "trust_domain": "saw.example", "broker_url": "https://10.210.1.1:8444",
            "broker_name": "broker.saw.internal", "ring2": "10.210.1.1:8443", "ring2_name": "ring2.saw.internal",
            "ca_pem": authority()[0].decode(), "tuf_root": {"signed": {"_type": "root"}, "signatures": []},
            "blueprint": "coding", "ring": "stable",
        }
    )()  # fmt: skip


class Hands:
    """What policy.local looks at beside the wish: the policy in force, and who asks."""

    def current(self) -> Any:
        return SimpleNamespace(digest="ab" * 32)

    def caller(self, _source: str) -> None:
        return None


def wish(raw: bytes) -> object:
    return PolicyLocal(Hands(), Path("/nowhere"), lambda: 0.0)._more("", raw)


def grant(raw: bytes) -> object:
    return oauth2._granted("id", oauth2.Answer(200, raw))


def not_granted(raw: bytes) -> object:
    return oauth2._granted("id", oauth2.Answer(400, raw))


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of the broker with a part of any form."""

    name: str
    parameters: dict[str, object] = {}


def probe(raw: bytes) -> object:
    return transfer.read(raw, "t0ken", {"a", "b"}).told


def told() -> tuple[bytes, ...]:
    return (b'hello\nsaw-probe:t0ken {"id":"a","outcome":"refused","errno":"EPERM"}\nsaw-probe:t0ken {"end":2}\n',)


def gpus() -> tuple[bytes, ...]:
    return (", ".join(["GPU-1", "NVIDIA H200", "580.1", "Enabled", "Enabled", "0", "0", "No"]).encode() + b"\n",)


def served(raw: bytes) -> object:
    """What ring 2 makes of a server of PostgreSQL that says this behind the greeting."""

    async def run() -> object:
        stream = asyncio.StreamReader()
        stream.feed_data(raw)
        stream.feed_eof()
        return await pg_login._until_ready(stream)

    return asyncio.run(run())


def ready() -> tuple[bytes, ...]:
    said = pg_wire.message(b"S", b"server_version\x0016\0") + pg_wire.message(b"K", struct.pack("!II", 1, 2))
    return (said + pg_wire.message(b"Z", b"I"),)


def destination(raw: bytes) -> object:
    words = [*raw.decode("latin-1").split("|"), "", "", ""]
    return [
        target_of(
            Asked(stage=stage, method="GET", authority=words[0], path="/", connect=words[1], server_name=words[2])
        )
        for stage in ("connect", "plain", "tls", "tunnel")
    ]


@cache
def connection() -> tuple[socket.socket, socket.socket]:
    """A connection of this process, and who listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    return socket.create_connection(listener.getsockname()), listener


def source() -> tuple[bytes, ...]:
    host, port = connection()[0].getsockname()
    return (f"{host}:{port}".encode(),)


def program(raw: bytes) -> object:
    return Attribution(Path("/proc/self/ns/net")).caller(raw.decode("latin-1"))


PARSERS = {
    # what an agent, its programs and its workspace's root send
    "policy.local: a wish": Parser(
        wish, json_of({"host": "api.example.com", "reason": "why", "path": "/v1", "port": 443}), (AskRefused,)
    ),
    "execd: a request": Parser(
        parse_request,
        lambda: (b"run\0tty\x0024\x0080\0/srv\x001\0A=b\0ls\0-l", b"run\0pipe\x000\x000\0/\x000\0true"),
        (RequestInvalid,),
    ),
    "saw-postgres: a place": Parser(text(parse_place), lambda: (b"db.example.com:5432", b"db")),
    "saw-postgres: a refusal": Parser(
        fatal, json_of({"layer": "ring1", "reason": "x", "detail": "d", "next_steps": ["a"]})
    ),
    "ring 1: where a call goes": Parser(
        destination, lambda: (b"a.example.com:443|a.example.com:443|a.example.com",), (Refused,)
    ),
    "ring 1: which program calls": Parser(program, source),
    "ring 2: who calls": Parser(peer, lambda: (in_header(authority()[2]),), (PeerRefused,)),
    "ring 2: the certificate of who calls": Parser(peer_of_certificate, lambda: (authority()[2],), (IdentityError,)),
    "ring 2: placeholders": Parser(
        text(holds_placeholder),
        lambda: (b"Bearer openshell%3Aresolve:env:GIT", b"Basic " + base64.b64encode(b"u:openshell:resolve:env:GIT")),
    ),
    "broker: a request for a certificate": Parser(load_csr, lambda: (authority()[1],), (IdentityError,)),
    "broker: the key of a request": Parser(
        lambda raw: verifier._requested_key(raw.decode("latin-1")), lambda: (authority()[1],), (verifier._Refused,)
    ),
    "broker: numbers of registers": Parser(
        text(lambda told: verifier._pcr_values({told: "ab" * 32})), lambda: (b"7", b"14"), (verifier._Refused,)
    ),
    "broker: a certificate": Parser(parse_svid, lambda: (authority()[2],), (IdentityError,)),
    "broker: a name": Parser(
        text(parse_spiffe_id), lambda: (b"spiffe://saw.example/workspace/ws-demo",), (IdentityError,)
    ),
    "broker: an SSH key": Parser(
        utf8(parse_ssh_key),
        lambda: (ssh_line(Ed25519PrivateKey.generate()), ssh_line(ec.generate_private_key(ec.SECP256R1()))),
        (IdentityError,),
    ),
    "broker: an endorsement key": Parser(
        load_ek, lambda: (public(rsa.generate_private_key(65537, 2048)),), (StructureError,)
    ),
    "broker: a quote": Parser(
        parse_quote, lambda: (SoftTpm.attest(NONCE, boot_pcrs(boot_events())),), (StructureError,)
    ),
    "broker: a signature of a TPM": Parser(
        parse_signature,
        lambda: (SoftTpm().sign(NONCE),),
        (StructureError,),
    ),
    "broker: an attestation key": Parser(parse_attestation_key, lambda: (SoftTpm().ak_pub(),), (StructureError,)),
    "broker: a body": Parser(
        lambda raw: read_body(raw, Body),
        json_of({"name": "x", "parameters": {"a": [1, {"b": None}]}}),
        (MalformedError,),
    ),
    # what the broker and other far ends say
    "gatekeeper: the broker's state": Parser(
        parse_state,
        json_of(
            {
                "seq": 3,
                "now": LATER,
                "releases": {"ab" * 32: "AAAA"},
                "policy_keys": {"threshold": 1, "keys": {"a": "b"}},
                "workspaces": [
                    {"id": "ws-1", "number": 1, "state": "active", "lease_expires_at": LATER, "delegations": ["x"]}
                ],
            }
        ),
        (StateRefused,),
    ),
    "gatekeeper: a release": Parser(text(decode_release), lambda: (b"AAAA", b"AA=="), (StateRefused,)),
    "gatekeeper: what was granted": Parser(
        grant,
        json_of({"access_token": "t", "token_type": "bearer", "expires_in": 60, "refresh_token": "r", "x": {"y": 0}}),
        (oauth2._NotGranted,),
    ),
    "gatekeeper: what was not granted": Parser(
        not_granted, json_of({"error": "invalid_grant", "x": 0}), (oauth2._NotGranted,), reads=False
    ),
    "gatekeeper: usage of a model": Parser(
        lambda raw: read_usage([raw]),
        json_of({"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}),
    ),
    "gatekeeper: a server of PostgreSQL": Parser(served, ready, (pg_wire.SessionRefused, asyncio.IncompleteReadError)),
    "vault: why not": Parser(
        lambda raw: errors_of(httpx.Response(400, content=raw)), json_of({"errors": ["permission denied"], "x": 0})
    ),
    "mediator: what was handed out": Parser(
        read_handed,
        json_of(
            {
                "bound": True,
                "grants": [
                    {
                        "delegation": "d",
                        "not_before": LATER,
                        "expires": LATER,
                        "tools": [{"server": "fs", "tools": ["read"]}],
                    }
                ],
            }
        ),
        (HandedInvalid,),
    ),
    "workspace: what it was told at creation": Parser(parse_seed, seeds, (ConfigError,)),
    "hypervisor: the console of a reference boot": Parser(
        utf8(lambda said: (parse_report(said), saw_secure_boot(said))),
        lambda: (b"SAW-BOOT-REPORT-BEGIN\r\n 0: 0x" + b"aB" * 32 + b"\nSecureBoot: 1\nSAW-BOOT-REPORT-END",),
    ),
    "hypervisor: nvidia-smi": Parser(utf8(read_gpus), gpus, (GpuError,)),
    "conformance: what a probe says": Parser(probe, told),
    # files of people
    "audit: a public key": Parser(utf8(note.PublicKey.parse), keys_of_notes, (NoteError,)),
    "audit: a private key": Parser(utf8(note.Signer.parse), private_notes, (NoteError,)),
    "audit: a checkpoint": Parser(lambda raw: note.open_checkpoint(raw, LOG_KEY.public), checkpoints, (NoteError,)),
    "audit: a leaf": Parser(Leaf.parse, lambda: (Leaf("s", 1, "ab" * 32).raw,), (TreeError,)),
    "audit: an export": Parser(utf8(lambda line: list(parse_export(line))), export, (OtlpError,)),
    "policy: a public key": Parser(
        lambda raw: parse_public_key(raw, "k"),
        lambda: (
            public_pem(Ed25519PrivateKey.generate().public_key()),
            public(ec.generate_private_key(ec.SECP256R1())),
        ),
        (KeyFileError,),
    ),
    "policy: a private key": Parser(
        lambda raw: parse_private_key(raw, "k"), lambda: (private_pem(Ed25519PrivateKey.generate()),), (KeyFileError,)
    ),
    "policy: cases": Parser(
        lambda raw: load_cases(raw, "cases.yaml"),
        lambda: ((POLICIES / "coding/tests.yaml").read_bytes()[:3000].rpartition(b"\n  - ")[0],),
        (PolicyError,),
    ),
    "policy: denials": Parser(
        lambda raw: read_denials(raw, "denials.json"),
        json_of({"error": "policy_denied", "layer": "ring1", "host": "a", "port": 443}, []),
        (PolicyError,),
    ),
    "policy: invariants": Parser(
        load_invariants, lambda: ((POLICIES / "invariants.yaml").read_bytes(),), (PolicyError,)
    ),
    "policy: a reference": Parser(
        utf8(parse_reference), lambda: (b"file:git-token", b"vault:kv/saw/{sponsor}#token"), (ValueError,)
    ),
}


@cache
def good(name: str) -> tuple[bytes, ...]:
    return PARSERS[name].good()


@pytest.mark.parametrize("name", [name for name, parser in PARSERS.items() if parser.reads])
def test_what_is_right_is_read(name: str) -> None:
    for raw in good(name):
        assert PARSERS[name].read(raw), "it was passed over, so that its fuzzer would see nothing"


P256, UNKNOWN = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f")


def on_another_curve(pem: bytes) -> bytes:
    """``pem`` with a key that says that it is on a curve which nobody here computes with."""
    kind, body = pem.split(b"-----")[1].removeprefix(b"BEGIN "), pem.split(b"-----")[2]
    der = base64.b64decode(body)
    assert P256 in der
    lines = base64.encodebytes(der.replace(P256, UNKNOWN))
    return b"-----BEGIN " + kind + b"-----\n" + lines + b"-----END " + kind + b"-----\n"


def with_a_compressed_point() -> bytes:
    fields = (b"ecdsa-sha2-nistp256", b"nistp256", b"\x02" + bytes(range(32)))
    return b"ecdsa-sha2-nistp256 " + base64.b64encode(b"".join(struct.pack(">I", len(one)) + one for one in fields))


FOUND: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a request on another curve": ("broker: a request for a certificate", lambda: on_another_curve(authority()[1])),
    "evidence on another curve": ("broker: the key of a request", lambda: on_another_curve(authority()[1])),
    "a certificate on another curve": ("broker: a certificate", lambda: on_another_curve(authority()[2])),
    "a compressed point": ("broker: an SSH key", with_a_compressed_point),
    "a register of 5000 digits": ("broker: numbers of registers", lambda: b"9" * 5000),
    "an address with a bracket": (
        "workspace: what it was told at creation",
        lambda: seeds()[0].replace(b"//10", b"//["),
    ),
    "a number beyond RFC 8785": ("audit: a leaf", lambda: b'{"hash":"","seq":9010000000000000,"source":""}'),
    "a state that is not UTF-8": (
        "gatekeeper: the broker's state",
        lambda: b'{"policy_keys": {"threshold": 1, "keys": {"\xff": ""}}}',
    ),
    "a grant that is nested deeply": ("gatekeeper: what was granted", lambda: b'{"x": ' + b"[" * 60_000),
    "a body that is nested deeply": ("broker: a body", lambda: b'{"name": "x", "parameters": {"a": ' + b"[" * 60_000),
}
"""What the fuzzers found once, each an error that nobody had thought of."""


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_once_is_refused(case: str) -> None:
    name, made = FOUND[case]
    with pytest.raises(PARSERS[name].refuses):
        PARSERS[name].read(made())


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@settings(
    max_examples=examples(2000), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
def test_any_text_is_read_or_refused_as_the_parser_says(name: str, data: st.DataObject) -> None:
    raw = data.draw(near(good(name)))
    with contextlib.suppress(*PARSERS[name].refuses):
        PARSERS[name].read(raw)
