"""``saw audit key``, ``checkpoint`` and ``verify --checkpoint``: the trail as a signed Merkle tree."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saw.audit import ChainedEvent, event_hash, merkle
from saw.audit.chain import ChainError
from saw.audit.note import LOG, WITNESS, Checkpoint, PublicKey, Signer, open_checkpoint, sign_checkpoint
from saw.audit.removal import Removals, is_removed
from saw.audit.tiles import Folder, Leaf, Tiles, TreeError, TreeWriter
from saw.broker.client import BrokerContext, Context, OperatorClient
from saw.cli.audit_copy import completed, incomplete, removed_text, span_of
from saw.cli.audit_ship import AuditSocket
from saw.cli.operator_options import add_options, fields, show
from saw.errors import ConfigError
from saw.files import write_atomic, write_private

_PAGE = 1000


def key(options: argparse.Namespace) -> int:
    """Run ``saw audit key``: make a key pair; an existing file is never replaced."""
    out = Path(options.out)
    public = out.with_name(out.name + ".pub")
    for file in (out, public):
        if file.exists():
            raise ConfigError(f"{file} exists", cure="use another name, or remove it if nobody needs it")
    signer = Signer(options.name, 4 if options.witness else 1, secrets.token_bytes(32))
    write_private(out, signer.private_line() + "\n")
    write_atomic(public, signer.public.line + "\n")
    value = {"private": str(out), "public": str(public), "key": signer.public.line}
    show(value, fields(value), as_json=options.json)
    return 0


def checkpoint(options: argparse.Namespace) -> int:
    """Run ``saw audit checkpoint``: append what is new in the trail, and sign the tree."""
    folder = Path(options.tiles)
    files, signer = Folder(folder), _log_key(options)
    with contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)  # one writer
        raw = files.read("checkpoint")
        old = Checkpoint(signer.public.name, 0, merkle.EMPTY_ROOT)
        if raw is not None:
            old = open_checkpoint(raw, signer.public).checkpoint
        writer = TreeWriter(files, old.origin, old.size, old.root)
        context = Context(BrokerContext(socket=options.socket)) if options.socket else None
        client = OperatorClient(context) if context else OperatorClient.from_context(options.context)
        _append(writer, AuditSocket(stack.enter_context(client.session())))
        new = writer.finish()
        # signed again also when nothing is new: the time says that the log lives
        files.write("checkpoint", sign_checkpoint(new, signer, int(time.time())).encode())
    value = {"origin": new.origin, "size": new.size, "root": new.root.hex(), "added": new.size - old.size}
    show(value, fields(value), as_json=options.json)
    return 0


def _log_key(options: argparse.Namespace) -> Signer:
    """Return the log's key; with ``--name`` it is made where there is none, unless there is a tree that another one signed."""
    file = Path(options.key)
    if options.name and not file.exists():
        if (Path(options.tiles) / "checkpoint").exists():
            raise ConfigError(f"{file} is missing, and there is a tree", cure="restore the key, or begin a new tree")
        signer = Signer(options.name, LOG, secrets.token_bytes(32))
        write_atomic(file.with_name(file.name + ".pub"), signer.public.line + "\n")
        write_private(file, signer.private_line() + "\n")
    signer = Signer.parse(_text(options.key))
    if signer.public.kind != LOG or (options.name and signer.public.name != options.name):
        wanted = options.name or "a log"
        raise ConfigError(f"{file} is the key of {signer.public.name}, not of {wanted}", cure="use the log's own key")
    return signer


def _append(writer: TreeWriter, trail: AuditSocket) -> None:
    while True:
        page = trail.read(writer.size, _PAGE, 0)
        before = None if page.before is None else Leaf(page.before.source, page.before.seq, page.before.hash)
        if before != writer.last:
            raise TreeError(
                f"the broker's trail is not the one that the tree of {writer.size} leaves was made of",
                cure="compare a copy with the tree (saw audit verify --checkpoint); a restored backup needs a new tree and key",
            )
        for place, item in enumerate(page.events, writer.size + 1):
            if item.position != place:
                raise TreeError(
                    f"the event at position {place} is missing in the broker",
                    cure="somebody removed it: saw audit verify",
                )
        writer.add(Leaf(item.source, item.seq, item.hash) for item in page.events)
        if writer.size >= page.end:
            return


def verify_tree(options: argparse.Namespace) -> int:
    """Run ``saw audit verify --checkpoint``: hold tiles, an older checkpoint and a copy of the trail against a checkpoint."""
    if not options.key or not options.tiles:
        raise ConfigError(
            "--checkpoint needs --key and --tiles", cure="give the log's public key and the folder of tiles"
        )
    log = PublicKey.read(options.key, LOG)
    witnesses = tuple(PublicKey.read(name, WITNESS) for name in options.witness or ())
    signed = open_checkpoint(_bytes(options.checkpoint), log, witnesses)
    findings = [
        _finding("unwitnessed", log.name, 0, f"{one.name} did not sign this checkpoint")
        for one in witnesses
        if one.name not in signed.witnesses
    ]
    new, tiles = signed.checkpoint, Tiles(Folder(Path(options.tiles)), signed.checkpoint.size)
    value: dict[str, Any] = {"complete": True, "origin": new.origin, "size": new.size, "root": new.root.hex()}
    value["witnesses"] = dict(signed.witnesses)
    if options.since_checkpoint:
        old = open_checkpoint(_bytes(options.since_checkpoint), log).checkpoint
        findings += _consistency(old, new, tiles)
        value["since"] = old.size
    if not options.part and tiles.root_of_leaves() != new.root:
        findings.append(_finding("tree_changed", new.origin, 0, "the entries are not those that were signed"))
    if options.file and not findings:
        found, counts = _copy(completed(options), new, tiles, part=options.part)
        findings += found
        value |= counts
    if findings:
        raise incomplete(findings)
    removed = value.get("removed", {"events": 0})
    shown = {name: item for name, item in value.items() if name != "removed"}
    show(value, fields(shown) + removed_text(removed), as_json=options.json)
    return 0


def _consistency(old: Checkpoint, new: Checkpoint, tiles: Tiles) -> list[dict[str, Any]]:
    if new.size < old.size:
        return [_finding("tree_shrunk", new.origin, 0, f"it had {old.size} leaves, this checkpoint has {new.size}")]
    if new.size == old.size and new.root != old.root:
        return [_finding("split_view", new.origin, 0, f"two trees of {new.size} leaves were signed")]
    proof = merkle.consistency_proof(old.size, new.size, tiles.node)
    if not merkle.verify_consistency(old.size, new.size, proof, old.root, new.root):
        return [_finding("tree_forked", new.origin, 0, f"it does not continue the tree of {old.size} leaves")]
    return []


def _copy(
    events: Iterable[ChainedEvent], new: Checkpoint, tiles: Tiles, *, part: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Hold a copy against the tree: every event is a leaf, by a proof of its own with ``part``; else every leaf has its event.

    An event that retention removed is one whose content is gone, whose hash is the leaf's, and which a removal names whose own
    tree is the beginning of this one.
    """
    links: dict[tuple[str, int], tuple[str, str]] = {}
    findings: list[dict[str, Any]] = []
    told, gone = Removals(), set[tuple[str, int]]()
    for item in events:
        told.add(item)
        if is_removed(item):
            gone.add((item.source, item.seq))
        try:
            good = is_removed(item) or event_hash(item.source, item.seq, item.prev, item.event) == item.hash
        except ChainError:
            good = False
        link = (item.prev, item.hash)
        if not good or links.setdefault((item.source, item.seq), link) != link:
            findings.append(
                _finding("changed", item.source, item.seq, "the content does not match its hash, or is there twice")
            )
    findings += _removed(gone, told, new, tiles)
    signed = max((one.size for one in told.told), default=0)
    newer = set(links)
    for index, leaf in enumerate(_leaves(tiles)):
        place = (leaf.source, leaf.seq)
        newer.discard(place)
        if place not in links:
            if not part:
                findings.append(_finding("removed", *place, f"leaf {index} of the tree has no event in the copy"))
        elif place in gone and index >= signed:
            findings.append(_finding("removed", *place, f"leaf {index} is in no tree that a removal names"))
        elif links[place][1] != leaf.hash:
            findings.append(_finding("changed", *place, f"leaf {index} of the tree is another event"))
        elif part:  # else the root over all leaves has proved this one
            proof = merkle.inclusion_proof(index, new.size, tiles.node)
            if not merkle.verify_inclusion(merkle.leaf_hash(leaf.raw), index, new.size, proof, new.root):
                findings.append(_finding("tree_changed", *place, f"leaf {index} is not in the signed tree"))
    for source, seq in sorted(newer):
        prev, digest = links[source, seq]
        before, behind = links.get((source, seq - 1)), links.get((source, seq + 1))
        if (before and before[1] != prev) or (behind and behind[0] != digest):
            findings.append(_finding("foreign", source, seq, "it is not in the tree and does not fit into its chain"))
    return findings, {"events": len(links), "newer": len(newer), "removed": span_of(told, len(gone))}


def _removed(gone: set[tuple[str, int]], told: Removals, new: Checkpoint, tiles: Tiles) -> list[dict[str, Any]]:
    """Return what is wrong with events without content, and with what tells of their removal."""
    found = [
        _finding("removed", *place, "its content is gone, and no removal by retention names it")
        for place in sorted(gone)
        if not told.tell(*place)
    ]
    for size, root in sorted({(one.size, one.root) for one in told.told if one.size <= new.size}):
        if _consistency(Checkpoint(new.origin, size, bytes.fromhex(root)), new, tiles):
            found.append(_finding("tree_forked", new.origin, 0, f"a removal names another tree of {size} leaves"))
    return found


def _leaves(tiles: Tiles) -> Iterator[Leaf]:
    return (Leaf.parse(entry) for entry in tiles.leaves())


def _finding(code: str, source: str, seq: int, detail: str) -> dict[str, Any]:
    return {"code": code, "source": source, "seq": seq, "detail": detail}


def _bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}", cure="check the path") from error


def _text(name: str) -> str:
    return _bytes(name).decode("utf-8", "replace")


def add_tree(commands: Any, verify: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of ``saw audit``, and to ``verify`` what concerns the tree."""
    made = commands.add_parser("key", help="make a key for checkpoints, or for a witness")
    made.add_argument("--name", required=True, help="name of the log or witness, as in trail.example.com")
    made.add_argument(
        "--out", required=True, metavar="FILE", help="private key; the public one gets .pub behind its name"
    )
    made.add_argument("--witness", action="store_true", help="the key of a witness")
    made.add_argument("--json", action="store_true", help="print JSON")
    grown = commands.add_parser("checkpoint", help="bring the Merkle tree up to date, and sign it")
    add_options(grown)
    grown.add_argument("--socket", help="the broker's audit socket, in place of --context")
    grown.add_argument("--tiles", required=True, metavar="DIR", help="folder of the tree")
    grown.add_argument("--key", required=True, metavar="FILE", help="private key of the log")
    grown.add_argument("--name", help="make the key under this name if there is none yet")
    verify.add_argument("--checkpoint", metavar="FILE", help="hold --tiles, and --file, against this signed checkpoint")
    verify.add_argument("--key", metavar="FILE", help="public key of the log")
    verify.add_argument("--tiles", metavar="DIR", help="folder of the tree, or a copy")
    verify.add_argument(
        "--since-checkpoint", metavar="FILE", help="an older checkpoint, which this one has to continue"
    )
    verify.add_argument(
        "--witness", metavar="FILE", action="append", help="public key of a witness who has to have signed"
    )
    verify.add_argument(
        "--part", action="store_true", help="the file holds a part of the trail: prove each event in it"
    )
