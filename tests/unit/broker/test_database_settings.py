"""The setting ``database``: what it takes, what it refuses with a cure, and that no secret gets in or out by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.broker.config import load_config
from saw.broker.database_settings import parse_database, require_safe
from saw.errors import ConfigError

CA = "sslrootcert=/etc/saw/db-ca.pem"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            f"postgresql://saw@db.example.com:5433/saw?passfile=/etc/saw/pgpass&{CA}",
            {
                "host": "db.example.com",
                "port": "5433",
                "dbname": "saw",
                "user": "saw",
                "passfile": "/etc/saw/pgpass",
                "sslrootcert": "/etc/saw/db-ca.pem",
            },
        ),
        (
            f"postgresql://[2001:db8::1]/saw?{CA}",
            {"host": "2001:db8::1", "dbname": "saw", "sslrootcert": "/etc/saw/db-ca.pem"},
        ),
        ("postgresql:///saw?host=/run/postgresql", {"host": "/run/postgresql", "dbname": "saw"}),
        ("postgresql://a%40b@/s%20w?host=/run/pg", {"host": "/run/pg", "dbname": "s w", "user": "a@b"}),
        ("postgresql:///?service=saw", {"service": "saw"}),
    ],
)
def test_a_place_is_read_and_always_verified_in_full(text: str, wanted: dict[str, str]) -> None:
    assert parse_database(text).parameters == {**wanted, "sslmode": "verify-full"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "postgresql://"),
        ("sqlite:////var/lib/saw.db", "postgresql://"),
        ("postgres://db/saw", "postgresql://"),
        ("postgresql+psycopg://db/saw", "postgresql://"),
        (f"postgresql://saw:hunter2@db/saw?{CA}", "password"),
        (f"postgresql://db/saw?{CA}&password=hunter2", "'password'"),
        (f"postgresql://db/saw?{CA}&sslmode=disable", "'sslmode'"),
        (f"postgresql://db/saw?{CA}&options=-csynchronous_commit%3Doff", "'options'"),
        ("postgresql://db.example.com/saw", "sslrootcert"),
        ("postgresql://db/saw?sslrootcert=ca.pem", "absolute"),
        (f"postgresql://db/saw?{CA}&{CA}", "twice"),
        (f"postgresql://db:99999/saw?{CA}", "no URL"),
        (f"postgresql://one,two/saw?{CA}", "more than one host"),
        (f"postgresql://db/saw?{CA}&host=/run/postgresql", "only host"),
        ("postgresql:///saw?host=run", "Unix socket"),
        ("postgresql:///saw", "no host"),
        (f"postgresql://db/?{CA}", "no host or no database"),
        (f"postgresql://db/saw/more?{CA}", "slash"),
        (f"postgresql://db/saw?{CA}#x", "fragment"),
        ("postgresql:///saw?host=/run/postgresql&host", "no URL"),
        ("postgresql:///?service=saw&host=/run/postgresql", "names nothing else"),
        ("postgresql:///saw?service=saw", "names nothing else"),
        ("postgresql:///saw?host=/run/postgresql&servicefile=/a", "'servicefile'"),
        ("postgresql:///saw ?host=/run/postgresql", "space"),
    ],
)
def test_anything_else_is_refused_with_a_cure_and_without_its_secret(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_database(text)
    assert reason in caught.value.message
    assert caught.value.cure
    assert "hunter2" not in str(caught.value)


@given(st.text(alphabet="abc:/@?&=#%[],. ", max_size=40))
def test_no_text_is_taken_that_lacks_what_verifies_the_server(rest: str) -> None:
    try:
        found = parse_database(f"postgresql://{rest}").parameters
    except ConfigError:
        return
    assert found["sslmode"] == "verify-full"
    assert "password" not in found
    assert found.get("service") or found["host"].startswith("/") or found["sslrootcert"].startswith("/")


def test_the_configuration_takes_the_setting_and_names_it_when_it_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "broker.json"
    good = {
        "trust_domain": "saw.example",
        "state_dir": "/var/lib/saw/broker",
        "operator_socket": "/run/o.sock",
        "server_names": ["b.saw.internal"],
    }
    file.write_text(json.dumps(good))
    assert load_config(file).postgresql is None
    file.write_text(json.dumps({**good, "database": "postgresql:///saw?host=/run/postgresql"}))
    assert load_config(file).postgresql == "postgresql:///saw?host=/run/postgresql"
    for wrong in ("postgresql://saw:hunter2@db/saw", 5, {"url": "x"}):
        file.write_text(json.dumps({**good, "database": wrong}))
        with pytest.raises(ConfigError, match="database"):
            load_config(file)


def test_a_secret_that_others_can_read_is_refused_and_a_private_one_is_taken(tmp_path: Path) -> None:
    secret = tmp_path / "pgpass"
    place = parse_database(f"postgresql:///saw?host=/run/postgresql&passfile={secret}")
    with pytest.raises(ConfigError, match=r"passfile.*No such file"):
        require_safe(place, {})
    secret.write_text("*:*:*:saw:hunter2")
    for mode in (0o640, 0o604):
        secret.chmod(mode)
        with pytest.raises(ConfigError, match="others can read"):
            require_safe(place, {})
    secret.chmod(0o600)
    require_safe(place, {})
    with pytest.raises(ConfigError, match="PGPASSWORD"):
        require_safe(place, {"PGPASSWORD": "hunter2"})
    folder = parse_database(f"postgresql:///saw?host=/run/postgresql&sslrootcert={tmp_path}")
    with pytest.raises(ConfigError, match="no file"):
        require_safe(folder, {})
