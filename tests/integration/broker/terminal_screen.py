"""What a terminal got, shown in a page by the portal's own emulator: pictures of steps at a command line."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from chromium import Chromium

from saw.lab.attach import Terminal

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = ROOT / "roles/broker/files/terminal/node_modules/@xterm/xterm"
OPTIONS = ROOT / "src/saw/broker/sso/static/emulator.js"
PAGE = "data:text/html,<!doctype html><title>Terminal</title><body><div id=screen></div>"
PROMPT = b"$ "


def draw(page: Chromium, got: bytes, columns: int = 100, rows: int = 24) -> int:
    """Show what a terminal of this size got, and return how high it is down to the last row with text (pixels)."""
    assert (EMULATOR / "lib/xterm.js").is_file(), "run scripts/bootstrap.sh: it installs the emulator"
    page.go(PAGE)
    style = (EMULATOR / "css/xterm.css").read_text(encoding="utf-8")
    style += "body { margin: 0; padding: 12px; background: #0d1117 } .xterm-viewport { overflow: hidden !important }"
    page.run(
        f"document.head.append(Object.assign(document.createElement('style'), {{ textContent: {json.dumps(style)} }}));0"
    )
    for script in (OPTIONS, EMULATOR / "lib/xterm.js"):
        page.run(f"{script.read_text(encoding='utf-8')};0")
    page.run(
        f"const terminal = new Terminal({{ ...window.emulatorOptions, cols: {columns}, rows: {rows} }});"
        "terminal.open(document.getElementById('screen'));"
        f"const got = Uint8Array.from(atob('{base64.b64encode(got).decode()}'), (one) => one.charCodeAt(0));"
        "terminal.write(got, () => { window.written = true; });0"
    )
    page.until("window.written && document.querySelector('.xterm-rows').innerText.trim()")
    return int(
        page.run(
            "Math.ceil([...document.querySelectorAll('.xterm-rows > div')].filter((row) => row.innerText.trim())"
            ".at(-1).getBoundingClientRect().bottom) + 12"
        )
    )


def at_prompt(folder: Path, environment: Mapping[str, str], lines: Sequence[str], behind: Sequence[str] = ()) -> bytes:
    """Type ``lines`` at a shell in ``folder``, each when the one before has ended; return all that the terminal got.

    ``behind`` is a command, by its path, that runs the shell.
    """
    shell = ["/bin/sh", "-c", 'cd "$0" && exec bash --norc --noprofile -i', str(folder)]
    with Terminal([*behind, *shell], {**environment, "PS1": PROMPT.decode()}) as terminal:
        for number, line in enumerate([*lines, ""], start=1):
            deadline = time.monotonic() + 120
            while terminal.seen.count(PROMPT) < number:
                assert time.monotonic() < deadline, terminal.tail()
                assert terminal.read(1.0), terminal.tail()
            terminal.type(f"{line}\r".encode() if line else b"")
        return terminal.seen
