"""The pages about the installation as a whole, for those whose work it is to look: the fleet in figures, perimeters, images,
gates, people, legal holds and uses of the glass. They show and change nothing (docs/portal.md).

The fleet is for operators, the security team and auditors. What is kept for an investigation, and how often and by whom the
glass was broken, is for those who examine what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from starlette.responses import Response

from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError
from saw.broker.fleet import Fleet
from saw.broker.fleet_people import FleetPeople
from saw.broker.images import ImageState
from saw.broker.people import Person
from saw.broker.sso.access import reads_trail, sees_everything
from saw.broker.sso.sessions import Session
from saw.broker.sso.web import Visit, Web
from saw.broker.sso_settings import ROLES, Role

_Short = Annotated[str, msgspec.Meta(max_length=64)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]
_Page = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_LOOK = "operator, security or auditor"
_EXAMINE = "security or auditor"

#: Path, what the page is called, and who sees it.
PARTS: tuple[tuple[str, str, Callable[[Person], bool]], ...] = (
    ("/fleet", "Overview", sees_everything),
    ("/fleet/perimeters", "Perimeters", sees_everything),
    ("/fleet/images", "Images", sees_everything),
    ("/fleet/gates", "Gates", sees_everything),
    ("/fleet/people", "People and roles", sees_everything),
    ("/fleet/holds", "Legal holds", reads_trail),
    ("/fleet/break-glass", "Break-glass", reads_trail),
)


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page that can be asked nothing."""


class Numbered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of a list."""

    page: _Page = 1


class WantedImages(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which images: a part of the name or the beginning of the digest, a state, and which page."""

    q: _Short = ""
    state: ImageState | None = None
    page: _Page = 1


class WantedPeople(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which people: a part of the name, a role, and the name to go on behind."""

    q: _Short = ""
    role: Role | None = None
    after: _Name = ""


class WantedHolds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether released holds are wanted too."""

    show: Literal["", "all"] = ""


class FleetPages:
    """What these pages show."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker
        self._fleet = Fleet(broker.services, broker.upkeep)
        self._people = FleetPeople(broker.services)

    def overview(self, visit: Visit) -> Response:
        """The fleet in figures, and what needs a look."""
        session = self._session(visit)
        visit.asked(Nothing)
        domain = self._broker.config.trust_domain
        return self._shown(visit, "fleet.html", session, trust_domain=domain, **self._fleet.figures())

    def perimeters(self, visit: Visit) -> Response:
        """Perimeters, bastions and machines: whose certificate counts, and who reports."""
        session = self._session(visit)
        visit.asked(Nothing)
        places = sorted(self._broker.config.numbers.places.items())
        return self._shown(
            visit,
            "fleet_perimeters.html",
            session,
            places=places,
            examines=reads_trail(session.person),
            **self._fleet.parts(),
        )

    def images(self, visit: Visit) -> Response:
        """Golden images, where each stands, and on how many workspaces it is."""
        session = self._session(visit)
        wanted = visit.asked(WantedImages)
        found = self._fleet.images(wanted.q, wanted.state, wanted.page)
        return self._shown(visit, "fleet_images.html", session, wanted=wanted, states=list(ImageState), **found)

    def gates(self, visit: Visit) -> Response:
        """Gates, and what was asked at them."""
        session = self._session(visit)
        wanted = visit.asked(Numbered)
        return self._shown(visit, "fleet_gates.html", session, wanted=wanted, **self._fleet.gates(wanted.page))

    def people(self, visit: Visit) -> Response:
        """People with the roles in force, which groups give them, and the programs that may ask."""
        session = self._session(visit)
        wanted = visit.asked(WantedPeople)
        found = self._people.listed(wanted.q, wanted.role, wanted.after)
        rules = self._people.rules()
        return self._shown(visit, "fleet_people.html", session, wanted=wanted, role_names=ROLES, rules=rules, **found)

    def holds(self, visit: Visit) -> Response:
        """Legal holds in force, or all there ever were."""
        session = self._session(visit)
        everything = visit.asked(WantedHolds).show == "all"
        found = self._broker.holds.listed(everything=everything)
        return self._shown(visit, "fleet_holds.html", session, everything=everything, **found)

    def break_glass(self, visit: Visit) -> Response:
        """Reviews whose glass was broken: by whom, why, and what became of the look afterwards."""
        session = self._session(visit)
        wanted = visit.asked(Numbered)
        return self._shown(
            visit, "fleet_break_glass.html", session, wanted=wanted, **self._fleet.broken_glass(wanted.page)
        )

    def _session(self, visit: Visit) -> Session:
        """Return the session behind a page of :data:`PARTS`; raise :class:`ForbiddenError` for roles that do not see it."""
        session = visit.session()
        sees = next(sees for path, _, sees in PARTS if path == visit.path)
        if not sees(session.person):
            wanted = _LOOK if sees is sees_everything else _EXAMINE
            raise ForbiddenError(f"this takes the role {wanted}", cure="ask somebody who has it", code="not_allowed")
        return session

    def _shown(self, visit: Visit, name: str, session: Session, **values: Any) -> Response:
        parts = [(path, text) for path, text, sees in PARTS if sees(session.person)]
        return self._web.render(name, session, parts=parts, here=visit.path, **values)
