"""``saw policy rings, rollback, repository-export, -import, -update``: what is released, going back, carrying it over."""

from __future__ import annotations

import argparse
import base64
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.answers import Add, Answer, read_file
from saw.cli.policy_release import DEFAULT_VALIDITY, hand_over
from saw.cli.policy_review import review_for, told_all
from saw.cli.policy_signing import add_signing, owed_json, owed_text, present, signers_of
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy.bundle import read_content
from saw.policy.governance import duration
from saw.policy.keys import load_private_key, read_passphrase
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_draft import Draft, contribute, is_draft, load_draft, owed, save_draft
from saw.policy.tuf_repository import adopt_publication
from saw.policy.tuf_rings import RingStatus, held_revision, revision_before, ring_status
from saw.policy.tuf_store import current_releases, current_root
from saw.policy.tuf_transfer import export_repository, import_repository


def rings(options: argparse.Namespace) -> Answer:
    """Say what each ring gets now and what it got before."""
    found: list[dict[str, Any]]
    if options.repository:
        found = [msgspec.to_builtins(status) for status in ring_status(options.repository)]
    else:
        from saw.broker.client import OperatorClient

        found = OperatorClient.from_context(options.context).request("GET", "/v1/policy/rings")["rings"]
    lines: list[str] = []
    for status in found:
        one = msgspec.convert(status, RingStatus)
        current = one.current
        whose = f", released by {one.role}" if one.role else ""
        lines.append(
            f"{one.ring}/{one.blueprint}: revision {current.revision} ({current.version}) until "
            f"{current.not_after}{whose}"
        )
        lines.append(f"  {current.policy_digest}  signed by {', '.join(key[:16] + '…' for key in current.signers)}")
        lines += [f"  before: revision {old.revision}  {old.policy_digest}" for old in one.history]
    return {"ok": True, "rings": found}, "\n".join(lines) or "nothing is released", 0


def _blueprint(options: argparse.Namespace) -> str:
    if options.blueprint:
        return str(options.blueprint)
    found = [one.blueprint for one in current_releases(options.repository) if one.ring == options.ring]
    if len(found) != 1:
        reason = f"ring {options.ring} has {len(found)} blueprints"
        raise ConfigError(reason, cure="give --blueprint" if found else "check the ring with saw policy rings")
    return found[0]


def _rollback_draft(options: argparse.Namespace) -> Draft:
    """Return the rollback that the folder holds already, or a new one."""
    blueprint = _blueprint(options)
    to = options.to if options.to is not None else revision_before(options.repository, options.ring, blueprint)
    old = held_revision(options.repository, options.ring, blueprint, to)
    validity = timedelta(seconds=duration(options.valid_for))
    wanted = roll_back(options.repository, options.ring, blueprint, old, now=present(), validity=validity)
    if not is_draft(options.out):
        return wanted
    held = load_draft(options.out)
    same = (held.note.kind, held.note.subject) == (wanted.note.kind, wanted.note.subject) and held.base == wanted.base
    if not same or _contents(held) != _contents(wanted):
        cure = "choose another --out, or remove the folder if that change is given up"
        raise ConfigError(f"{options.out} holds another change ({held.note.subject})", cure=cure)
    return held


def _contents(draft: Draft) -> dict[str, dict[str, bytes]]:
    return {path: read_content(raw).members for path, raw in draft.targets.items()}


def rollback(options: argparse.Namespace) -> Answer:
    """Release the content of an earlier revision as the next one; repeat the command with each officer's key.

    What going back allows again is shown and signed. Ends published (0), or says who must still sign (1).
    """
    started = _rollback_draft(options)
    changes = review_for(options, started)
    draft = contribute(started, signers_of(options))
    save_draft(options.out, draft)
    left = owed(draft)
    result: dict[str, Any] = {
        "ok": True,
        "subject": draft.note.subject,
        "directory": options.out,
        "complete": not left,
        "published": False,
        "owed": owed_json(left),
        "changes": told_all(changes),
    }
    if left or options.prepare_only:
        done = f"{options.out}: complete; hand it over with saw policy publish {options.out}"
        return result, owed_text(left, done), 1 if left else 0
    result["answer"] = hand_over(draft.publication, options.context)
    result["published"] = True
    adopt_publication(options.repository, draft.publication)
    return result, f"released: {draft.note.subject}", 0


def export(options: argparse.Namespace) -> Answer:
    """Write the repository as one archive, for a place without a network or for any web server."""
    key = lifetime = None
    if bool(options.timestamp_key) != bool(options.valid_for):
        raise ConfigError("a timestamp needs a key and a time", cure="give --timestamp-key and --valid-for together")
    if options.timestamp_key:
        key = load_private_key(options.timestamp_key, read_passphrase(options.passphrase_file))
        lifetime = timedelta(seconds=duration(options.valid_for))
    raw = export_repository(options.repository, present(), online_key=key, lifetime=lifetime)
    write_atomic(options.out, raw)
    return {"ok": True, "archive": options.out, "length": len(raw)}, f"{options.out}: {len(raw)} bytes", 0


def import_(options: argparse.Namespace) -> Answer:
    """Verify an archive completely against a pinned root and bring a copy of the repository up to it."""
    return _imported(options.repository, options.archive, read_file(options.root))


def update(options: argparse.Namespace) -> Answer:
    """Bring the officers' copy up to what the broker serves, verified under the root that the copy trusts already.

    Needed after anybody else has published: another officer, or the broker itself, which releases a signed way back when a
    rollout halts. Nothing older than the copy, and nothing of another root of trust, is taken.
    """
    from saw.broker.client import OperatorClient

    root = current_root(options.repository)
    held = OperatorClient.from_context(options.context).request("GET", "/v1/policy/repository")["archive"]
    with tempfile.TemporaryDirectory(prefix="saw-update-") as scratch:
        archive = Path(scratch) / "repository.tar"
        archive.write_bytes(base64.b64decode(held))
        return _imported(options.repository, archive, root)


def _imported(repository: str, archive: Path | str, root: bytes) -> Answer:
    done = import_repository(archive, repository, root, present())
    result = {
        "ok": True,
        "changed": done.changed,
        "root_version": done.root_version,
        "targets_version": done.targets_version,
        "releases": [msgspec.to_builtins(release) for release in done.releases],
    }
    word = "brought up to" if done.changed else "is at"
    text = f"{repository}: {word} root {done.root_version}, targets {done.targets_version}, "
    return result, f"{text}{len(done.releases)} releases", 0


def add_export(sub: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options of an export of the repository."""
    sub.add_argument("--repository", required=required, help="the broker's repository, or an imported one")
    sub.add_argument("--timestamp-key", help="online key file, for a timestamp that outlasts the journey")
    sub.add_argument("--passphrase-file", help="file with the passphrase of that key")
    sub.add_argument("--valid-for", help="how long that timestamp counts, for example 7d")
    sub.add_argument("--out", required=required, help="file to write")


def register(add: Add) -> None:
    """Add the commands to ``saw policy``."""
    sub = add("rings", rings, "say what each ring gets now and got before")
    sub.add_argument("--repository", help="copy of the repository to read instead of asking the broker")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
    sub = add("rollback", rollback, "release the content of an earlier revision as the next one")
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    sub.add_argument("--ring", required=True, help="ring to roll back")
    sub.add_argument("--blueprint", help="blueprint (default: the only one of the ring)")
    sub.add_argument("--to", type=int, help="revision whose content is wanted (default: the one before)")
    sub.add_argument("--valid-for", default=DEFAULT_VALIDITY, help="how long it counts (default: %(default)s)")
    add_signing(sub)
    sub.add_argument("--out", required=True, help="folder of the change; the same for each officer")
    sub.add_argument("--prepare-only", action="store_true", help="leave the complete change to saw policy publish")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
    sub = add("repository-export", export, "write the repository as one archive")
    add_export(sub, required=True)
    sub = add("repository-import", import_, "verify an archive and bring a copy of the repository up to it")
    sub.add_argument("archive")
    sub.add_argument("--repository", required=True, help="copy to bring up to date; made when it does not exist")
    sub.add_argument("--root", required=True, help="pinned root.json")
    sub = add("repository-update", update, "bring the officers' copy up to what the broker serves")
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
