"""A process that writes to a broker's database as fast as it can, and says what was answered: ``writer.py URL NAME COUNT``."""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from saw.audit import EventFactory
from saw.broker.context import BROKER
from saw.broker.database_settings import parse_database
from saw.broker.store import Store
from saw.broker.wake import Waker


def main(url: str, name: str, count: int) -> None:
    store = Store.open_postgresql(parse_database(url), Waker())
    events = EventFactory("saw-broker", host=name, new_uid=lambda: "0" * 8)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        with store.write() as tx:
            # The event first: nothing but the store's own lock keeps two writers from the same place in the chain.
            tx.record(
                events.entity_management(datetime.now(UTC), BROKER.subject(), (name, str(number)), activity="update")
            )
            seq = tx.touch()
        print(seq, number, flush=True)
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
