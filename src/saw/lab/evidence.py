"""What the audit trail says about a run: under which policy each allowed call passed, and whether the workspace is attested.

Nothing here is taken from what a part says about itself while the trail says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from saw.broker.client import OperatorClient

PAGE = 500
AUTHENTICATION, HTTP_ACTIVITY = 3002, 4002
"""OCSF classes: an attestation verdict; one governed call."""
QUOTE_PROTOCOLS = frozenset({"tpm2", "tpm2-quote"})
Event = Mapping[str, Any]


def trail(client: OperatorClient, source: str, after: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the chained events of ``source`` behind sequence number ``after``, oldest first."""
    while True:
        path = f"/v1/audit/events?source={source}&after={after}&limit={PAGE}"
        events = client.request("GET", path)["events"]
        yield from events
        if len(events) < PAGE:
            return
        after = int(events[-1]["seq"])


def head(client: OperatorClient, source: str) -> int:
    """Return the sequence number of the newest event of ``source``, 0 for a chain without events."""
    chains = client.request("GET", "/v1/audit/verify")["chains"]
    return next((int(chain["head"]["seq"]) for chain in chains if chain["source"] == source), 0)


def request_of(event: Event) -> tuple[str, str, str]:
    """Return method, host and path with query of an HTTP Activity event."""
    request = event["http_request"]
    url = request["url"]
    query = f"?{url['query_string']}" if url.get("query_string") else ""
    return str(request["http_method"]), str(url["hostname"]), f"{url['path']}{query}"


def digest_of(event: Event) -> str:
    """Return the policy digest under which an event happened, empty when it names none."""
    return str(event.get("policy", {}).get("uid", ""))


def upstream_of(event: Event) -> tuple[str, str, str]:
    """Return host, method and path with which an allowed call went on to the far end."""
    method, host, path = request_of(event)
    authority = str(event.get("unmapped", {}).get("saw", {}).get("authority") or host)
    return authority.partition(":")[0], method, path


def unexplained(arrived: Iterable[Mapping[str, Any]], events: Iterable[Event]) -> list[str]:
    """Return what arrived at the far end without an allowed call of its own, or with a header of the rings on it."""
    explained = Counter(upstream_of(event) for event in events)
    strangers = []
    for item in arrived:
        key = (str(item["host"]), str(item["method"]), str(item["uri"]))
        if item.get("saw_headers") or not explained[key]:
            strangers.append(" ".join(key))
        explained[key] -= 1
    return strangers


def allowed_calls(chained: Iterable[Event], workspace: str) -> list[Event]:
    """Return the events of calls that the gatekeeper allowed to ``workspace``."""
    events = (item["event"] for item in chained)
    return [
        event
        for event in events
        if event["class_uid"] == HTTP_ACTIVITY
        and event.get("action") == "Allowed"
        and event.get("device", {}).get("uid") == workspace
    ]


def explain(calls: Sequence[dict[str, Any]], events: Sequence[Event]) -> list[str]:
    """Give each allowed call the policy digest of its audit events; return the names of calls that have none.

    A call's requests must all be found, in their order, behind those of the call before it, and under one digest. A
    refused call keeps the digest that its answer named; a call that no ring decided (MCP over stdio, a connection that the
    kernel refused) has none. ``digest_source`` says which it is: ``audit``, ``answer`` or ``none``.
    """
    missing: list[str] = []
    position = 0
    for call in calls:
        call["digest_source"] = "answer" if call["policy_digest"] else "none"
        if call["verdict"] != "allow" or not call["requests"]:
            continue
        digests: set[str] = set()
        cursor = position
        for wanted in call["requests"]:
            found = next((at for at in range(cursor, len(events)) if request_of(events[at]) == tuple(wanted)), None)
            if found is None:
                digests = set()
                break
            digests.add(digest_of(events[found]))
            cursor = found + 1
        if len(digests) != 1 or "" in digests:
            missing.append(str(call["name"]))
            continue
        position = cursor
        call["policy_digest"], call["digest_source"] = digests.pop(), "audit"
    return missing


def attestation(
    shown: Mapping[str, Any], chained: Iterable[Event], released_digest: str, now: datetime
) -> dict[str, Any]:
    """Say what the verifier said last about a workspace, and whether that holds now.

    ``shown`` is the broker's record, ``chained`` the broker's events. The verdict is ``attested`` only when the newest
    attestation event is a good quote over the released digest, the lease runs, and the workspace is active; else
    ``not_attested``, with every reason in ``problems``.
    """
    workspace, problems = str(shown["id"]), []
    verdicts = [
        item
        for item in chained
        if item["event"]["class_uid"] == AUTHENTICATION
        and item["event"].get("auth_protocol") in QUOTE_PROTOCOLS
        and item["event"].get("device", {}).get("uid") == workspace
    ]
    event = verdicts[-1]["event"] if verdicts else {}
    quoted = digest_of(event) if event.get("status") == "Success" else ""
    if not verdicts:
        problems.append("the trail has no attestation of this workspace")
    elif event.get("status") != "Success":
        problems.append(f"the newest attestation was refused: {event.get('message') or event.get('status_detail')}")
    elif quoted != released_digest or not released_digest:
        problems.append(f"the quote is over policy {quoted or 'none'}, released is {released_digest or 'none'}")
    if shown.get("state") != "active":
        problems.append(f"the workspace is {shown.get('state')}")
    loaded = str(shown.get("policy_digest") or "")
    if quoted and loaded != quoted:
        problems.append(f"the broker holds policy {loaded or 'none'}, the quote was over {quoted}")
    expires = str(shown.get("lease_expires_at") or "")
    if not expires or datetime.fromisoformat(expires) <= now:
        problems.append(f"the lease ended at {expires}" if expires else "there is no lease")
    return {
        "verdict": "not_attested" if problems else "attested",
        "problems": problems,
        "policy_digest": quoted,
        "released_digest": released_digest,
        "lease_expires_at": shown.get("lease_expires_at"),
        "event": {"seq": verdicts[-1]["seq"], "time": when(event)} if verdicts else None,
    }


def when(event: Event) -> str:
    """Return an event's time as ISO 8601."""
    return datetime.fromtimestamp(int(event["time"]) / 1000, UTC).isoformat(timespec="milliseconds")
