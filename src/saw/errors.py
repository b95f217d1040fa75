"""The base of every error that a person may see."""

from __future__ import annotations


class SawError(Exception):
    """An error that names the thing, the reason and the cure.

    Subclasses set ``code`` (stable, machine-readable, snake_case). ``details`` holds JSON-serialisable values and never
    a secret.
    """

    code = "error"

    def __init__(self, message: str, *, cure: str = "", details: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.details: dict[str, object] = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.cure})" if self.cure else self.message

    def as_dict(self) -> dict[str, object]:
        """Return the machine-readable form used by ``--json`` and by the Ansible modules' ``failure``."""
        return {"code": self.code, "message": self.message, "cure": self.cure, "details": self.details}


class ConfigError(SawError):
    """A configuration file or value cannot be used."""

    code = "config_invalid"


class UnavailableError(SawError):
    """A service or file that is needed is not there (yet)."""

    code = "unavailable"
