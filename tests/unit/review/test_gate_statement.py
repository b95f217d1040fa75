"""The statement of a change to the fleet: every bound input counts, it has one form, and people see all of it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from saw.review.gate import (
    MAX_VALUE,
    BoundFile,
    BoundHost,
    BoundVariable,
    GateRefused,
    GateRequest,
    GateStatement,
    bound_variable,
    check_gate,
    differences,
    gate_digest,
    render_gate,
)

ASKER = "machine:awx"


def file(path: str, content: str = "x", kind: str = "file") -> BoundFile:
    return msgspec.convert(
        {"path": path, "kind": kind, "sha256": hashlib.sha256(content.encode()).hexdigest()}, BoundFile
    )


STATED = GateStatement(
    gate="rolling-update",
    purpose="kernel of November",
    requested_by="ada@example.com",
    playbook="update.yml",
    first=3,
    total=6,
    hosts=(BoundHost(name="ws-3", address="10.0.0.3"), BoundHost(name="ws-4")),
    files=(file("roles/update/tasks/main.yml"), file("update.yml")),
    excluded=(".git",),
    variables=(bound_variable("channel", "stable"), bound_variable("version", 7)),
    unbound=("token",),
    image="1" * 64,
    policy="2" * 64,
)  # fmt: skip


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "changed",
    [
        {"gate": "rolling-updates"}, {"purpose": "kernel of December"}, {"requested_by": "ben@example.com"},
        {"playbook": "other.yml"}, {"first": 2}, {"total": 7}, {"image": "3" * 64}, {"image": ""}, {"policy": ""},
        {"hosts": STATED.hosts[:1]}, {"hosts": (BoundHost(name="ws-3", address="10.0.0.9"), STATED.hosts[1])},
        {"files": STATED.files[:1]}, {"files": (file("roles/update/tasks/main.yml", "y"), STATED.files[1])},
        {"files": (file("roles/update/tasks/main.yml", kind="program"), STATED.files[1])},
        {"excluded": ()}, {"unbound": ()}, {"unbound": ("secret_key", "token")}, {"variables": ()},
        {"variables": (STATED.variables[0], bound_variable("version", "7"))},
    ],
)  # fmt: skip
def test_a_change_anywhere_gives_another_digest_and_is_named(changed: dict[str, Any]) -> None:
    other = msgspec.structs.replace(STATED, **changed)
    assert gate_digest(ASKER, other) != gate_digest(ASKER, STATED)
    assert differences(STATED, other)
    same = msgspec.structs.replace(STATED)
    assert gate_digest(ASKER, same) == gate_digest(ASKER, STATED)
    assert differences(STATED, same) == []


@pytest.mark.control("REV-02")
def test_what_one_client_asked_is_never_anothers() -> None:
    assert gate_digest("machine:other", STATED) != gate_digest(ASKER, STATED)


def test_the_digest_is_over_type_asker_and_canonical_json_as_documented() -> None:
    parts = [b"saw-gate-statement/1", ASKER.encode(), rfc8785.dumps(msgspec.to_builtins(STATED))]
    raw = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert gate_digest(ASKER, STATED) == hashlib.sha256(raw).hexdigest()


names = st.lists(st.text("abz/.-é", min_size=1, max_size=8), min_size=1, max_size=4, unique=True).map(sorted)
contents = st.text(max_size=6)
trees = names.flatmap(
    lambda paths: st.lists(contents, min_size=len(paths), max_size=len(paths)).map(lambda c: tuple(map(file, paths, c)))
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | contents, lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@pytest.mark.control("REV-02")
@given(trees, trees, values, values)
def test_two_statements_share_a_digest_only_when_they_are_the_same(one: Any, two: Any, left: Any, right: Any) -> None:
    first, second = (
        msgspec.structs.replace(STATED, files=tree, variables=(bound_variable("v", value),))
        for tree, value in ((one, left), (two, right))
    )
    assert (gate_digest(ASKER, first) == gate_digest(ASKER, second)) == (first == second)
    assert bool(differences(first, second)) == (first != second)
    wire = msgspec.json.decode(msgspec.json.encode(first), type=GateStatement)
    assert check_gate(wire) == check_gate(first)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hosts": STATED.hosts[::-1]}, "hosts are not sorted"),
        ({"files": (STATED.files[0], STATED.files[0])}, "files are not sorted"),
        ({"variables": STATED.variables[::-1]}, "variables are not sorted"),
        ({"variables": (BoundVariable(name="v", sha256="0" * 64, value='"shown"'),)}, "another value's"),
        ({"first": 6}, "more hosts than the play"),
        ({"purpose": "a\u202eb"}, "printable"),
        ({"requested_by": " "}, "printable"),
    ],
)
def test_a_statement_has_one_form_alone(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(GateRefused, match=said):
        check_gate(msgspec.structs.replace(STATED, **changed))
    assert check_gate(STATED)


def test_fields_that_are_not_known_are_refused() -> None:
    plain = msgspec.to_builtins(STATED)
    assert msgspec.convert(plain, GateStatement) == STATED
    with pytest.raises(msgspec.ValidationError, match="force"):
        msgspec.convert({**plain, "force": True}, GateStatement)


def test_a_value_that_json_cannot_hold_is_refused_and_a_long_one_is_bound_by_digest() -> None:
    with pytest.raises(GateRefused, match="variable v"):
        bound_variable("v", object())
    long = bound_variable("v", "x" * MAX_VALUE)
    assert long.value is None
    assert bound_variable("v", "x").value == '"x"'
    assert "NOT shown" in render_gate(ASKER, GateRequest(statement=msgspec.structs.replace(STATED, variables=(long,))))


@pytest.mark.control("REV-02")
def test_people_see_hosts_variables_files_and_what_changed_since_the_last_time() -> None:
    first = render_gate(ASKER, GateRequest(statement=STATED))
    assert "no statement of this gate was approved before" in first
    for text in (
        "wave       hosts 3 to 4 of 6",
        "ws-3 (10.0.0.3)",
        'channel = "stable"',
        "version = 7",
        "  .git",
        "NOT bound:\n  token",
    ):
        assert text in first
    assert all(item.sha256 in first for item in STATED.files)
    assert "asked by   ada@example.com, through machine:awx" in first
    now = msgspec.structs.replace(
        STATED,
        files=(file("roles/update/tasks/main.yml", "y"), STATED.files[1]),
        hosts=(BoundHost(name="ws-5"),),
        first=5,
    )
    second = render_gate(ASKER, GateRequest(statement=now, before=STATED))
    for text in ("~ file roles/update/tasks/main.yml", "- host ws-3", "+ host ws-5", "first: 3 → 5"):
        assert text in second
    assert "~ file update.yml" not in second
    assert "as the last approved statement" in render_gate(ASKER, GateRequest(statement=STATED, before=STATED))


def test_what_steers_a_terminal_or_looks_like_another_name_is_written_as_an_escape() -> None:
    sly = msgspec.structs.replace(
        STATED,
        hosts=(BoundHost(name="ws-\x1b[2J"),),
        files=(file("a\nhosts of this wave:"),),
        variables=(bound_variable("v", "\u202e"),),
    )
    shown = render_gate(ASKER, GateRequest(statement=sly))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert shown.count("\nhosts of this wave:") == 1
    assert "\\u{1b}" in shown
