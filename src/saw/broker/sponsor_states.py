"""Whether anything may be done on behalf of a sponsor: asked by whatever begins something, inside its transaction."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Connection, select

from saw.broker.errors import ForbiddenError
from saw.broker.schema import sponsors

SponsorState = Literal["active", "disabled"]


class SponsorDisabled(ForbiddenError):
    """Nothing is begun on behalf of this sponsor, and nothing goes on."""

    code = "sponsor_disabled"


def sponsor_key(name: str) -> str:
    """Return ``name`` as sponsors are told apart: operators write names as they like, identity providers in lower case."""
    return name.strip().casefold()


def is_disabled(connection: Connection, name: str) -> bool:
    """Tell whether the sponsor called ``name`` is disabled."""
    wanted = (sponsors.c.name == sponsor_key(name)) & (sponsors.c.state == "disabled")
    return connection.execute(select(sponsors.c.name).where(wanted)).first() is not None


def require_enabled(connection: Connection, name: str) -> None:
    """Raise :class:`SponsorDisabled` when the sponsor called ``name`` is disabled."""
    if is_disabled(connection, name):
        raise SponsorDisabled(
            f"the sponsor {name} is disabled",
            cure="saw sponsor show tells why; saw sponsor enable takes it back",
        )
