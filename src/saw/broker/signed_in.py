"""The command line's own session with the broker: where its secret is kept, and how the broker is called with it."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import load_json, write_private

FILE_VARIABLE = "SAW_SESSION"
TIMEOUT_S = 30.0
OPERATOR_PREFIX = "/operator"
"""Below this the pages serve the operators' calls to people who signed in."""


class NotSignedIn(SawError):
    """There is no session, or it has ended."""

    code = "not_signed_in"


class Refused(SawError):
    """The broker refused; code, message and cure are the broker's."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(str(body.get("message") or "the broker refused"), cure=str(body.get("cure") or ""))
        self.code = str(body.get("code") or "refused")


class Place(msgspec.Struct, frozen=True):
    """Where people sign in: ``url`` as in a browser, and the authorities (PEM file) of its certificate; None: the system's."""

    url: str
    ca_file: str | None = None


class StoredSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``saw login`` keeps (0600). ``token`` is a secret."""

    url: str
    ca_file: str | None
    name: str
    expires_at: str
    token: str

    @property
    def place(self) -> Place:
        """Where it belongs to."""
        return Place(self.url, self.ca_file)


def session_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the session is kept: ``SAW_SESSION``, else ``saw/session.json`` below the user's configuration."""
    named = environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".config")
    return Path(base) / "saw" / "session.json"


def store(session: StoredSession, path: Path) -> None:
    """Write the session so that its owner alone reads it; its directory is made private where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, msgspec.json.encode(session))


def load(path: Path) -> StoredSession:
    """Return the stored session; raise :class:`NotSignedIn` without one, :class:`ConfigError` when others can read it."""
    try:
        found = path.lstat()
    except FileNotFoundError as error:
        raise NotSignedIn("nobody is signed in", cure="saw login --url https://…") from error
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(f"{path} is not a private file of yours", cure="remove it, and run saw login again")
    return load_json(path, StoredSession)


@contextmanager
def signed_in_client(timeout_s: float) -> Iterator[httpx.Client]:
    """Give a client for the operators' calls of the stored session; raises as :func:`load`."""
    session = load(session_file())
    try:
        context = ssl.create_default_context(cafile=session.ca_file)
    except OSError as error:
        raise ConfigError(f"{session.ca_file} cannot be read: {error.strerror}", cure="run saw login again") from error
    base = f"{session.url.rstrip('/')}{OPERATOR_PREFIX}"
    headers = {"authorization": f"Bearer {session.token}"}
    with httpx.Client(verify=context, base_url=base, timeout=timeout_s, headers=headers) as client:
        yield client


def call(place: Place, method: str, path: str, json: object | None = None, *, token: str = "") -> dict[str, Any]:
    """Call the broker's pages and return the answer; raise :class:`Refused` or :class:`UnavailableError`."""
    if not place.url.startswith("https://"):
        raise ConfigError(f"{place.url!r} does not begin with https://", cure="give the address that people type")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        context = ssl.create_default_context(cafile=place.ca_file)
        with httpx.Client(verify=context, timeout=TIMEOUT_S, headers=headers) as client:
            answer = client.request(method, f"{place.url.rstrip('/')}{path}", json=json)
        body = jsontext.decode(answer.content, kind=dict[str, Any])
    except (httpx.HTTPError, OSError) as error:
        raise UnavailableError(
            f"{place.url} does not answer: {error or type(error).__name__}", cure="check --url, --ca and the network"
        ) from error
    except msgspec.DecodeError as error:
        raise UnavailableError(f"{place.url} is no broker's sign-in", cure="check --url") from error
    if answer.is_error:
        raise Refused(body)
    return body
