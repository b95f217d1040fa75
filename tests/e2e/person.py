"""Somebody with a browser and an SSH client on the machine that ran ``make workspace``, and nothing of the lab's own access."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chromium import ROWS, Chromium, chromium
from vm_access import wait_until

from saw.lab import people
from saw.lab.topology import Lab

PICTURES = Path("build/first-day")
PAGE = Path(__file__).parents[2] / "docs/first-day.md"
_COMPLETE = re.compile(rb"^or open (\S+)$", re.MULTILINE)


class Person:
    """``name`` of the demonstration, with the names of the pages in an ``/etc/hosts`` that only their programs see."""

    def __init__(self, lab: Lab, name: str, desk: Path) -> None:
        self.lab, self.name, self.desk = lab, name, desk
        desk.mkdir(mode=0o700)
        self.password = json.loads(people.people_file(lab).read_text(encoding="utf-8"))[name]
        self.hosts = desk / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n" + people.hosts_lines(lab), encoding="ascii")
        keep = ("PATH", "LANG", "TMPDIR")
        self.environment = {name: os.environ[name] for name in keep if name in os.environ} | {
            "HOME": str(desk), "SAW_CONTEXT": str(people.context_file(lab)),
        }  # fmt: skip

    @property
    def behind(self) -> list[str]:
        """Begins a command line: what follows sees the names."""
        script = 'mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(self.hosts)]

    def command(self, *argv: str) -> list[str]:
        """``saw`` of the lab as this person runs it."""
        return [*self.behind, str(self.lab.repository / ".venv/bin/saw"), *argv]

    def saw(self, *argv: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*argv), env=self.environment, cwd=self.desk, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, (argv, done.stdout[-2000:], done.stderr[-2000:])
        return done

    @contextmanager
    def browser(self) -> Iterator[Chromium]:
        """A browser that nobody has used before."""
        profile = self.desk / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        profile.mkdir()
        with chromium(profile, self.behind) as page:
            yield page

    def fill_in(self, page: Chromium, password: str) -> None:
        """Fill in the provider's form and send it."""
        page.until(f"location.host === '{people.IDENTITY}' && document.querySelector('input[name=login]')")
        page.run(
            f"document.querySelector('input[name=login]').value = {json.dumps(self.name)};"
            f"document.querySelector('input[name=password]').value = {json.dumps(password)};"
            "document.querySelector('form').submit()"
        )

    def sign_in(self, page: Chromium) -> None:
        """Sign in at the pages with the own password."""
        page.go(f"{people.ORIGIN}/")
        page.until("location.pathname === '/sign-in'")
        page.run("document.querySelector('main a.button').click()")
        self.fill_in(page, self.password)
        page.until(f"location.origin === '{people.ORIGIN}' && document.readyState === 'complete'")

    def log_in(self, page: Chromium, pictures: str = "") -> dict[str, Any]:
        """``saw login``, whose code is confirmed in the browser."""
        line = f"saw login --url {people.ORIGIN} --ca build/lab/people-tls/ca.pem"
        places = {"build/lab/people-tls/ca.pem": str(people.tls_directory(self.lab) / "ca.pem")}
        argv = self.command(*told(line, places), "--json")
        process = subprocess.Popen(
            argv,
            env=self.environment,
            cwd=self.desk,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            said = b""
            while not (found := _COMPLETE.search(said)):
                assert select.select([process.stderr], [], [], 60)[0], said
                piece = os.read(process.stderr.fileno(), 4096)
                assert piece, (said, process.wait(60))
                said += piece
            page.go(found[1].decode())
            button = "document.querySelector('button[form=\"op.deviceConfirmForm\"]')"
            page.until(f"location.host === '{people.IDENTITY}' && document.readyState === 'complete' && {button}")
            if pictures:
                take(page, pictures, 560)
            page.run(f"{button}.click()")
            out, rest = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        assert process.returncode == 0, said + rest
        return dict(json.loads(out))


def told(line: str, places: Mapping[str, str] = {}) -> list[str]:
    """Return the words behind ``saw`` of a line that the guide has, with the places that lie elsewhere here."""
    assert f"\n$ {line}\n" in PAGE.read_text(encoding="utf-8"), line
    return [places.get(word, word) for word in line.partition(" >")[0].split()[1:]]


def take(page: Chromium, name: str, height: int = 0, top: str = "") -> None:
    """Keep a picture of the page from ``top`` (JavaScript) on, ``height`` pixels of it where that is given."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.picture(PICTURES / f"{name}.png", height, top)


def type_line(page: Chromium, text: str) -> None:
    page.type(text)
    page.key("Enter", "\r", 13)


def shown(page: Chromium, text: str) -> None:
    """Wait until the terminal of the page shows ``text``, which is written as in JavaScript; the machine behind it is slow."""
    wait_until(text, lambda: page.run(f"{ROWS}.includes('{text}')"), patience=300)
