"""A PostgreSQL server of the machine's own package, on a Unix socket in a directory of its own, under an account of no rights."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from saw.broker.store import Store
from saw.broker.wake import Waker

#: The package makes it; it owns nothing here but the server's directory.
ACCOUNT = "postgres"
#: What the tests need of a server, and nothing that would make it less of one: it writes through as in production.
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "120",
    "max_wal_size": "96MB",
    "autovacuum": "off",
}
#: Databases of tests that have ended are dropped once so many newer ones were made, where nobody else drops them.
KEPT = 4


def programs() -> Path:
    """Where the newest installed server's programs are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda one: float(one.parts[4]))
    assert found, "the package postgresql is missing: scripts/bootstrap.sh"
    return found[-1].parent


class Server:
    """One server with databases ``saw_1``, ``saw_2`` …, each a copy of one whose tables are made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port = 5432
        self.kept: int | None = KEPT
        self._made = 0
        account = pwd.getpwnam(ACCOUNT)
        self._as: dict[str, Any] = {}
        self.user = pwd.getpwuid(os.getuid()).pw_name
        if os.getuid() == 0:
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(directory, account.pw_uid, account.pw_gid)
            self.user = ACCOUNT
        self._run(
            "initdb", "-D", str(self.data), "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "-U", "saw"
        )
        self.process: subprocess.Popen[bytes] | None = None

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(programs() / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **self._as)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, **settings: str) -> None:
        self.port = int(settings.get("port", self.port))
        given = {**SETTINGS, "port": str(self.port), "unix_socket_directories": str(self.directory), **settings}
        options = " ".join(f"-c {name}='{value}'" for name, value in given.items())
        self._run(
            "pg_ctl", "start", "-w", "-t", "120", "-D", str(self.data), "-l", str(self.directory / "log"), "-o", options
        )

    def stop(self, how: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-t", "120", "-D", str(self.data), "-m", how)

    @property
    def running(self) -> bool:
        return (self.data / "postmaster.pid").exists()

    def admin(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.directory), port=self.port, user="saw", dbname=database, autocommit=True)

    def url(self, database: str) -> str:
        return f"postgresql://saw@/{database}?host={self.directory}"

    def database(self, empty: bool = False) -> str:
        """Make a database; return the setting that names it. ``empty``: without tables."""
        with self.admin() as session:
            if not self._made:
                session.execute("CREATE DATABASE template_saw")
                self._made = 1
                _migrated(self.url("template_saw"))
            self._made += 1
            name = f"saw_{self._made}"
            if self.kept is not None and self._made > self.kept:
                session.execute(f"DROP DATABASE IF EXISTS saw_{self._made - self.kept} WITH (FORCE)".encode())
            source = "template0" if empty else "template_saw"
            session.execute(f"CREATE DATABASE {name} TEMPLATE {source} STRATEGY file_copy".encode())
        return self.url(name)


def _migrated(url: str) -> None:
    from saw.broker.database_settings import parse_database

    Store.open_postgresql(parse_database(url), Waker()).close()


def name_of(url: str) -> str:
    found = re.fullmatch(r"postgresql://saw@/(\w+)\?host=.*", url)
    assert found is not None
    return found[1]


def memory() -> str | None:
    """A file system in memory with room for a server: what is written through is there at once, and gone with it."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    found = os.statvfs(place)
    return str(place) if found.f_bavail * found.f_frsize > 2**30 else None


@contextmanager
def running_postgres(**settings: str) -> Iterator[Server]:
    """A server, ended and removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="saw-pg-", dir=memory()))
    directory.chmod(0o755)
    server = Server(directory)
    try:
        server.start(**settings)
        yield server
    finally:
        if server.running:
            server.stop("immediate")
        shutil.rmtree(directory)


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait(60)
