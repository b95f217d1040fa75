"""Policy releases: what the TUF repository says, mirrored into the registry.

The repository on disk is the truth about what is published; :meth:`Releases.synchronise` makes the registry equal to it, in
one transaction with the audit rows, after each publication and at each start. A crash between the two is healed by the
next start, a full disk as soon as there is room; until then an unrecorded release is refused at attestation.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from datetime import datetime
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import ConflictError, MalformedError
from saw.broker.lifecycle import State
from saw.broker.repository import Repository
from saw.broker.rollout import open_rollout
from saw.broker.schema import registry, releases, workspaces
from saw.broker.store import Transaction
from saw.errors import SawError
from saw.policy.bundle import VerifiedBundle, check_signatures, describe, read_content, verify_bundle
from saw.policy.keys import PublicKey, public_pem
from saw.policy.tuf_repository import trusted_policy_keys
from saw.policy.tuf_rings import revision_of

FALLBACK_LEASE_S = 120

_TARGET = re.compile(
    r"rings/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)\.bundle\.json"
)


class Publication(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New officer-signed metadata (file name → base64 of its bytes, or its JSON) and target files (path → base64)."""

    metadata: Annotated[dict[str, msgspec.Raw], msgspec.Meta(min_length=1, max_length=64)]
    targets: Annotated[dict[str, str], msgspec.Meta(max_length=256)] = {}


class TrustRoot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first ``root.json``, as base64 of its exact bytes or as the JSON itself."""

    root: msgspec.Raw


class Releases:
    """Publishing and the view of what is current."""

    def __init__(self, services: Services, repository: Repository) -> None:
        self._s = services
        self._repository = repository
        #: Who put into the repository what the register does not have yet.
        self._unrecorded: Caller | None = None

    def install_root(self, caller: Caller, body: TrustRoot) -> dict[str, Any]:
        """Take the first TUF root, once. The same root again changes nothing; any other is refused."""
        raw = _content("root", body.root)
        if self._repository.root() is not None:
            if self._repository.holds_root(raw):
                return {"version": self._repository.root_version(), "changed": False}
            raise ConflictError(
                "a TUF root is installed already",
                cure="publish a successor signed by the present officers",
                code="root_exists",
            )
        self._install(caller, raw)
        return {"version": self._repository.root_version(), "changed": True}

    def _install(self, caller: Caller, raw: bytes) -> None:
        self.catch_up()
        self._unrecorded = caller  # first: what the repository took may be all that is written before the disk is full
        self._repository.install_root(raw, self._s.clock())
        with self._s.store.write() as tx:
            self._record_roots(tx, caller)
        self._unrecorded = None

    def publish(self, caller: Caller, body: Publication) -> dict[str, Any]:
        """Verify and take officer-signed metadata, sign snapshot and timestamp, and record the releases."""
        now = self._s.clock()
        metadata = {name: _content(name, raw) for name, raw in body.metadata.items()}
        targets = {path: _base64(path, text) for path, text in body.targets.items()}
        try:
            if self._repository.root() is None and "root.json" in metadata:
                self._install(caller, metadata["root.json"])
            root = self._repository.root()
            if root is None:
                raise ConflictError(
                    "no TUF root is installed", cure="send root.json with the first publication", code="no_root"
                )
            # A root that is installed already counts as left out, however it was formatted on its way.
            metadata = {name: raw for name, raw in metadata.items() if not self._repository.holds_root(raw)}
            keys, threshold = trusted_policy_keys(metadata.get("root.json", root))
            for path, raw in targets.items():
                self._check_target(path, raw, keys, threshold, now)
            self.catch_up()  # what others brought is told under their names
            self._unrecorded = caller
            self._repository.accept(metadata, targets, now)
        except SawError as error:
            with self._s.store.write() as tx:
                tx.record(
                    self._s.events.api_activity(
                        now,
                        caller.subject(),
                        "policy.publish",
                        activity="create",
                        outcome="failure",
                        status_detail=error.code,
                        message=error.message[:1024],
                    )
                )
            raise
        self._unrecorded = caller
        released = self.synchronise(caller)
        self._unrecorded = None
        return {"released": released, **self.state()}

    def catch_up(self) -> None:
        """Record a root or publication that the repository has taken and the database had no room for, or did not answer to."""
        caller = self._unrecorded
        if caller is not None:
            self._unrecorded = None  # first, so that another publication meanwhile says so again
            try:
                self.synchronise(caller)
            except BaseException:
                self._unrecorded = caller
                raise

    def synchronise(self, caller: Caller = BROKER) -> list[dict[str, Any]]:
        """Record every root and current target of the repository that the registry does not know yet; return the new targets."""
        root = self._repository.root()
        if root is None:
            return []
        now = self._s.clock()
        keys, threshold = trusted_policy_keys(root)
        new: list[dict[str, Any]] = []
        with self._s.store.write() as tx:
            self._record_roots(tx, caller)
            for path, raw in self._repository.current_targets():
                ring, blueprint = _split(path)
                bundle = self._read(raw, keys, threshold, now)
                known = current_release(tx.connection, ring, blueprint)
                if bundle is not None and _signed_anew(known, bundle, raw):
                    self._take_signatures(tx, ring, bundle, raw, caller)
                if bundle is None or (known is not None and known.revision >= bundle.revision):
                    continue
                tx.connection.execute(
                    releases.insert().values(
                        ring=ring,
                        blueprint=blueprint,
                        revision=bundle.revision,
                        policy_digest=bundle.digest,
                        bundle=raw,
                        lease_ttl_s=_lease_ttl(bundle),
                        released_at=iso(now),
                    )
                )
                open_rollout(tx, self._s.config.rollout, ring, bundle, raw=raw, now=now)
                where = (workspaces.c.ring == ring) & (workspaces.c.blueprint == blueprint)
                tx.touch(*tx.connection.execute(select(workspaces.c.id).where(where)).scalars())
                tx.record(
                    self._s.events.application_lifecycle(
                        now,
                        caller.subject(policy_digest=bundle.digest),
                        (f"policy/{blueprint}", str(bundle.revision)),
                        activity="update" if known is not None else "install",
                        message=f"policy released to ring {ring}",
                        detail={"ring": ring, "replaces": known.policy_digest if known is not None else ""},
                    )
                )
                new.append(
                    {"ring": ring, "blueprint": blueprint, "revision": bundle.revision, "policy_digest": bundle.digest}
                )
        return new

    def _record_roots(self, tx: Transaction, caller: Caller) -> None:
        """Record roots of the repository that the trail does not tell of yet: the first one, and each that followed."""
        known = tx.connection.execute(select(registry.c.root_version)).scalar_one()
        newest = self._repository.root_version()
        if newest <= known:
            return
        tx.connection.execute(registry.update().values(root_version=newest))
        for version in self._repository.versions_after(known):
            tx.record(
                self._s.events.entity_management(
                    self._s.clock(),
                    caller.subject(),
                    ("tuf-root", str(version)),
                    activity="update" if known else "create",
                )
            )
            known = version
        tx.touch()

    def _take_signatures(self, tx: Transaction, ring: str, bundle: VerifiedBundle, raw: bytes, caller: Caller) -> None:
        """Serve the same release with the signatures that count now; perimeters verify them under the newest root."""
        row = (releases.c.ring == ring) & (releases.c.blueprint == bundle.blueprint)
        tx.connection.execute(
            releases.update().where(row & (releases.c.revision == bundle.revision)).values(bundle=raw)
        )
        tx.touch()
        tx.record(
            self._s.events.application_lifecycle(
                self._s.clock(),
                caller.subject(policy_digest=bundle.digest),
                (f"policy/{bundle.blueprint}", str(bundle.revision)),
                activity="update",
                message=f"policy of ring {ring} signed anew",
                detail={"ring": ring, "replaces": bundle.digest},
            )
        )

    def rings(self) -> dict[str, Any]:
        """Return for every ring and blueprint the release in force, its signers and window, and the ones before."""
        with self._s.store.read() as connection:
            rows = connection.execute(
                select(releases).order_by(releases.c.ring, releases.c.blueprint, releases.c.revision.desc())
            ).all()
        root = self._repository.root()
        keys = trusted_policy_keys(root)[0] if root is not None else {}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            described = msgspec.to_builtins(revision_of(row.bundle, keys))
            found.setdefault((row.ring, row.blueprint), []).append({**described, "released_at": row.released_at})
        return {
            "rings": [
                {
                    "ring": ring,
                    "blueprint": blueprint,
                    "current": history[0],
                    "history": history[1:],
                }
                for (ring, blueprint), history in found.items()
            ]
        }

    def archive(self) -> dict[str, Any]:
        """Return the TUF repository as one archive (base64 of a tar); whoever takes it verifies it under its own root."""
        return {"archive": base64.b64encode(self._repository.archive(self._s.clock())).decode()}

    def state(self) -> dict[str, Any]:
        """Return the installed root, the online public key and every current release."""
        with self._s.store.read() as connection:
            rows = current_releases(connection)
        return {
            "root_version": self._repository.root_version(),
            "online_key_pem": self._repository.online_public_pem,
            "releases": [
                {
                    "ring": row.ring,
                    "blueprint": row.blueprint,
                    "revision": row.revision,
                    "policy_digest": row.policy_digest,
                    "released_at": row.released_at,
                    "lease_ttl_s": row.lease_ttl_s,
                }
                for row in rows
            ],
        }

    def officers(self) -> tuple[dict[str, PublicKey], int] | None:
        """Return the keys of the officers and how many of them must sign, or None before there is a root."""
        root = self._repository.root()
        return None if root is None else trusted_policy_keys(root)

    def policy_keys(self) -> dict[str, Any]:
        """Return the keys and threshold that sign policies, as perimeters get them; empty before there is a root."""
        root = self._repository.root()
        if root is None:
            return {"threshold": 0, "keys": {}}
        keys, threshold = trusted_policy_keys(root)
        return {"threshold": threshold, "keys": {keyid: public_pem(key).decode() for keyid, key in keys.items()}}

    def tuf_root(self) -> Any:
        """Return the installed root as JSON, or None."""
        raw = self._repository.root()
        return None if raw is None else msgspec.Raw(raw)

    def tuf_roots(self) -> list[Any]:
        """Return every root as JSON, from the first on; none before one is installed."""
        return [msgspec.Raw(raw) for raw in self._repository.roots()]

    def _check_target(self, path: str, raw: bytes, keys: dict[str, PublicKey], threshold: int, now: datetime) -> None:
        """Refuse a bundle that no workspace could load: not signed by enough officers, not valid, or rolled back."""
        ring, blueprint = _split(path)
        with self._s.store.read() as connection:
            known = current_release(connection, ring, blueprint)
        if known is not None and describe(raw)[0] == known.policy_digest:
            # The release in force with other signatures: a change of officers must not wait for its window.
            check_signatures(raw, keys, threshold)
            return
        bundle = verify_bundle(raw, keys, threshold, now, min_revision=known.revision if known is not None else 0)
        if bundle.blueprint != blueprint:
            raise MalformedError(
                f"{path} holds a bundle of blueprint {bundle.blueprint}",
                cure="publish it under its own name",
                code="target_name",
            )
        if known is not None and known.revision == bundle.revision and known.policy_digest != bundle.digest:
            raise ConflictError(
                f"revision {bundle.revision} of {ring}/{blueprint} is released with another content",
                cure="give the new content a new revision",
                code="revision_reused",
            )

    @staticmethod
    def _read(raw: bytes, keys: dict[str, PublicKey], threshold: int, now: datetime) -> VerifiedBundle | None:
        """Read a published bundle; one that has expired meanwhile is not released anew."""
        try:
            return verify_bundle(raw, keys, threshold, now)
        except SawError:
            return None


def _signed_anew(known: Row[Any] | None, bundle: VerifiedBundle, raw: bytes) -> bool:
    if known is None or (known.revision, known.policy_digest) != (bundle.revision, bundle.digest):
        return False
    return bool(known.bundle != raw)


def current_release(connection: Connection, ring: str, blueprint: str) -> Row[Any] | None:
    """Return the release with the highest revision, or None."""
    where = (releases.c.ring == ring) & (releases.c.blueprint == blueprint)
    return connection.execute(select(releases).where(where).order_by(releases.c.revision.desc()).limit(1)).one_or_none()


def current_releases(connection: Connection) -> list[Row[Any]]:
    """Return the current release of every ring and blueprint."""
    newest = (
        select(releases.c.ring, releases.c.blueprint, func.max(releases.c.revision).label("revision"))
        .group_by(releases.c.ring, releases.c.blueprint)
        .subquery()
    )
    joined = (
        (releases.c.ring == newest.c.ring)
        & (releases.c.blueprint == newest.c.blueprint)
        & (releases.c.revision == newest.c.revision)
    )
    return list(
        connection.execute(select(releases).join(newest, joined).order_by(releases.c.ring, releases.c.blueprint))
    )


def released_digests(connection: Connection, ring: str, blueprint: str) -> frozenset[str]:
    """Return every digest that was ever released to a ring for a blueprint."""
    where = (releases.c.ring == ring) & (releases.c.blueprint == blueprint)
    return frozenset(connection.execute(select(releases.c.policy_digest).where(where)).scalars())


def live_bundles(connection: Connection) -> dict[str, bytes]:
    """Return digest → bundle for every current release and for every digest that a live workspace has loaded."""
    found = {row.policy_digest: row.bundle for row in current_releases(connection)}
    live = select(workspaces.c.policy_digest).where(
        workspaces.c.policy_digest.is_not(None), workspaces.c.state == State.ACTIVE
    )
    rows = connection.execute(
        select(releases.c.policy_digest, releases.c.bundle).where(releases.c.policy_digest.in_(live))
    )
    return found | {row.policy_digest: row.bundle for row in rows}


def bundles_of(connection: Connection, digests: set[str]) -> dict[str, bytes]:
    """Return digest → bundle of these releases."""
    query = select(releases.c.policy_digest, releases.c.bundle).where(releases.c.policy_digest.in_(digests))
    return {row.policy_digest: row.bundle for row in connection.execute(query)} if digests else {}


def offline_granted(connection: Connection, policy_digest: str) -> int:
    """Return the seconds that a release grants its workspaces while perimeters cannot reach the broker."""
    return max(map(_offline_ttl, bundles_of(connection, {policy_digest}).values()), default=0)


@functools.lru_cache(maxsize=64)
def _offline_ttl(bundle: bytes) -> int:
    return read_content(bundle).governance.lease.offline_ttl_s


def _lease_ttl(bundle: VerifiedBundle) -> int:
    return bundle.governance.lease.ttl_s or FALLBACK_LEASE_S


def _split(path: str) -> tuple[str, str]:
    match = _TARGET.fullmatch(path)
    if match is None:
        raise MalformedError(
            f"{path[:128]!r} is not a release target",
            cure="targets are rings/<ring>/<blueprint>.bundle.json",
            code="target_name",
        )
    return match[1], match[2]


def _content(name: str, raw: msgspec.Raw) -> bytes:
    value = bytes(raw)
    return _base64(name, jsontext.decode(value)) if value.startswith(b'"') else value


def _base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedError(f"{name} is not base64", cure="send standard base64 of the exact bytes") from error
