"""``saw image``: sign, register, promote, deprecate, revoke and list golden images, and those that lie on this machine."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import rfc8785

from saw import jsontext
from saw.attest.image_record import PAYLOAD_TYPE, RecordInvalid, parse_record
from saw.cli import image_compare, image_local, image_record, image_scan, image_secure_boot
from saw.cli.operator_options import add_options, fields, show, table
from saw.cli.policy_signing import add_signing, present, signers_of
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy.envelope import (
    EnvelopeRefused,
    SignedEnvelope,
    cosign,
    good_signers,
    payload_of,
    read_envelope,
    seal,
)
from saw.policy.governance import duration
from saw.policy.keys import PublicKey, key_id
from saw.policy.signers import Signer

_STEPS = {
    "promote": ("stable", "let every ring use it"),
    "deprecate": ("deprecated", "let no further workspace use it"),
    "revoke": ("revoked", "cut off every workspace that runs it, for good"),
}


def main(argv: list[str]) -> int:
    """Run one ``saw image`` command."""
    options = _parser().parse_args(argv)
    if options.command in _HERE:
        return _HERE[options.command](options)
    from saw.broker.client import OperatorClient

    client = OperatorClient.from_context(options.context)
    if options.command == "list":
        answer = client.request("GET", "/v1/images")
        rows = [{**row, "image_sha256": row["image_sha256"][:16]} for row in answer["images"]]
        columns = ("name", "state", "signed", "image_sha256", "created", "not_after", "registered_at")
        show(answer, table(rows, columns), as_json=options.json)
        return 0
    if options.command == "hand-over":
        print(json.dumps(client.request("GET", _hand_over(options))))
        return 0
    answer = _call(client, options)
    show(answer, fields(answer), as_json=options.json)
    return 0


def _hand_over(options: argparse.Namespace) -> str:
    return f"/v1/images/hand-over?{urlencode({'name': options.name, 'image_sha256': options.sha256})}"


def _call(client: Any, options: argparse.Namespace) -> dict[str, Any]:
    if options.command == "register":
        envelope = read_envelope(_read(options.record), PAYLOAD_TYPE)
        return dict(client.request("PUT", "/v1/images", msgspec.to_builtins(envelope)))
    body = {"to": _STEPS[options.command][0], "reason": options.reason, "image_sha256": options.sha256}
    return dict(client.request("POST", f"/v1/images/{quote(options.name, safe='')}/state", body))


def _sign(options: argparse.Namespace) -> int:
    """Sign a record, or add signatures to a signed one; what is signed is shown."""
    raw, signers = _read(options.record), signers_of(options)
    held = _held(raw, options) if options.keep else b""
    signed_by = good_signers(read_envelope(held, PAYLOAD_TYPE), _keys(signers)) if held else ()
    lacking = [signer for signer in signers if key_id(signer.public_key()) not in signed_by]
    before = held or raw
    if not lacking:
        sealed = held
    elif b'"payloadType"' in before:
        sealed = cosign(before, PAYLOAD_TYPE, lacking)
    else:
        sealed = seal(_payload(raw, options), PAYLOAD_TYPE, lacking)
    envelope: SignedEnvelope = read_envelope(sealed, PAYLOAD_TYPE)
    record = parse_record(payload_of(envelope))
    if lacking:
        write_atomic(Path(options.out), sealed)
    answer = {
        "changed": bool(lacking),
        "name": record.name,
        "image_sha256": record.image_sha256,
        "not_after": record.not_after.isoformat(),
        "signatures": len(envelope.signatures),
        "out": options.out,
    }
    show(answer, fields(answer), as_json=options.json)
    return 0


def _held(raw: bytes, options: argparse.Namespace) -> bytes:
    """Return what lies at ``--out`` when it holds the record ``raw`` and counts for long enough, else nothing.

    Long enough is a third of ``--for``, or to the end that a record which is signed now would get, where that is sooner.
    """
    try:
        held = Path(options.out).read_bytes()
        payload = payload_of(read_envelope(held, PAYLOAD_TYPE))
        plain = payload_of(read_envelope(raw, PAYLOAD_TYPE)) if b'"payloadType"' in raw else raw
        record, wanted = (jsontext.decode(one, kind=dict[str, Any]) for one in (payload, plain))
        until, now = parse_record(payload).not_after, present()
        end, third = _end(wanted, options), timedelta(seconds=duration(options.duration)) / 3
    except (OSError, EnvelopeRefused, RecordInvalid, msgspec.DecodeError, ValueError):
        return b""
    if "not_after" not in wanted:
        record.pop("not_after")
    return held if record == wanted and until > now and until >= min(now + third, end) else b""


def _keys(signers: list[Signer]) -> dict[str, PublicKey]:
    return {key_id(signer.public_key()): signer.public_key() for signer in signers}


def _payload(raw: bytes, options: argparse.Namespace) -> bytes:
    try:
        found = jsontext.decode(raw, kind=dict[str, Any])
        end = _end(found, options)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{options.record} cannot be signed: {error}", cure="pass the image's .release.json"
        ) from error
    found.setdefault("not_after", end.strftime("%Y-%m-%dT%H:%M:%SZ"))
    payload = rfc8785.dumps(found)
    parse_record(payload)
    return payload


def _end(record: dict[str, Any], options: argparse.Namespace) -> datetime:
    """Return until when ``record`` counts when it is signed now; raises :class:`ValueError` and :class:`ConfigError`.

    A record that names no end gets one, so that no image counts for ever, and none longer than what somebody answers for.
    """
    if "not_after" in record:
        return datetime.fromisoformat(str(record["not_after"]))
    end = present() + timedelta(seconds=duration(options.duration))
    waived = (record.get("scan") or {}).get("waived_until") if isinstance(record.get("scan"), dict) else None
    return min(end, _after(str(waived))) if waived else end


def _after(day: str) -> datetime:
    """Return the end of a day that counts to its end."""
    try:
        return datetime.combine(date.fromisoformat(day), time(), UTC) + timedelta(days=1)
    except ValueError as error:
        raise ConfigError(f"scan.waived_until {day!r} is no date", cure="search again: saw image scan") from error


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}", cure="name a readable file") from error


_HERE = {
    "record": image_record.record,
    "sign": _sign,
    "scan": image_scan.scan,
    "evidence": image_scan.evidence,
    "compare": image_compare.compare,
    "local": image_local.local,
    "prune": image_local.prune,
    "secure-boot": image_secure_boot.main,
}
"""What is done on this machine; ``prune`` asks the broker by itself."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw image", description="Release records of golden images.")
    commands = parser.add_subparsers(dest="command", required=True)
    image_record.add_command(commands)
    sign = commands.add_parser("sign", help="sign a release record, or add signatures to a signed one")
    sign.add_argument("record", help="<image>.release.json, or what another officer signed")
    sign.add_argument("--out", required=True, help="signed record to write")
    sign.add_argument(
        "--for", dest="duration", default="90d", metavar="TIME", help="how long it counts (default: %(default)s)"
    )
    sign.add_argument(
        "--keep",
        action="store_true",
        help="leave --out alone where it holds this record, signed by these keys, and counts for long enough",
    )
    add_signing(sign)
    sign.add_argument("--json", action="store_true", help="print JSON")
    register = commands.add_parser("register", help="register a signed release record as a candidate")
    register.add_argument("record", help="signed record")
    add_options(register)
    for name, (_, text) in _STEPS.items():
        step = commands.add_parser(name, help=text)
        step.add_argument("name", help="name of the image")
        step.add_argument("--sha256", default="", help="digest, where several images have the name")
        step.add_argument("--reason", required=True, help="why; it is audited")
        add_options(step)
    add_options(commands.add_parser("list", help="list registered images"))
    handed = commands.add_parser(
        "hand-over", help="print what a hypervisor needs to judge images itself, for saw vm accept there (JSON)"
    )
    handed.add_argument("name", nargs="?", default="", help="with the signed record of this image")
    handed.add_argument("--sha256", default="", help="digest, where several images have the name")
    add_options(handed)
    image_scan.add_commands(commands)
    image_compare.add_command(commands)
    image_local.add_commands(commands)
    image_secure_boot.add_commands(commands)
    return parser
