"""``saw broker secrets``: look at the broker's own secrets, move them from one place to another, put one in, take one out.

A move copies each secret and reads it back, then notes in ``secrets.json`` that the new place holds them, then removes the old
copies, after all were compared. Whatever ends it, the place that the note names is complete, and running it again goes on.
"""

from __future__ import annotations

import hmac
import os
import pwd
import socket
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw.audit import EventFactory
from saw.broker.config import BrokerConfig
from saw.broker.context import BROKER, Caller
from saw.broker.database_copy import serves
from saw.broker.register_place import require_register
from saw.broker.replicas import living
from saw.broker.secret_place import (
    AUTHORITY,
    NAMES,
    ONLINE,
    RENEWED,
    SEALING,
    Known,
    folders,
    known_place,
    open_secrets,
    remember_place,
    require_place,
)
from saw.broker.store import Store, Transaction
from saw.broker.wake import Waker
from saw.errors import ConfigError, SawError
from saw.files import locked, write_atomic, write_private
from saw.identity.names import read_private
from saw.identity.sealed import KEY_BYTES
from saw.policy.keys import parse_private_key, public_pem
from saw.secrets.files import FileStore
from saw.secrets.folder import Folder
from saw.secrets.sealed import SUFFIX, SealedStore
from saw.secrets.settings import Provider
from saw.secrets.store import SecretStore, read_or_none


class MoveRefused(SawError):
    """Secrets cannot be moved; every one is still where it was."""

    code = "secrets_move_refused"


class Moved(msgspec.Struct, frozen=True):
    """Where the secrets are now, how many were copied there, and how many old copies were removed."""

    provider: Provider
    copied: int = 0
    removed: int = 0


class Status(msgspec.Struct, frozen=True):
    """Where the secrets are and should be. ``problems``: names, and what is wrong; ``copies``: what lies elsewhere too."""

    provider: Provider
    known: Provider | None
    leaving: Provider | None
    place: str
    held: tuple[str, ...]
    problems: dict[str, str]
    copies: dict[Provider, tuple[str, ...]]


def secrets_status(config: BrokerConfig, environ: Mapping[str, str] = os.environ) -> Status:
    """Open every secret where the configuration says, and look for copies in the state directory; nothing is changed."""
    known = known_place(config)
    held: list[str] = []
    problems: dict[str, str] = {}
    place: str = config.secrets.provider
    try:
        store = open_secrets(config, environ=environ)
    except SawError as error:
        problems["*"] = str(error)
    else:
        place = store.place
        for name in NAMES:
            try:
                if read_or_none(store, name) is not None:
                    held.append(name)
            except SawError as error:
                problems[name] = str(error)
        store.close()
    if known is not None and known.provider != config.secrets.provider:
        problems["*"] = f"they are in {known.provider}, and the configuration says {config.secrets.provider}"
    copies = {kind: tuple(names) for kind, names in _copies(config).items() if names}
    return Status(
        provider=config.secrets.provider,
        known=None if known is None else known.provider,
        leaving=None if known is None else known.leaving,
        place=place,
        held=tuple(held),
        problems=problems,
        copies=copies,
    )


def move_secrets(
    config: BrokerConfig,
    clock: Callable[[], datetime],
    to: Provider | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Moved:
    """Bring every secret to where the configuration says; where all are there and nowhere else, nothing is done.

    Raises :class:`MoveRefused`, :class:`ConfigError` or what a place refuses.
    """
    wanted = config.secrets.provider
    if to is not None and to != wanted:
        raise ConfigError(
            f"the configuration says that secrets are in {wanted}", cure=f"set secrets.provider to {to}, then move"
        )
    if wanted == "environment":
        raise MoveRefused("nothing is moved to the environment", cure="it is for tests")
    known = known_place(config)
    if known is None or (known == Known(wanted) and not any(_copies(config).values())):
        return Moved(wanted)
    _require_alone(config)
    require_register(config)
    with locked(config.state):
        store = Store.open(config, Waker())
        try:
            if living(store):
                raise MoveRefused("a broker serves on this database", cure="stop every broker, then again")
            return _move(config, store, clock, environ)
        finally:
            store.close()


def _move(config: BrokerConfig, store: Store, clock: Callable[[], datetime], environ: Mapping[str, str]) -> Moved:
    wanted = config.secrets.provider
    known = known_place(config) or Known(wanted)
    target = open_secrets(config, environ=environ)
    try:
        copied: list[str] = []
        if known.provider != wanted:
            source = open_secrets(config, known.provider, environ=environ)
            try:
                copied = _copy(source, target)
            finally:
                source.close()
            with store.write() as tx:
                _record(
                    tx,
                    clock(),
                    "secrets.move",
                    f"{len(copied)} secrets were copied from {known.provider} to {wanted}",
                    copied,
                )
            known = Known(wanted, leaving=known.provider)
            remember_place(config, known)
        removed: list[str] = []
        for kind in _left(config, known):
            source = open_secrets(config, kind, environ=environ)
            try:
                removed += _leave(source, target)
            finally:
                source.close()
        with store.write() as tx:
            _record(tx, clock(), "secrets.move", f"{len(removed)} copies outside of {wanted} were removed", removed)
        remember_place(config, Known(wanted))
        return Moved(wanted, len(copied), len(removed))
    finally:
        target.close()


def _copy(source: SecretStore, target: SecretStore) -> list[str]:
    """Copy everything and read it back; what is in the source stays, and nothing that it does not know is written over."""
    if read_or_none(source, AUTHORITY) is None:
        raise MoveRefused(f"there is no {AUTHORITY} in {source.place}", cure="put back the secrets of the backup")
    copied: list[str] = []
    for name in NAMES:
        value = read_or_none(source, name)
        if value is None:
            continue
        there = read_or_none(target, name)
        if there is not None and not _same(value, there) and name not in RENEWED:
            raise _differ(name, source, target, f"remove {name} there when it is nobody's, or name another place")
        if there is None or not _same(value, there):
            target.write(name, value, new=there is None)
        if not _same(value, target.read(name)):
            raise MoveRefused(
                f"{name} in {target.place} is not what was written", cure="report this; nothing was removed"
            )
        copied.append(name)
    return copied


def _leave(source: SecretStore, target: SecretStore) -> list[str]:
    """Remove from the source what the target holds; raise :class:`MoveRefused` before the first thing that it does not."""
    held = {name: value for name in NAMES if (value := read_or_none(source, name)) is not None}
    for name, value in held.items():
        there = target.read(name)
        if not _same(value, there) and name not in RENEWED:
            raise _differ(
                name, source, target, f"saw broker secrets put {name} takes it over; else remove it from {source.place}"
            )
    for name in held:
        source.remove(name)
    for store in (source, target):
        if isinstance(store, FileStore | SealedStore):
            store.folder.sweep()
    return list(held)


def put_secret(
    config: BrokerConfig, clock: Callable[[], datetime], name: str, file: Path, environ: Mapping[str, str] = os.environ
) -> None:
    """Let the content of ``file`` take the place of a secret, such as the next online key; raise :class:`SawError`."""
    if name not in NAMES:
        raise ConfigError(f"the broker has no secret {name[:64]!r}", cure=f"it has {', '.join(NAMES)}")
    _require_alone(config)
    require_register(config)
    require_place(config)
    value = read_private(file)
    public = public_pem(parse_private_key(value, str(file)).public_key()) if name == ONLINE else None
    if name in SEALING and len(value) != KEY_BYTES:
        raise ConfigError(f"{file} is not a key of {KEY_BYTES} bytes", cure=f"{name} is one")
    with locked(config.state):
        store, secrets = Store.open(config, Waker()), open_secrets(config, environ=environ)
        try:
            if living(store):
                raise MoveRefused("a broker serves on this database", cure="stop every broker, then again")
            with store.write() as tx:
                _record(tx, clock(), "secrets.put", f"{name} was replaced", [name])
                secrets.write(name, value)
                if public is not None:
                    write_atomic(config.keys / "tuf-online.pub", public)
        finally:
            secrets.close()
            store.close()


def take_secret(
    config: BrokerConfig, clock: Callable[[], datetime], name: str, out: Path, environ: Mapping[str, str] = os.environ
) -> None:
    """Write a secret in the clear to the new file ``out`` (0600), for a program that takes files alone."""
    _require_owner(config)
    require_register(config)
    require_place(config)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already", cure="name a new file")
    store, secrets = Store.open(config, Waker()), open_secrets(config, environ=environ)
    try:
        value = secrets.read(name)
        with store.write() as tx:
            _record(tx, clock(), "secrets.take", f"{name} was written in the clear to a file", [name])
            write_private(out, value)
    finally:
        secrets.close()
        store.close()


def _copies(config: BrokerConfig) -> dict[Provider, list[str]]:
    """Return what of our secrets lies in the state directory, elsewhere than the configuration says."""
    places = folders(config)
    found: dict[Provider, list[str]] = {}
    for kind, suffix in (("files", ""), ("sealed", SUFFIX)):
        if kind != config.secrets.provider:
            there = set(Folder(places[kind], suffix).names())
            found["files" if kind == "files" else "sealed"] = [name for name in NAMES if name in there]
    return found


def _left(config: BrokerConfig, known: Known) -> list[Provider]:
    """Return the places from which copies have to go."""
    kinds: list[Provider] = [kind for kind, names in _copies(config).items() if names]
    if known.leaving is not None and known.leaving not in kinds:
        kinds.append(known.leaving)
    return kinds


def _require_owner(config: BrokerConfig) -> None:
    owner = config.state.stat().st_uid
    if os.geteuid() != owner:
        raise MoveRefused(
            f"{config.state} belongs to {_name(owner)}", cure=f"run it as that account: runuser -u {_name(owner)} -- …"
        )


def _require_alone(config: BrokerConfig) -> None:
    _require_owner(config)
    if serves(config.operator_socket):
        raise MoveRefused(f"a broker serves at {config.operator_socket}", cure="systemctl stop saw-broker, then again")


def _record(tx: Transaction, now: datetime, operation: str, message: str, names: list[str]) -> None:
    account = _name(os.geteuid())
    caller = BROKER if account == "saw-broker" else Caller(f"operator:{account}", "local", "")
    events = EventFactory("saw-broker", host=socket.gethostname(), new_uid=lambda: str(uuid.uuid4()))
    activity: Literal["read", "update"] = "read" if operation == "secrets.take" else "update"
    tx.record(
        events.api_activity(
            now, caller.subject(), operation, activity=activity, message=message, detail={"secrets": list(names)}
        )
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _same(one: bytes, other: bytes) -> bool:
    return hmac.compare_digest(one, other)


def _differ(name: str, source: SecretStore, target: SecretStore, cure: str) -> MoveRefused:
    return MoveRefused(
        f"{name} in {source.place} is not the one in {target.place}; neither was touched",
        cure=cure,
        details={"secret": name},
    )
