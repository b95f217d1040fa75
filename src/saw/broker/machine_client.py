"""How a machine calls the broker: HTTPS with the certificate of its name, or with a token that it gets from the provider.

The context file's part ``machine`` says where the broker is and who the machine is. Secrets are in files; a path ``env:NAME`` is
the value of the environment variable NAME, because AWX gives files names of its own.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import httpx
import msgspec

from saw import jsontext
from saw.broker.client import BrokerRefusal, MachineAccess, OperatorClient, TokenSource, answer_of, load_context, silent
from saw.errors import ConfigError, UnavailableError

TIMEOUT_S = 60.0
RENEW_S = 30.0
"""A token is not used in its last seconds."""
MAX_TOKEN_ANSWER = 64 * 1024


class _Token(msgspec.Struct, frozen=True):
    """What the token endpoint answers (RFC 6749, section 5.1); unknown fields are others' business."""

    access_token: str
    expires_in: float = 60.0


class MachineClient:
    """Calls of a machine. ``clock`` gives seconds; ``environ`` has the variables that paths may name."""

    def __init__(
        self,
        access: MachineAccess,
        clock: Callable[[], float] = time.monotonic,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._access = access
        self._environ = environ
        self._clock = clock
        self._token: tuple[str, float] | None = None
        if not access.url.startswith("https://"):
            raise ConfigError("machine.url does not begin with https://", cure="correct the context file")
        if (access.certificate_file is None) == (access.token is None):
            raise ConfigError("machine has a certificate or a token, one of the two", cure="correct the context file")
        if access.token is not None and not access.token.url.startswith("https://"):
            raise ConfigError("machine.token.url does not begin with https://", cure="correct the context file")

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call the broker and return its answer; raise :class:`BrokerRefusal` or :class:`UnavailableError`."""
        try:
            return self._call(method, path, json)
        except BrokerRefusal as error:
            if error.code != "token_expired" or self._access.token is None:
                raise
            self._token = None
            return self._call(method, path, json)

    def _call(self, method: str, path: str, json: object | None) -> dict[str, Any]:
        access = self._access
        headers = {} if json is None else {"content-type": "application/json"}
        if access.token is not None:
            headers["authorization"] = f"Bearer {self._bearer(access.token)}"
        extensions: dict[str, Any] = {"sni_hostname": access.server_name} if access.server_name else {}
        content = None if json is None else msgspec.json.encode(json)
        url = f"{access.url.rstrip('/')}{path}"
        try:
            with httpx.Client(verify=self._context(), timeout=TIMEOUT_S, trust_env=False) as client:
                answer = client.request(method, url, content=content, headers=headers, extensions=extensions)
        except httpx.HTTPError as error:
            raise silent(error, "check machine.url and machine.ca_file") from error
        return answer_of(answer)

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._file(self._access.ca_file))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self._access.certificate_file is not None:
                key = self._access.key_file
                context.load_cert_chain(
                    self._file(self._access.certificate_file), None if key is None else self._file(key)
                )
        except OSError as error:
            raise ConfigError(
                f"the certificate of the machine cannot be used: {error.strerror or error}",
                cure="check machine.ca_file, machine.certificate_file and machine.key_file",
            ) from error
        return context

    def _file(self, path: str) -> str:
        """Return a path of the context file; raise :class:`ConfigError` when it names a variable that is not set."""
        if not path.startswith("env:"):
            return path
        found = self._environ.get(path.removeprefix("env:"), "")
        if not found:
            raise ConfigError(
                f"the environment variable {path.removeprefix('env:')[:64]} is not set", cure="set it to a path"
            )
        return found

    def _bearer(self, source: TokenSource) -> str:
        """Return a token by client credentials (RFC 6749, section 4.4); it is kept until shortly before its end."""
        if self._token is not None and self._clock() < self._token[1]:
            return self._token[0]
        try:
            secret = Path(self._file(source.client_secret_file)).read_text(encoding="ascii").strip()
            context = ssl.create_default_context(cafile=None if source.ca_file is None else self._file(source.ca_file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "the secret of the machine's client cannot be read", cure="check machine.token"
            ) from error
        body = {"grant_type": "client_credentials", **source.parameters}
        auth = (quote_plus(source.client_id), quote_plus(secret))
        try:
            with httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=False) as client:
                answer = client.post(source.url, data=body, auth=auth)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the identity provider does not answer: {error or type(error).__name__}",
                cure="check machine.token.url",
            ) from error
        if answer.status_code != 200 or len(answer.content) > MAX_TOKEN_ANSWER:
            raise ConfigError(
                f"the identity provider gives no token: it answered {answer.status_code}",
                cure="check machine.token: url, client_id, client_secret_file, parameters",
            )
        try:
            found = jsontext.decode(answer.content, kind=_Token)
        except msgspec.DecodeError as error:
            raise ConfigError(f"the provider's answer is no token: {error}", cure="check machine.token.url") from error
        self._token = (found.access_token, self._clock() + found.expires_in - RENEW_S)
        return found.access_token


def asking_client(path: Path | str | None = None) -> OperatorClient | MachineClient:
    """Return the client for the context file ``path`` (default: ``SAW_CONTEXT``): the machine that it names, else an operator."""
    context = load_context(path)
    return OperatorClient(context) if context.machine is None else MachineClient(context.machine)
