"""The setting ``database`` of ``broker.json``: where PostgreSQL is, without any secret, read strictly.

``postgresql://USER@HOST:PORT/DATABASE?passfile=/…&sslrootcert=/…`` over TLS, ``postgresql:///DATABASE?host=/run/postgresql``
over a Unix socket, or ``postgresql:///?service=NAME`` for an entry of libpq's service file (``~/.pg_service.conf``, or where
``PGSERVICEFILE`` says), which takes whatever else libpq does (https://www.postgresql.org/docs/current/libpq-connect.html).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from saw.errors import ConfigError

_FILES = ("passfile", "sslrootcert", "sslcert", "sslkey", "sslcrl")
_SECRET = ("passfile", "sslkey")
_PARAMETERS = ("host", "service", *_FILES)
_CURE = "see docs/replicas.md"


@dataclass(frozen=True)
class PostgresPlace:
    """``parameters`` as libpq takes them, without a password; ``shown`` names the place in messages."""

    parameters: Mapping[str, str]
    shown: str


def _refused(reason: str, cure: str = _CURE) -> ConfigError:
    return ConfigError(f"the setting database is not valid: {reason}", cure=cure)


def parse_database(text: str) -> PostgresPlace:
    """Read the setting; raise :class:`ConfigError` that never repeats what could hold a password."""
    if any(ord(character) <= 32 or ord(character) == 127 for character in text):
        raise _refused("it contains a space or a control character", "percent-encode it")
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qsl(parts.query, strict_parsing=True, keep_blank_values=True) if parts.query else []
    except ValueError as error:
        raise _refused("it is no URL") from error
    if parts.scheme != "postgresql":
        raise _refused("it does not begin with postgresql://", "leave it out for SQLite; " + _CURE)
    if parts.password is not None:
        raise _refused("it holds a password", "keep the password in a file of mode 0600 and name it: ?passfile=/…")
    if parts.fragment:
        raise _refused("it has a fragment", "percent-encode #")
    if parts.path.count("/") > 1:
        raise _refused("the name of the database holds a slash")
    given = dict(query)
    if len(given) != len(query):
        raise _refused("a parameter is given twice")
    if unknown := sorted(set(given) - set(_PARAMETERS)):
        raise _refused(
            f"it has the parameter {unknown[0][:32]!r}", f"it takes {', '.join(_PARAMETERS)}; all else is for a service"
        )
    for name in _FILES:
        if name in given and not Path(given[name]).is_absolute():
            raise _refused(f"{name} must be an absolute path")
    return _place(parts, port, given)


def _place(parts: SplitResult, port: int | None, given: dict[str, str]) -> PostgresPlace:
    host, database = parts.hostname or "", unquote(parts.path[1:])
    if "host" in given:
        if host or not given["host"].startswith("/"):
            raise _refused("the parameter host must be the directory of a Unix socket, and the only host")
        host = given["host"]
    if "," in host:
        raise _refused("it names more than one host", "name several hosts in a service, or one address that moves")
    if "service" in given:
        if host or parts.username or database or port:
            raise _refused("with a service it names nothing else", "put host, port, user and dbname into the service")
        return PostgresPlace(given | {"sslmode": "verify-full"}, f"service {given['service']}")
    if not host or not database:
        raise _refused("it names no host or no database")
    found = {**given, "host": host, "dbname": database, "sslmode": "verify-full"}
    if parts.username:
        found["user"] = unquote(parts.username)
    if port is not None:
        found["port"] = str(port)
    if not host.startswith("/") and "sslrootcert" not in given:
        raise _refused(
            "a connection over the network needs sslrootcert",
            "name the file of the authority that signed the server's certificate: ?sslrootcert=/…",
        )
    return PostgresPlace(found, f"database {database} at {host}")


def require_safe(place: PostgresPlace, environment: Mapping[str, str] = os.environ) -> None:
    """Raise :class:`ConfigError` when a secret is in the environment, or in a file that others can read."""
    if "PGPASSWORD" in environment:
        raise ConfigError("PGPASSWORD is set", cure="unset it and keep the password in a file: ?passfile=/…")
    for name in _FILES:
        if name not in place.parameters:
            continue
        file = Path(place.parameters[name])
        try:
            mode = file.stat().st_mode
        except OSError as error:
            raise _refused(f"{name}: {file}: {error.strerror}", "make the file, readable by the broker") from error
        if not stat.S_ISREG(mode):
            raise _refused(f"{name}: {file} is no file", "name a regular file")
        if name in _SECRET and mode & 0o077:
            raise _refused(f"{name}: others can read {file}", f"chmod 600 {file}")
