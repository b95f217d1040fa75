"""What inference costs, on a real broker: the gatekeeper's own charges arrive, are added up once, shown and exported."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, cli
from page import run_page

from saw.audit.events import EventFactory, Subject
from saw.budget.errors import Exhausted
from saw.budget.focus import COLUMNS
from saw.budget.ledger import Ledger
from saw.gateway.metering import Meter, Payer, Told
from saw.gateway.spool import Spool
from saw.policy.inference import price_of
from saw.policy.loader import load_members
from saw.policy.model import Request

pytestmark = pytest.mark.control("BUD-01")

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
GOVERNANCE = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
inference:
  routes:
    - alias: inference.local
      models: ["demo-*"]
      upstream: "https://models.example.com/v1"
      budget: spend
      prices: [{models: ["demo-*"], input: "0", output: "10000"}]
budgets: [{id: spend, scope: workspace, period: day, limit: {currency: USD, amount: "1.00"}}]
"""


class Perimeter:
    """A gatekeeper's ledger, meter and spool, and its way to the broker."""

    def __init__(self, lab: Lab, directory: Path, name: str) -> None:
        self.lab, self.name = lab, name
        directory.mkdir()
        numbers = itertools.count(1)
        self.factory = EventFactory("saw-gatekeeper", host=name, new_uid=lambda: f"uid-{next(numbers)}")
        self.spool = Spool(directory, name, 1000)
        self.ledger = Ledger(directory / "budget.db", life_s=60)
        self.now = NOW
        self.meter = Meter(
            self.ledger, self.spool, self.factory, now=lambda: self.now, new_id=lambda: f"{name}-{next(numbers)}"
        )
        self.governance = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": GOVERNANCE}).governance

    async def _call(self, workspace: str, tokens: int, model: str, engagement: str) -> str:
        (route,) = self.governance.inference.routes
        body = json.dumps({"model": model, "messages": [], "max_tokens": tokens}).encode()
        request = Request("https", "inference.local", 443, "POST", "/v1/chat/completions", body=body)
        payer = Payer(
            workspace=workspace, engagement=engagement, sponsor="mia@example.com", agent="agent-1", blueprint="coding",
            policy_digest="aa" * 32, request_id="r-1",
        )  # fmt: skip
        held = await self.meter.reserve(
            request, request.path, route, budget=self.governance.budget("spend"), limits=(), payer=payer
        )
        event = self.factory.http_activity(
            self.now, Subject(workspace=workspace, request_id="r-1"), method="POST", scheme="https",
            host="inference.local", port=443, path=request.path, allowed=True, detail={"budget": held.detail},
        )  # fmt: skip
        await self.spool.record(event)
        return held.id

    def call(self, workspace: str, tokens: int, model: str = "demo-1", engagement: str = "") -> str:
        """Reserve a call of at most ``tokens`` cents, and record it as the gatekeeper does."""
        return asyncio.run(self._call(workspace, tokens, model, engagement))

    def answer(self, charge: str, *texts: bytes, whole: bool = True) -> None:
        """Tell how a call ended."""
        told = Told(charge=charge, status=200, flags="", whole=whole, encoding="", texts=texts)
        asyncio.run(self.meter.settle(told))

    def ship(self, *, again: bool = False) -> None:
        """Bring what is known into the trail and to the broker, ``again`` for what it has already."""

        async def tell() -> None:
            running = asyncio.create_task(self.meter.run_forever())
            async with asyncio.timeout(60):
                while self.ledger.untold():  # noqa: ASYNC110 - another thread writes it
                    await asyncio.sleep(0.01)
            running.cancel()

        asyncio.run(tell())
        events = [msgspec.to_builtins(event) for event in self.spool.pending()]
        with self.lab.tls("perimeter", self.name) as edge:
            for _ in range(2 if again else 1):
                answer = edge.post("/v1/perimeter/events", json={"source": self.name, "events": events})
                assert answer.status_code == 200, answer.text

    def close(self) -> None:
        self.ledger.close()
        self.spool.close()


_names = itertools.count(1)


@pytest.fixture
def perimeter(broker: Lab, tmp_path: Path) -> Any:
    """Return a perimeter of its own for each test; so are the workspaces that the tests name."""
    name = f"edge-budget-{next(_names)}"
    found = Perimeter(broker, tmp_path / name, name)
    yield found
    found.close()


def shown(lab: Lab, *workspaces: str, day: str = "2026-11-29") -> dict[str, Any]:
    """Return what is shown of these workspaces alone."""
    answer = lab.operator.request("GET", f"/v1/budgets?first={day}&last={day}")
    return {
        "budgets": [row for row in answer["budgets"] if row["subject"] in workspaces],
        "charges": [row for row in answer["charges"] if row["workspace"] in workspaces],
    }


def used(output: int) -> bytes:
    return json.dumps({"prompt_tokens": 9, "completion_tokens": output}).encode()


def test_what_is_reserved_spent_and_left_is_shown_by_workspace_engagement_model_and_day(
    broker: Lab, perimeter: Perimeter
) -> None:
    first = perimeter.call("bud-a", 30)
    perimeter.call("bud-a", 20, "demo-2", "dg-1")
    third = perimeter.call("bud-b", 5)
    perimeter.answer(first, used(12))
    perimeter.answer(third, whole=False)
    with pytest.raises(Exhausted):
        perimeter.call("bud-a", 80)
    perimeter.ship(again=True)
    answer = shown(broker, "bud-a", "bud-b")
    assert [
        (row["budget"], row["subject"], row["limit"], row["reserved"], row["spent"], row["left"])
        for row in answer["budgets"]
    ] == [
        ("coding/spend", "bud-a", 1_000_000, 200_000, 120_000, 680_000),
        ("coding/spend", "bud-b", 1_000_000, 0, 50_000, 950_000),
    ]
    assert [
        (row["day"], row["workspace"], row["engagement"], row["model"], row["calls"], row["unmetered"])
        for row in answer["charges"]
    ] == [
        ("2026-11-29", "bud-a", "", "demo-1", 1, 0),
        ("2026-11-29", "bud-a", "dg-1", "demo-2", 0, 0),
        ("2026-11-29", "bud-b", "", "demo-1", 1, 1),
    ]
    assert (answer["charges"][0]["input_tokens"], answer["charges"][0]["output_tokens"]) == (9, 12)
    text = cli(broker, "budget", "show", "--first", "2026-11-29").stdout
    assert re.search("coding/spend +bud-a +day +2026-11-29 +1.00 USD +0.20 USD +0.12 USD +0.68 USD", text)
    only = json.loads(cli(broker, "budget", "show", "--first", "2026-11-29", "--workspace", "bud-b", "--json").stdout)
    assert [row["subject"] for row in only["budgets"]] == ["bud-b"]
    assert shown(broker, "bud-a", "bud-b", day="2026-11-28") == {"budgets": [], "charges": []}


def test_an_expired_reservation_is_spent_and_its_true_cost_takes_the_place(broker: Lab, perimeter: Perimeter) -> None:
    charge = perimeter.call("bud-c", 30)
    perimeter.ship()
    assert shown(broker, "bud-c")["budgets"][0]["reserved"] == 300_000
    perimeter.now = NOW.replace(minute=2)
    perimeter.ledger.expire(perimeter.now, '{"rule":"expired"}')
    perimeter.ship()
    (row,) = shown(broker, "bud-c")["charges"]
    assert (row["reserved"], row["spent"], row["calls"], row["unmetered"]) == (0, 300_000, 1, 1)
    perimeter.answer(charge, used(1))
    perimeter.ship()
    (row,) = shown(broker, "bud-c")["charges"]
    assert (row["spent"], row["calls"], row["unmetered"]) == (10_000, 1, 0)


def test_a_focus_file_has_every_mandatory_column_and_only_what_was_spent(
    broker: Lab, perimeter: Perimeter, tmp_path: Path
) -> None:
    perimeter.answer(perimeter.call("bud-d", 30, "demo-1", "dg-1"), used(12))
    perimeter.call("bud-d", 20, "demo-2")
    perimeter.ship()
    path = tmp_path / "focus.csv"
    done = cli(broker, "budget", "export", "--focus", str(path), "--first", "2026-11-01", "--last", "2026-11-30")
    assert done.returncode == 0, done.stderr
    assert "rows of 2026-11-01 to 2026-11-30" in done.stdout
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    (row,) = [row for row in rows if row["SubAccountId"] == "bud-d"]
    assert (row["BilledCost"], row["EffectiveCost"], row["BillingCurrency"]) == ("0.120000", "0.120000", "USD")
    assert (row["ChargeCategory"], row["ChargeClass"], row["ServiceCategory"]) == (
        "Usage",
        "",
        "AI and Machine Learning",
    )
    assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == ("2026-11-29T00:00:00Z", "2026-11-30T00:00:00Z")
    assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    assert (row["SkuId"], row["ProviderName"], row["SubAccountId"]) == ("demo-1", "models.example.com", "bud-d")
    assert (row["ConsumedQuantity"], row["x_InputTokens"], row["x_Calls"]) == ("21", "9", "1")
    assert json.loads(row["Tags"]) == {"workspace": "bud-d", "engagement": "dg-1", "budget": "coding/spend"}
    nowhere = cli(broker, "budget", "export", "--focus", str(tmp_path / "no" / "focus.csv"))
    assert (nowhere.returncode, "cannot write" in nowhere.stderr) == (1, True)


def test_every_command_of_the_page_does_what_the_page_says(broker: Lab, perimeter: Perimeter, tmp_path: Path) -> None:
    perimeter.answer(perimeter.call("ws-1", 30), used(12))
    perimeter.ship()
    (tmp_path / "context.json").write_text(json.dumps({"broker": {"socket": broker.config.operator_socket}}))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    printed = run_page("docs/budgets.md", tmp_path, {"SAW_CONTEXT": str(tmp_path / "context.json"), "PATH": path})
    assert len(printed) == 2
    assert "ws-1" in printed[0]


def test_the_policy_of_the_page_loads_and_its_prices_are_read_in_order() -> None:
    page = Path(__file__).parents[3] / "docs/budgets.md"
    text, limited, aliases = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    head = (
        "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"
        "credentials: [{id: model-key, ref: 'local:model-key', inject: {header: A, format: '{secret}'}}]\n"
    )
    members = {"policy.yaml": b"version: 1\n", "governance.yaml": (head + text).encode()}
    (route,) = load_members(members).governance.inference.routes
    assert [getattr(price_of(route, name), "input", None) for name in ("demo-large-1", "demo-1", "x")] == [
        "3",
        "0.15",
        None,
    ]
    (route,) = load_members(members | {"governance.yaml": (head + limited).encode()}).governance.inference.routes
    assert route.limits == ("burst", "monthly")
    named = text.replace('      models: ["demo-*"]\n', aliases.partition("\n")[2], 1)
    (route,) = load_members(members | {"governance.yaml": (head + named).encode()}).governance.inference.routes
    assert route.aliases == {"fast": "demo-small-2", "large": "demo-large-7"}


def test_a_day_that_is_none_is_refused(broker: Lab) -> None:
    for wrong in ("yesterday", "2026-11-29T00"):
        done = cli(broker, "budget", "show", "--last", wrong)
        assert (done.returncode, "is not a day" in done.stderr) == (1, True)
    assert cli(broker, "budget", "show").returncode == 0


def test_an_event_that_says_nothing_clear_is_kept_in_the_trail_and_not_counted(
    broker: Lab, perimeter: Perimeter
) -> None:
    for said in ({"charge": "a"}, {"charge": 5}, "text", {"charge": "a", "reserved": -1}):
        subject = Subject(workspace="bud-e")
        event = perimeter.factory.api_activity(NOW, subject, "budget.settle", detail={"budget": said})
        asyncio.run(perimeter.spool.record(event))
    perimeter.answer(perimeter.call("bud-e", 30), used(1))
    perimeter.answer(perimeter.call("bud-f", 30), used(10**12))
    perimeter.answer(perimeter.call("bud-g", 30), used(10**13))
    perimeter.ship()
    assert len(broker.events(perimeter.name)) == 10
    spent = [row["spent"] for row in shown(broker, "bud-f", "bud-g")["charges"]]
    assert spent == [10**15, 300_000], "what no service can have used is no usage"
    (row,) = shown(broker, "bud-e")["charges"]
    assert row["spent"] == 10_000
