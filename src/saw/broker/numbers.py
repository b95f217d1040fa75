"""Numbers of workspaces: given at registration, given back when a workspace is decommissioned.

A number is a network, ports and devices (:mod:`saw.addressing`). Each is found by index, however many workspaces there are: the
lowest that was given back, else the one after the highest in use. Writers follow one another (:mod:`saw.broker.store`), and the
index ``workspaces_number_in_use`` refuses a number that two would have.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, and_, exists, func, select, text

from saw.addressing import HIGHEST, Band
from saw.broker.errors import ConflictError, MalformedError
from saw.broker.number_settings import NumberSettings
from saw.broker.schema import freed_numbers, workspaces


def free_number(connection: Connection, settings: NumberSettings, place: str = "") -> int:
    """Return a number for a new workspace at ``place`` and take it off the numbers that were given back.

    Raises :class:`MalformedError` for an unknown place, :class:`ConflictError` (``no_free_number``) when all are in use.
    """
    if place and place not in settings.places:
        raise MalformedError(
            f"there is no place {place[:64]!r}", cure="name one of numbers.places, or none", code="unknown_place"
        )
    bands = list(settings.bands(place))
    for search in (_given_back, _next, _gap):
        for band in bands:
            number = search(connection, band)
            if number is not None:
                connection.execute(freed_numbers.delete().where(freed_numbers.c.number == number))
                return number
    count = sum(band.last - band.first + 1 for band in bands)
    where = (
        f"numbers.places.{place} of broker and perimeter"
        if place
        else "numbers.most of the broker, numbers of the perimeter"
    )
    raise ConflictError(
        f"all {count} workspace numbers{f' of {place}' if place else ''} are in use",
        cure=f"decommission a workspace, or raise {where} (docs/scale.md; {HIGHEST} at most)",
        code="no_free_number",
        details={"place": place, "numbers": count},
    )


def give_back(connection: Connection, number: int) -> None:
    """Let ``number`` be given again: its workspace is decommissioned."""
    connection.execute(freed_numbers.delete().where(freed_numbers.c.number == number))
    connection.execute(freed_numbers.insert().values(number=number))


#: Written out, so that the partial index serves it.
_IN_USE = text("workspaces.state != 'decommissioned'")


def _given_back(connection: Connection, band: Band) -> int | None:
    # A broker of before this table, which shares the database during an update, gives numbers without looking here.
    used = exists().where(and_(workspaces.c.number == freed_numbers.c.number, _IN_USE)).select_from(workspaces)
    free = freed_numbers.c.number.between(band.first, band.last) & ~used
    query = select(freed_numbers.c.number).where(free).order_by(freed_numbers.c.number).limit(1)
    return connection.execute(query).scalar_one_or_none()


def _next(connection: Connection, band: Band) -> int | None:
    wanted = and_(workspaces.c.number.between(band.first, band.last), _IN_USE)
    last = connection.execute(select(func.max(workspaces.c.number)).where(wanted)).scalar_one_or_none()
    number = band.first if last is None else int(last) + 1
    return number if number <= band.last else None


def _gap(connection: Connection, band: Band) -> int | None:
    """Look at each number, which is only done before a refusal."""
    wanted = and_(workspaces.c.number.between(band.first, band.last), _IN_USE)
    used = connection.execute(select(workspaces.c.number).where(wanted).order_by(workspaces.c.number)).scalars()
    return first_gap(used, band)


def first_gap(used: Iterable[int], band: Band) -> int | None:
    """Return the lowest number of ``band`` that is not in ``used``, which ascends; None when there is none."""
    expected = band.first
    for number in used:
        if number != expected:
            return expected
        expected += 1
    return expected if expected <= band.last else None
