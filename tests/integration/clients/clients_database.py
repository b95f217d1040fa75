"""The database of the clients' workspace: a real server behind ring 2, and the way to it that a user of the sandbox has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clients_rig import PYTHON, Done, Workspace
from pg_ends import PASSWORD, Database, database

HOST, ADDRESS = "db.example.com", "10.99.0.8"


@contextmanager
def serving(workspace: Workspace) -> Iterator[Database]:
    """Start the server and give ring 2 its name and password; both are taken back afterwards."""
    ring2 = workspace.ring2
    ring2.namespace.ip("addr", "add", f"{ADDRESS}/24", "dev", "far0")
    certificate, key = ring2._pair(ring2.corporate, (HOST,), "clients-db")
    secret = ring2.directory / "credentials" / "orders-db"
    secret.touch(0o600)
    secret.write_text(PASSWORD + "\n")
    lines = ring2.hosts.read_text()
    with database(ring2.namespace.run, ADDRESS, certificate, key) as found:
        ring2.hosts.write_text(f"{lines}{ADDRESS} {HOST}\n")
        yield found
    ring2.hosts.write_text(lines)
    ring2.namespace.ip("addr", "del", f"{ADDRESS}/24", "dev", "far0")


def helper(workspace: Workspace, *words: str, **options: object) -> Done:
    """Run ``saw-postgres`` as the image's shim does."""
    return workspace.client(PYTHON, "-I", "-S", f"{workspace.spec.paths.package}/pg_connect.py", *words, **options)  # type: ignore[arg-type]
