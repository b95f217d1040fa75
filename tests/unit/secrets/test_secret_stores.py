"""What every place for secrets promises, tried on each: files, sealed files, Vault's contract, OpenBao, the environment."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vault_far_end import Contract, FarEnd, OpenBao, bao_program

from saw.secrets.environment import VARIABLE, EnvironmentStore
from saw.secrets.files import FileStore
from saw.secrets.sealed import SealedStore
from saw.secrets.store import (
    MAX_VALUE,
    SecretConflict,
    SecretError,
    SecretExists,
    SecretMissing,
    SecretStore,
    read_or_none,
)
from saw.secrets.vault import VaultStore

KEY = bytes(range(32))
Open = Callable[[], SecretStore]


@pytest.fixture(scope="module")
def openbao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarEnd]:
    far = OpenBao(tmp_path_factory.mktemp("openbao"), bao_program())
    yield far
    far.close()


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarEnd]:
    far = Contract(tmp_path_factory.mktemp("vault"))
    yield far
    far.close()


@pytest.fixture(params=["files", "sealed", "contract", "openbao"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same place again, as another process would."""
    if request.param == "files":
        yield lambda: FileStore(tmp_path / "keys")
        return
    if request.param == "sealed":
        yield lambda: SealedStore(tmp_path / "sealed", KEY)
        return
    far: FarEnd = request.getfixturevalue(request.param)
    far.clear()
    made: list[VaultStore] = []

    def open_vault() -> SecretStore:
        made.append(VaultStore(far.by_role(), pause=lambda _: None))
        return made[-1]

    yield open_vault
    for store in made:
        store.close()


def test_what_was_written_is_read_by_whoever_opens_it_next(opened: Open) -> None:
    store = opened()
    values = {"server.pem": b"-----BEGIN", "x509/ca-key.pem": bytes(range(256)), "sessions.key": b"\n\0 "}
    for name, value in values.items():
        store.write(name, value, new=True)
    again = opened()
    assert {name: again.read(name) for name in values} == values
    assert again.names() == sorted(values)
    again.write("sessions.key", b"another")
    assert (store.read("sessions.key"), store.read("server.pem")) == (b"another", b"-----BEGIN")
    assert store.names() == sorted(values)


def test_what_is_not_there_is_missing_and_no_other_error(opened: Open) -> None:
    store = opened()
    assert store.names() == []
    for name in ("server.pem", "x509/ca-key.pem"):
        with pytest.raises(SecretMissing, match=name):
            store.read(name)
        assert read_or_none(store, name) is None
        store.remove(name)
    store.write("server.pem", b"1")
    assert read_or_none(store, "server.pem") == b"1"


def test_what_has_to_be_new_takes_the_place_of_nothing(opened: Open) -> None:
    store = opened()
    store.write("x509/ca-key.pem", b"first", new=True)
    with pytest.raises(SecretExists, match=r"ca-key\.pem"):
        opened().write("x509/ca-key.pem", b"second", new=True)
    assert store.read("x509/ca-key.pem") == b"first"
    store.write("x509/ca-key.pem", b"second")
    assert store.read("x509/ca-key.pem") == b"second"


def test_of_many_that_make_one_at_once_one_does_and_all_read_its_value(opened: Open) -> None:
    stores = [opened() for _ in range(4)]
    begin, ends = threading.Barrier(4), list[bytes | None]([None] * 4)

    def make(number: int) -> None:
        begin.wait(60)
        try:
            stores[number].write("server.pem", b"%d" % number, new=True)
            ends[number] = b"%d" % number
        except (SecretExists, SecretConflict):
            pass

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    [made] = [end for end in ends if end is not None]
    assert {store.read("server.pem") for store in stores} == {made}


def test_what_is_removed_is_gone_and_can_be_made_anew(opened: Open) -> None:
    store = opened()
    store.write("server.pem", b"old")
    store.write("signer.pem", b"stays")
    store.remove("server.pem")
    assert store.names() == ["signer.pem"]
    with pytest.raises(SecretMissing):
        opened().read("server.pem")
    store.write("server.pem", b"new", new=True)
    assert (store.read("server.pem"), store.read("signer.pem")) == (b"new", b"stays")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/shadow",
        "../server.pem",
        "x509/../server.pem",
        "x509//a",
        "a/b/c/d/e",
        ".hidden",
        "A",
        "a b",
        "a\n",
        "a?list",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(opened: Open, name: str) -> None:
    store = opened()
    for call in (store.read, store.remove, lambda given: store.write(given, b"x")):
        with pytest.raises(SecretError, match="not the name of a secret"):
            call(name)
    store.write("a/b/c/d", b"the longest that is one")
    assert store.read("a/b/c/d") == b"the longest that is one"
    store.remove("a/b/c/d")


def test_values_have_bounds(opened: Open) -> None:
    store = opened()
    for value in (b"", b"x" * (MAX_VALUE + 1)):
        with pytest.raises(SecretError, match="a value of"):
            store.write("server.pem", value)
    store.write("server.pem", b"x" * MAX_VALUE)
    assert opened().read("server.pem") == b"x" * MAX_VALUE


def test_the_environment_holds_secrets_of_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"x509/ca-key.pem": b"\0\1", "server.pem": b"pem"}
    told = {VARIABLE: json.dumps({name: base64.b64encode(value).decode() for name, value in given.items()})}
    with pytest.raises(SecretError, match="no place for secrets"):
        EnvironmentStore(told, only_for_tests=False)
    store: SecretStore = EnvironmentStore(told, only_for_tests=True)
    assert {name: store.read(name) for name in store.names()} == given
    with pytest.raises(SecretMissing):
        store.read("sso.key")
    for call in (lambda: store.write("sso.key", b"x"), lambda: store.remove("server.pem")):
        with pytest.raises(SecretError, match="the environment"):
            call()
    assert EnvironmentStore({}, only_for_tests=True).names() == []
    for wrong in ("{", '{"a": 1}', '{"a": "*"}', '{"../a": ""}'):
        with pytest.raises(SecretError, match=VARIABLE):
            EnvironmentStore({VARIABLE: wrong}, only_for_tests=True)
    assert VARIABLE not in os.environ
