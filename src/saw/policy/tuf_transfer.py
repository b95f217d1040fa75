"""Carry a repository over a gap: one archive, verified completely against a pinned root before anything is replaced.

The archive is a plain tar of ``metadata/`` and ``targets/`` as any web server can serve them: every root, and the current
state. Import writes the timestamp last, so a reader or a crash sees the old state or the new one.
"""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from saw.files import locked, write_atomic
from saw.policy.bundle import MAX_BUNDLE, check_signatures, describe, read_content
from saw.policy.errors import BundleRefused, PolicyError, RepositoryError
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_metadata import (
    MAX_METADATA,
    Metadata,
    MetaFile,
    Root,
    Timestamp,
    check_role,
    parse,
    sign_metadata,
    trusted_policy_keys,
)
from saw.policy.tuf_roots import follow_roots
from saw.policy.tuf_store import (
    Release,
    State,
    current_root,
    current_snapshot,
    current_state,
    newest,
    read_file,
    read_role,
    release_of,
    stored_target,
)

MAX_ARCHIVE = 1024 * 1024 * 1024
"""Largest archive that is read (bytes)."""
_MAX_MEMBERS = 10_000
_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_MEMBER = re.compile(
    rf"metadata/(?:timestamp|[1-9][0-9]{{0,8}}\.(?:root|snapshot|targets|ring-{_NAME}))\.json"
    rf"|targets/rings/{_NAME}/[0-9a-f]{{64}}\.{_NAME}\.bundle\.json"
)
_URL = "https://archive.invalid/"


class Imported(msgspec.Struct, frozen=True):
    """What an import led to; ``changed`` tells whether any file was written."""

    root_version: int
    targets_version: int
    releases: tuple[Release, ...]
    changed: bool


def export_repository(
    directory: Path | str,
    now: datetime,
    *,
    online_key: Ed25519PrivateKey | None = None,
    lifetime: timedelta | None = None,
) -> bytes:
    """Return the archive of the repository in ``directory``: every root and the current state.

    A timestamp counts for an hour, which a journey outlasts: with ``online_key`` and ``lifetime`` the archive gets one of
    its own that counts for that long.
    """
    base = Path(directory)
    if not base.is_dir():
        raise RepositoryError("not_found", f"{directory} is not there", cure="check the path")
    with locked(base):  # never half of a publication
        return _export(base, now, online_key, lifetime)


def _export(base: Path, now: datetime, online_key: Ed25519PrivateKey | None, lifetime: timedelta | None) -> bytes:
    state, snapshot = current_state(base), current_snapshot(base)
    if state is None or snapshot is None:
        cure = "export the broker's repository, or an imported one"
        raise RepositoryError("not_found", f"{base} has no snapshot and timestamp", cure=cure)
    files: dict[str, bytes] = {}
    for version in range(1, newest(base, "root") + 1):
        files[f"metadata/{version}.root.json"] = read_role(base, "root", version)
    for role, version in {"snapshot": snapshot.version, **state.versions}.items():
        files[f"metadata/{version}.{role}.json"] = read_role(base, role, version)
    files["metadata/timestamp.json"] = read_file(base / "metadata" / "timestamp.json")
    if online_key is not None and lifetime is not None:
        present = parse(Timestamp, files["metadata/timestamp.json"], "timestamp.json").signed
        timestamp = Timestamp(
            version=present.version + 1, expires=now + lifetime, snapshot_meta=MetaFile(snapshot.version)
        )
        signed = sign_metadata(Metadata(timestamp), [online_key])
        root = parse(Root, current_root(base), "root.json").signed
        check_role(root, "timestamp", Timestamp, signed, now)
        files["metadata/timestamp.json"] = signed
    for path, file in state.files.items():
        stored = stored_target(base, path, file)
        files[str(stored.relative_to(base))] = read_file(stored)
    return _pack(files)


def _pack(files: Mapping[str, bytes]) -> bytes:
    """Return a tar that is the same for the same files; a target's name may be longer than plain ustar takes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, raw in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(raw), 0o644
            archive.addfile(member, io.BytesIO(raw))
    return stream.getvalue()


def _unpack(path: Path) -> dict[str, bytes]:
    """Return the files of an archive by name; refuse anything that no export contains, before it is read."""
    files: dict[str, bytes] = {}
    try:
        if path.stat().st_size > MAX_ARCHIVE:
            raise RepositoryError("malformed", f"{path} is too large for an export", cure="check the file")
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                limit = MAX_BUNDLE if member.name.startswith("targets/") else MAX_METADATA
                expected = member.isreg() and _MEMBER.fullmatch(member.name) and member.name not in files
                if not expected or member.size > limit or len(files) >= _MAX_MEMBERS:
                    reason = f"{path} contains {member.name[:128]!r}, which no export does"
                    raise RepositoryError("malformed", reason, cure="fetch the archive again")
                stream = archive.extractfile(member)
                files[member.name] = stream.read() if stream is not None else b""
    except OSError as error:
        raise RepositoryError("malformed", f"{path} cannot be read: {error.strerror}", cure="check the path") from error
    except tarfile.TarError as error:
        raise RepositoryError("malformed", f"{path} is not an archive: {error}", cure="fetch it again") from error
    return files


class _ArchiveFetcher(FetcherInterface):
    """Serves the files of an archive to the TUF client."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        raw = self._files.get(url.removeprefix(_URL))
        if raw is None:
            raise DownloadHTTPError(f"the archive has no {url.removeprefix(_URL)}", 404)
        yield raw


def import_repository(archive: Path | str, directory: Path | str, root: bytes, now: datetime) -> Imported:
    """Verify the archive against the pinned ``root`` as a client would, then bring ``directory`` up to it.

    Everything is verified before the first file is written: the chain of roots, all signatures, expiry, that nothing is
    older than what ``directory`` has, each bundle's hash, signatures and content, and that the archive holds nothing else. A
    copy that officers keep (it has roots and no timestamp) stays one. Raises :class:`RepositoryError`.
    """
    files = _unpack(Path(archive))
    target = Path(directory)
    with tempfile.TemporaryDirectory(prefix="saw-import-") as scratch:
        tree = Path(scratch) / "tree"
        for name, raw in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(tree / name, raw)
        newest_root = _check_roots(tree, root, now)
        state = _check_state(files, tree, Path(scratch), target, root)
        _check_bundles(files, tree, state, newest_root)
        _check_nothing_else(files, tree, state)
    releases = tuple(release_of(path, file) for path, file in sorted(state.files.items()))
    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _check_not_older(target, state, newest_root)
        changed = _write(target, files)
    version = parse(Root, newest_root, "root.json").signed.version
    return Imported(version, state.targets.version, releases, changed)


def _check_roots(tree: Path, pinned: bytes, now: datetime) -> bytes:
    """Return the archive's newest root; its whole chain must hold and contain the pinned root."""
    last = newest(tree, "root")
    chain = [read_role(tree, "root", version) for version in range(1, last + 1)]
    if not chain:
        raise RepositoryError("no_root", "the archive has no root", cure="export it again")
    found = follow_roots(chain[0], chain[1:], now)
    ours = parse(Root, pinned, "root.json")
    same = [raw for raw in chain if parse(Root, raw, "root.json").signed_bytes == ours.signed_bytes]
    if not same:
        reason = f"the archive's roots do not contain the pinned root version {ours.signed.version}"
        raise RepositoryError("threshold", reason, cure="this is another repository, or an older state of it")
    return found


def _check_state(files: Mapping[str, bytes], tree: Path, scratch: Path, target: Path, root: bytes) -> State:
    """Let the TUF client judge the archive with the memory of ``target``, and return the state that it names."""
    memory = scratch / "client"
    memory.mkdir()
    if (target / "metadata" / "timestamp.json").exists():
        (memory / "timestamp.json").write_bytes(read_file(target / "metadata" / "timestamp.json"))
        held = current_snapshot(target)
        if held is not None:
            (memory / "snapshot.json").write_bytes(read_role(target, "snapshot", held.version))
    updater = refresh(memory, scratch / "fetched", _URL, root, _ArchiveFetcher(files))
    state = current_state(tree)
    if state is None:
        raise RepositoryError("malformed", "the archive has no targets", cure="export it again")
    for path in state.files:
        fetch_target(updater, path)
    return state


def _check_bundles(files: Mapping[str, bytes], tree: Path, state: State, root: bytes) -> None:
    keys, threshold = trusted_policy_keys(root)
    for path, file in state.files.items():
        raw = files[str(stored_target(tree, path, file).relative_to(tree))]
        release = release_of(path, file)
        try:
            check_signatures(raw, keys, threshold)
            content = read_content(raw)
        except (BundleRefused, PolicyError) as error:
            raise RepositoryError("bundle", f"{path}: {error.message}", cure="export it again") from error
        digest, manifest, _ = describe(raw)
        stated = (release.blueprint, release.policy_digest, release.revision)
        if stated != (content.governance.blueprint.name, digest, manifest.revision):
            reason = f"{path} states another blueprint, digest or revision than the bundle has"
            raise RepositoryError("bundle", reason, cure="export it again")


def _check_nothing_else(files: Mapping[str, bytes], tree: Path, state: State) -> None:
    snapshot = current_snapshot(tree)
    roots = {f"metadata/{version}.root.json" for version in range(1, newest(tree, "root") + 1)}
    roles = {"snapshot": snapshot.version if snapshot else 0, **state.versions}
    metadata = {f"metadata/{version}.{role}.json" for role, version in roles.items()}
    bundles = {str(stored_target(tree, path, file).relative_to(tree)) for path, file in state.files.items()}
    spare = sorted(set(files) - roots - metadata - bundles - {"metadata/timestamp.json"})
    if spare:
        reason = f"the archive holds {spare[0]}, which the current state does not name"
        raise RepositoryError("malformed", reason, cure="export it again")


def _check_not_older(target: Path, state: State, root: bytes) -> None:
    versions = {"root": parse(Root, root, "root.json").signed.version, **state.versions}
    for role, version in versions.items():
        if version < newest(target, role):
            reason = f"the archive has {role} version {version}, and {target} has {newest(target, role)} already"
            raise RepositoryError("rollback", reason, cure="export the newer state and import that")


def _write(target: Path, files: Mapping[str, bytes]) -> bool:
    """Write what is new, the timestamp last; return whether anything was."""
    officers = newest(target, "root") > 0 and not (target / "metadata" / "timestamp.json").exists()
    online = ("metadata/timestamp.json", ".snapshot.json")
    names = sorted(files, key=lambda name: (not name.startswith("targets/"), name == "metadata/timestamp.json", name))
    changed = False
    for name in names:
        path = target / name
        if (officers and name.endswith(online)) or (path.exists() and path.read_bytes() == files[name]):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, files[name])
        changed = True
    return changed
