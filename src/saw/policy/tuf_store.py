"""The TUF repository as it lies on disk, read without judging: the writer verified it, clients verify it again.

Layout: ``metadata/<N>.root.json``, ``<N>.targets.json``, ``<N>.ring-<ring>.json`` for rings with officers of their own,
``<N>.snapshot.json``, ``timestamp.json`` and ``targets/`` with hash-prefixed files (consistent snapshots, TUF 1.0).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import msgspec

from saw.policy.bundle import Reach
from saw.policy.errors import RepositoryError
from saw.policy.tuf_metadata import Snapshot, TargetFile, Targets, Timestamp, parse

_TARGET = re.compile(r"rings/([a-z0-9][a-z0-9-]{0,62})/([a-z0-9][a-z0-9-]{0,62})\.bundle\.json\Z")
_RING_ROLE = re.compile(r"ring-([a-z0-9][a-z0-9-]{0,62})\Z")


class Release(msgspec.Struct, frozen=True):
    """One target of the repository: ring, blueprint, digest and revision of the bundle behind ``path``."""

    path: str
    ring: str
    blueprint: str
    policy_digest: str
    revision: int


def split_target(path: str) -> tuple[str, str]:
    """Return ring and blueprint of a target path; raise :class:`RepositoryError` (``malformed``) for other paths."""
    match = _TARGET.match(path)
    if match is None:
        cure = "targets are rings/<ring>/<blueprint>.bundle.json"
        raise RepositoryError("malformed", f"{path[:128]!r} is not a target path", cure=cure)
    return match[1], match[2]


def ring_role(ring: str) -> str:
    """Return the name of the role that releases to ``ring`` when the ring has officers of its own."""
    return f"ring-{ring}"


def ring_of_role(role: str) -> str | None:
    """Return the ring of a role name, or ``None`` for a role of another kind."""
    match = _RING_ROLE.match(role)
    return match[1] if match else None


class State(msgspec.Struct, frozen=True):
    """The officers' metadata that is current: top-level targets, and the metadata of each delegated ring by role name."""

    targets: Targets
    rings: dict[str, Targets] = {}

    @property
    def files(self) -> dict[str, TargetFile]:
        """Every released file by target path."""
        files = dict(self.targets.targets)
        for ring in self.rings.values():
            files.update(ring.targets)
        return files

    @property
    def versions(self) -> dict[str, int]:
        """The version of each role's metadata by role name, as a snapshot lists it."""
        return {"targets": self.targets.version, **{role: ring.version for role, ring in self.rings.items()}}

    def role_for(self, ring: str) -> str:
        """Return the role that releases to ``ring``: its own when there is one, else ``targets``."""
        return ring_role(ring) if ring_role(ring) in delegated_roles(self.targets) else "targets"


def delegated_roles(targets: Targets) -> tuple[str, ...]:
    """Return the names of the roles that ``targets`` delegates to; which of them are acceptable is checked elsewhere."""
    if targets.delegations is None or targets.delegations.roles is None:
        return ()
    return tuple(sorted(targets.delegations.roles))


def metadata_dir(directory: Path | str) -> Path:
    return Path(directory) / "metadata"


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror}"
        raise RepositoryError("not_found", reason, cure="fetch the repository again") from error


def current_root(directory: Path | str) -> bytes:
    """Return the newest root in ``directory``; raise :class:`RepositoryError` (``no_root``) when there is none."""
    version = newest(directory, "root")
    if not version:
        raise RepositoryError("no_root", f"{directory} has no root.json", cure="install the officers' root first")
    return read_role(directory, "root", version)


def current_snapshot(directory: Path | str) -> Snapshot | None:
    """Return the snapshot that the timestamp names, or ``None`` before the first publication."""
    folder = metadata_dir(directory)
    if not (folder / "timestamp.json").exists():
        return None
    timestamp = parse(Timestamp, read_file(folder / "timestamp.json"), "timestamp.json").signed
    version = timestamp.snapshot_meta.version
    return parse(Snapshot, read_file(folder / f"{version}.snapshot.json"), "snapshot.json").signed


def newest(directory: Path | str, role: str) -> int:
    """Return the highest version of a role's numbered files, 0 when there is none."""
    names = (path.name.partition(".")[0] for path in metadata_dir(directory).glob(f"[1-9]*.{role}.json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read_role(directory: Path | str, role: str, version: int) -> bytes:
    """Return the file of ``role`` in ``version``."""
    return read_file(metadata_dir(directory) / f"{version}.{role}.json")


def current_state(directory: Path | str) -> State | None:
    """Return what the snapshot names; in an officer's copy without a snapshot, the newest. ``None`` when there is nothing."""
    snapshot = current_snapshot(directory)

    def load(role: str) -> Targets | None:
        if snapshot is None:
            version = newest(directory, role)
        else:
            listed = snapshot.meta.get(f"{role}.json")
            version = listed.version if listed else 0
        return parse(Targets, read_role(directory, role, version), f"{role}.json").signed if version else None

    targets = load("targets")
    if targets is None:
        return None
    rings = {role: load(role) for role in delegated_roles(targets)}
    return State(targets, {role: ring for role, ring in rings.items() if ring is not None})


def current_files(directory: Path | str) -> dict[str, TargetFile]:
    """Return every released file by target path."""
    state = current_state(directory)
    return state.files if state is not None else {}


def release_of(path: str, file: TargetFile) -> Release:
    ring, blueprint = split_target(path)
    custom = file.custom
    if not isinstance(custom, dict) or set(custom) - {"reach"} != {"policy_digest", "revision"}:
        raise RepositoryError("malformed", f"{path} does not state policy_digest and revision", cure="stage it again")
    digest, revision = custom["policy_digest"], custom["revision"]
    if not isinstance(digest, str) or not isinstance(revision, int) or isinstance(revision, bool):
        raise RepositoryError("malformed", f"{path} states no valid digest and revision", cure="stage it again")
    return Release(path, ring, blueprint, digest, revision)


def stated_reach(path: str, file: TargetFile) -> Reach | None:
    """Return what the officers who release ``path`` state about its reach against the release that it follows, if anything."""
    custom = file.custom if isinstance(file.custom, dict) else {}
    if "reach" not in custom:
        return None
    try:
        return msgspec.convert(custom["reach"], Reach)
    except msgspec.ValidationError as error:
        raise RepositoryError("malformed", f"{path} states no valid reach: {error}", cure="stage it again") from error


def current_releases(directory: Path | str) -> tuple[Release, ...]:
    """Return what the repository in ``directory`` releases now, sorted by path."""
    return tuple(release_of(path, file) for path, file in sorted(current_files(directory).items()))


def stored_target(directory: Path | str, path: str, file: TargetFile) -> Path:
    folder, _, name = path.rpartition("/")
    return Path(directory) / "targets" / folder / f"{file.hashes['sha256']}.{name}"


def read_target(directory: Path | str, path: str) -> bytes:
    """Return the bundle that the repository releases under ``path``, checked against its hash."""
    file = current_files(directory).get(path)
    if file is None:
        raise RepositoryError("not_found", f"{path} is not released", cure="publish it first")
    raw = read_file(stored_target(directory, path, file))
    check_file(path, file, raw)
    return raw


def check_file(path: str, file: TargetFile, raw: bytes) -> None:
    try:
        file.verify_length_and_hashes(raw)
    except Exception as error:
        raise RepositoryError("malformed", f"{path} is not the file that was signed", cure="send it again") from error


def target_name(ring: str, blueprint: str) -> str:
    """Return the target path of a ring and blueprint."""
    path = str(PurePosixPath("rings") / ring / f"{blueprint}.bundle.json")
    split_target(path)
    return path
