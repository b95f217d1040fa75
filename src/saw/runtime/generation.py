"""A policy generation: everything that enforces one verified policy, in one directory, switched by one rename.

``<root>/<digest>/`` holds the members of the bundle, its manifest, ring 1's leaf and discovery files, and
``generation.json`` with the SHA-256 of every file. ``<root>/current`` is a symbolic link to the directory in force. A
directory is complete before it gets its name, and is never changed afterwards.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.files import load_json
from saw.policy.governance import Governance
from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher
from saw.policy.model import Policy
from saw.runtime import ring1
from saw.runtime.leaf import LeafAuthority
from saw.runtime.ring1_settings import POLICY_HOST

INDEX = "generation.json"
CURRENT = "current"
SWITCHED = "switched"
"""A file that :func:`switch` leaves: what is started by it takes it away first, and then looks at :data:`CURRENT`."""
CLOSED = "closed"
_MEMBERS = ("policy.yaml", "governance.yaml")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class GenerationInvalid(SawError):
    """A generation on disk is not what its name and index say."""

    code = "generation_invalid"


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation is made of: a verified bundle, as far as the workspace needs it."""

    digest: str
    revision: int
    blueprint: str
    manifest: bytes
    members: Mapping[str, bytes]
    matcher: Matcher


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``generation.json``: names the policy and the SHA-256 of every other file of the directory."""

    format: str
    policy_digest: str
    revision: int
    blueprint: str
    files: dict[str, str]


class Loaded(msgspec.Struct, frozen=True):
    """A generation read back and verified, ready to decide."""

    digest: str
    revision: int
    matcher: Matcher
    policy: Policy
    governance: Governance


def compile_generation(
    content: Content, root: Path, settings: ring1.Ring1, authority: LeafAuthority, now: datetime, *, group: int | None
) -> Path:
    """Write the generation of ``content`` under a temporary name in ``root`` and return that directory.

    Discovery files already name the final directory. ``group`` may read it (the user that ring 1 runs as). Raises
    ``OSError``; nothing is left behind then.
    """
    final = root / content.digest
    hosts = [address.host for address in content.matcher.endpoints()]
    certificate, key = authority.issue([*hosts, POLICY_HOST], now)
    files: dict[str, bytes] = {
        **{name: content.members[name] for name in _MEMBERS},
        "manifest.json": content.manifest,
        "leaf.pem": certificate,
        "leaf.key": key,
        **discovery_files(content.digest, final, settings),
    }
    index = Index(
        format="saw-generation/1",
        policy_digest=content.digest,
        revision=content.revision,
        blueprint=content.blueprint,
        files={name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()},
    )
    return _write_directory(root, {**files, INDEX: msgspec.json.encode(index)}, group)


def discovery_files(digest: str, directory: Path, settings: ring1.Ring1) -> dict[str, bytes]:
    """Return Envoy's discovery files for the generation that will lie in ``directory``."""
    return {
        "lds.json": ring1.discovery("listener", ring1.listeners(settings, digest, directory), digest),
        "cds.json": ring1.discovery("cluster", ring1.clusters(settings, digest), digest),
    }


def write_closed(root: Path, settings: ring1.Ring1, *, group: int | None) -> None:
    """Make sure that ``current`` exists: without a policy it is a generation that refuses every request."""
    root.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(root / CURRENT) and (root / CURRENT / "lds.json").exists():
        return
    files = {
        "lds.json": ring1.discovery("listener", ring1.closed_listeners(settings), CLOSED),
        "cds.json": ring1.discovery("cluster", ring1.clusters(settings, CLOSED), CLOSED),
    }
    place(root, _write_directory(root, files, group), CLOSED)
    switch(root, CLOSED)


def place(root: Path, directory: Path, name: str) -> None:
    """Give a finished directory its name; a directory of that name is exchanged in one step and then removed."""
    final = root / name
    if final.exists():
        _exchange(directory, final)
        shutil.rmtree(directory)
    else:
        os.rename(directory, final)  # noqa: PTH104 - Path.rename replaces files silently; both paths are ours
    _sync(root)


def switch(root: Path, name: str) -> None:
    """Point ``current`` at the generation ``name`` by one rename, and leave :data:`SWITCHED` for whoever waits for that."""
    temporary = root / f".current.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, root / CURRENT)
    (root / SWITCHED).touch()
    _sync(root)


def current(root: Path) -> str | None:
    """Return the name of the generation in force, or None."""
    try:
        return os.readlink(root / CURRENT)  # noqa: PTH115 - called for every request
    except OSError:
        return None


def prune(root: Path, keep: set[str]) -> None:
    """Remove generations other than ``keep`` and what an interrupted compile left."""
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink() and entry.name not in keep:
            shutil.rmtree(entry)


def fingerprint(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of ``directory`` by name; raises ``OSError``."""
    return {entry.name: hashlib.sha256(entry.read_bytes()).hexdigest() for entry in sorted(directory.iterdir())}


def load(root: Path, name: str) -> Loaded:
    """Verify the generation ``name`` of ``root`` and compile its matcher; see :func:`load_from`."""
    return load_from(root / name, name)


def load_from(directory: Path, name: str) -> Loaded:
    """Verify that ``directory`` holds the generation of the digest ``name`` and compile its matcher.

    The manifest must hash to the name, and each member to what the manifest says. Raises :class:`GenerationInvalid` or the
    policy loader's errors.
    """
    index = load_json(directory / INDEX, Index)
    try:
        manifest = (directory / "manifest.json").read_bytes()
        members = {member: (directory / member).read_bytes() for member in _MEMBERS}
    except OSError as error:
        raise GenerationInvalid(f"generation {name} cannot be read: {error}", cure="restart saw-policyd") from error
    if hashlib.sha256(manifest).hexdigest() != name or index.policy_digest != name:
        raise GenerationInvalid(f"generation {name}: the manifest is not the one of that digest", cure=_CURE)
    listed = jsontext.decode(manifest)["members"]
    for member, raw in members.items():
        if listed.get(member, {}).get("sha256") != hashlib.sha256(raw).hexdigest():
            raise GenerationInvalid(f"generation {name}: {member} was changed after it was verified", cure=_CURE)
    policy = load_policy(members["policy.yaml"])
    governance = load_governance(members["governance.yaml"])
    return Loaded(name, index.revision, Matcher.compile(policy, governance), policy, governance)


_CURE = "saw-policyd restores it from the signed bundle; find out who wrote there"


_PUBLIC = {"manifest.json", *_MEMBERS}
"""Files that the sandbox and the MCP mediator read too; the others may hold the generation's TLS key."""


def _write_directory(root: Path, files: Mapping[str, bytes], group: int | None) -> Path:
    directory = Path(tempfile.mkdtemp(prefix=".compiling.", dir=root))
    try:
        for name, raw in files.items():
            path = directory / name
            with path.open("xb") as stream:
                os.fchmod(stream.fileno(), 0o644 if name in _PUBLIC else 0o640)
                if group is not None:
                    os.fchown(stream.fileno(), -1, group)
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
        if group is not None:
            os.chown(directory, -1, group)
        directory.chmod(0o755)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _exchange(first: Path, second: Path) -> None:
    """Swap two names in one step (renameat2(2) with RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
