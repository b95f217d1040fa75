"""Changes over the operators' socket where people can sign in: the way for emergencies, and loud (control ID-01).

Each account that asks for a change raises a finding and a message, once an hour. It is written down before the change is tried:
none goes unsaid when the broker dies; what became of the change is in its own event. See decision 0086.
"""

from __future__ import annotations

import logging
import threading
from datetime import datetime, timedelta

from saw.broker.context import Caller, Services
from saw.broker.errors import StorageFull
from saw.broker.notification_settings import Kind
from saw.broker.notifications import Notifications
from saw.broker.peer import Peer

EVERY = timedelta(hours=1)
"""How often one account is told of."""
KIND = "local_change"
_NO_CHANGE = frozenset({("POST", "/v1/findings/drift"), ("POST", "/v1/gates/preview")})
"""Calls that change nothing, though their method is not ``GET``: a report to the trail, and a question."""

logger = logging.getLogger("saw.broker")


def changes(method: str, path: str) -> bool:
    """Tell whether the call of this method and route is one that changes something."""
    return method != "GET" and (method, path) not in _NO_CHANGE


class LocalChanges:
    """Who has asked for a change over the socket of this broker, and when that was told last.

    It is kept in memory: a broker that was started again tells once more.
    """

    def __init__(self, services: Services, notifications: Notifications) -> None:
        self._s = services
        self._notifications = notifications
        self._told: dict[int, datetime] = {}
        self._telling = threading.Lock()

    def note(self, caller: Caller, peer: Peer, call: str, workspace: str) -> None:
        """Tell that the account behind ``peer`` asks for ``call`` (method and route), about ``workspace`` when it is known.

        Nothing is told without sign-in, of accounts that programs have (``sso.automation``), and within the hour. A full disk is
        no reason to refuse: the change is refused itself for want of room, and a kill must not be.
        """
        settings = self._s.config.sso
        if settings is None or peer.uid is None or peer.user in settings.automation:
            return
        with self._telling:
            now = self._s.clock()
            last = self._told.get(peer.uid)
            # After a clock that was put back nobody is quiet for longer than the hour.
            if last is not None and timedelta(0) <= now - last < EVERY:
                return
            try:
                self._tell(now, caller, peer, call, workspace, usual=not settings.operate)
            except StorageFull:
                logger.warning(
                    "no room to note that %s (uid %d) asks for %s over the socket", peer.user, peer.uid, call
                )
                return
            self._told[peer.uid] = now

    def _tell(self, now: datetime, caller: Caller, peer: Peer, call: str, workspace: str, *, usual: bool) -> None:
        title = f"{peer.user} (uid {peer.uid}) changes things over the control host's socket, without signing in"
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.detection_finding(
                    now,
                    caller.subject(workspace),
                    kind=KIND,
                    title=title,
                    description="The first change of this account within an hour; the others are in the trail alone.",
                    severity="medium" if usual else "high",
                    detail={"uid": peer.uid, "user": peer.user, "call": call},
                )
            )
            self._notifications.tell(tx, kind=Kind.LOCAL_CHANGE, account=peer.user)
