"""``saw worker``: runs lifecycle jobs of a broker, with ansible-runner here or by AWX."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from saw.errors import ConfigError
from saw.jobs.config import CREDENTIALS, DEFAULT_CONFIG, WorkerConfig, load_config, missing_for
from saw.jobs.executor import Executor
from saw.jobs.worker import Client, Worker


def main(argv: list[str]) -> int:
    """Run ``saw worker serve`` or ``saw worker check``."""
    parser = argparse.ArgumentParser(prog="saw worker", description="Run lifecycle jobs of a broker.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("serve", "claim jobs and run them until stopped"),
        ("check", "tell whether the configuration can be used on this host"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", default=DEFAULT_CONFIG, help="configuration file (default: %(default)s)")
        command.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    config = load_config(options.config)
    if options.command == "check":
        require_usable(config)
        print(json.dumps({"ok": True}) if options.json else "the configuration can be used")
        return 0
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    require_usable(config)
    serve(config)
    return 0


def require_usable(config: WorkerConfig) -> None:
    """Raise :class:`ConfigError` that names everything that is missing on this host."""
    missing = []
    if config.ansible is not None:
        missing += list(missing_for(config.ansible))
        for module, package in (("ansible_runner", "ansible-runner"), ("ansible", "ansible-core")):
            if importlib.util.find_spec(module) is None:
                missing.append(f"the Python package {package} is not installed in {sys.prefix}")
    if config.awx is not None:
        missing += [
            f"awx: there is no {value}"
            for value in (config.awx.token_file, config.awx.ca_file)
            if value is not None and not value.startswith(CREDENTIALS) and not Path(value).exists()
        ]
    if config.broker_context is not None and not Path(config.broker_context).exists():
        missing.append(f"broker_context: there is no {config.broker_context}")
    if missing:
        raise ConfigError("; ".join(missing), cure="see docs/jobs.md")


def serve(config: WorkerConfig) -> None:
    """Claim and run jobs until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = secrets.token_hex(16)
    with guarded(name):
        worker = Worker(lambda: connect(config), executor_of(config, name), config.state, slots=config.slots, stop=stop)
        runs = threading.Thread(target=worker.run)
        runs.start()
        while runs.is_alive():  # a join without an end would keep signals waiting
            runs.join(1.0)


def connect(config: WorkerConfig) -> Client:
    """Return a way to the broker."""
    from saw.broker.client import BrokerContext, Context, OperatorClient, load_context
    from saw.broker.machine_client import MachineClient

    if config.broker_socket is not None:
        return OperatorClient(Context(BrokerContext(socket=config.broker_socket)))
    context = load_context(config.broker_context)
    if context.machine is None:
        raise ConfigError(f"{config.broker_context} has no part machine", cure="see docs/jobs.md")
    return MachineClient(context.machine)


def executor_of(config: WorkerConfig, name: str) -> Executor:
    """Return the executor that the configuration asks for; ``name`` marks the processes of this worker."""
    if config.ansible is not None:
        from saw.jobs.ansible_run import AnsibleExecutor

        return AnsibleExecutor(config.ansible, config.state, name, config.keep_runs)
    if config.awx is not None:
        from saw.jobs.awx import AwxExecutor

        return AwxExecutor(config.awx)
    raise ConfigError("no executor is configured", cure="give ansible or awx")


@contextlib.contextmanager
def guarded(name: str) -> Iterator[None]:
    """Have a process beside the worker that ends its runs when the worker is killed; it sees that by the end of a pipe."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "saw.jobs.processes", name]
    guard = subprocess.Popen(command, stdin=read, start_new_session=True)
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        guard.wait()
