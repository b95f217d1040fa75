"""The operating guide's walk through a change of policy: its commands by step, and how each must end."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[3] / "docs/guide.md"
WIDER = "+ POST https://api.example.com:443/v1/items"
"""What the walk's change lets the workspace reach, as the diff says it."""
LOADED = "every running workspace has loaded it"
ENDS = {"saw policy diff": {1}, "saw policy watch --ring stable --timeout 300    # exit 1, halted": {0, 1}}
"""Commands, by their beginning, that end in their own way."""


def commands(number: int) -> list[str]:
    """Return the commands of a step."""
    section = GUIDE.read_text(encoding="utf-8").split("## Change a policy\n")[1].split("\n## ")[0]
    step = section.split(f"### {number}. ")[1].split("\n### ")[0]
    [block] = re.findall(r"^```sh\n(.*?)^```$", step, re.MULTILINE | re.DOTALL)
    return str(block).replace("\\\n", " ").splitlines()


def exit_codes(command: str) -> set[int]:
    """Return the exit codes with which the guide lets a command end."""
    own = next((codes for start, codes in ENDS.items() if command.startswith(start)), None)
    return own or ({1} if "exit 1" in command else {0})


def last(told: dict[str, str], start: str) -> str:
    """Return what the last command that begins so printed."""
    return next(text for command, text in reversed(told.items()) if command.startswith(start))
