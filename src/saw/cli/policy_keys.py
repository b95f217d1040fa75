"""``saw policy keys``: make, list, rotate and revoke keys, give a ring to its own officers, hold a ceremony."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saw.cli.answers import Add, Answer, read_file
from saw.cli.policy_signing import add_signing, owed_json, owed_text, present, signers_of
from saw.errors import ConfigError
from saw.files import write_atomic
from saw.policy import tuf_ceremony as ceremonies
from saw.policy.errors import KeyFileError
from saw.policy.keys import PublicKey, create_key, key_id, load_public_key, read_passphrase
from saw.policy.tuf_changes import RootChange, change_root, delegate_ring, first_root
from saw.policy.tuf_draft import Draft, contribute, is_draft, owed, save_draft
from saw.policy.tuf_metadata import Root, check_root, parse
from saw.policy.tuf_repository import adopt_publication, current_root
from saw.policy.tuf_roots import key_uses
from saw.policy.tuf_store import current_state

_KEY_ID = re.compile(r"[0-9a-f]{64}\Z")


def create(options: argparse.Namespace) -> Answer:
    """Make signing keys."""
    passphrase = read_passphrase(options.passphrase_file)
    made = {name: key_id(create_key(options.dir, name, passphrase).public_key()) for name in options.name}
    return {"ok": True, "keys": made}, "\n".join(f"{name}  {identifier}" for name, identifier in made.items()), 0


def _names(directory: str | None) -> dict[str, str]:
    """Return key id → name of the public keys in a folder; files of other kinds are passed over."""
    names: dict[str, str] = {}
    for path in sorted(Path(directory).glob("*.pub")) if directory else []:
        try:
            names[key_id(load_public_key(path))] = path.stem
        except KeyFileError:
            continue
    return names


def list_keys(options: argparse.Namespace) -> Answer:
    """Say who must sign what: every role, its threshold and its keys."""
    if bool(options.root) == bool(options.repository):
        raise ConfigError("one root is needed", cure="give --root or --repository")
    raw = read_file(options.root) if options.root else current_root(options.repository)
    root = check_root(raw, None)
    state = current_state(options.repository) if options.repository else None
    names = _names(options.dir)
    roles: list[dict[str, Any]] = []
    lines = [f"root version {root.version}, counts until {root.expires.isoformat()}"]
    for use in key_uses(root, state.targets if state else None):
        keys = [{"key_id": k, "kind": kind, "name": names.get(k, "")} for k, kind in sorted(use.keys.items())]
        roles.append({"role": use.role, "threshold": use.threshold, "keys": keys})
        lines.append(f"{use.role}: {use.threshold} of {len(keys)}")
        lines += [f"  {key['key_id']}  {key['kind']:<10}  {key['name']}".rstrip() for key in keys]
    result = {"ok": True, "root_version": root.version, "expires": root.expires.isoformat(), "roles": roles}
    return result, "\n".join(lines), 0


def _identifier(text: str) -> str:
    """Return a key id that is written out or that of a public key file."""
    return text if _KEY_ID.match(text) else key_id(load_public_key(text))


def _publics(paths: Iterable[str]) -> tuple[PublicKey, ...]:
    return tuple(load_public_key(path) for path in paths)


def _change(options: argparse.Namespace) -> RootChange:
    online = load_public_key(options.online_pub) if options.online_pub else None
    removed = tuple(_identifier(text) for text in options.remove)
    return RootChange(_publics(options.add), removed, options.threshold, online)


def _begun(options: argparse.Namespace, draft: Draft) -> Answer:
    """Let the signers of the options contribute, write the draft, and say what is still owed."""
    if is_draft(options.out):
        cure = f"add signatures with saw policy stage --repository COPY --key KEY --out {options.out}, or choose another folder"
        raise ConfigError(f"{options.out} holds a change under way", cure=cure)
    draft = contribute(draft, signers_of(options))
    save_draft(options.out, draft)
    left = owed(draft)
    result = {
        "ok": True,
        "directory": options.out,
        "subject": draft.note.subject,
        "signed_anew": sorted(draft.targets),
        "complete": not left,
        "owed": owed_json(left),
    }
    done = f"{options.out}: {draft.note.subject} is complete; hand it over with saw policy publish {options.out}"
    return result, owed_text(left, done), 0


def online(options: argparse.Namespace) -> Answer:
    """Write the broker's online public key, which a root gives the roles snapshot and timestamp to."""
    from saw.broker.client import OperatorClient

    pem = str(OperatorClient.from_context(options.context).request("GET", "/v1/policy/state")["online_key_pem"])
    write_atomic(options.out, pem)
    identifier = key_id(load_public_key(options.out))
    return {"ok": True, "out": options.out, "key_id": identifier}, f"{options.out}  {identifier}", 0


def rotate(options: argparse.Namespace) -> Answer:
    """Make the next root: officers who come and go, another threshold, another online key, or just another year."""
    return _begun(options, change_root(options.repository, _change(options), present()))


def revoke(options: argparse.Namespace) -> Answer:
    """Take an officer's key out of everything: root, targets, rings, and the signatures on what is released."""
    removed = tuple(_identifier(text) for text in options.officer)
    change = RootChange(_publics(options.replace_with), removed, options.threshold)
    return _begun(options, change_root(options.repository, change, present(), kind="revoke"))


def delegate(options: argparse.Namespace) -> Answer:
    """Give a ring to officers of its own, or, without --officer-pub, back to the officers of the targets role."""
    keys = _publics(options.officer_pub)
    return _begun(options, delegate_ring(options.repository, options.ring, keys, options.threshold, present()))


def ceremony(options: argparse.Namespace) -> Answer:
    """Take the next step of a key ceremony in DIR: begin it, sign in it, or say where it stands.

    The first call begins: with --officer NAME=FILE, --threshold and --online-pub for a new repository, or with
    --repository and what changes (--add, --remove, --threshold, --online-pub). Each officer then calls it with --key on
    any machine that has the folder; no broker and no network is needed. Every call may be repeated.
    """
    folder, now = Path(options.dir), present()
    if not (folder / "transcript.json").exists():
        named = {name: path for name, _, path in (text.partition("=") for text in options.officer)}
        if not all(named) or not all(named.values()):
            raise ConfigError("an officer is written NAME=FILE", cure="for example --officer ada=ada.pub")
        publics = {name: load_public_key(path) for name, path in named.items()}
        draft = _ceremony_draft(options, tuple(publics.values()))
        ceremonies.begin(folder, draft, {key_id(key): name for name, key in publics.items()}, now)
    if options.confirm and not options.key:
        raise ConfigError("--confirm belongs to a signature", cure="give --key too")
    state = ceremonies.resume(folder)
    for signer in signers_of(options):
        state = ceremonies.take_part(folder, signer, now, confirm=options.confirm)
    first = "root.json" not in state.draft.base
    if state.complete and first and options.repository:
        adopt_publication(options.repository, state.draft.publication)
    items = ceremonies.digests(state.draft)
    result = {
        "ok": True,
        "subject": state.draft.note.subject,
        "complete": state.complete,
        "items": items,
        "owed": owed_json(state.owed),
        "transcript_head": state.transcript.head,
        "entries": len(state.transcript.entries),
    }
    lines = [state.draft.note.subject, *(f"  {digest}  {name}" for name, digest in items.items())]
    root = parse(Root, state.draft.metadata["root.json"], "root.json").signed
    done = f"complete: root version {root.version}; the publication is in {folder}"
    lines += [
        owed_text(state.owed, done),
        f"transcript: {len(state.transcript.entries)} entries, head {result['transcript_head']}",
    ]
    return result, "\n".join(lines), 0


def _ceremony_draft(options: argparse.Namespace, officers: tuple[PublicKey, ...]) -> Draft:
    if options.repository and (Path(options.repository) / "metadata").exists():
        return change_root(options.repository, _change(options), present())
    if not officers or not options.online_pub or options.threshold is None:
        cure = "give --officer NAME=FILE (repeat), --threshold and --online-pub, or an existing --repository"
        raise ConfigError("a first ceremony needs officers, a threshold and the online key", cure=cure)
    return first_root(officers, options.threshold, load_public_key(options.online_pub), present())


def keys(_options: argparse.Namespace) -> Answer:
    """Make, list, rotate and revoke the keys that sign policy."""
    raise ConfigError("keys is followed by a command", cure="see saw policy keys --help")


def register(add: Add) -> None:
    """Add ``saw policy keys`` and its commands."""
    group = add("keys", keys, "signing keys").add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    sub = add("create", create, "make Ed25519 signing keys", group)
    sub.add_argument("--dir", required=True, help="directory of the key files")
    sub.add_argument("--name", action="append", required=True, help="name of a key; repeat")
    sub.add_argument("--passphrase-file", help="file with the passphrase that protects the keys")

    sub = add("list", list_keys, "say which keys must sign what", group)
    sub.add_argument("--root", help="root.json")
    sub.add_argument("--repository", help="officers' copy of the repository; tells the rings' officers too")
    sub.add_argument("--dir", help="folder of .pub files whose names are shown")

    sub = add("online", online, "write the broker's online public key, which init-repo and ceremonies need", group)
    sub.add_argument("--out", required=True, help="file to write")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")

    sub = add("rotate", rotate, "make the next root: officers, threshold, online key, or another year", group)
    _change_options(sub)
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    add_signing(sub)
    sub.add_argument("--out", required=True, help="folder of the change; others sign it with saw policy stage")

    sub = add("revoke", revoke, "take an officer's key out of everything", group)
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    sub.add_argument("--officer", action="append", required=True, help="public key file or key id; repeat")
    sub.add_argument("--replace-with", action="append", default=[], help="public key file of a successor; repeat")
    sub.add_argument("--threshold", type=int, help="how many officers must sign from now on")
    add_signing(sub)
    sub.add_argument("--out", required=True, help="folder of the change; others sign it with saw policy stage")

    sub = add("delegate", delegate, "give a ring to officers of its own", group)
    sub.add_argument("--repository", required=True, help="officers' copy of the repository")
    sub.add_argument("--ring", required=True, help="the ring, for example canary")
    sub.add_argument("--officer-pub", action="append", default=[], help="public key file; repeat. None: take it back")
    sub.add_argument("--threshold", type=int, default=1, help="how many of them must sign (default: %(default)s)")
    add_signing(sub)
    sub.add_argument("--out", required=True, help="folder of the change; others sign it with saw policy stage")

    sub = add("ceremony", ceremony, "take the next step of a key ceremony; no broker is needed", group)
    sub.add_argument("dir", help="folder of the ceremony")
    sub.add_argument("--officer", action="append", default=[], help="NAME=FILE of a public key; repeat")
    _change_options(sub)
    sub.add_argument(
        "--repository", help="officers' copy: what a rotation starts from, where a first root is written to"
    )
    add_signing(sub, required=False)
    sub.add_argument("--confirm", help="SHA-256 that is to be signed; anything else is refused")


def _change_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--add", action="append", default=[], help="public key file of an officer who comes; repeat")
    sub.add_argument("--remove", action="append", default=[], help="public key file or key id of one who goes; repeat")
    sub.add_argument("--threshold", type=int, help="how many officers must sign")
    sub.add_argument("--online-pub", help="public key file of the broker's online key")
