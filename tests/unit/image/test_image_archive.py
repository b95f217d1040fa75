"""The archive is asked by the real apt: signed indices in a folder, newer versions in them, and what apt does not trust."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from saw.image import packages as image_packages
from saw.image.base_os import BaseOs
from saw.image.disk import ImageError
from saw.image.packages import Archive, Change, IndexAway, PackageSet, ask, compare, installed, read_set, words

pytestmark = [
    pytest.mark.control("P0-02"),
    pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("gpg")), reason="needs apt and gpg"),
]


class Mirror:
    """An archive in a folder: main and security updates, signed with a key of its own."""

    def __init__(self, folder: Path) -> None:
        # gpg's agent listens below its home, and the path of a socket is short (unix(7): 108 bytes).
        self.folder, self.home = folder, Path(tempfile.mkdtemp(prefix="saw-gpg-", dir="/tmp"))
        folder.mkdir(parents=True)
        self.gpg = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--no-tty", "--pinentry-mode", "loopback"]
        self._run([*self.gpg, "--passphrase", "", "--quick-generate-key", "a@example.com", "ed25519", "sign", "never"])
        self.key = folder / "key.gpg"
        self.key.write_bytes(self._run([*self.gpg, "--export"]))
        self.main = {"bash": "5.2-1", "apt": "3.0.3", "openssl": "3.5.1-1", "libc6": "2.41-1"}
        self.security: dict[str, str] = {}
        self.publish()

    def archive(self) -> Archive:
        """Its sources."""
        signed = f"[signed-by={self.key}]"
        places = (("main", "trixie"), ("security", "trixie-security"))
        return Archive(
            tuple(f"deb {signed} file:{self.folder}/{name} {suite} main" for name, suite in places), "trixie"
        )

    def base(self) -> BaseOs:
        """The base system that it is of."""
        return BaseOs("trixie", str(self.key), "packages.txt", "/usr/bin/python3")

    def publish(self, *, valid: timedelta = timedelta(days=1), signed: bool = True) -> None:
        """Write both indices."""
        self._index(self.folder / "main/dists/trixie", "Debian", "trixie", self.main, valid, signed=signed)
        security = self.folder / "security/dists/trixie-security"
        self._index(security, "Debian-Security", "trixie-security", self.security, valid, signed=signed)

    def close(self) -> None:
        """End gpg's agent."""
        self._run(["gpgconf", "--homedir", str(self.home), "--kill", "all"])
        shutil.rmtree(self.home, ignore_errors=True)

    def _index(
        self, folder: Path, label: str, codename: str, packages: dict[str, str], valid: timedelta, *, signed: bool
    ) -> None:
        text = ""
        for name, version in packages.items():
            essential = "Essential: yes\nPriority: required\n" if name == "bash" else ""
            depends = "Depends: libc6\n" if name == "openssl" else ""
            text += (
                f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: A <a@example.com>\n{essential}{depends}"
                f"Filename: pool/{name}.deb\nSize: 1\nSHA256: {'0' * 64}\nDescription: d\n\n"
            )
        binary = folder / "main/binary-amd64"
        binary.mkdir(parents=True, exist_ok=True)
        (binary / "Packages").write_text(text)
        now = datetime.now(UTC)
        form = "%a, %d %b %Y %H:%M:%S UTC"
        release = (
            f"Origin: Debian\nLabel: {label}\nSuite: {codename.replace('trixie', 'stable')}\nCodename: {codename}\n"
            f"Date: {now - timedelta(days=3):{form}}\nValid-Until: {now + valid:{form}}\nArchitectures: amd64\nComponents: main\n"
            f"SHA256:\n {hashlib.sha256(text.encode()).hexdigest()} {len(text)} main/binary-amd64/Packages\n"
        )
        for path in folder.glob("*Release"):
            path.unlink()
        if signed:
            done = self._run([*self.gpg, "--passphrase", "", "--clearsign", "--output", "-"], release)
            (folder / "InRelease").write_bytes(done)
        else:
            (folder / "Release").write_text(release)

    @staticmethod
    def _run(command: list[str], text: str = "") -> bytes:
        return subprocess.run(command, input=text.encode(), check=True, capture_output=True, timeout=240).stdout


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    made = Mirror(tmp_path / "mirror")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _of_amd64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indices are of amd64, on whatever machine this runs."""
    monkeypatch.setattr(image_packages, "run", lambda *_: "amd64\n")


def test_apt_says_what_a_tree_would_get_and_what_of_it_is_a_security_update(mirror: Mirror, tmp_path: Path) -> None:
    def asked() -> PackageSet:
        return ask(mirror.archive(), mirror.base(), ["openssl"], tmp_path)

    first = asked()
    assert first.packages == mirror.main, "essential packages, apt, and what the listed one depends on"
    assert (first.suite, first.security) == ("trixie", ())
    assert (datetime.now(UTC) - datetime.fromisoformat(first.index)).days == 3
    again = asked()
    assert (again.digest, compare(first, again)) == (first.digest, [])
    mirror.security["openssl"] = "3.5.1-1+deb13u1"
    mirror.main["bash"] = "5.2-2"
    mirror.main["other"] = "1.0"
    mirror.publish()
    newer = asked()
    assert newer.security == ("openssl",)
    assert newer.packages == {**first.packages, "openssl": "3.5.1-1+deb13u1", "bash": "5.2-2"}
    assert compare(first, newer) == [
        Change("bash", "5.2-1", "5.2-2"), Change("openssl", "3.5.1-1", "3.5.1-1+deb13u1", security=True),
    ]  # fmt: skip
    assert newer.digest != first.digest


@pytest.mark.parametrize("wrong", ["gone", "unsigned", "never signed", "out of date", "another key", "no such package"])
def test_an_index_that_cannot_be_had_or_trusted_is_an_error_though_an_old_one_is_there(
    mirror: Mirror, tmp_path: Path, wrong: str
) -> None:
    ask(mirror.archive(), mirror.base(), ["openssl"], tmp_path)
    wanted, other, cache = ["openssl"], None, tmp_path
    if wrong == "gone":
        shutil.rmtree(mirror.folder / "security")
    elif wrong in {"unsigned", "never signed"}:
        mirror.publish(signed=False)
        cache = tmp_path / "new" if wrong == "never signed" else tmp_path
    elif wrong == "out of date":
        mirror.publish(valid=timedelta(days=-1))
    elif wrong == "another key":
        other = Mirror(tmp_path / "other")
        mirror.key.write_bytes(other.key.read_bytes())
        mirror.main["bash"] = "9.9-1"
        mirror.publish()
    else:
        wanted = ["openssl", "nothing-of-that-name"]
    try:
        with pytest.raises(IndexAway, match="the archive cannot be asked: E: "):
            ask(mirror.archive(), mirror.base(), wanted, cache)
        assert (cache / mirror.archive().name).exists() is (cache == tmp_path), (
            "a first asking that failed leaves nothing"
        )
    finally:
        if other:
            other.close()


def test_an_archive_that_does_not_answer_is_given_up(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    (tools / "apt-get").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tools}:/usr/bin:/bin")
        with pytest.raises(IndexAway, match="did not answer within 0 s"):
            ask(mirror.archive(), mirror.base(), ["openssl"], tmp_path, patience=0.1)
        patch.setenv("PATH", str(tmp_path / "none"))
        with pytest.raises(IndexAway, match="apt-get is not installed"):
            ask(mirror.archive(), mirror.base(), ["openssl"], tmp_path)


DAY = "2026-01-01T00:00:00+00:00"


def test_changes_are_told_with_the_worst_first() -> None:
    old = PackageSet("trixie", DAY, "", {"a": "1", "b": "1", "c": "2:1", "d": "1", "linux-1": "1"})
    new = PackageSet(
        "trixie", DAY, "", {"a": "2", "b": "2", "c": "1:9", "d": "1", "linux-2": "2"}, ("b", "c", "linux-2")
    )
    changes = compare(old, new)
    assert words(changes) == (
        "3 packages are newer (2 of them for security), 1 older, 1 gone: c 2:1 → 1:9, b 1 → 2, linux-2, a 1 → 2 and 1 more"
    )
    assert words([]) == "no package is newer"
    assert words([Change("a", "1", "2")]) == "1 package is newer (none of them for security): a 1 → 2"


def test_the_database_of_dpkg_is_read_for_what_is_installed() -> None:
    status = (
        "Package: a\nStatus: install ok installed\nVersion: 1:2\nDescription: x\n Version: 9\n\n"
        "Package: b\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: c\nStatus: hold ok installed\nVersion: 3~rc1\n"
    )
    assert installed(status) == {"a": "1:2", "c": "3~rc1"}


@pytest.mark.parametrize(
    ("packages", "word"),
    [
        ({}, "names no package"),
        ({"a\nPin-Priority": "1"}, "no name"),
        ({"a": "1\n"}, "no name"),
        ({"A": "1"}, "no name"),
    ],
)
def test_a_package_set_has_names_and_versions_of_debian_alone(packages: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        PackageSet("trixie", DAY, "", packages)
    assert PackageSet("trixie", DAY, "", {"a": "1:2.0~rc1+b1-3"}).packages


@pytest.mark.parametrize(
    ("asked", "word"),
    [("", "isoformat"), ("yesterday", "isoformat"), ("2026-01-01T00:00:00", "no zone"), ("2026-01-01", "no zone")],
)
def test_a_package_set_says_when_the_archive_was_asked(tmp_path: Path, asked: str, word: str) -> None:
    (tmp_path / "set.json").write_text(
        f'{{"suite": "trixie", "asked": "{asked}", "index": "", "packages": {{"a": "1"}}}}', encoding="utf-8"
    )
    with pytest.raises(ImageError, match=f"is no package set: .*{word}"):
        read_set(tmp_path / "set.json")
    (tmp_path / "set.json").write_text(
        f'{{"suite": "trixie", "asked": "{DAY}", "index": "", "packages": {{"a": "1"}}}}', encoding="utf-8"
    )
    assert read_set(tmp_path / "set.json").age(datetime(2026, 1, 2, tzinfo=UTC)).endswith("(1 day ago)")
