"""40,000 workspaces in one broker: how long list, search and inventory take.

    python benchmarks/inventory.py [COUNT]

A real broker process over its Unix socket. The register's rows are written straight into its database, with numbers that the
broker's own code gives one by one; some more are registered through the broker, and end. Prints one JSON line: median of three
runs in seconds, with the processor time of this process and of the broker: on a busy machine these say more than the seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests/integration/broker")]

from broker_rig import running_broker  # noqa: E402
from results import processor_time  # noqa: E402 - the module beside this one

from saw.addressing import HIGHEST  # noqa: E402
from saw.broker.client import OperatorClient, listed_workspaces  # noqa: E402
from saw.broker.number_settings import NumberSettings  # noqa: E402
from saw.broker.numbers import free_number  # noqa: E402
from saw.broker.schema import workspaces  # noqa: E402
from saw.broker.store import Store  # noqa: E402
from saw.broker.wake import Waker  # noqa: E402

GOAL_S = 2.0
ROUNDS = 3
REGISTERED = 10
"""Registrations in one round."""
NUMBERS = NumberSettings(most=HIGHEST)


def fill(database: Path, count: int) -> float:
    """Write ``count`` workspaces as they are after attestation: 200 sponsors, four rings, eight blueprints.

    Returns the processor time in seconds.
    """
    now = "2026-11-29T08:00:00.000000Z"
    rows: list[dict[str, Any]] = [
        {
            "id": f"ws-{n:06}",
            "sponsor": f"person-{n % 200}@example.com",
            "blueprint": f"blueprint-{n % 8}",
            "ring": f"ring-{n % 4}",
            "image": "workspace",
            "image_sha256": "1" * 64,
            "agent_id": f"agent-{n}",
            "state": "active" if n % 10 else "stopped",
            "state_reason": "quote accepted",
            "state_since": now,
            "created_at": now,
            "watch_seq": 1,
            "policy_digest": f"{n % 16:064x}",
            "lease_expires_at": now,
            "attested_at": now,
            "reported_state": "active",
            "reported_digest": f"{n % 16:064x}",
            "reported_verified": 1,
            "reported_at": now,
        }
        for n in range(count)
    ]
    store = Store.open_sqlite(database, Waker())
    began = time.process_time()
    with store.write() as tx:
        for row in rows:
            row["number"] = free_number(tx.connection, NUMBERS)
            tx.connection.execute(workspaces.insert().values(**row))
    store.close()
    return round(time.process_time() - began, 3)


def register(client: OperatorClient, count: int) -> int:
    """Register :data:`REGISTERED` workspaces through the broker and end them: each gets the lowest number that is free."""
    with client.session():
        for index in range(REGISTERED):
            name = f"new-{time.monotonic_ns()}"
            wanted = {"id": name, "sponsor": "ada", "blueprint": "coding", "ring": "ring-0", "image": "workspace"}
            made = client.request("POST", "/v1/workspaces", wanted)
            if made["number"] != count + 1:
                raise SystemExit(f"number {made['number']} instead of {count + 1}")
            client.request("POST", f"/v1/workspaces/{name}/transition", {"to": "decommissioned", "reason": str(index)})
    return count


def timed(broker: int, work: Callable[[], int], count: int) -> dict[str, float]:
    """Run ``work`` :data:`ROUNDS` times; it must return ``count`` each time. ``broker`` is the process id of the broker."""
    taken: dict[str, list[float]] = {"seconds": [], "client_cpu": [], "broker_cpu": []}
    for _ in range(ROUNDS):
        began, used, there = time.perf_counter(), time.process_time(), processor_time(broker)
        found = work()
        taken["seconds"].append(time.perf_counter() - began)
        taken["client_cpu"].append(time.process_time() - used)
        taken["broker_cpu"].append(processor_time(broker) - there)
        if found != count:
            raise SystemExit(f"found {found} instead of {count}")
    return {name: round(statistics.median(values), 3) for name, values in taken.items()}


def main() -> None:
    """Measure and print."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    with tempfile.TemporaryDirectory() as name, running_broker(numbers=NUMBERS) as lab:
        base = Path(name)
        lab.register_image()
        filled = fill(lab.config.database, count)
        context = base / "context.json"
        context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}, "bastion": {"host": "edge"}}))
        link = base / "ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        os.environ |= {"ANSIBLE_COLLECTIONS_PATH": name, "SAW_SSH_KEYS": str(base / "kept")}
        plain = {"plugin": "secure_agent.workspace.broker", "context": str(context)}
        keyed = {**plain, "keyed_groups": [{"key": "saw_workspace.ring", "prefix": "ring"}]}
        for file, told in (("plain", plain), ("keyed", keyed)):
            (base / f"{file}.broker.yml").write_text(json.dumps(told))

        from ansible.inventory.manager import InventoryManager
        from ansible.parsing.dataloader import DataLoader
        from ansible.plugins.loader import init_plugin_loader

        init_plugin_loader([name])
        client = OperatorClient.from_context(context)

        def ask(**filters: list[str]) -> int:
            with client.session():
                return len(listed_workspaces(client, **filters))

        def inventory(file: str) -> int:
            return len(InventoryManager(DataLoader(), sources=[str(base / f"{file}.broker.yml")]).hosts)

        assert lab.process is not None
        pid = lab.process.pid
        result = {
            "workspaces": count,
            "goal_s": GOAL_S,
            "numbers given, cpu": filled,
            "list": timed(pid, ask, count),
            "search by sponsor": timed(pid, lambda: ask(sponsor=["person-7@example.com"]), count // 200),
            "search by text": timed(pid, lambda: ask(text=["ws-0000"]), min(count, 100)),
            "inventory": timed(pid, lambda: inventory("plain"), count),
            "inventory, one keyed group": timed(pid, lambda: inventory("keyed"), count),
            # Those that have ended stay in the register, so this is last.
            f"register and end {REGISTERED}": timed(pid, lambda: register(client, count), count),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
