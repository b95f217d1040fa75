"""``saw policyd``: run the policy agent, or write ring 1's static configuration."""

from __future__ import annotations

import argparse
import grp
import pwd
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from saw.errors import ConfigError
from saw.files import load_json, write_atomic
from saw.runtime import generation, ring1
from saw.runtime.desk import Desk
from saw.runtime.leaf import LeafAuthority, publish_bundle
from saw.runtime.notify import notify
from saw.runtime.policyd import Policyd
from saw.runtime.policyd_activate import Activator, Step, ensure_secret_file
from saw.runtime.policyd_broker import PolicyBroker
from saw.runtime.policyd_config import PolicydConfig, bootstrap_settings, load_workspace, ring1_settings
from saw.runtime.policyd_floor import FileFloor, Floors, TpmFloor
from saw.runtime.policyd_requests import RequestBroker
from saw.runtime.policyd_reviews import ReviewBroker
from saw.runtime.request_desk import RequestDesk
from saw.runtime.review_desk import ReviewDesk


def main(argv: list[str]) -> int:
    """Run the agent until SIGTERM, or render the bootstrap; return the exit code."""
    parser = argparse.ArgumentParser(prog="saw policyd", description="The policy agent of a workspace.")
    parser.add_argument("command", nargs="?", choices=["run", "render-bootstrap"], default="run")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where render-bootstrap writes; default standard output"
    )
    arguments = parser.parse_args(argv)
    config = load_json(arguments.config, PolicydConfig)
    if arguments.command == "render-bootstrap":
        raw = rendered_bootstrap(config)
        if arguments.output is None:
            sys.stdout.write(raw.decode())
        else:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.output, raw)
        return 0
    agent = build(config)
    desks = [desk for desk in (review_desk(config), request_desk(config)) if desk is not None]
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    notify("READY=1")
    try:
        agent.run()
    finally:
        for desk in desks:
            desk.close()
        agent.close()
    return 0


def rendered_bootstrap(config: PolicydConfig) -> bytes:
    """Return ring 1's static configuration as JSON."""
    return msgspec.json.format(msgspec.json.encode(ring1.bootstrap(bootstrap_settings(config))), indent=1) + b"\n"


def build(config: PolicydConfig, step: Step = lambda _: None) -> Policyd:
    """Prepare the runtime directories, closed until a policy is in force, and return the agent."""
    workspace = load_workspace(config)
    settings = ring1_settings(config, workspace)
    now = _now()
    group = _group(config.egress_group)
    config.state.mkdir(parents=True, exist_ok=True)
    (config.run / "policy").mkdir(parents=True, exist_ok=True)
    config.generations.mkdir(parents=True, exist_ok=True)
    authority = LeafAuthority.ensure(config.run / "ring1-ca", now)
    publish_bundle(Path(config.system_bundle), authority, config.run / "sandbox" / "ca-bundle.pem")
    ensure_secret_file(config)
    generation.write_closed(config.generations, settings, group=group)
    ring1_directory = config.run / "ring1"
    ring1_directory.mkdir(exist_ok=True)
    ring1_directory.chmod(0o755)
    write_atomic(ring1_directory / "bootstrap.json", rendered_bootstrap(config))
    broker = PolicyBroker(workspace, config.run)
    floors = Floors(
        [
            FileFloor(config.state / "floor.json"),
            *([TpmFloor(config.nv_index, config.tcti)] if config.nv_index else []),
        ]
    )
    return Policyd(
        config,
        workspace,
        broker,
        Activator(config, settings, authority, _now, group=group, step=step),
        floors,
        now=_now,
        boottime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        log=_log,
    )


def review_desk(config: PolicydConfig) -> Desk | None:
    """Return the socket where mediators ask people, answering; None where there are no mediators, or it cannot be made."""
    place = config.run / "review" / "tools.sock"

    def make(uid: int) -> Desk:
        return ReviewDesk(place, uid, ReviewBroker(load_workspace(config), config.run), _log)

    return _desk(config.review_user, make, "tools over stdio have no reviews here")


def request_desk(config: PolicydConfig) -> Desk | None:
    """Return the socket where the decision service asks for more, answering; None where it has no user, or it cannot be made."""
    place = config.run / "ask" / "policy.sock"

    def make(uid: int) -> Desk:
        return RequestDesk(place, uid, RequestBroker(load_workspace(config), config.run), _log)

    return _desk(config.ask_user, make, "agents cannot ask for more than their policy here")


def _desk(user: str | None, make: Callable[[int], Desk], without: str) -> Desk | None:
    """Start what ``make`` makes for ``user``; when it cannot be, ``without`` is logged and the policy goes on being enforced."""
    if user is None:
        return None
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        _log(f"there is no user {user}: {without}")
        return None
    try:
        desk = make(uid)
    except OSError as error:
        _log(f"{without}: {error}")
        return None
    desk.start()
    return desk


def _group(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigError(f"there is no group {name}", cure="create the user that ring 1 runs as") from error


def _now() -> datetime:
    return datetime.now(UTC)


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
