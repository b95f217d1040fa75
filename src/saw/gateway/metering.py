"""Budgets and limits at ring 2: an allowed call of a model service is counted before it leaves, and settled by its answer.

The rules where an answer says nothing clear: Envoy had no connection, or the service refused the call before it worked on it
(:data:`REFUSED_UNSERVED`): nothing was spent. Anything else, and silence: the whole reservation is spent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from saw import jsontext
from saw.audit.events import EventFactory, Subject
from saw.budget.bounds import Bound, bound
from saw.budget.counts import Count, Unit
from saw.budget.errors import Unbounded
from saw.budget.ledger import MOST, Charge, Ledger, Limit, money
from saw.budget.price import Rates, Usage, micros
from saw.budget.usage import read_usage
from saw.errors import SawError
from saw.gateway.envoy_parts import NOT_SENT
from saw.gateway.spool import Spool
from saw.policy import inference, strict_json
from saw.policy.governance import Budget, CallLimit, InferenceRoute, LimitScope, Price
from saw.policy.inference import price_of, requested_model
from saw.policy.model import Request

LOG = logging.getLogger("saw.gateway")

REFUSED_UNSERVED = frozenset({400, 401, 403, 404, 405, 413, 415, 422, 429})
"""Statuses by which a model service says that it did not begin to work on a call."""
TELLABLE = 2**53 - 1
"""The largest number that an audit event can hold (RFC 8785); a larger amount is told as this one."""
EVERY_S = 1.0
"""How often reservations are looked through for those whose time is up (seconds)."""


class Payer(msgspec.Struct, frozen=True, kw_only=True):
    """Who a call is charged to: who made it, under which release, and the engagement that it belongs to (empty: none)."""

    workspace: str
    engagement: str
    sponsor: str
    agent: str
    blueprint: str
    policy_digest: str
    request_id: str


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept with a charge, so that it can be settled and told whatever happens meanwhile. Amounts are millionths."""

    payer: Payer
    budget: str
    scope: str
    subject: str
    period: str
    start: str
    end: str
    currency: str
    limit: int
    model: str
    service: str
    rates: Rates
    at: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a charge ended: by which ``rule``, why, with which status, and the usage that was told (None: none)."""

    rule: str
    why: str = ""
    status: int = 0
    usage: Usage | None = None


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What ring 2's Envoy tells of an answer. ``flags``: Envoy answered itself. ``whole``: the answer came to its end."""

    charge: str
    status: int
    flags: str
    whole: bool
    encoding: str
    texts: tuple[bytes, ...]


class Reserved(msgspec.Struct, frozen=True):
    """A reservation: its id, empty where the answer corrects nothing, and what the audit event of the call says about it.

    ``detail`` is None where no budget pays for the call. ``counted`` is the name under which its request is counted.
    """

    id: str
    detail: dict[str, object] | None
    counted: str = ""


class Meter:
    """Charges calls to the ledger. ``new_id`` makes up the name of each charge; no part of a call has a say in it."""

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        factory: EventFactory,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self._ledger = ledger
        self._spool = spool
        self._factory = factory
        self._now = now
        self._new_id = new_id
        self._ended = asyncio.Event()

    async def reserve(
        self,
        request: Request,
        path: str,
        route: InferenceRoute,
        *,
        budget: Budget | None,
        limits: Sequence[CallLimit],
        payer: Payer,
        approved: bool = False,
    ) -> Reserved:
        """Set aside what an allowed call to the canonical ``path`` may cost at most, and count it against ``limits``.

        ``approved``: people agreed that it may pass the budget. Raises the errors of :mod:`saw.budget.errors`.
        """
        now, identifier = self._now(), self._new_id()
        bounded = budget is not None or any(limit.tokens is not None for limit in limits)
        model, found = _bound(request, path, route) if bounded else ("", Bound(0, 0))
        counts = counts_of(limits, payer, found.input + found.output)
        if budget is None:
            corrected = await asyncio.to_thread(self._ledger.count, counts, identifier, now)
            return Reserved(identifier if corrected else "", None, identifier)
        price = price_of(route, model)
        if price is None:
            raise Unbounded(f"the model {model[:80]!r} has no price", cure="use a model with a price")
        rates = rates_of(price)
        limit = Limit(
            f"{payer.blueprint}/{budget.id}",
            sharing(budget.scope, payer),
            budget.limit.currency,
            budget.period,
            micros(budget.limit.amount),
            hard=budget.on_exhaust != "report" and not approved,
        )
        amount = min(rates.most(found.input, found.output, caches=found.caches), MOST - 1)
        start, end = await asyncio.to_thread(self._ledger.period, limit, now)
        account = Account(
            payer=payer,
            budget=limit.budget,
            scope=budget.scope,
            subject=limit.subject,
            period=budget.period,
            start=f"{start:%Y-%m-%d}",
            end=f"{end:%Y-%m-%d}",
            currency=limit.currency,
            limit=limit.most,
            model=model[:256],
            service=route.upstream_address[0],
            rates=rates,
            at=now.isoformat(timespec="milliseconds"),
        )
        text = msgspec.json.encode(account).decode()
        held = await asyncio.to_thread(self._ledger.reserve, limit, amount, identifier, now, text, counts=counts)
        told = {**_told(account), "charge": identifier, "state": "open"}
        return Reserved(identifier, {**told, "reserved": _tellable(amount), "left": _tellable(held.left)}, identifier)

    async def give_back(self, charge: str, why: str) -> None:
        """Release a reservation whose call was certainly not sent."""
        outcome = msgspec.json.encode(Outcome(rule="not_sent", why=why)).decode()
        await asyncio.to_thread(self._ledger.release, charge, self._now(), outcome)
        self._ended.set()

    async def uncount(self, counted: str) -> None:
        """Count the request no more of a call that this perimeter could not send."""
        await asyncio.to_thread(self._ledger.uncount, counted)

    async def settle(self, told: Told) -> None:
        """End the charge of an answer by what it said, or by the rule for answers that say nothing clear."""
        account, outcome = await asyncio.to_thread(self._account, told.charge), judged(told)
        now, text = self._now(), msgspec.json.encode(outcome).decode()
        usage = outcome.usage
        if usage is not None:
            cost = 0 if account is None else min(account.rates.cost(usage), MOST - 1)
            tokens = usage.input + usage.output + usage.cache_read + usage.cache_write
            await asyncio.to_thread(self._ledger.settle, told.charge, cost, now, text, tokens=tokens)
        elif outcome.rule == "nothing_spent":
            await asyncio.to_thread(self._ledger.release, told.charge, now, text)
        else:
            await asyncio.to_thread(self._ledger.keep, told.charge, now, text)
        self._ended.set()

    def _account(self, charge: str) -> Account | None:
        detail = self._ledger.detail(charge)
        return jsontext.decode(detail, kind=Account) if detail else None

    async def run_forever(self) -> None:
        """Let reservations expire and bring every end into the audit trail, until cancelled."""
        expired = msgspec.json.encode(Outcome(rule="expired", why="nobody told the end of the call")).decode()
        said = ""
        while True:
            self._ended.clear()
            try:
                await asyncio.to_thread(self._ledger.expire, self._now(), expired)
                while await self._tell():
                    pass
                said = ""
            except SawError as error:
                if said != error.message:
                    LOG.error(  # noqa: TRY400 - the message says it
                        "charges cannot be told: %s", error.message
                    )
                said = error.message
            try:
                await asyncio.wait_for(self._ended.wait(), EVERY_S)
            except TimeoutError:
                continue

    async def _tell(self) -> bool:
        """Record the ends that are not in the trail yet; return whether there were any."""
        charges = await asyncio.to_thread(self._ledger.untold)
        for charge in charges:
            await self._spool.record(self._event(charge))
        if charges:
            await asyncio.to_thread(self._ledger.told, charges)
        return bool(charges)

    def _event(self, charge: Charge) -> dict[str, Any]:
        account = jsontext.decode(charge.detail, kind=Account)
        outcome = jsontext.decode(charge.outcome, kind=Outcome)
        payer, usage = account.payer, outcome.usage
        known = {
            **_told(account),
            "charge": charge.id,
            "state": charge.state,
            "reserved": _tellable(charge.reserved),
            "spent": _tellable(charge.amount),
            "rule": outcome.rule,
            "metered": usage is not None,
        }
        if outcome.why:
            known["why"] = outcome.why
        if outcome.status:
            known["status"] = outcome.status
        if usage is not None:
            known |= {
                "input_tokens": usage.input + usage.cache_read + usage.cache_write,
                "output_tokens": usage.output,
                "cache_read_tokens": usage.cache_read,
                "cache_write_tokens": usage.cache_write,
            }
        what = money(charge.amount, account.currency)
        return self._factory.api_activity(
            self._now(),
            Subject(
                principal=payer.sponsor,
                agent=payer.agent,
                workspace=payer.workspace,
                policy_digest=payer.policy_digest,
                request_id=payer.request_id,
            ),
            "budget.settle",
            activity="update",
            outcome="success",
            message=f"{what} spent" + ("" if usage is not None else f": {outcome.why or outcome.rule}"),
            resource=("budget", account.budget),
            detail={"layer": "ring2", "budget": known},
        )


def rates_of(price: Price) -> Rates:
    """Return a price in whole numbers, with what policy says where it names no price of its own for the service's cache."""
    entry = micros(price.input)
    return Rates(
        entry,
        micros(price.output),
        entry if price.cache_read is None else micros(price.cache_read),
        2 * entry if price.cache_write is None else micros(price.cache_write),
    )


def judged(told: Told) -> Outcome:
    """Return how a charge ends by what was told of its answer."""
    readable = told.whole and told.encoding.strip().lower() in {"", "identity"}
    usage = read_usage(told.texts) if readable else None
    if usage is not None:
        return Outcome(rule="usage", status=told.status, usage=usage)
    if told.flags:
        if set(told.flags.split(",")) <= NOT_SENT:
            return Outcome(rule="nothing_spent", why=f"the call was not sent ({told.flags})", status=told.status)
        return Outcome(rule="reservation", why=f"no answer came ({told.flags})", status=told.status)
    if told.status in REFUSED_UNSERVED:
        return Outcome(rule="nothing_spent", why=f"the service refused the call ({told.status})", status=told.status)
    if not told.whole:
        why = "the answer did not come to its end, or is no JSON and no stream of events"
    elif told.encoding:
        why = f"the answer is encoded ({told.encoding[:32]})"
    else:
        why = "the answer says no usage"
    return Outcome(rule="reservation", why=why, status=told.status)


def read_told(headers: Iterable[tuple[bytes, bytes]], body: bytes, names: tuple[str, ...], between: bytes) -> Told:
    """Return what Envoy tells in a request; ``names`` are its headers: charge, status, flags, whole, encoding."""
    values = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    charge, status, flags, whole, encoding = (values.get(name, "") for name in names)
    return Told(
        charge=charge,
        status=int(status) if status.isascii() and status.isdigit() and len(status) == 3 else 0,
        flags=flags,
        whole=whole == "1",
        encoding=encoding,
        texts=tuple(text for text in body.split(between) if text),
    )


def sharing(scope: LimitScope, payer: Payer) -> str:
    """Return the name of those who share one limit with ``payer``. Without an agent, a workspace counts as one."""
    return {
        "engagement": f"{payer.workspace}/{payer.engagement or '-'}",
        "agent": payer.agent or f"{payer.workspace}/-",
        "workspace": payer.workspace,
        "sponsor": payer.sponsor,
        "blueprint": payer.blueprint,
    }[scope]


def counts_of(limits: Iterable[CallLimit], payer: Payer, tokens: int) -> list[Count]:
    """Return what a call that may use ``tokens`` takes of ``limits``."""
    found: list[Count] = []
    for limit in limits:
        subject, name = f"{limit.scope}:{sharing(limit.scope, payer)}", f"{payer.blueprint}/{limit.id}"
        asked: tuple[tuple[Unit, int | None, int], ...] = (
            ("requests", limit.requests, 1),
            ("tokens", limit.tokens, min(tokens, MOST - 1)),
        )
        found += [
            Count(limit=name, subject=subject, unit=unit, per=limit.span, most=most, amount=amount)
            for unit, most, amount in asked
            if most is not None
        ]
    return found


def _bound(request: Request, path: str, route: InferenceRoute) -> tuple[str, Bound]:
    body = request.body or b""
    encoding = request.headers.get("content-encoding", "")
    try:
        model = requested_model(body, complete=request.body_complete, encoding=encoding)
        value = strict_json.loads(body, limit=inference.MAX_BODY)
    except (inference.Unreadable, strict_json.NotStrict) as error:
        raise Unbounded(f"the call cannot be read: {error}", cure="send one plain JSON object") from error
    if not isinstance(value, dict):
        raise Unbounded("the call is no JSON object", cure="send one plain JSON object")
    return model, bound(
        path.partition("?")[0], value, len(body), max_input=route.max_input_tokens, max_output=route.max_output_tokens
    )


def _tellable(amount: int) -> int:
    return min(amount, TELLABLE)


def tellable(details: Mapping[str, object]) -> dict[str, object]:
    """Return ``details`` of a refusal as an audit event can hold them."""
    return {name: _tellable(value) if isinstance(value, int) else value for name, value in details.items()}


def _told(account: Account) -> dict[str, object]:
    """Return what the events of a charge say about whom it belongs to."""
    payer = account.payer
    return {
        "id": account.budget,
        "scope": account.scope,
        "subject": account.subject,
        "period": account.period,
        "start": account.start,
        "end": account.end,
        "currency": account.currency,
        "limit": _tellable(account.limit),
        "model": account.model,
        "service": account.service,
        "blueprint": payer.blueprint,
        "engagement": payer.engagement,
        "at": account.at,
    }
