"""What both proofs under load need: a real broker that is killed and started again, reviewers, active workspaces, senders."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "integration/broker"), str(TESTS / "integration")]

from broker_rig import Lab, image_record, ready_socket  # noqa: E402
from sso_rig import free_port  # noqa: E402

from databases import beside  # noqa: E402
from saw.broker.client import BrokerContext, Context, OperatorClient  # noqa: E402
from saw.broker.config import BrokerConfig, Listen  # noqa: E402
from saw.identity.x509 import new_key_and_csr  # noqa: E402
from saw.policy.keys import create_key  # noqa: E402

HERE = Path(__file__).resolve().parent
POLICY = "a" * 64
LEASE = "2099-01-01T00:00:00.000Z"
EDGE = "edge"
GROUP = "maintainers"
REVIEWER = "ben@example.com"

#: Imports once what every broker imports, then makes one of each line it reads, by the command that users run.
KEEPS_IMPORTS = """
import os, sys
from saw.broker import migrations
from saw.broker.server import run
from saw.cli.main import main
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(["broker", "serve", "--config", line.strip()]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def made(directory: Path, workspaces: int, **settings: Any) -> Lab:
    """Make a broker in ``directory`` on a port that stays, with active workspaces ``ws-N``, a reviewer and a perimeter."""
    lab = Lab(directory, **settings)
    lab.config = msgspec.structs.replace(lab.config, listen=Listen("127.0.0.1", free_port()))
    lab.config_file.write_bytes(msgspec.json.encode(lab.config))
    lab.start()
    lab.register_image(image_record())
    for number in range(workspaces):
        body = {"id": f"ws-{number}", "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable"}
        lab.operator.request("POST", "/v1/workspaces", {**body, "image": "workspace"})
    # What an attestation leaves behind in the register.
    run(lab, f"UPDATE workspaces SET state = 'active', lease_expires_at = '{LEASE}', policy_digest = '{POLICY}'")  # noqa: S608
    create_key(directory, "ben")
    reviewer = {"groups": [GROUP], "public_key": (directory / "ben.pub").read_text()}
    lab.operator.request("PUT", f"/v1/reviewers/{REVIEWER}", reviewer)
    edge = directory / EDGE
    edge.mkdir()
    key, csr = new_key_and_csr(EDGE)
    issued = {"csr_pem": csr.decode(), "kind": "perimeter", "name": EDGE}
    (edge / "key.pem").write_bytes(key)
    (edge / "cert.pem").write_text(lab.operator.request("POST", "/v1/certificates/x509", issued)["certificate"])
    return lab


def reopened(directory: Path) -> Lab:
    """Return the broker that an earlier run made in ``directory``; it does not run."""
    lab = object.__new__(Lab)
    lab.directory, lab.config_file = directory, directory / "broker.json"
    lab.config = msgspec.json.decode(lab.config_file.read_bytes(), type=BrokerConfig)
    lab.ca_file = lab.config.keys / "x509" / "ca.pem"
    lab.port, lab.process = lab.config.listen.port, None
    lab.operator = OperatorClient(Context(BrokerContext(socket=lab.config.operator_socket)))
    return lab


def run(lab: Lab, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement in the broker's database, beside it."""
    with beside(lab.config) as rows:
        found = rows.execute(statement)
        return found.fetchall() if found.description else []


class Brokers:
    """Starts and kills the broker of ``lab``: every ``cold`` th time a whole process, else one that has its imports done."""

    def __init__(self, lab: Lab, cold: int) -> None:
        self.lab = lab
        self._cold = cold
        self._starts = 0
        self._keeper: subprocess.Popen[str] | None = None
        self._child = 0
        self._listens = ExitStack()

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.begin()()

    def begin(self) -> Callable[[], None]:
        """Start it; return what waits until it serves."""
        self._starts += 1
        name = self.lab.directory / "run" / "notify.sock"
        self._listens = ExitStack()
        _, wait = self._listens.enter_context(ready_socket(name))
        if self._starts % self._cold == 0:
            command = [sys.executable, "-m", "saw.cli.main", "broker", "serve", "--config", str(self.lab.config_file)]
            with (self.lab.directory / "broker.log").open("ab") as log:
                self.lab.process = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": str(name)}, stderr=log)
        else:
            keeper = self._kept(name)
            assert keeper.stdin is not None
            assert keeper.stdout is not None
            keeper.stdin.write(f"{self.lab.config_file}\n")
            keeper.stdin.flush()
            self._child = int(keeper.stdout.readline())

        def serves() -> None:
            with self._listens:
                wait(self.lab.process or self._kept(name))

        return serves

    def kill(self) -> None:
        """Kill it (signal 9), which may not serve yet, and wait until it is gone."""
        self._listens.close()
        if self.lab.process is not None:
            self.lab.process.kill()
            self.lab.process.wait(60)
            self.lab.process = None
            return
        os.kill(self._child, signal.SIGKILL)
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == "ended\n"
        self._child = 0

    def close(self) -> None:
        """End whatever runs."""
        if self.lab.process is not None or self._child:
            self.kill()
        if self._keeper is not None:
            self._keeper.communicate("", timeout=60)

    def _kept(self, name: Path) -> subprocess.Popen[str]:
        if self._keeper is None:
            with (self.lab.directory / "broker.log").open("ab") as log:
                self._keeper = subprocess.Popen(
                    [sys.executable, "-c", KEEPS_IMPORTS], env={**os.environ, "NOTIFY_SOCKET": str(name)}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        return self._keeper


class Piped:
    """A program of this folder that says it is ready on its output and ends with its input."""

    def __init__(self, program: str, argument: str, log: Path) -> None:
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / program), argument], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()
        assert self.said, log.read_text()

    def stop(self) -> None:
        """End it and what it started."""
        self.process.communicate("", timeout=60)


def far_end(lab: Lab) -> Piped:
    """Start the far end of ``lab``."""
    return Piped("far_end.py", str(lab.directory / "arrived"), lab.directory / "far.log")


def arrived(lab: Lab) -> list[tuple[str, str]]:
    """Return every call at the far end: its idempotency key and the SHA-256 of its body."""
    file = lab.directory / "arrived"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(key, body) for key, body in (line.split() for line in lines)]


def senders(lab: Lab, far: Piped, processes: int, *, ships: bool) -> Piped:
    """Start so many perimeters that all are ``perimeter:edge``."""
    told = {
        "name": EDGE, "broker_port": lab.config.listen.port, "far_port": int(far.said[0]), "processes": processes,
        "directory": str(lab.directory / EDGE), "ca_file": str(lab.ca_file), "ships": ships,
    }  # fmt: skip
    return Piped("sender.py", json.dumps(told), lab.directory / "senders.log")


def token() -> str:
    """Return a word that nobody else writes."""
    return secrets.token_hex(8)
