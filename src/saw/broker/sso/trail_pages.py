"""The pages of those who examine: a search over the audit trail, and a copy of what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import msgspec
from starlette.responses import Response, StreamingResponse

from saw.audit.choose import Choice, verdict_of
from saw.audit.ocsf import CLASSES
from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError, MalformedError
from saw.broker.sso.access import reads_trail
from saw.broker.sso.portal import stamp
from saw.broker.sso.sessions import Session
from saw.broker.sso.web import Visit, Web
from saw.broker.trail import MAX_PAGE

PAGE = 50
"""Events in one page."""
NAMES = tuple(sorted(kind.name for kind in CLASSES.values()))
"""Names that the field for the class suggests; any name or number of an OCSF class is taken."""

Text = Annotated[str, msgspec.Meta(max_length=256)]
Time = Annotated[str, msgspec.Meta(max_length=40)]


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"kind": "class"}):
    """The fields of the form, as ``saw audit search`` has them; times are ISO 8601, UTC without a zone."""

    workspace: Text = ""
    person: Text = ""
    agent: Text = ""
    kind: Text = ""
    activity: Text = ""
    verdict: Literal["", "allowed", "refused"] = ""
    source: Text = ""
    text: Text = ""
    since: Time = ""
    until: Time = ""
    before: Annotated[int, msgspec.Meta(ge=1, lt=2**53)] | None = None

    def choice(self) -> Choice:
        """Return the filters; a person without a kind (``user:``, ``operator:``) is somebody who signs in."""
        principal = self.person if ":" in self.person or not self.person else f"user:{self.person.lower()}"
        return Choice(
            since=_moment(self.since, "since"),
            until=_moment(self.until, "until"),
            source=self.source,
            workspace=self.workspace,
            agent=self.agent,
            principal=principal,
            kind=self.kind,
            activity=self.activity,
            verdict=self.verdict,
            text=self.text,
        )

    def query(self) -> str:
        """Return the filters, without the place, as a query."""
        fields = {name: value for name, value in msgspec.to_builtins(self).items() if value and name != "before"}
        return urlencode(fields)


class TrailPages:
    """What auditors and the security team read."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker

    def audit(self, visit: Visit) -> Response:
        """Events that the filters choose, the newest first."""
        session = self._reader(visit)
        search = visit.asked(Search)
        found = self._broker.trail.back(search.before, PAGE, search.choice())
        return self._web.render(
            "audit.html",
            session,
            search=search,
            query=search.query(),
            classes=NAMES,
            events=[_line(item) for item in found["events"]],
            earlier=found["next"],
            end=found["end"],
        )

    def download(self, visit: Visit) -> Response:
        """The chosen events as lines of JSON, the oldest first, as ``saw audit search --json`` prints them; audited."""
        session = self._reader(visit)
        choice = visit.asked(Search).choice()
        self._broker.trail.taken(Caller(session.principal, visit.address, visit.request_id), choice)
        return StreamingResponse(
            self._lines(visit, choice),
            media_type="application/x-ndjson",
            headers={"content-disposition": 'attachment; filename="audit.ndjson"'},
        )

    def _lines(self, visit: Visit, choice: Choice) -> Iterator[bytes]:
        """Yield page by page up to where the trail ended at first. Who loses the role meanwhile gets no further page."""
        after, end = 0, None
        while end is None or after < end:
            self._reader(visit)
            page = self._broker.trail.log(after, MAX_PAGE, choice)
            end = page["end"] if end is None else end
            yield b"".join(msgspec.json.encode(item) + b"\n" for item in page["events"] if item["position"] <= end)
            if page["next"] == after:
                return
            after = page["next"]

    @staticmethod
    def _reader(visit: Visit) -> Session:
        session = visit.session()
        if not reads_trail(session.person):
            raise ForbiddenError(
                "the trail is read by those who have the role auditor or security",
                cure="ask one of them, or see docs/audit.md",
                code="not_an_auditor",
            )
        return session


def _line(item: dict[str, Any]) -> dict[str, Any]:
    """Return what the page says of one event."""
    event = item["event"]
    ours = event.get("unmapped", {}).get("saw", {})
    title = event.get("message") or event.get("finding_info", {}).get("title") or event.get("api", {}).get("operation")
    return {
        "position": item["position"],
        "chain": f"{item['source']}:{item['seq']}",
        "at": stamp(event),
        "type": event.get("type_name", ""),
        "verdict": verdict_of(event),
        "reason": event.get("status_detail", ""),
        "principal": ours.get("principal", ""),
        "workspace": ours.get("workspace", ""),
        "title": title or event.get("comment") or _call(event),
        "json": msgspec.json.format(msgspec.json.encode(event), indent=2).decode(),
        "hash": item["hash"],
    }


def _call(event: dict[str, Any]) -> str:
    """Return the call that an event of the class HTTP Activity is about."""
    request = event.get("http_request", {})
    url = request.get("url", {})
    return f"{request.get('http_method', '')} {url.get('hostname', '')}{url.get('path', '')}".strip()


def _moment(text: str, field: str) -> int | None:
    """Return milliseconds since 1970, None for no text; raise :class:`MalformedError`."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise MalformedError(
            f"{field} {text[:40]!r} is no time", cure=f"write it as {iso(datetime(2026, 11, 29, 8, tzinfo=UTC))}"
        ) from error
