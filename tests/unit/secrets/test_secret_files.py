"""Secrets in files, plain and sealed: who may read them, what was changed, and what a crash leaves."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from saw.secrets.files import FileStore
from saw.secrets.sealed import HEADER, SealedStore
from saw.secrets.store import SecretBroken, SecretError, SecretMissing

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
NAME = "x509/ca-key.pem"
VALUE = b"the private key of everything"


@pytest.fixture(params=["files", "sealed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore | SealedStore:
    made = FileStore(tmp_path / "keys") if request.param == "files" else SealedStore(tmp_path / "keys", KEY)
    made.write(NAME, VALUE)
    return made


@pytest.fixture
def sealed(tmp_path: Path) -> SealedStore:
    made = SealedStore(tmp_path / "sealed", KEY)
    made.write(NAME, VALUE)
    return made


def test_files_and_folders_are_the_owners_alone(store: FileStore | SealedStore) -> None:
    path = store.folder.path(NAME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, store.folder.root)} == {0o700}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_is_open_to_others_is_refused_until_it_is_closed(store: FileStore | SealedStore, mode: int) -> None:
    path = store.folder.path(NAME)
    path.chmod(mode)
    with pytest.raises(SecretError, match=rf"{path.name} is open to group or others \(chmod 0600 "):
        store.read(NAME)
    path.chmod(0o400)
    assert store.read(NAME) == VALUE


@pytest.mark.parametrize("where", [".", "x509"])
def test_a_folder_that_is_open_to_others_is_refused_until_it_is_closed(
    store: FileStore | SealedStore, where: str
) -> None:
    folder = store.folder.root / where
    folder.chmod(0o755)
    for call in (lambda: store.read(NAME), lambda: store.write(NAME, b"x"), lambda: store.remove(NAME)):
        with pytest.raises(SecretError, match=r"is open to group or others \(chmod 0700 "):
            call()
    folder.chmod(0o700)
    assert store.read(NAME) == VALUE


def _link(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("what", ["file", "folder", "root"])
def test_a_symbolic_link_is_refused_wherever_it_lies(store: FileStore | SealedStore, tmp_path: Path, what: str) -> None:
    path = store.folder.path(NAME)
    place = {"file": path, "folder": path.parent, "root": store.folder.root}[what]
    _link(place, tmp_path / "elsewhere")
    with pytest.raises(SecretError, match="symbolic link"):
        store.read(NAME)
    if what != "file":
        with pytest.raises(SecretError, match="symbolic link"):
            store.write(NAME, b"x")
    place.unlink()
    (tmp_path / "elsewhere").rename(place)
    assert store.read(NAME) == VALUE


def test_a_link_is_replaced_and_removed_without_touching_what_it_leads_to(
    store: FileStore | SealedStore, tmp_path: Path
) -> None:
    path, elsewhere = store.folder.path(NAME), tmp_path / "elsewhere"
    _link(path, elsewhere)
    before = elsewhere.read_bytes()
    store.write(NAME, b"new")
    assert (store.read(NAME), elsewhere.read_bytes(), path.is_symlink()) == (b"new", before, False)
    path.unlink()
    path.symlink_to(elsewhere)
    store.remove(NAME)
    assert (path.is_symlink(), elsewhere.read_bytes()) == (False, before)
    assert store.names() == []


def test_what_is_no_file_is_refused(store: FileStore | SealedStore) -> None:
    path = store.folder.path(NAME)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(SecretError, match="is no file"):
        store.read(NAME)


def test_what_a_killed_write_left_is_no_secret_and_is_swept_away(store: FileStore | SealedStore) -> None:
    path = store.folder.path(NAME)
    left = [path.with_name(f".{path.name}.1a2b3c4d"), store.folder.root / ".server.pem.00000000"]
    for one in left:
        one.write_bytes(b"half")
    keep = path.with_name(".note")
    keep.write_bytes(b"somebody's")
    assert store.names() == [NAME]
    store.folder.sweep()
    assert (store.read(NAME), [one.exists() for one in left], keep.exists()) == (VALUE, [False, False], True)


def test_sealed_files_hold_neither_the_secret_nor_the_key(sealed: SealedStore, tmp_path: Path) -> None:
    raw = sealed.folder.path(NAME).read_bytes()
    assert raw.startswith(HEADER)
    assert VALUE not in raw and KEY not in raw and VALUE[:8] not in raw
    sealed.write(NAME, VALUE)
    assert sealed.folder.path(NAME).read_bytes() != raw, "each is under a fresh nonce"
    assert SealedStore(tmp_path / "sealed", KEY).read(NAME) == VALUE


def test_another_key_opens_nothing_and_says_so(sealed: SealedStore, tmp_path: Path) -> None:
    other = SealedStore(tmp_path / "sealed", OTHER)
    with pytest.raises(SecretBroken, match=r"ca-key\.pem\.sealed was sealed under another key") as refused:
        other.read(NAME)
    assert refused.value.details["path"] == str(sealed.folder.path(NAME))
    # also when somebody makes the file look as if it were ours
    path = sealed.folder.path(NAME)
    mine = path.read_bytes()
    other.write("server.pem", b"x")
    head = (tmp_path / "sealed/server.pem.sealed").read_bytes()[: len(HEADER) + 8]
    path.write_bytes(head + mine[len(head) :])
    with pytest.raises(SecretBroken, match="was changed"):
        other.read(NAME)
    path.write_bytes(mine)
    assert sealed.read(NAME) == VALUE


def test_files_that_change_places_open_in_neither(sealed: SealedStore) -> None:
    sealed.write("ssh/ssh-user-ca", b"of users")
    sealed.write("ssh/ssh-host-ca", b"of hosts")
    users, hosts = (sealed.folder.path(f"ssh/ssh-{who}-ca") for who in ("user", "host"))
    one, other = users.read_bytes(), hosts.read_bytes()
    users.write_bytes(other)
    hosts.write_bytes(one)
    for name in ("ssh/ssh-user-ca", "ssh/ssh-host-ca"):
        with pytest.raises(SecretBroken, match="belongs to another secret"):
            sealed.read(name)
    users.write_bytes(one)
    hosts.write_bytes(other)
    assert (sealed.read("ssh/ssh-user-ca"), sealed.read("ssh/ssh-host-ca")) == (b"of users", b"of hosts")


def _flip(place: int) -> Callable[[bytes], bytes]:
    def flip(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[place] ^= 1
        return bytes(changed)

    return flip


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[:-1],
    "cut to the head": lambda raw: raw[: len(HEADER) + 8],
    "cut in the nonce": lambda raw: raw[: len(HEADER) + 12],
    "empty": lambda _raw: b"",
    "longer": lambda raw: raw + b"\0",
    "another version": lambda raw: raw.replace(b"/1\n", b"/2\n", 1),
    "key id": _flip(len(HEADER)),
    "nonce": _flip(len(HEADER) + 8),
    "content": _flip(len(HEADER) + 20),
    "tag": _flip(-1),
    "plain": lambda _raw: VALUE,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_cut_or_changed_is_refused_by_name(sealed: SealedStore, change: str) -> None:
    path = sealed.folder.path(NAME)
    raw = path.read_bytes()
    path.write_bytes(CHANGES[change](raw))
    reason = {"empty": "no sealed secret of this", "plain": "no sealed secret of this", "key id": "another key"}
    reason |= {"another version": "no sealed secret of this"}
    words = reason.get(change, "was changed, cut, or belongs to another secret")
    with pytest.raises(SecretBroken, match=rf"ca-key\.pem\.sealed .*{words}") as refused:
        sealed.read(NAME)
    assert VALUE.decode() not in str(refused.value)
    path.write_bytes(raw)
    assert sealed.read(NAME) == VALUE


def test_a_plain_file_beside_sealed_ones_is_none_of_them(sealed: SealedStore) -> None:
    (sealed.folder.root / "sso.key").write_bytes(b"plain")
    assert sealed.names() == [NAME]
    with pytest.raises(SecretMissing):
        sealed.read("sso.key")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_seals_nothing(tmp_path: Path, size: int) -> None:
    with pytest.raises(SecretError, match="sealing key"):
        SealedStore(tmp_path / "sealed", bytes(size))
    assert not (tmp_path / "sealed").exists()
