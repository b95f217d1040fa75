"""Tickets of terminals count once, for a short time, for one sign-in and workspace; places are bounded."""

from __future__ import annotations

from itertools import count

import pytest

from saw.broker.errors import BusyError, ForbiddenError
from saw.broker.terminal.tickets import TICKET_S, Places, Ticket, Tickets

pytestmark = pytest.mark.control("ID-02")
ADA = Ticket("ss-1", "ws-a")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tickets(clock: Clock) -> Tickets:
    numbers = count()
    return Tickets(clock, lambda: f"secret-{next(numbers)}")


def test_a_ticket_counts_until_its_time_is_over(tickets: Tickets, clock: Clock) -> None:
    in_time, late = tickets.issue(ADA), tickets.issue(Ticket("ss-2", "ws-a"))
    clock.now = TICKET_S - 0.001
    tickets.take(in_time, ADA)
    clock.now = TICKET_S
    with pytest.raises(ForbiddenError, match="too old"):
        tickets.take(late, Ticket("ss-2", "ws-a"))


@pytest.mark.parametrize("other", [Ticket("ss-2", "ws-a"), Ticket("ss-1", "ws-b")])
def test_a_ticket_shown_for_something_else_is_refused_and_used_up(tickets: Tickets, other: Ticket) -> None:
    secret = tickets.issue(ADA)
    for shown in (other, ADA):
        with pytest.raises(ForbiddenError):
            tickets.take(secret, shown)
    tickets.take(tickets.issue(other), other)


def test_a_new_ticket_takes_the_place_of_the_one_before(tickets: Tickets) -> None:
    first, second = tickets.issue(ADA), tickets.issue(ADA)
    with pytest.raises(ForbiddenError):
        tickets.take(first, ADA)
    tickets.take(second, ADA)


def test_nobody_fills_the_memory_with_tickets(tickets: Tickets) -> None:
    first = tickets.issue(ADA)
    for number in range(1024):
        last = tickets.issue(Ticket("ss-2", f"ws-{number}"))
    with pytest.raises(ForbiddenError):
        tickets.take(first, ADA)
    tickets.take(last, Ticket("ss-2", "ws-1023"))


def test_places_are_bounded_for_each_person_and_for_all() -> None:
    places = Places(per_person=2, in_all=3)
    for person in ("ada", "ada", "ben"):
        places.take(person)
    for person, why in (("ada", "you have 2 terminals open"), ("ben", "3 terminals are open")):
        with pytest.raises(BusyError, match=why):
            places.look(person)
        with pytest.raises(BusyError, match=why):
            places.take(person)
    places.give_back("ada")
    places.take("ben")
    places.give_back("ben")
    places.look("ada")
