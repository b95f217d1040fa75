"""A comparison of two texts gives back both of them, is as short as it can be, and costs what it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from saw.review.line_diff import Effort, Line, diff_lines, hunks

TEXTS = st.lists(st.sampled_from([b"a", b"b", b"c", b""]), max_size=14)


def texts(lines: list[Line], old: list[bytes], new: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    before = [old[at] for sign, at in lines if sign != "+"]
    after = []
    for sign, at in lines:
        if sign == "+":
            after.append(new[at])
        elif sign == " ":
            after.append(old[at])
    return before, after


def shortest(old: list[bytes], new: list[bytes]) -> int:
    row = list(range(len(new) + 1))
    for at, line in enumerate(old, 1):
        last, row[0] = row[0], at
        for column, other in enumerate(new, 1):
            last, row[column] = row[column], last if line == other else 1 + min(row[column], row[column - 1])
    return row[-1]


@given(TEXTS, TEXTS)
def test_both_texts_come_back_and_no_shorter_way_exists(old: list[bytes], new: list[bytes]) -> None:
    lines = diff_lines(old, new, Effort())
    assert texts(lines, old, new) == (old, new)
    assert sum(sign != " " for sign, _ in lines) == shortest(old, new)


@given(TEXTS, TEXTS, st.integers(0, 40))
def test_without_room_for_more_work_the_answer_is_longer_and_still_right(
    old: list[bytes], new: list[bytes], steps: int
) -> None:
    assert texts(diff_lines(old, new, Effort(steps)), old, new) == (old, new)


def test_work_is_bounded_and_used_up_once_for_all_files() -> None:
    old, new = [f"old {at}".encode() for at in range(5000)], [f"new {at}".encode() for at in range(5000)]
    effort = Effort()
    lines = diff_lines(old, new, effort)
    assert texts(lines, old, new) == (old, new)
    first = effort.left
    assert first < Effort().left
    for _ in range(3):
        diff_lines(old, new, effort)
    assert effort.left > -20_000, "each file costs little once nothing is left"


def test_parts_have_three_lines_around_them_and_join_where_they_meet() -> None:
    old = [str(at).encode() for at in range(40)]
    new = [*old[:10], b"x", *old[11:14], b"y", *old[15:30], b"z", *old[31:]]
    lines = diff_lines(old, new, Effort())
    found = hunks(lines)
    assert len(found) == 2
    assert [sign for sign, _ in lines[slice(*found[1])]] == [" "] * 3 + ["-", "+"] + [" "] * 3
    assert hunks(diff_lines(old, old, Effort())) == []
