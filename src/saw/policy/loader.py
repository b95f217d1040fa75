"""Read policy files and bundle folders: everything that is wrong is told at once, with its place and its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from saw.policy.checks_bundle import (
    MAX_ALIKE,
    MAX_COMPARISONS,
    MAX_PROBLEMS,
    Told,
    agreement_problems,
    endpoint_specificity,
    rule_problems,
)
from saw.policy.checks_governance import GOVERNANCE_CHECKS
from saw.policy.checks_policy import POLICY_CHECKS
from saw.policy.decode import Checks, Decoder, Steps, locate, path_text
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Governance
from saw.policy.model import Policy
from saw.policy.yamltree import parse

__all__ = [
    "GOVERNANCE_FILE",
    "MAX_ALIKE",
    "MAX_COMPARISONS",
    "MAX_PROBLEMS",
    "MEMBERS",
    "POLICY_FILE",
    "Bundle",
    "cross_problems",
    "endpoint_specificity",
    "load_bundle_folder",
    "load_governance",
    "load_members",
    "load_policy",
]

POLICY_FILE = "policy.yaml"
GOVERNANCE_FILE = "governance.yaml"
MEMBERS = (POLICY_FILE, GOVERNANCE_FILE)
"""The files of a bundle."""

T = TypeVar("T", bound=msgspec.Struct)


class Bundle(msgspec.Struct, frozen=True):
    """The two files as they are on disk (``members``), and what they say."""

    members: dict[str, bytes]
    policy: Policy
    governance: Governance


class _File(Generic[T]):
    """One file as far as it could be read: its values, of which parts may be unknown, and what is wrong."""

    def __init__(self, raw: bytes, name: str, kind: type[T], checks: Checks) -> None:
        self.name = name
        self.kind = kind
        self.value: T | None = None
        self.problems: list[Problem] = []
        try:
            self._root, self.problems = parse(raw, name)
        except PolicyError as error:
            self.problems = list(error.problems)
            return
        decoder = Decoder(name, checks)
        self.value = decoder.structure(self._root, kind, "")
        self.problems += decoder.problems

    def tell(self, steps: Steps, reason: str, cure: str) -> None:
        """Add a problem at the value that ``steps`` lead to."""
        node = locate(self._root, steps)
        self.problems.append(Problem(self.name, node.line, node.column, path_text(steps), reason, cure))

    def listed(self) -> list[Problem]:
        """Return the problems in file order, as many as are listed."""
        problems = sorted(self.problems, key=lambda problem: (problem.line, problem.column))
        if len(problems) <= MAX_PROBLEMS:
            return problems
        rest = f"there are {len(problems) - MAX_PROBLEMS} more problems"
        last = Problem(self.name, problems[MAX_PROBLEMS - 1].line, 1, "", rest, "correct the others first")
        return [*problems[:MAX_PROBLEMS], last]

    def whole(self) -> T:
        """Return the value; raise :class:`PolicyError` with all problems when there are any."""
        if self.problems or not isinstance(self.value, self.kind):
            raise PolicyError(self.listed())
        return self.value


def _policy_file(raw: bytes, name: str) -> _File[Policy]:
    file = _File(raw, name, Policy, POLICY_CHECKS)
    if file.value is not None:
        rule_problems(file.value, file.tell)
    return file


def load_policy(raw: bytes, name: str = POLICY_FILE) -> Policy:
    """Return the policy in ``raw``; raise :class:`PolicyError` with all problems."""
    return _policy_file(raw, name).whole()


def load_governance(raw: bytes, name: str = GOVERNANCE_FILE) -> Governance:
    """Return the governance in ``raw``; raise :class:`PolicyError` with all problems."""
    return _File(raw, name, Governance, GOVERNANCE_CHECKS).whole()


def load_members(members: dict[str, bytes], prefix: str = "") -> Bundle:
    """Return the bundle of these files; problems of both files, and between them, are reported together."""
    problems = [
        Problem(prefix + name, 1, 1, "", "the file is missing", f"add {name}")
        for name in MEMBERS
        if name not in members
    ]
    problems += [
        Problem(prefix + name, 1, 1, "", "a bundle has no such member", "remove it")
        for name in members
        if name not in MEMBERS
    ]
    policy = _policy_file(members[POLICY_FILE], prefix + POLICY_FILE) if POLICY_FILE in members else None
    governance = (
        _File(members[GOVERNANCE_FILE], prefix + GOVERNANCE_FILE, Governance, GOVERNANCE_CHECKS)
        if GOVERNANCE_FILE in members
        else None
    )
    if policy is not None and governance is not None and policy.value is not None and governance.value is not None:
        agreement_problems(policy.value, governance.value, policy.tell, governance.tell)
    for file in (policy, governance):
        problems += file.listed() if file is not None else []
    if problems or policy is None or governance is None:
        raise PolicyError(problems)
    return Bundle(dict(members), policy.whole(), governance.whole())


def load_bundle_folder(path: Path | str) -> Bundle:
    """Return the bundle in the folder ``path``; other files there (tests, notes) are no part of it."""
    folder = Path(path)
    members: dict[str, bytes] = {}
    problems: list[Problem] = []
    for name in MEMBERS:
        try:
            members[name] = (folder / name).read_bytes()
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            problems.append(Problem(str(folder / name), 1, 1, "", reason, "a bundle folder holds both files"))
    if problems:
        raise PolicyError(problems)
    return load_members(members, f"{folder}/")


def cross_problems(policy: Policy, governance: Governance) -> list[Problem]:
    """Return what is wrong between the two files, each of which is right by itself and was read elsewhere."""
    problems: list[Problem] = []

    def of(file: str) -> Told:
        def tell(steps: Steps, reason: str, cure: str) -> None:
            problems.append(Problem(file, 1, 1, path_text(steps), reason, cure))

        return tell

    agreement_problems(policy, governance, of(POLICY_FILE), of(GOVERNANCE_FILE))
    return problems
