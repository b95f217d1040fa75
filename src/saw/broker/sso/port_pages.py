"""The part of a workspace's page about granted ports: who reaches which until when, a new grant, the end of one (control ID-02).

To grant takes the roles of the call (:data:`saw.broker.operator_roles.ALLOWED`), and that people may operate at all
(``sso.operate``). To end a grant takes those roles, or being the one whom it is for: that only narrows.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError
from saw.broker.forwarding_settings import MOST_HOURS
from saw.broker.forwards import GrantForward, Port, Reason, RevokeForward, unknown_grant
from saw.broker.lifecycle import State
from saw.broker.operator_roles import ALLOWED
from saw.broker.people import Person
from saw.broker.registry import unknown_workspace
from saw.broker.sso.access import is_sponsor, may_attach, may_end, sees_workspace
from saw.broker.sso.refused import record_refused
from saw.broker.sso.sessions import Session
from saw.broker.sso.web import Visit, Web, redirect

SHOWN = 100
"""Most grants on the page of a workspace, the newest."""
HOUR_S = 3600
_NOBODY_ENTERS = frozenset({State.QUARANTINED, State.DECOMMISSIONED})


class GrantForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which port, for how many hours, and why. It is granted to the sponsor: nobody else opens sessions with a workspace."""

    port: Port
    hours: Annotated[int, msgspec.Meta(ge=1, le=MOST_HOURS)]
    reason: Reason


class PortPages:
    """What this part shows and does."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker
        self._rules = broker.config.forwarding

    def of_workspace(self, session: Session, workspace: dict[str, Any], *, everything: bool) -> dict[str, Any]:
        """Return what the page of a workspace says of its ports, for the template ``workspace_ports.html``."""
        person, rules = session.person, self._rules
        found = self._broker.forwards.listed(workspace["id"], everything=True)["forwards"]
        counting = [one for one in found if one["state"] == "granted"]
        shown = (found if everything else counting)[:SHOWN]
        mine = [
            one["port"] for one in counting if one["to"] == f"user:{person.name}" and self._on(one["port"], workspace)
        ]
        return {
            "on": rules is not None,
            "ports": rules.ports if rules else (),
            "max_hours": rules.max_hours if rules else 0,
            "of_blueprint": rules is not None and rules.allows_blueprint(workspace["blueprint"]),
            "admitted": workspace["state"] not in _NOBODY_ENTERS,
            "may_grant": _may_grant(person),
            "own": is_sponsor(person, workspace["sponsor"]),
            "operate": self._web.sso.settings.operate,
            "grants": [{**one, "may_end": one in counting and may_end(person, one["to"])} for one in shown],
            "all": everything,
            "ended": len(found) - len(counting),
            "most": SHOWN,
            "reach": sorted(mine) if may_attach(person, workspace["sponsor"]) else [],
        }

    def grant(self, visit: Visit) -> Response:
        """A port is granted to the sponsor. The provider is asked first whether the person still has the role."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        name = str(visit.parameters["id"])
        sponsor = self._broker.overview.sponsor(name)
        if not sees_workspace(session.person, sponsor):
            raise unknown_workspace(name)
        self._allow(_may_grant(session.person), caller, "forward.grant", name)
        if not self._web.sso.settings.operate:
            raise ForbiddenError(
                "these pages do not operate",
                cure="set operate in broker_sso (docs/sign-in.md), or use saw session grant on the control host",
                code="operate_off",
            )
        form = visit.filled_in(GrantForm)
        self._broker.forwards.grant(
            caller, GrantForward(name, form.port, f"user:{sponsor}", form.hours * HOUR_S, form.reason)
        )
        return redirect(f"/workspaces/{name}#ports")

    def revoke(self, visit: Visit) -> Response:
        """A grant ends, and with it what was opened by it. The provider is asked first, as for the grant."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        identifier = str(visit.parameters["id"])
        found = self._broker.forwards.show(identifier)
        if not sees_workspace(session.person, self._broker.overview.sponsor(found["workspace"])):
            raise unknown_grant(identifier)
        self._allow(may_end(session.person, found["to"]), caller, "forward.revoke", found["workspace"])
        self._broker.forwards.revoke(caller, identifier, visit.filled_in(RevokeForward))
        return redirect(f"/workspaces/{found['workspace']}#ports")

    def _on(self, port: int, workspace: dict[str, Any]) -> bool:
        """Tell whether the configuration forwards this port now, whatever was granted."""
        rules = self._rules
        return rules is not None and rules.allows(port) and rules.allows_blueprint(workspace["blueprint"])

    def _allow(self, allowed: bool, caller: Caller, operation: str, workspace: str) -> None:
        """Raise :class:`ForbiddenError` unless ``allowed``; the attempt is audited."""
        if allowed:
            return
        record_refused(self._broker.services, caller, operation, workspace)
        raise ForbiddenError(
            f"your roles do not allow {operation}", cure="ask somebody who may: see docs/portal.md", code="not_allowed"
        )


def _may_grant(person: Person) -> bool:
    return bool(ALLOWED["POST", "/v1/forwards"] & set(person.roles))
