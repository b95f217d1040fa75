"""Always-on agents: programs that run whenever a policy is in force, without anybody who starts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from saw.policy.decode import Report
from saw.policy.model import Part, says

Restart = Literal["always", "on-failure", "no"]
RESTARTS: dict[Restart, int] = {"no": 0, "on-failure": 1, "always": 2}
"""How often a program is started again, from never to whenever it ends."""

MOST_AGENTS = 16
"""Most always-on agents of one workspace: each has a unit and two file systems of its own."""
MOST_WORDS = 64
"""Most words of an agent's command."""
_PROGRAM = re.compile(r"/[^\s\x00-\x1f\x7f]{1,255}\Z")
_WORD = re.compile(r"[^\x00-\x1f\x7f]{0,1024}\Z")
_AGENT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")


class Agent(Part, frozen=True):
    """An always-on agent: a program that runs in a sandbox of its own whenever this policy is in force."""

    command: Annotated[
        tuple[str, ...],
        says("The program by its absolute path, and its arguments.", ["/usr/bin/triage-agent", "--watch"]),
    ]
    restart: Annotated[
        Restart, says("Whether it is started again when it ends: always, after a failure, or not.", "on-failure")
    ] = "always"


def check_agent_name(value: str, report: Report) -> None:
    """Report a text that is no name of an agent."""
    if not _AGENT.match(value):
        report(f"{value[:80]!r} is not the name of an agent", "use lower-case letters, digits and dashes, at most 32")


def check_command(value: tuple[str, ...], report: Report) -> None:
    """Report a command that does not name its program by an absolute path, or that a unit file cannot carry."""
    if not value or not _PROGRAM.match(value[0]) or ".." in value[0].split("/"):
        report("the first word is not the absolute path of a program", "write for example /usr/bin/triage-agent")
    if len(value) > MOST_WORDS or not all(_WORD.match(word) for word in value):
        report(f"more than {MOST_WORDS} words, or one that is too long or has control characters", "call a script")


def check_agents(value: dict[str, Agent], report: Report) -> None:
    """Report more agents than a workspace carries."""
    if len(value) > MOST_AGENTS:
        report(f"more than {MOST_AGENTS} agents", "use another workspace")


def more_agents(old: Mapping[str, Agent], new: Mapping[str, Agent]) -> Iterator[tuple[str, str, str]]:
    """Yield name, old and new words of each agent that is new, runs another command, or is started again more often."""
    for name, now in sorted(new.items()):
        was = old.get(name)
        if was is None or was.command != now.command or RESTARTS[now.restart] > RESTARTS[was.restart]:
            yield name, "no such agent" if was is None else _words(was), _words(now)


def _words(agent: Agent) -> str:
    return f"{list(agent.command)}, restart {agent.restart}"[:600]
