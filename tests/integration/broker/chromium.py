"""A real Chromium, driven over the pipe of its DevTools protocol; no further library. Its authenticator is a virtual one."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 60
ROWS = "[...document.querySelectorAll('.xterm-rows > div')].map((row) => row.innerText).join('\\n')"
"""What a terminal on the page shows (JavaScript)."""
SAID = "document.getElementById('said').innerText"
"""What the page of a terminal or of a recording says about it (JavaScript)."""
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-dev-shm-usage", "--disable-component-update", "--disable-extensions", "--ignore-certificate-errors",
    "--remote-debugging-pipe", "--window-size=1100,1000", "--force-device-scale-factor=1", "about:blank",
)  # fmt: skip


class Chromium:
    """One page. Commands are answered in order; what the page tells by itself is not needed here."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._read = b""
        self._number = 0
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "WebAuthn"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """Evaluate ``script`` in the page and return its value."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Return as soon as ``script`` is true; a page that is being loaded counts as not yet."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = self.send("Runtime.evaluate", expression=f"Boolean({script})", returnByValue=True)
            if "exceptionDetails" not in found and found["result"]["value"]:
                return
            assert time.monotonic() < deadline, (script, self.run("location.href + document.body.innerText"))
            time.sleep(0.05)

    def key(self, name: str, text: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **typed)

    def go(self, url: str) -> None:
        # Interfaces that come and go on this machine end what the browser is loading; that says nothing about the page.
        for _ in range(20):
            if self.send("Page.navigate", url=url).get("errorText") != "net::ERR_NETWORK_CHANGED":
                break
            time.sleep(0.2)
        self.until("document.readyState === 'complete'")

    def sign_in(self, origin: str, issuer: str, person: str) -> None:
        """Sign in at the pages of ``origin`` with the tests' provider, until it sends the browser back."""
        self.go(f"{origin}/")
        self.until("location.pathname === '/sign-in'")
        self.run("document.querySelector('main a.button').click()")
        self.until(f"location.origin === '{issuer}' && document.querySelector('input[name=login]')")
        self.run(
            f"document.querySelector('input[name=login]').value = '{person}';"
            "document.querySelector('input[name=password]').value = 'any'; document.forms[0].submit()"
        )
        self.until("document.body.innerText.includes('Continue') && document.querySelector('button[autofocus]')")
        self.run("document.forms[0].submit()")
        self.until(f"location.origin === '{origin}' && document.readyState === 'complete'")

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def virtual_authenticator(self) -> str:
        """Add an authenticator of the platform that verifies the person and needs no touch."""
        options = {
            "protocol": "ctap2", "transport": "internal", "hasResidentKey": True, "hasUserVerification": True,
            "isUserVerified": True, "automaticPresenceSimulation": True,
        }  # fmt: skip
        return str(self.send("WebAuthn.addVirtualAuthenticator", options=options)["authenticatorId"])

    def scheme(self, name: str) -> None:
        """Prefer ``light`` or ``dark``."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, file: Path, height: int = 0, top: str = "") -> None:
        """Write what the window shows as PNG; where ``height`` is given, that many pixels from the element ``top`` on."""
        clip = {}
        if height:
            y = self.run(f"{top}.scrollIntoView(); scrollY + {top}.getBoundingClientRect().top" if top else "scrollY")
            clip = {"clip": {"x": 0, "y": y, "width": 1085, "height": height, "scale": 1}}
        raw = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=False, **clip)["data"]
        file.write_bytes(base64.b64decode(raw))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], WAIT_S)
            assert ready, "Chromium does not answer"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium has ended"
            self._read += chunk
        raw, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(raw))


@contextmanager
def chromium(directory: Path, behind: Sequence[str] = ()) -> Iterator[Chromium]:
    """Start the browser on a profile of its own, by the command ``behind``; it reads at descriptor 3 and answers at 4."""
    (command_read, command_write), (answer_read, answer_write) = os.pipe(), os.pipe()
    script = f'exec chromium --user-data-dir="$0" "$@" 3<&{command_read} 4>&{answer_write}'
    process = subprocess.Popen(
        [*behind, "bash", "-c", script, str(directory), *FLAGS],
        pass_fds=(command_read, answer_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(directory.parent / "chromium.log").open("ab"),
        env={**os.environ, "HOME": str(directory)},
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Chromium(command_write, answer_read)
    finally:
        os.close(command_write)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answer_read)
