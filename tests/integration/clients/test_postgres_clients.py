"""psql and psycopg inside the sandbox, with the way that ``saw-postgres`` opens: through both rings, without a password."""

from __future__ import annotations

from collections.abc import Iterator

import clients_database
import pytest
from clients_rig import PYTHON, Workspace
from pg_ends import DATABASE, PASSWORD, ROLE, Database

HOST = clients_database.HOST


@pytest.fixture(scope="module")
def server(workspace: Workspace) -> Iterator[Database]:
    with clients_database.serving(workspace) as found:
        yield found


helper = clients_database.helper


@pytest.mark.control("CRED-01")
@pytest.mark.control("RUN-01")
def test_psql_asks_a_database_whose_password_it_never_had(workspace: Workspace, server: Database) -> None:
    psql = ("psql", "-X", "-U", ROLE, "-d", DATABASE, "-At", "-c")
    done = helper(workspace, HOST, *psql, "SELECT current_user, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert (done.code, done.out) == (0, "agent|t\n"), done.words
    assert PASSWORD not in done.words
    for words, says in (
        ((HOST, *psql[:3], "postgres", *psql[4:], "SELECT 1"), "policy lets this workspace in as agent only"),
        (("other.example.com", *psql, "SELECT 1"), "refused by ring1: host_not_allowed"),
        ((f"{HOST}:5433", *psql, "SELECT 1"), "refused by ring1: host_not_allowed"),
    ):
        refused = helper(workspace, *words)
        assert (refused.code, says in refused.err) == (2, True), refused.words
    assert server.running


@pytest.mark.control("RUN-01")
def test_a_program_that_the_rule_does_not_name_opens_no_session(workspace: Workspace, server: Database) -> None:
    status = ("curl", "-sS", "-H", "connection: upgrade", "-H", "upgrade: postgres", f"http://{HOST}:5432/")
    done = workspace.client(*status)
    assert "binary_not_allowed" in done.out, done.words
    assert server.running


@pytest.mark.control("CRED-01")
def test_psycopg_asks_it_as_well_and_other_commands_keep_their_exit_status(
    workspace: Workspace, server: Database
) -> None:
    script = (
        "import psycopg, sys\n"
        "with psycopg.connect(user=sys.argv[1], dbname=sys.argv[2]) as c:\n"
        "    print(c.execute('SELECT sum(n) FROM generate_series(1, 100) n').fetchone()[0], len(c.execute(\n"
        "        \"SELECT repeat('x', 3000000)\").fetchone()[0]))\n"
    )
    done = helper(
        workspace,
        f"{HOST}:5432",
        PYTHON,
        "-B",
        "-c",
        script,
        ROLE,
        DATABASE,
        variables={"PYTHONPATH": "/run/clients/python"},
    )
    assert (done.code, done.out) == (0, "5050 3000000\n"), done.words
    assert helper(workspace, HOST, "sh", "-c", "exit 7").code == 7
    assert helper(workspace, HOST, "no-such-command").code == 127
    assert helper(workspace, "not a host").code == 2
    there = helper(workspace, HOST, "sh", "-c", 'test -S "$PGHOST/.s.PGSQL.5432" && echo "$PGHOST"')
    assert there.code == 0, there.words
    gone = 'for _ in $(seq 600); do [ -e "$1" ] || exit 0; sleep 0.1; done; exit 1'
    assert workspace.client("sh", "-c", gone, "sh", there.out.strip()).code == 0, (
        "the way is taken away with the command"
    )
    assert server.running
