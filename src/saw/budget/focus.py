"""Costs as a CSV file in the FinOps Open Cost and Usage Specification (FOCUS), version 1.2.

All mandatory columns of the specification, the conditional ones that have a meaning here, and columns of our own, whose names
begin with ``x_`` as it asks. The mapping is in ``docs/budgets.md``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec

from saw.budget.windows import window

VERSION = "1.2"
COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "SkuId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_Calls",
    "x_InputTokens",
    "x_OutputTokens",
    "x_UnmeteredCalls",
)
_RUN = ("=", "+", "-", "@")
"""What a spreadsheet takes for a formula when a text begins with it."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What the calls of one day, workspace, engagement and model cost. ``spent`` is in millionths of ``currency``."""

    day: str
    workspace: str
    engagement: str
    blueprint: str
    budget: str
    model: str
    service: str
    currency: str
    calls: int
    unmetered: int
    spent: int
    input_tokens: int
    output_tokens: int


def focus_csv(lines: Iterable[Line]) -> str:
    """Return the CSV text (RFC 4180, UTF-8) of ``lines``, with a header, one row for each line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _cell(value) for name, value in _row(line).items()})
    return out.getvalue()


def _row(line: Line) -> dict[str, object]:
    day = datetime.strptime(line.day, "%Y-%m-%d").replace(tzinfo=UTC)
    start, end = window("month", day)
    cost, tokens = _decimal(line.spent), line.input_tokens + line.output_tokens
    tags = {"workspace": line.workspace, "engagement": line.engagement, "budget": line.budget}
    return {
        "BilledCost": cost,
        "BillingAccountId": line.blueprint,
        "BillingAccountName": line.blueprint,
        "BillingCurrency": line.currency,
        "BillingPeriodEnd": _time(end),
        "BillingPeriodStart": _time(start),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{line.calls} calls of {line.model} by {line.workspace}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": _time(day + timedelta(days=1)),
        "ChargePeriodStart": _time(day),
        "ConsumedQuantity": tokens,
        "ConsumedUnit": "Tokens",
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "InvoiceIssuerName": line.service,
        "ListCost": cost,
        "PricingQuantity": tokens,
        "PricingUnit": "Tokens",
        "ProviderName": line.service,
        "PublisherName": line.service,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Inference",
        "SkuId": line.model,
        "SubAccountId": line.workspace,
        "SubAccountName": line.workspace,
        "Tags": json.dumps({name: value for name, value in tags.items() if value}),
        "x_Calls": line.calls,
        "x_InputTokens": line.input_tokens,
        "x_OutputTokens": line.output_tokens,
        "x_UnmeteredCalls": line.unmetered,
    }


def _decimal(micros: int) -> str:
    return format(Decimal(micros).scaleb(-6), "f")


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _cell(value: object) -> object:
    """Return a cell; null is empty. A text that came from an agent's call must not be run by a spreadsheet."""
    if not isinstance(value, str):
        return "" if value is None else value
    text = "".join(character if character.isprintable() else "?" for character in value)
    return f"'{text}" if text.startswith(_RUN) else text
