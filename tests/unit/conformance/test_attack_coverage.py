"""Every attack of docs/attacks.yml is tried by cases of the kit or by tests, and each that is named there is there.

A new attack without a proof, a case that went or a test that was renamed makes this file fail.
"""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from saw.conformance import catalogue

ROOT = Path(__file__).resolve().parents[3]
SECTIONS = {
    "network": 17, "addressing": 11, "http": 16, "credentials": 6, "process": 13, "policy": 28, "attestation": 9, "access": 10,
    "review": 10, "audit": 9,
}  # fmt: skip
"""How many attacks each section has, exactly."""
CASES = tuple(case.id for case in catalogue.attacks())
Sections = list[dict[str, Any]]


@cache
def listed() -> Sections:
    """Return the sections of the list."""
    return list(yaml.safe_load((ROOT / "docs/attacks.yml").read_text(encoding="utf-8")))


@cache
def names_in(path: str) -> frozenset[str]:
    """Return the names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def stands(name: str) -> bool:
    """Tell whether a proof is there: a test, or at least one case."""
    path, test, function = name.partition("::")
    if test:
        return (ROOT / path).is_file() and function in names_in(path)
    return any(fnmatchcase(case, name) for case in CASES)


def missing(sections: Sections) -> list[str]:
    """Return the attacks without a proof, and the proofs that are not there."""
    found = []
    for section in sections:
        for attack in section["attacks"]:
            found += [name for name in attack["by"] if not stands(name)] if attack["by"] else [attack["attack"]]
    return found


def test_every_attack_has_proofs_that_exist() -> None:
    assert missing(listed()) == []
    titles = [attack["attack"] for section in listed() for attack in section["attacks"]]
    assert len(titles) == len(set(titles))
    assert {section["section"]: len(section["attacks"]) for section in listed()} == SECTIONS


@pytest.mark.parametrize(
    "by",
    [
        [],
        ["tests/unit/policy/test_policy_bundle.py::test_that_was_renamed"],
        ["tests/unit/policy/test_gone.py::test_unsigned"],
        ["net.gone"],
        ["gone.*"],
    ],
)
def test_a_gap_is_noticed(by: list[str]) -> None:
    section = {"section": "x", "attacks": [{"attack": "an attack", "by": by}]}
    assert missing([*listed(), section]) == (by or ["an attack"])


@pytest.mark.parametrize("by", ["net.tcp.direct", "net.*", "tests/unit/policy/test_policy_bundle.py::test_unsigned"])
def test_what_is_there_is_no_gap(by: str) -> None:
    assert missing([{"section": "x", "attacks": [{"attack": "an attack", "by": [by]}]}]) == []


def test_every_case_belongs_to_a_suite_that_the_list_has() -> None:
    """The suite ``sockets`` is part of the network, ``files`` of processes."""
    among = {"sockets": "network", "files": "process"}
    assert {among.get(case.suite, case.suite) for case in catalogue.attacks()} <= set(SECTIONS)


def test_the_page_says_what_is_tried_from_inside_and_what_tests_prove() -> None:
    page = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    told = {
        title: tuple(map(int, found))
        for title, *found in re.findall(r"(?m)^\| ([A-Z][^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", page)
    }
    counted = {}
    for section in listed():
        inside = sum(any("::" not in name for name in attack["by"]) for attack in section["attacks"])
        counted[section["title"]] = (len(section["attacks"]), inside, len(section["attacks"]) - inside)
    assert told == counted
