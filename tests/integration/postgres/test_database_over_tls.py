"""PostgreSQL over the network: verified in full and with the password of a private file, or not at all."""

from __future__ import annotations

import os
import pwd
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from postgres_rig import ACCOUNT, Server, running_postgres

from saw.broker.database_settings import parse_database
from saw.broker.postgres import DatabaseUnavailable
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.identity.x509 import Authority, new_key_and_csr

pytestmark = pytest.mark.control("FLT-01")
WORD = "correct horse battery"


def with_tls(server: Server, directory: Path) -> Path:
    """Give the server a certificate for ``localhost``; return the file of its authority."""
    authority = Authority.create(directory / "ca", "saw.example", datetime.now(UTC))
    key, csr = new_key_and_csr("localhost", ("localhost",))
    pem = authority.issue_server(csr, ("localhost",), datetime.now(UTC), timedelta(days=1), spiffe_path="service/db")
    for name, content in (("server.crt", pem), ("server.key", key)):
        file = server.data / name
        file.write_bytes(content)
        file.chmod(0o600)
        if os.getuid() == 0:
            account = pwd.getpwnam(ACCOUNT)
            os.chown(file, account.pw_uid, account.pw_gid)
    (server.data / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    return directory / "ca" / "ca.pem"


def test_only_the_named_server_with_its_own_authority_is_talked_to(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running_postgres() as server:
        authority = with_tls(server, tmp_path)
        other = tmp_path / "other"
        Authority.create(other, "saw.example", datetime.now(UTC))
        server.stop()
        server.start(listen_addresses="127.0.0.1", port=str(port), ssl="on")
        with server.admin() as session:
            session.execute(f"CREATE ROLE app LOGIN PASSWORD '{WORD}'".encode())
            session.execute("CREATE DATABASE app OWNER app TEMPLATE template0")
        secret = tmp_path / "pgpass"
        secret.write_text(f"*:*:*:app:{WORD}")
        secret.chmod(0o600)
        good = f"postgresql://app@localhost:{port}/app?passfile={secret}&sslrootcert={authority}"
        store = Store.open_postgresql(parse_database(good), Waker())
        with store.write() as tx:
            used = tx.connection.exec_driver_sql("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
            assert used.scalar_one() is True
        store.close()
        refused = {
            "verify failed": good.replace(str(authority), str(other / "ca.pem")),
            "does not match host name": good.replace("@localhost", "@127.0.0.1"),
            "password authentication failed": good.replace(str(secret), str(wrong(tmp_path))),
        }
        for reason, url in refused.items():
            with pytest.raises(DatabaseUnavailable, match=reason) as caught:
                Store.open_postgresql(parse_database(url), Waker())
            assert WORD not in str(caught.value)
        server.stop()
        server.start(listen_addresses="127.0.0.1", ssl="off")
        with pytest.raises(DatabaseUnavailable, match="does not support SSL"):
            Store.open_postgresql(parse_database(good), Waker())


def wrong(directory: Path) -> Path:
    file = directory / "wrong"
    file.write_text("*:*:*:app:another word")
    file.chmod(0o600)
    return file
