"""The provider ``environment``, for tests alone: whatever is started inherits it, so nothing is secret there."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import msgspec

from saw import jsontext
from saw.secrets.store import SecretError, check_name, is_name, missing

VARIABLE = "SAW_TEST_SECRETS"
"""Holds a JSON object: names of secrets, and their values in Base64 (RFC 4648, section 4)."""


class EnvironmentStore:
    """Secrets in :data:`VARIABLE`; nothing can be written. Refused unless the caller says that this is a test."""

    kind = "environment"
    place = f"the variable {VARIABLE}"

    def __init__(self, environ: Mapping[str, str], *, only_for_tests: bool) -> None:
        if only_for_tests is not True:
            raise SecretError(
                "the environment is no place for secrets",
                cure="use files, sealed or vault; in a test say only_for_tests",
            )
        try:
            given = jsontext.decode(environ.get(VARIABLE, "{}"), kind=dict[str, str])
            self._values = {name: base64.b64decode(value, validate=True) for name, value in given.items()}
        except (msgspec.DecodeError, binascii.Error) as error:
            raise SecretError(f"{VARIABLE} cannot be read", cure="a JSON object of names and Base64") from error
        if not all(map(is_name, self._values)):
            raise SecretError(f"{VARIABLE} holds a name that is none", cure="see the provider files for names")

    def read(self, name: str) -> bytes:
        """Return a secret."""
        try:
            return self._values[check_name(name)]
        except KeyError as error:
            raise missing(name, self.place) from error

    def write(self, name: str, value: bytes, *, new: bool = False) -> None:
        """Refuse."""
        del value, new
        raise SecretError(f"{name} cannot be written to the environment", cure=f"set {VARIABLE} before the start")

    def remove(self, name: str) -> None:
        """Refuse."""
        raise SecretError(f"{name} cannot be removed from the environment", cure=f"set {VARIABLE} before the start")

    def names(self) -> list[str]:
        """Return the names of all secrets."""
        return sorted(self._values)

    def close(self) -> None:
        """Nothing is held."""
