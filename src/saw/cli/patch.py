"""``saw patch``: security updates of this host - what is pending, held and overdue, a run now, and a restart in its window."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from saw.cli.answers import Answer
from saw.cli.patch_cves import add_commands, judge_hosts, judge_images
from saw.edr.forward import kind_of
from saw.edr.service import Courier, factory_of, now
from saw.edr.store import Store
from saw.patching import engine
from saw.patching.apt import PatchError, names_of, probe
from saw.patching.config import DEFAULT_CONFIG, PatchConfig, read_config
from saw.patching.findings import open_store, record
from saw.patching.holds import apply_holds, held_of, refuse_expired
from saw.patching.restart import RebootRefused, busy_units, decide, need_of, no_upgrade, running_kernel
from saw.patching.status import Status, remember, status_of

DPKG_LOCK = Path("/var/lib/dpkg/lock-frontend")


class _Call(NamedTuple):
    config: PatchConfig
    store: Store
    options: argparse.Namespace


def main(argv: list[str]) -> int:
    """Run ``saw patch``; 1 when something is not as it should be, or was refused."""
    options = _parser().parse_args(argv)
    if options.command == "cves":
        return _print(judge_hosts(options), options)
    if options.command == "images":
        return _print(judge_images(options), options)
    config = read_config(options.config)
    if options.command == "check":
        refuse_expired(config, now().date())
        return 0
    store = open_store(config)
    try:
        return _print(_COMMANDS[options.command](_Call(config, store, options)), options)
    finally:
        store.close()


def _print(told: Answer, options: argparse.Namespace) -> int:
    answer, text, code = told
    if options.json:
        print(msgspec.json.encode(answer).decode())
    elif text:
        print(text)
    return code


def _status(call: _Call) -> Answer:
    config, store, options = call
    apt = probe(config)
    status = status_of(config, apt, store, now(), running_kernel())
    if options.report:
        _report(config, store, status)
    width = max(map(len, status.parts))
    lines = [f"{name:<{width}}  {text}" for name, text in status.parts.items()]
    lines += [f"problem: {one.words}" for one in status.breaches]
    problems = [one.words for one in status.breaches]
    answer: dict[str, Any] = {"ok": not problems, "problems": problems, **msgspec.to_builtins(status)}
    if options.packages:
        answer |= {"distribution": names_of(config), "packages": msgspec.to_builtins(apt.installed)}
    return answer, "\n".join(lines), 1 if problems else 0


def _report(config: PatchConfig, store: Store, status: Status) -> None:
    """Write what is newly wrong to the spool, and deliver what waits there."""
    remember(status.pending, store)
    record(status.breaches, config, store, factory_of("saw-patching"), now())
    courier = Courier(config)
    try:
        courier.deliver()
    finally:
        courier.close()


def _findings(call: _Call) -> Answer:
    found = call.store.newest(call.options.limit)
    rows = []
    for one in found:
        moment = datetime.fromtimestamp(one.event["time"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        rows.append(f"{moment}  {one.event['severity']:<13}  {kind_of(one.event):<19}  {one.event['message']}")
    return {"ok": True, "findings": [msgspec.to_builtins(one) for one in found]}, "\n".join(rows) or "no findings", 0


def _run(call: _Call) -> Answer:
    config, store = call.config, call.store
    try:
        done = engine.run(config, store, now)
    finally:
        # what is wrong leaves the host with the run, whatever became of it
        _report(config, store, status_of(config, probe(config), store, now(), running_kernel()))
    lines = [f"installed: {one.package} {one.offered} (was {one.installed})" for one in done.installed]
    lines += [f"held: {one.package} {one.installed}, offered is {one.offered}" for one in done.held]
    lines += [f"left: {one.package} {one.installed}, offered is {one.offered}" for one in done.left]
    answer = {"ok": not done.left, "changed": bool(done.installed), **msgspec.to_builtins(done)}
    return answer, "\n".join(lines) or "nothing to install", 1 if done.left else 0


def _holds(call: _Call) -> Answer:
    config, store, options = call
    apt = probe(config)
    changes: list[str] = []
    if options.apply or options.dry_run:
        changes = apply_holds(config, apt, store, dry=options.dry_run)
        apt = apt if options.dry_run or not changes else probe(config)
    held = held_of(config, apt, now().date())
    wrong = [one for one in held if one.state in {"expired", "unexplained"}]
    lines = [f"{'would ' if options.dry_run else ''}{one}" for one in changes]
    lines += [
        f"{one.package:<24}  {one.state:<11}  {one.until:<10}  {one.owner}{': ' if one.owner else ''}{one.reason}"
        for one in held
    ]
    answer = {"ok": not wrong, "changed": bool(changes), "changes": changes, "holds": msgspec.to_builtins(held)}
    return answer, "\n".join(lines) or "nothing is held", 1 if wrong else 0


def _reboot(call: _Call) -> Answer:
    config, options = call.config, call.options
    need = need_of(config, probe(config).kernels, running_kernel())
    if not need.reasons:
        return {"ok": True, "needed": False, "restarting": False, "reasons": []}, "no restart is needed", 0
    why = "; ".join(need.reasons)
    decision = decide(
        config, need, now(), busy_units(config), any_time=options.outside_window, regardless=options.during_engagement
    )
    if decision.refusals:
        raise RebootRefused(
            f"the host needs a restart ({why}), and is not restarted: {'; '.join(decision.refusals)}",
            cure="wait for the window, or say --outside-window or --during-engagement",
            details={"reasons": list(need.reasons), "refusals": list(decision.refusals)},
        )
    with no_upgrade(DPKG_LOCK) as free:
        if not free:
            raise RebootRefused(
                f"the host needs a restart ({why}), and is not restarted: packages are being changed",
                cure="wait until that is done",
                details={"reasons": list(need.reasons), "refusals": ["packages are being changed"]},
            )
        if not options.dry_run:
            _restart(config)
    answer = {"ok": True, "needed": True, "restarting": not options.dry_run, "reasons": list(need.reasons)}
    return answer, f"{'would restart' if options.dry_run else 'restarting'}: {why}", 0


def _restart(config: PatchConfig) -> None:
    try:
        done = subprocess.run(config.reboot.command, check=False, stdin=subprocess.DEVNULL, timeout=60)
        code: object = done.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        code = type(error).__name__
    if code != 0:
        raise PatchError(f"{config.reboot.command[0]} ended with {code}", cure="restart the host by hand")


_COMMANDS: dict[str, Callable[[_Call], Answer]] = {
    "status": _status,
    "findings": _findings,
    "run": _run,
    "holds": _holds,
    "reboot": _reboot,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw patch", description="Security updates of this host (docs/patching.md).")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"configuration (default {DEFAULT_CONFIG})")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "status": "tell what is pending, held and overdue; 1 when something is not as it should be",
        "findings": "show the newest findings, with --json as OCSF events",
        "run": "fetch the lists and install updates of listed sources now (the timer does)",
        "holds": "show held packages; 1 when a hold ran out or nobody answers for it",
        "reboot": "restart the host if it needs it, in its window and while no engagement runs",
        "check": "read the configuration and refuse what is wrong in it, a hold past its end too",
    }
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    add_commands(commands)
    for name in _COMMANDS:
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["status"].add_argument(
        "--report", action="store_true", help="make a new problem a finding, and deliver findings"
    )
    made["status"].add_argument("--packages", action="store_true", help="with --json: every installed package too")
    made["findings"].add_argument("--limit", type=int, default=100, help="how many (default 100)")
    either = made["holds"].add_mutually_exclusive_group()
    either.add_argument("--apply", action="store_true", help="make apt hold what the configuration names")
    either.add_argument("--dry-run", action="store_true", help="say what --apply would change")
    made["reboot"].add_argument("--dry-run", action="store_true", help="decide, and restart nothing")
    made["reboot"].add_argument("--outside-window", action="store_true", help="restart at any time")
    made["reboot"].add_argument(
        "--during-engagement", action="store_true", help="restart although an engagement would be cut off"
    )
    return parser
