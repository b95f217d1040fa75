"""Errors of the policy package: what is wrong in a file, a request's form, a bundle or a repository."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from saw.errors import SawError


class Problem(msgspec.Struct, frozen=True):
    """One thing wrong in one file: where it is (1-based), which field, why it is refused, what cures it."""

    file: str
    line: int
    column: int
    field: str
    reason: str
    cure: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}"
        text = f"{where}: {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"
        return f"{text}; {self.cure}" if self.cure else text


class PolicyError(SawError):
    """A policy file cannot be used; ``problems`` names every fault found, in file order."""

    code = "policy_invalid"

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        files = sorted({problem.file for problem in self.problems})
        count = len(self.problems)
        listing = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(
            f"{', '.join(files)}: {count} problem{'' if count == 1 else 's'}\n{listing}",
            details={"problems": [msgspec.to_builtins(problem) for problem in self.problems]},
        )


class NotCanonical(SawError):
    """A request path has a form that two parsers could read differently."""

    code = "not_canonical"


class BundleRefused(SawError):
    """A signed bundle fails verification; ``code`` tells why.

    Codes: ``malformed``, ``unsigned``, ``threshold``, ``expired``, ``not_yet_valid``, ``rolled_back``,
    ``member_mismatch``, ``policy_invalid``.
    """

    code = "malformed"

    def __init__(self, code: str, message: str, *, cure: str = "", details: dict[str, object] | None = None) -> None:
        super().__init__(message, cure=cure, details=details)
        self.code = code


class RepositoryError(SawError):
    """The TUF repository, or what it served, is refused; ``code`` tells why.

    Codes: ``freeze`` (expired metadata), ``rollback``, ``threshold``, ``unreachable``, ``malformed``, ``not_found``,
    ``stale_base``, ``bundle`` (a target is not a valid bundle), ``mix_and_match``.
    """

    code = "repository"

    def __init__(self, code: str, message: str, *, cure: str = "", details: dict[str, object] | None = None) -> None:
        super().__init__(message, cure=cure, details=details)
        self.code = code


class KeyFileError(SawError):
    """A signing key cannot be read or written."""

    code = "key_file"
