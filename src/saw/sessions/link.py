"""The bastion's calls to the broker, over mutual TLS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import httpx
import msgspec

from saw import jsontext
from saw.errors import SawError, UnavailableError
from saw.sessions.config import BastionConfig
from saw.sessions.messages import Closing, Granted, HostKey, Redeem, Watched

T = TypeVar("T")
CONNECT_S = 5.0
_HAND_IN_S = 300.0
"""How long the broker may take for the next part of a recording, or to check all of it (seconds)."""
_PATH = "/v1/bastion"


class Refused(SawError):
    """The broker refused; code, message and cure are its own."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(str(body.get("message") or "the broker refused"), cure=str(body.get("cure") or ""))
        self.code = str(body.get("code") or "refused")


class Certified(msgspec.Struct, frozen=True):
    """A host certificate, and the authority whose certificates may log in."""

    certificate: str
    session_ca: str


class BrokerLink:
    """One HTTP client, good for one thread."""

    def __init__(self, config: BastionConfig) -> None:
        try:
            context = ssl.create_default_context(cafile=config.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(config.cert_file, config.key_file)
        except OSError as error:
            raise UnavailableError(
                f"the bastion's own certificate cannot be used: {error.strerror or error}",
                cure="run the role bastion again",
            ) from error
        self._name = config.broker_name
        self._http = httpx.Client(
            base_url=config.broker_url, verify=context, timeout=httpx.Timeout(CONNECT_S, read=15.0), trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def redeem(self, wanted: Redeem) -> Granted:
        """Open the session, which works once."""
        return self._call("POST", f"{_PATH}/sessions/redeem", Granted, wanted)

    def watch(self, session: str, wait_s: int, read_s: float) -> Watched:
        """Return as soon as the session must end, or after ``wait_s`` seconds; give up after ``read_s``."""
        return self._call("GET", f"{_PATH}/sessions/{session}?wait={wait_s}", Watched, read_s=read_s)

    def close(self, session: str, said: Closing) -> None:
        """Report the end of a session."""
        self._call("POST", f"{_PATH}/sessions/{session}/close", dict[str, Any], said)

    def hand_in(self, session: str, recording: Path) -> None:
        """Give the broker the recording of a session whose end it has heard."""
        with recording.open("rb") as stream:
            path = f"{_PATH}/sessions/{session}/recording"
            self._call("PUT", path, dict[str, Any], stream, read_s=_HAND_IN_S)

    def certify_host(self, public_key: str) -> Certified:
        """Have a host key certified."""
        return self._call("POST", f"{_PATH}/host", Certified, HostKey(public_key))

    def _call(
        self, method: str, path: str, kind: type[T], body: msgspec.Struct | BinaryIO | None = None, read_s: float = 15.0
    ) -> T:
        structured = body is None or isinstance(body, msgspec.Struct)
        kind_of_body = "application/json" if structured else "application/octet-stream"
        timeout = httpx.Timeout(CONNECT_S, read=read_s, write=read_s)
        try:
            answer = self._http.request(
                method,
                path,
                content=msgspec.json.encode(body) if isinstance(body, msgspec.Struct) else body,
                headers={"host": self._name, "content-type": kind_of_body},
                extensions={"sni_hostname": self._name, "timeout": timeout.as_dict()},
            )
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the broker does not answer: {error or type(error).__name__}", cure="try again later"
            ) from error
        try:
            if answer.is_error:
                raise Refused(jsontext.decode(answer.content, kind=dict[str, Any]))
            return jsontext.decode(answer.content, kind=kind)
        except msgspec.DecodeError as error:
            raise UnavailableError("the broker's answer cannot be read", cure="see its log") from error
