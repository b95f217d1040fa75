"""The files of a draft bundle: the base with the learned rules added, marked so that nobody takes it for a release."""

from __future__ import annotations

import json
import re

import msgspec

from saw.policy.casefile import load_cases, run_case
from saw.policy.denials import as_line
from saw.policy.learn import Lesson, request_of
from saw.policy.learned_rules import Asked
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, Bundle, load_members
from saw.policy.matcher import Matcher
from saw.policy.yamltext import dump, with_entries, with_items, with_scalars

TESTS_FILE = "tests.yaml"
REPORT_FILE = "learned.json"
_NAME_LIMIT = 63
_MARK = "-draft"


class Draft(msgspec.Struct, frozen=True):
    """The files by name, the draft's version, and the base's cases that the learned rules break."""

    files: dict[str, bytes]
    name: str
    version: str
    broken_cases: tuple[str, ...]


def draft_version(version: str) -> str:
    """Return the next minor version, marked: ``1.4.2`` becomes ``1.5.0-draft``."""
    major, minor, _ = re.split(r"[.]", version, maxsplit=2)
    return f"{major}.{int(minor) + 1}.0{_MARK}"


def build_draft(base: Bundle, lesson: Lesson, tests: bytes | None) -> Draft:
    """Return the files of the draft; ``tests`` is the base's ``tests.yaml``, to which the learned calls are added.

    Raises :class:`saw.policy.errors.PolicyError` when the draft would not load.
    """
    blueprint = base.governance.blueprint
    version = draft_version(blueprint.version)
    name = f"{blueprint.name[: _NAME_LIMIT - len(_MARK)]}{_MARK}"
    governance = with_scalars(
        base.members[GOVERNANCE_FILE], {("blueprint", "name"): name, ("blueprint", "version"): version}
    )
    policy = base.members[POLICY_FILE]
    if lesson.rules:
        policy = with_entries(policy, "network_policies", lesson.rules)
    members = {POLICY_FILE: policy, GOVERNANCE_FILE: governance}
    bundle = load_members(members)
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    broken: list[str] = []
    if tests is not None:
        cases = load_cases(tests, TESTS_FILE).cases
        broken = [outcome.name for case in cases if (outcome := run_case(case, matcher, bundle.governance)).fault]
    learned = [_case(asked, index) for index, asked in enumerate(_all(lesson), 1)]
    files = dict(members)
    if learned:
        files[TESTS_FILE] = with_items(tests or dump({"schema": 1}).encode(), "cases", learned)
    elif tests is not None:
        files[TESTS_FILE] = tests
    files[REPORT_FILE] = json.dumps({**report(lesson), "broken_cases": broken}, indent=2).encode() + b"\n"
    return Draft(files, name, version, tuple(broken))


def _all(lesson: Lesson) -> list[Asked]:
    return [asked for proposal in lesson.proposals for asked in proposal.asked]


def _case(asked: Asked, number: int) -> dict[str, object]:
    port = "" if asked.port == 443 else f":{asked.port}"
    return {
        "name": f"learned {number}: {asked.method} {asked.host}{asked.path}",
        "request": {
            "method": asked.method,
            "url": f"https://{asked.host}{port}{request_of(asked).path}",
            "binary": asked.binary,
        },
        "expect": {"verdict": "allow"},
    }


def report(lesson: Lesson) -> dict[str, object]:
    """Return the lesson for people and machines: what is proposed, from which calls, and what is not, with the reason."""
    return {
        "proposed": [
            {
                "host": proposal.asked[0].host,
                "port": proposal.asked[0].port,
                "method": proposal.asked[0].method,
                "path": proposal.path,
                "binary": proposal.asked[0].binary,
                "query": {key: list(values) for key, values in proposal.asked[0].query},
                "generalised_from": [asked.path for asked in proposal.asked] if len(proposal.asked) > 1 else [],
            }
            for proposal in lesson.proposals
        ],
        "not_proposed": [
            {
                "where": left.denial.where,
                "call": as_line(left.denial),
                "denied_as": left.denial.reason,
                "reason": left.reason,
                "cure": left.cure,
                "times": left.times,
            }
            for left in lesson.left
        ],
        "already_allowed": lesson.already_allowed,
    }
