"""What the page of a terminal does, without a script engine: a ticket, the connection, and what goes over it."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from session_rig import RULES, Bastion
from sso_rig import Browser, SsoLab, free_port
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from saw.broker.terminal.settings import TerminalBastion, TerminalSettings

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = ROOT / "roles/broker/files/terminal/node_modules/@xterm"
FILES = ("xterm/lib/xterm.js", "xterm/css/xterm.css", "addon-fit/lib/addon-fit.js")
COOKIE = "__Host-saw-session"
PROTOCOL = "saw-terminal"
WAIT_S = 60


def settings(directory: Path) -> dict[str, Any]:
    """Settings of a lab with terminals, for a bastion that starts later; ``bastion_port`` of it is to be used."""
    emulator = directory / "emulator"
    emulator.mkdir()
    for name in FILES:
        assert (EMULATOR / name).is_file(), "run scripts/bootstrap.sh: it installs the emulator"
        shutil.copy(EMULATOR / name, emulator)
    bastion = TerminalBastion("127.0.0.1", free_port(), "root")
    told = TerminalSettings(
        files_dir=str(emulator), bastion=bastion, runtime_dir=str(directory / "run/terminals"), per_person=2
    )
    return {"sessions": RULES, "terminal": told}


def ask(browser: Browser, workspace: str = "ws-a") -> httpx.Response:
    """Ask for a ticket as the page does."""
    return browser.post(f"/workspaces/{workspace}/terminal", {})


def ticket(browser: Browser, workspace: str = "ws-a") -> str:
    answer = ask(browser, workspace)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["ticket"])


class Portal(Protocol):
    """Where a portal is: a lab, or another host."""

    origin: str

    @property
    def ca_file(self) -> Path: ...


class Page:
    """One connection. Refused ones have ``status`` and ``body``; others ``news`` (JSON) and ``shown`` (bytes) as they come."""

    def __init__(
        self,
        lab: Portal,
        browser: Browser,
        secret: str,
        workspace: str = "ws-a",
        *,
        origin: str | None = "",
        **more: str,
    ) -> None:
        place = urlsplit(lab.origin)
        raw = socket.create_connection((place.hostname or "", place.port or 0), timeout=WAIT_S)
        context = ssl.create_default_context(cafile=str(lab.ca_file))
        self._sock = context.wrap_socket(raw, server_hostname=place.hostname)
        self._web = WSConnection(ConnectionType.CLIENT)
        headers = [(b"cookie", f"{COOKIE}={browser.cookie(COOKIE)}".encode())]
        if origin is not None:
            headers.append((b"origin", (origin or lab.origin).encode()))
        target = f"/workspaces/{workspace}/terminal/connection"
        wanted = Request(
            more.get("host", place.netloc),
            target,
            extra_headers=headers,
            subprotocols=[PROTOCOL, *filter(None, [secret])],
        )
        self._sock.sendall(self._web.send(wanted))
        self.status, self.body, self.ended = 0, b"", False
        self.news: list[dict[str, Any]] = []
        self.shown, self.confirmed = b"", 0
        while not self.status:
            self._more()
        while self.status != 101 and not self.ended:
            self._more()
        if self.ended:
            self.close()

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code of a connection that was not accepted."""
        return self.status, str(json.loads(self.body)["code"])

    def begin(self, columns: int = 100, rows: int = 30) -> str:
        """Say how large the terminal is; return the id of the session that was opened for it."""
        self.say(size={"columns": columns, "rows": rows})
        self.until(lambda: self.news)
        assert "opened" in self.news[0], self.news
        return str(self.news[0]["opened"]["session"])

    def say(self, **told: Any) -> None:
        self._sock.sendall(self._web.send(TextMessage(data=json.dumps(told))))

    def type(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self._sock.sendall(self._web.send(BytesMessage(data=raw)))

    def until_shown(self, wanted: str) -> None:
        self.until(lambda: wanted.encode() in self.shown)

    def end(self) -> dict[str, Any]:
        """Return the last news once the broker has closed the connection."""
        self.until(lambda: self.ended)
        return self.news[-1]

    def until(self, check: Any, *, confirm: bool = True) -> None:
        """Read until ``check`` holds, telling what was shown as a page does."""
        deadline = time.monotonic() + WAIT_S
        while not check():
            assert time.monotonic() < deadline, (self.news, self.shown[-2000:])
            assert not self.ended, (self.news, self.shown[-2000:])
            before = len(self.shown)
            self._more()
            if confirm and len(self.shown) > before and not self.ended:
                self.confirm(len(self.shown) - before)

    def confirm(self, size: int) -> None:
        """Tell that ``size`` further bytes are on the screen."""
        self.confirmed += size
        self.say(shown=size)

    def quiet(self, wait_s: float) -> bool:
        """Whether nothing more is shown for ``wait_s``."""
        before = len(self.shown)
        self._sock.settimeout(wait_s)
        try:
            while len(self.shown) == before:
                self._more()
        except TimeoutError:
            return True
        finally:
            self._sock.settimeout(WAIT_S)
        return False

    def close(self) -> None:
        """Go away, as a page does that is closed."""
        self._sock.close()
        self.ended = True

    def _more(self) -> None:
        try:
            piece = self._sock.recv(65536)
        except ConnectionError:
            piece = b""
        self._web.receive_data(piece or None)
        for event in self._web.events():
            match event:
                case AcceptConnection(subprotocol=chosen):
                    assert chosen == PROTOCOL
                    self.status = 101
                case RejectConnection(status_code=status):
                    self.status = status
                case RejectData(data=data, body_finished=finished):
                    self.body += bytes(data)
                    self.ended = finished
                case TextMessage(data=text):
                    self.news.append(json.loads(text))
                case BytesMessage(data=data):
                    self.shown += bytes(data)
                case Ping():
                    self._sock.sendall(self._web.send(event.response()))
                case CloseConnection():
                    self.ended = True
        self.ended = self.ended or not piece


def leftovers(lab: SsoLab, bastion: Bastion) -> tuple[list[str], list[str]]:
    """The folders of keys that there are, and the processes that have something to do with one."""
    assert lab.config.terminal is not None
    directory = Path(lab.config.terminal.runtime_dir)
    folders = [path.name for path in directory.glob("term-*")]
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{directory}/term-".encode() in line:
            found.append(place.name)
    return folders, found
