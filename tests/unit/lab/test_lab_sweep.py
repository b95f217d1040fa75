"""The search for credentials: what is collected, and in which forms a credential is recognised."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from saw.lab import sweep
from saw.lab.sweep import Swept, collect, forms, parse, search

SECRET = "git-token-Zm9v_bar-4711~xyz"
SECRETS = {"git-token": SECRET}


def in_text(text: bytes) -> list[str]:
    return search(Swept((("/home/agent/x", text),), ()), SECRETS)


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"Authorization: Bearer {SECRET}\n",
        *[
            base64.b64encode(f"{'x' * lead}:{SECRET}{tail}".encode()).decode()
            for lead in range(3)
            for tail in ("", "a", "bc")
        ],
        base64.urlsafe_b64encode(f"x-access-token:{SECRET}".encode()).decode(),
        "".join(f"%{byte:02x}" for byte in SECRET.encode()),
        "".join(f"%{byte:02X}" for byte in SECRET.encode()),
        f"https://x:{quote(SECRET, safe='').replace('4711', '%34711')}@git.example.com/",
        SECRET.encode().hex(),
    ],
)
def test_a_credential_is_found_in_every_form(text: str) -> None:
    assert in_text(f"before {text} after".encode()) == ["git-token in /home/agent/x"]


@pytest.mark.parametrize(
    "text", ["", SECRET[:-1], SECRET.swapcase(), base64.b64encode(b"nothing of it").decode(), "100%"]
)
def test_what_is_no_credential_is_not_found(text: str) -> None:
    assert in_text(text.encode()) == []


def test_no_form_is_so_short_that_it_is_found_by_chance() -> None:
    assert min(len(text) for text in forms(SECRET.encode())) >= len(SECRET)


def test_environments_files_and_git_configuration_are_collected(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "deep/.hidden").mkdir(parents=True)
    (home / "deep/.hidden/file").write_text(f"a {SECRET}")
    (home / "link").symlink_to("/dev/zero")
    os.mkfifo(home / "pipe")
    (home / ".gitconfig").write_text(f'[http]\n extraHeader = "Authorization: Basic {SECRET}"\n')
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TOKEN": SECRET}
    done = subprocess.run(
        [sys.executable, "-I", "-", str(home)],
        input=Path(sweep.__file__).read_bytes(),
        env=environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    swept = parse(done.stdout)
    hits = search(swept, SECRETS)
    for place in ("environment:TOKEN", "git config", str(home / "deep/.hidden/file"), str(home / ".gitconfig")):
        assert f"git-token in {place}" in hits
    assert any(hit.startswith("git-token in /proc/") and hit.endswith("/environ") for hit in hits)
    assert swept.left_out == ()


def test_what_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(bytes(100))
    (tmp_path / "small").write_bytes(bytes(10))
    monkeypatch.setattr(sweep, "MAX_FILE", 50)
    output = io.BytesIO()
    collect(output, (str(tmp_path),))
    swept = parse(output.getvalue())
    assert swept.left_out == (str(tmp_path / "large"),)
    assert (str(tmp_path / "small"), bytes(10)) in swept.places


def test_a_stream_that_breaks_off_is_no_clean_search(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content\n" * 50)
    output = io.BytesIO()
    collect(output, (str(tmp_path),))
    whole = output.getvalue()
    assert parse(whole).places
    for cut in (len(whole) - 30, len(whole) - 100, 10, 0):
        with pytest.raises(ValueError, match=r"."):
            parse(whole[:cut])
