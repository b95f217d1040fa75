"""``saw decide serve``: run the decision service of ring 1."""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import uvicorn

from saw.files import load_json
from saw.runtime.attribution import Attribution
from saw.runtime.decide import DecideConfig, Decider, DecideService
from saw.runtime.decide_counts import Counts
from saw.runtime.decide_state import Generations, Heartbeat, Lease
from saw.runtime.decision_log import DecisionLog
from saw.runtime.notify import notify
from saw.runtime.policy_local import PolicyLocal


def boottime() -> float:
    """Return the boot clock in seconds; it counts suspends and cannot be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main(argv: list[str]) -> int:
    """Serve until stopped; return 0."""
    parser = argparse.ArgumentParser(prog="saw decide", description="The decision service of ring 1.")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    config = load_json(arguments.config, DecideConfig)
    decider = Decider(
        Generations(Path(config.generations), time.monotonic),
        Lease(Path(config.lease), lambda: datetime.now(UTC), boottime),
        Heartbeat(Path(config.heartbeat), config.heartbeat_limit_s, boottime),
        Attribution(Path(config.netns)),
        Counts(boottime()),
    )
    listen = Path(config.socket)
    listen.parent.mkdir(parents=True, exist_ok=True)
    listen.unlink(missing_ok=True)
    os.umask(0o077)
    server = _Server(
        uvicorn.Config(
            DecideService(
                decider, DecisionLog(sys.stdout), PolicyLocal(decider, Path(config.ask_socket), time.monotonic)
            ),
            uds=config.socket,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            date_header=False,
            timeout_keep_alive=60,
        )
    )
    server.run()
    return 0


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets=sockets)  # type: ignore[arg-type]
        notify("READY=1")
