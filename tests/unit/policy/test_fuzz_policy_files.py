"""Policy files and bundles: one kind of error, everything at once, and one meaning for one text."""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime, timedelta

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.bundle import build_manifest, describe, sign, verify_bundle
from saw.policy.errors import BundleRefused, PolicyError
from saw.policy.loader import Bundle, load_governance, load_members, load_policy

pytestmark = pytest.mark.control("POL-02")
NOW = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
GOVERNANCE = b"schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"


# The loader

WORDS = st.sampled_from(
    """
    version network_policies endpoints binaries host port ports protocol rest access full rules allow deny_rules method
    path query any process run_as_user landlock filesystem_policy credentials inject actions match git mcp servers tools
    args regex items inference routes lease 1 443 null true ~ << '' /** *.example.com a.example.com
    """.split()  # noqa: SIM905 - one word after the other reads better
)
TREE = st.recursive(
    WORDS | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=25,
)


@given(st.dictionaries(WORDS, TREE, max_size=6), st.booleans())
@settings(max_examples=examples(300), deadline=None)
def test_no_tree_ends_in_anything_but_a_policy_or_its_problems(tree: dict[str, object], governance: bool) -> None:
    raw = json.dumps({"version": 1, **tree} if not governance else {"schema": 1, **tree}).encode()
    try:
        (load_governance if governance else load_policy)(raw, "file.yaml")
    except PolicyError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.file == "file.yaml" and problem.line >= 1 and problem.column >= 1
            assert problem.reason and problem.cure
        assert error.details["problems"] and str(error).count("file.yaml:") >= len(error.problems)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_unknown_field_is_told_in_one_go(coding: Bundle, data: st.DataObject) -> None:
    lines = coding.members["governance.yaml"].decode().splitlines()
    tops = [number for number, line in enumerate(lines) if re.match(r"[a-z]+:", line)]
    chosen = sorted(data.draw(st.sets(st.sampled_from(tops), min_size=1, max_size=4)), reverse=True)
    for count, number in enumerate(chosen):
        lines.insert(number, f"bogus{count}: 1")
    with pytest.raises(PolicyError) as caught:
        load_governance("\n".join(lines).encode())
    assert {problem.field for problem in caught.value.problems} == {f"bogus{n}" for n in range(len(chosen))}
    for problem in caught.value.problems:
        assert lines[problem.line - 1].startswith(problem.field)


# The canonical form of what is signed


def manifest_of(policy: bytes, governance: bytes = GOVERNANCE, revision: int = 1) -> bytes:
    bundle = load_members({"policy.yaml": policy, "governance.yaml": governance})
    return build_manifest(bundle, revision, NOW, NOW + timedelta(days=1))


def test_the_manifest_is_one_text_whatever_the_order_and_white_space() -> None:
    manifest = manifest_of(b"version: 1\n")
    tree = json.loads(manifest)
    reordered = dict(reversed(tree.items()))
    assert rfc8785.dumps(json.loads(json.dumps(reordered, indent=3))) == manifest
    assert rfc8785.dumps(json.loads(manifest)) == manifest


@given(st.sampled_from(["host", "port", "access", "path", "method"]), st.integers(1, 60_000))
@settings(max_examples=60, deadline=None)
def test_every_change_of_meaning_changes_the_digest(field: str, number: int) -> None:
    def text(**change: object) -> bytes:
        values: dict[str, object] = {"host": "a.example.com", "port": 443, "path": "/x", "method": "GET", **change}
        rule = f"rules: [{{allow: {{method: {values['method']}, path: {values['path']}}}}}]"
        how = f"access: {values['access']}" if "access" in values else rule
        return (
            f"version: 1\nnetwork_policies:\n  a:\n    binaries: [{{path: /bin/a}}]\n    endpoints:\n"
            f"      - {{host: {values['host']}, port: {values['port']}, protocol: rest, {how}}}\n"
        ).encode()

    change: dict[str, object] = {
        "host": f"a{number}.example.com",
        "port": number if number != 443 else 444,
        "access": ["read-only", "read-write", "full"][number % 3],
        "path": f"/x{number}",
        "method": ["POST", "PUT", "DELETE"][number % 3],
    }
    base, changed = text(), text(**{field: change[field]})
    assert load_policy(base) != load_policy(changed)
    assert manifest_of(base) != manifest_of(changed)
    assert manifest_of(base) == manifest_of(base)
    assert manifest_of(base, revision=2) != manifest_of(base)


# Bundles and envelopes


@given(data=st.data())
@settings(max_examples=examples(200), deadline=None)
def test_a_changed_bundle_verifies_as_nothing_but_what_was_signed(
    coding: Bundle, officers: list[Ed25519PrivateKey], trusted: dict[str, Ed25519PublicKey], data: st.DataObject
) -> None:
    manifest = build_manifest(coding, 3, NOW, NOW + timedelta(days=1))
    raw = bytearray(sign(manifest, coding.members, officers[:2]))
    good = verify_bundle(bytes(raw), trusted, 2, NOW)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "drop", "add", "copy"]))
        if kind == "flip":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "drop":
            del raw[at : at + data.draw(st.integers(1, 50))]
        elif kind == "add":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            raw[at:at] = raw[: data.draw(st.integers(1, 200))]
    try:
        found = verify_bundle(bytes(raw), trusted, 2, NOW)
    except BundleRefused:
        return
    assert (found.manifest, found.members, found.signers) == (good.manifest, good.members, good.signers)


@given(data=st.data())
@settings(max_examples=examples(150), deadline=None)
def test_no_field_of_an_envelope_can_be_exchanged(
    coding: Bundle, officers: list[Ed25519PrivateKey], trusted: dict[str, Ed25519PublicKey], data: st.DataObject
) -> None:
    def made(revision: int) -> dict:
        manifest = build_manifest(coding, revision, NOW, NOW + timedelta(days=1))
        return json.loads(sign(manifest, coding.members, officers[:2]))

    one, other = made(1), made(2)
    field = data.draw(st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig"]))
    if field in {"keyid", "sig"}:
        index = data.draw(st.integers(0, 1))
        value = data.draw(st.text(max_size=80) | st.sampled_from([other["envelope"]["signatures"][1 - index][field]]))
        one["envelope"]["signatures"][index][field] = value
    else:
        value = data.draw(st.none() | st.text(max_size=40) | st.just([]) | st.just(other["envelope"][field]))
        if value == one["envelope"][field]:
            return
        one["envelope"][field] = value
    with pytest.raises(BundleRefused):
        verify_bundle(json.dumps(one).encode(), trusted, 2, NOW)


@given(
    st.recursive(st.none() | st.text(max_size=8) | st.integers(), lambda t: st.lists(t) | st.dictionaries(st.text(), t))
)
@settings(max_examples=examples(150), deadline=None)
def test_no_json_crashes_what_reads_bundles_without_verifying(tree: object) -> None:
    for document in (tree, {"format": "saw-bundle/1", "members": tree, "envelope": tree}):
        with pytest.raises(BundleRefused):
            describe(json.dumps(document).encode())


def test_half_a_character_in_a_manifest_is_refused_and_a_whole_one_is_read(coding: Bundle) -> None:
    def described(version: str) -> str:
        manifest = json.loads(build_manifest(coding, 1, NOW, NOW + timedelta(days=1)))
        payload = json.dumps({**manifest, "version": version}, sort_keys=True, separators=(",", ":")).encode()
        envelope = {
            "payloadType": "application/vnd.saw.policy-manifest+json",
            "payload": base64.b64encode(payload).decode(),
            "signatures": [],
        }
        raw = json.dumps({"format": "saw-bundle/1", "members": {}, "envelope": envelope}).encode()
        return describe(raw)[1].version

    assert described("1.0.0") == "1.0.0"
    with pytest.raises(BundleRefused):
        described("\ud800")
