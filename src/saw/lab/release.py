"""Publish the demonstration's blueprint: keys made on the spot, two of three sign, TUF and DSSE for real."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saw.broker.client import OperatorClient
from saw.files import write_atomic
from saw.lab.topology import Lab

OFFICERS = ("officer-a", "officer-b", "officer-c")
VALID_FOR = "30d"
Saw = Callable[..., dict[str, Any]]
Say = Callable[[str], None]


def content_digest(folder: Path) -> str:
    """Return a digest of a bundle folder's two members; equal content needs no new revision."""
    members = (folder / name for name in ("policy.yaml", "governance.yaml"))
    return hashlib.sha256(b"".join(hashlib.sha256(member.read_bytes()).digest() for member in members)).hexdigest()


def current_release(lab: Lab, ring: str, blueprint: str) -> tuple[dict[str, Any], str]:
    """Return the broker's current release of ``ring`` (empty when none) and its online public key."""
    state = OperatorClient.from_context(lab.context_file).request("GET", "/v1/policy/state")
    wanted = [item for item in state["releases"] if item["ring"] == ring and item["blueprint"] == blueprint]
    return (max(wanted, key=lambda item: int(item["revision"])) if wanted else {}), str(state["online_key_pem"])


def publish_blueprint(
    lab: Lab, saw: Saw, say: Say, *, folder: Path | None = None, ring: str = "stable"
) -> dict[str, Any]:
    """Sign and publish ``folder`` to ``ring`` unless its content is in force; return ``{policy_digest, revision, changed}``."""
    source = folder or lab.repository / "policies/coding"
    blueprint = "coding"
    current, online = current_release(lab, ring, blueprint)
    note = lab.directory / f"release-{ring}-{blueprint}.json"
    known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    content = content_digest(source)
    if current and known.get("content") == content and known.get("policy_digest") == current["policy_digest"]:
        say(f"revision {current['revision']} is in force already")
        return {**known, "changed": False}
    keys, repository = lab.keys_directory, lab.directory / "officers"
    if not (keys / f"{OFFICERS[-1]}.pub").exists():
        shutil.rmtree(keys, ignore_errors=True)
        names = [option for name in OFFICERS for option in ("--name", name)]
        saw("policy", "keys", "create", "--dir", str(keys), *names)
        say("three officer keys made")
    signers = [option for name in OFFICERS[:2] for option in ("--key", str(keys / f"{name}.key"))]
    root = repository / "metadata/1.root.json"
    if not current and not root.exists():
        shutil.rmtree(repository, ignore_errors=True)
        online_file = lab.directory / "online.pub"
        write_atomic(online_file, online)
        absent = str(keys / f"{OFFICERS[2]}.pub")
        saw(
            "policy",
            "init-repo",
            "--dir",
            str(repository),
            *signers,
            "--officer-pub",
            absent,
            "--online-pub",
            str(online_file),
        )
    revision = int(current.get("revision", 0)) + 1
    bundle = lab.directory / f"{blueprint}-{revision}.bundle.json"
    publication = lab.directory / f"publication-{revision}"
    bundle.unlink(missing_ok=True)
    shutil.rmtree(publication, ignore_errors=True)
    signed = saw(
        "policy",
        "sign",
        str(source),
        *signers,
        "--revision",
        str(revision),
        "--repository",
        str(repository),
        "--ring",
        ring,
        "--valid-for",
        VALID_FOR,
        "--out",
        str(bundle),
    )
    saw(
        "policy", "stage", "--repository", str(repository), "--ring", ring, "--bundle", str(bundle), *signers,
        "--out", str(publication),
    )  # fmt: skip
    install = [] if current else ["--install-root", str(root)]
    saw("policy", "publish", str(publication), "--repository", str(repository), *install)
    now, _ = current_release(lab, ring, blueprint)
    release = {"content": content, "policy_digest": now["policy_digest"], "revision": now["revision"]}
    write_atomic(note, json.dumps(release, indent=2) + "\n")
    digest = str(signed.get("policy_digest", ""))
    who = " and ".join(OFFICERS[:2])
    say(f"revision {revision} published to ring {ring}, signed by {who}: {digest[:16]}…")
    if current and signed["reach"]["widening"]:
        say(f"it is wider than revision {current['revision']}: saw policy rings, docs/reach.md")
    return {**release, "changed": True}
