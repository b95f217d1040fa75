"""The broker's own secrets: where they are, that none is made in place of another, and how they move."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from vault_far_end import Contract

from saw.broker.config import BrokerConfig, load_config
from saw.broker.core import Broker
from saw.broker.schema import audit_events
from saw.broker.secret_move import MoveRefused, move_secrets, put_secret, take_secret
from saw.broker.secret_place import (
    AUTHORITY,
    NAMES,
    ONLINE,
    REVIEWS,
    SERVER,
    SIGN_INS,
    SIGNER,
    Known,
    known_place,
    open_secrets,
    remember_place,
)
from saw.broker.server import tls_context, upkeep_once
from saw.broker.setup import initialise
from saw.broker.store import Store, chained_rows
from saw.broker.wake import Waker
from saw.cli.broker import main
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import write_private
from saw.identity.names import AuthorityExistsError
from saw.policy.keys import private_pem, public_pem
from saw.secrets.environment import VARIABLE
from saw.secrets.settings import SealedSettings, SecretsSettings
from saw.secrets.store import read_or_none
from saw.secrets.vault_settings import AppRole, VaultSettings

NOW = datetime(2026, 11, 29, tzinfo=UTC)
SEALED = SecretsSettings("sealed", SealedSettings())
BACK = SecretsSettings("files", SealedSettings())


def now() -> datetime:
    return NOW


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BrokerConfig:
    """An installation on plain files; a credential is handed over as systemd does."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/saw-secrets").write_bytes(bytes(range(32)))
    (tmp_path / "credentials/saw-secrets").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    return BrokerConfig("saw.example", str(tmp_path / "state"), str(tmp_path / "o.sock"), ("b.saw.internal",))


def on(config: BrokerConfig, secrets: SecretsSettings) -> BrokerConfig:
    return msgspec.structs.replace(config, secrets=secrets)


def values(config: BrokerConfig, kind: str | None = None) -> dict[str, bytes]:
    store = open_secrets(config, kind)
    return {name: value for name in NAMES if (value := read_or_none(store, name)) is not None}


def events(config: BrokerConfig) -> list[tuple[str, str, int]]:
    """Operation, message and number of secrets of every event about them."""
    store = Store.open(config, Waker())
    with store.read() as connection:
        rows = list(chained_rows(connection.execute(audit_events.select().order_by(audit_events.c.seq))))
    store.close()
    found = [row.event for row in rows if row.event.get("api", {}).get("operation", "").startswith("secrets.")]
    return [(one["api"]["operation"], one["message"], len(one["unmapped"]["saw"]["secrets"])) for one in found]


def opens(config: BrokerConfig) -> None:
    """A broker opens, and signs with each key that it has."""
    broker = Broker.open(config, now, os.urandom)
    assert broker.services.signer.pem.startswith(b"-----BEGIN CERTIFICATE")
    assert broker.trust()["trust_domain"] == "saw.example"
    broker.close()


@pytest.mark.parametrize("secrets", [SecretsSettings(), SEALED], ids=["files", "sealed"])
def test_init_makes_each_secret_where_the_configuration_says_and_once(
    config: BrokerConfig, secrets: SecretsSettings
) -> None:
    config = on(config, secrets)
    assert {"x509 authority", "tuf online key", "key of recordings"} <= set(initialise(config, NOW))
    first = values(config)
    assert set(first) == set(NAMES) - {SIGN_INS}
    assert known_place(config) == Known(secrets.provider)
    assert initialise(config, NOW) == []
    assert values(config) == first
    opens(config)


def test_what_lies_on_the_disk_of_a_sealed_installation_opens_nothing(config: BrokerConfig) -> None:
    config = on(config, SEALED)
    initialise(config, NOW)
    held = values(config)
    parts = {line for value in held.values() for line in (value.splitlines() if b"-----" in value else [value]) if line}
    secret = {part for part in parts if len(part) > 24 and b"-----" not in part}
    # of a certificate with its key the certificate is public: what lies elsewhere on purpose
    public = {line for path in config.keys.rglob("*") if path.is_file() for line in path.read_bytes().splitlines()}
    files = [path for path in config.state.rglob("*") if path.is_file()]
    raw = b"".join(path.read_bytes() for path in files)
    assert secret - public and not any(part in raw for part in secret - public)
    assert {path.relative_to(config.keys).as_posix() for path in config.keys.rglob("*") if path.is_file()} == {
        "x509/ca.pem",
        "tuf-online.pub",
    }
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files if path.suffix == ".sealed")


def test_without_the_credential_nothing_opens_and_nothing_is_made(
    config: BrokerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = on(config, SEALED)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match="no credential saw-secrets was handed"):
        initialise(config, NOW)
    assert not config.keys.exists()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    initialise(config, NOW)
    key = tmp_path / "credentials/saw-secrets"
    for mode, content, reason in (
        (0o444, None, "open to others"),
        (0o400, b"short", "not a key of 32"),
        (0o400, bytes(32), "another key"),
    ):
        key.unlink()
        key.write_bytes(bytes(range(32)) if content is None else content)
        key.chmod(mode)
        with pytest.raises(SawError, match=reason):
            Broker.open(config, now, os.urandom)
        with pytest.raises(SawError, match=reason):
            initialise(config, NOW)
    key.unlink()
    key.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot read the key"):
        Broker.open(config, now, os.urandom)
    key.unlink()
    key.write_bytes(bytes(range(32)))
    key.chmod(0o400)
    opens(config)


def test_a_broker_never_makes_new_authorities_because_a_setting_changed(config: BrokerConfig) -> None:
    initialise(config, NOW)
    before = values(config)
    (config.state / "secrets.json").unlink()  # an installation of before this file
    for begin in (lambda one: initialise(one, NOW), lambda one: Broker.open(one, now, os.urandom)):
        with pytest.raises(ConfigError, match=r"are in files, and the configuration says sealed.*move --to sealed"):
            begin(on(config, SEALED))
    assert not (config.state / "sealed").exists()
    move_secrets(on(config, SEALED), now)
    for begin in (lambda one: initialise(one, NOW), lambda one: Broker.open(one, now, os.urandom)):
        with pytest.raises(ConfigError, match="are in sealed, and the configuration says files"):
            begin(config)
    assert values(config, "files") == {}
    opens(on(config, SEALED))
    assert values(on(config, SEALED)) == before


def test_the_check_of_a_configuration_that_lost_the_way_to_the_secrets_refuses(
    config: BrokerConfig, tmp_path: Path
) -> None:
    config = on(config, SEALED)
    initialise(config, NOW)
    file = tmp_path / "broker.json"
    for secrets, refused in (
        (SEALED, None),
        (BACK, None),
        (SecretsSettings(), "are in sealed, which the configuration does not name"),
    ):
        file.write_bytes(msgspec.json.encode(on(config, secrets)))
        if refused is None:
            assert main(["check", "--config", str(file)]) == 0
        else:
            with pytest.raises(ConfigError, match=refused):
                main(["check", "--config", str(file)])


def test_an_authority_without_its_certificate_is_not_made_anew(config: BrokerConfig) -> None:
    config = on(config, SEALED)
    initialise(config, NOW)
    certificate = config.keys / "x509/ca.pem"
    kept = certificate.read_bytes()
    certificate.unlink()
    with pytest.raises(AuthorityExistsError, match=r"ca-key\.pem.*no .*ca\.pem"):
        initialise(config, NOW)
    certificate.write_bytes(kept)
    (config.keys / "tuf-online.pub").unlink()
    assert initialise(config, NOW) == []
    assert (config.keys / "tuf-online.pub").exists(), "a public half can be made again"
    open_secrets(config).remove("ssh/ssh-user-ca")
    with pytest.raises(AuthorityExistsError, match="half of the keys of ssh"):
        initialise(config, NOW)


@pytest.fixture
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    far = Contract(tmp_path_factory.mktemp("vault"))
    yield far
    far.close()


def test_secrets_go_from_place_to_place_and_leave_nothing_behind(config: BrokerConfig, vault: Contract) -> None:
    initialise(config, NOW)
    first = values(config)
    way = vault.settings()
    places = [SEALED, SecretsSettings("vault", SealedSettings(), way), SecretsSettings("files", SealedSettings(), way)]
    before = "files"
    for secrets in places:
        there = on(config, secrets)
        moved = move_secrets(there, now, secrets.provider)
        assert (moved.provider, moved.copied, moved.removed) == (secrets.provider, len(first), len(first))
        assert (values(there), values(there, before)) == (first, {})
        assert known_place(there) == Known(secrets.provider)
        assert move_secrets(there, now) == type(moved)(secrets.provider), "a second time nothing is done"
        assert initialise(there, NOW) == []
        opens(there)
        before = secrets.provider
    assert events(config) == [
        ("secrets.move", text.format(len(first)), len(first))
        for old, new in (("files", "sealed"), ("sealed", "vault"), ("vault", "files"))
        for text in (f"{{}} secrets were copied from {old} to {new}", f"{{}} copies outside of {new} were removed")
    ]


@pytest.mark.thorough
def test_a_vault_that_is_away_keeps_a_broker_from_starting_and_not_from_serving(
    config: BrokerConfig, vault: Contract, caplog: pytest.LogCaptureFixture
) -> None:
    there = on(config, SecretsSettings("vault", vault=vault.settings()))
    initialise(there, NOW)
    broker = Broker.open(there, now, os.urandom)
    context = tls_context(broker, now)
    assert broker.services.signer.pem
    old = vault.held["saw/broker/server.pem"][-1]
    vault.before = lambda _method, _path: (503, {"errors": ["Vault is sealed"]})
    later = NOW + timedelta(days=21)
    upkeep_once(broker, context, lambda: later)  # all else goes on
    assert "certificates cannot be renewed" in caplog.text
    assert broker.services.signer.pem
    for begin in (lambda: Broker.open(there, now, os.urandom), lambda: initialise(there, NOW)):
        with pytest.raises(UnavailableError, match="does not answer"):
            begin()
    vault.before = lambda _method, _path: None
    before = broker.services.signer.pem
    upkeep_once(broker, context, lambda: later)
    assert vault.held["saw/broker/server.pem"][-1] != old
    assert broker.services.signer.pem != before, "statements are signed with the new key from now on"
    broker.close()


@pytest.mark.thorough
def test_a_move_that_is_killed_at_any_step_leaves_every_secret_readable_and_goes_on(
    config: BrokerConfig, tmp_path: Path
) -> None:
    initialise(config, NOW)
    number = len(values(config))
    for secrets, before, stride in ((SEALED, "files", 1), (BACK, "sealed", 5)):
        there = on(config, secrets)
        file, scratch = tmp_path / "broker.json", tmp_path / secrets.provider
        file.write_bytes(msgspec.json.encode(there))
        scratch.mkdir()
        if before == "files":  # by a write that was killed long ago
            write_private(config.keys / ".sessions.key.0badc0de", bytes(32))
        command = [
            sys.executable,
            str(Path(__file__).with_name("move_killed.py")),
            str(file),
            str(scratch),
            str(stride),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["secrets"] == number
        # before the note nothing counts, behind it the new place does, and at the end nothing is left to do
        stages = [(kind, leaving) for kind, leaving, *_ in said["kills"]]
        assert set(stages) == {(before, None), (secrets.provider, before), (secrets.provider, None)}
        assert len(stages) * stride > 2 * number
        move_secrets(there, now)


def test_what_differs_is_written_over_nowhere_and_removed_nowhere(config: BrokerConfig) -> None:
    initialise(config, NOW)
    first = values(config)
    there = on(config, SEALED)
    target = open_secrets(there)
    target.write(REVIEWS, bytes(32))
    with pytest.raises(MoveRefused, match=r"reviews\.key in .*neither was touched"):
        move_secrets(there, now)
    assert (values(config), known_place(config), target.read(REVIEWS)) == (first, Known("files"), bytes(32))
    target.remove(REVIEWS)
    target.write(SIGNER, b"an old one")
    move_secrets(there, now)
    assert values(there) == first, "what the broker makes anew itself is taken from where it was in use"

    config.keys.joinpath("ssh").mkdir(exist_ok=True)
    for name in (SERVER, ONLINE):
        write_private(config.keys / name, b"somebody put it here")
    with pytest.raises(MoveRefused, match=r"tuf-online\.key.*saw broker secrets put tuf-online\.key"):
        move_secrets(there, now)
    assert (config.keys / SERVER).exists() and (config.keys / ONLINE).exists()
    (config.keys / ONLINE).unlink()
    moved = move_secrets(there, now)
    assert (moved.copied, moved.removed, values(there)) == (0, 1, first)


def test_copies_go_only_when_the_new_place_opens_each(config: BrokerConfig) -> None:
    initialise(config, NOW)
    there = on(config, SEALED)
    move_secrets(there, now)
    kept = values(there)
    for name, value in kept.items():
        (config.keys / name).parent.mkdir(mode=0o700, exist_ok=True)
        write_private(config.keys / name, value)
    remember_place(config, Known("sealed", leaving="files"))
    sealed = config.state / "sealed/sessions.key.sealed"
    raw = sealed.read_bytes()
    sealed.write_bytes(raw[:-1])
    with pytest.raises(SawError, match=r"sessions\.key\.sealed was changed"):
        move_secrets(there, now)
    sealed.unlink()
    with pytest.raises(SawError, match=r"no sessions\.key"):
        move_secrets(there, now)
    assert values(config, "files") == kept
    write_private(sealed, raw)
    assert move_secrets(there, now).removed == len(kept)


def test_nothing_moves_while_a_broker_serves_or_by_another_account(
    config: BrokerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialise(config, NOW)
    there = on(config, SEALED)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(config.operator_socket)
        listener.listen()
        for act in (lambda: move_secrets(there, now), lambda: put_secret(config, now, ONLINE, config.keys / ONLINE)):
            with pytest.raises(MoveRefused, match="a broker serves"):
                act()
    Path(config.operator_socket).unlink()
    owner = os.geteuid()
    os.chown(config.state, 65534, -1)
    with pytest.raises(MoveRefused, match=r"belongs to .*runuser -u "):
        move_secrets(there, now)
    os.chown(config.state, owner, -1)
    assert known_place(config) == Known("files")
    with pytest.raises(ConfigError, match=r"secrets are in sealed .*set secrets\.provider to vault"):
        move_secrets(there, now, "vault")
    assert move_secrets(there, now, "sealed").copied > 0


def test_before_there_are_secrets_a_move_has_nothing_to_do(config: BrokerConfig) -> None:
    there = on(config, SEALED)
    assert move_secrets(there, now).copied == 0
    assert not config.state.exists()
    initialise(there, NOW)
    opens(there)


def test_the_next_online_key_takes_its_place_and_the_trail_says_so(config: BrokerConfig, tmp_path: Path) -> None:
    config = on(config, SEALED)
    initialise(config, NOW)
    key = Ed25519PrivateKey.generate()
    file = tmp_path / "next.key"
    write_private(file, private_pem(key))
    file.chmod(0o644)
    with pytest.raises(SawError, match="open to group or others"):
        put_secret(config, now, ONLINE, file)
    file.chmod(0o600)
    for name, content, reason in (
        (ONLINE, b"no key", "cannot be read"),
        (REVIEWS, b"no key", "not a key of 32"),
        ("root.key", b"x", "has no secret"),
    ):
        other = tmp_path / "other"
        write_private(other, content)
        with pytest.raises(SawError, match=reason):
            put_secret(config, now, name, other)
    put_secret(config, now, ONLINE, file)
    assert open_secrets(config).read(ONLINE) == private_pem(key)
    assert (config.keys / "tuf-online.pub").read_bytes() == public_pem(key.public_key())
    opens(config)

    out = tmp_path / "taken.key"
    take_secret(config, now, ONLINE, out)
    assert (out.read_bytes(), stat.S_IMODE(out.stat().st_mode)) == (private_pem(key), 0o600)
    with pytest.raises(ConfigError, match="there already"):
        take_secret(config, now, ONLINE, out)
    assert events(config) == [
        ("secrets.put", "tuf-online.key was replaced", 1),
        ("secrets.take", "tuf-online.key was written in the clear to a file", 1),
    ]


def test_the_command_tells_and_moves(config: BrokerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    initialise(config, NOW)
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(config))

    def run(*arguments: str) -> tuple[int, Any]:
        code = main(["secrets", *arguments, "--config", str(file), "--json"])
        return code, json.loads(capsys.readouterr().out)

    code, said = run("status")
    assert (code, said["ok"], said["provider"], len(said["held"]), said["problems"]) == (
        0,
        True,
        "files",
        len(values(config)),
        {},
    )
    file.write_bytes(msgspec.json.encode(on(config, SEALED)))
    code, said = run("status")
    assert (code, said["known"], "sealed" in said["problems"]["*"], len(said["copies"]["files"])) == (
        1,
        "files",
        True,
        len(values(config)),
    )
    assert run("move", "--to", "sealed") == (
        0,
        {"ok": True, "changed": True, "provider": "sealed", "copied": 10, "removed": 10},
    )
    assert run("move", "--to", "sealed")[1]["changed"] is False
    assert run("status")[0] == 0
    (config.state / "sealed/sessions.key.sealed").chmod(0o644)
    code, said = run("status")
    assert (code, list(said["problems"])) == (1, ["sessions.key"])
    assert main(["secrets", "status", "--config", str(file)]) == 1
    out = capsys.readouterr().out
    assert f"  {AUTHORITY}  opens" in out and "sessions.key  " in out and "open to group" in out


def test_secrets_of_a_test_come_from_the_environment_when_it_says_that_it_is_one(
    config: BrokerConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import base64

    initialise(config, NOW)
    given = {name: base64.b64encode(value).decode() for name, value in values(config).items()}
    monkeypatch.setenv(VARIABLE, json.dumps(given))
    for name in given:
        (config.keys / name).unlink()
    (config.state / "secrets.json").unlink()
    told = on(config, SecretsSettings("environment", only_for_tests=True))
    assert initialise(told, NOW) == []
    opens(told)
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(told))
    load_config(file)
    file.write_bytes(msgspec.json.encode(on(config, SecretsSettings("environment"))))
    with pytest.raises(ConfigError, match="is for tests"):
        load_config(file)
    with pytest.raises(MoveRefused, match="it is for tests"):
        move_secrets(told, now)


VAULT = VaultSettings("https://vault.example.com:8200", token_file="/etc/saw/vault.token")
ROLE = AppRole("role", "/etc/saw/vault.secret-id")


@pytest.mark.parametrize(
    ("secrets", "field"),
    [
        (SecretsSettings("vault"), r"secrets\.vault is missing"),
        (SecretsSettings("sealed", SealedSettings("../x")), r"sealed\.credential"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, url="http://vault.example.com")), r"vault\.url"),
        (
            SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, url="https://me:pw@vault.example.com")),
            r"vault\.url",
        ),
        (
            SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, url="https://vault.example.com/v1")),
            r"vault\.url",
        ),
        (
            SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, token_file=None)),
            "one of token_file and approle",
        ),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, approle=ROLE)), "one of token_file and approle"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, token_file="token")), "absolute paths"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, mount="a/../b")), r"vault\.mount"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, prefix="/x")), r"vault\.mount and prefix"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, namespace="a b")), r"vault\.namespace"),
        (SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, timeout_s=0)), r"vault\.timeout_s"),
        (
            SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, token_file=None, approle=AppRole("", "/x"))),
            r"approle needs role_id",
        ),
    ],
)
def test_a_wrong_field_is_named_and_the_right_one_is_taken(
    config: BrokerConfig, tmp_path: Path, secrets: SecretsSettings, field: str
) -> None:
    file = tmp_path / "broker.json"
    file.write_bytes(msgspec.json.encode(on(config, secrets)))
    with pytest.raises(ConfigError, match=field):
        load_config(file)
    for good in (
        SEALED,
        SecretsSettings("vault", vault=VAULT),
        SecretsSettings("vault", vault=msgspec.structs.replace(VAULT, token_file=None, approle=ROLE)),
    ):
        file.write_bytes(msgspec.json.encode(on(config, good)))
        assert load_config(file).secrets == good
