"""What may start again by itself in a workspace: files of the home that programs obey, and programs that Git starts.

An agent writes its home and its repositories. Whatever a later session would obey there without being asked is taken out of
its hands: the places below belong to root and are read-only in the sandbox, and Git's settings that name a program are given
by the environment, which Git lets win over a repository's configuration (git-config(1), ``GIT_CONFIG_COUNT``).
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Annotated

from saw.policy.decode import Report, StructureReport
from saw.policy.model import Part, says

START_FILES = (
    ".bash_login",
    ".bash_logout",
    ".bash_profile",
    ".bashrc",
    ".gitconfig",
    ".pam_environment",
    ".profile",
    ".tmux.conf",
    ".zprofile",
    ".zshenv",
    ".zshrc",
)
START_DIRECTORIES = (
    ".config/autostart",
    ".config/environment.d",
    ".config/git",
    ".config/systemd",
    ".config/tmux",
    ".local/share/systemd",
    ".ssh",
)
"""Places in the home directory that shells, terminals, Git and systemd obey. Nothing makes them the agent's."""

AGENT_FILES = (
    ".aider.conf.yml",
    ".claude.json",
    ".claude/CLAUDE.md",
    ".claude/settings.json",
    ".codex/AGENTS.md",
    ".codex/config.toml",
    ".cursor/hooks.json",
    ".cursor/mcp.json",
    ".gemini/GEMINI.md",
    ".gemini/settings.json",
    ".mcp.json",
)
AGENT_DIRECTORIES = (
    ".claude/agents",
    ".claude/commands",
    ".claude/plugins",
    ".claude/skills",
    ".codex/prompts",
    ".codex/skills",
    ".config/goose",
    ".config/opencode",
    ".gemini/commands",
    ".gemini/extensions",
)
"""Places in the home directory from which agents and MCP clients take commands, servers and standing instructions."""

_EDITOR = "${VISUAL:-${EDITOR:-$(command -v editor || echo vi)}}"
GIT_SETTINGS = MappingProxyType(
    {
        "core.alternateRefsCommand": 'alternates() { git --git-dir="$1" for-each-ref --format="%(objectname)"; }; alternates',
        "core.askPass": "",
        "core.editor": _EDITOR,
        "core.fsmonitor": "false",
        "core.hooksPath": "/dev/null",
        "core.sshCommand": "ssh",
        "credential.helper": "",
        "gpg.program": "gpg",  # gpg.openpgp.program is its other name, and the later of the two counts
        "gpg.ssh.defaultKeyCommand": "",
        "gpg.ssh.program": "ssh-keygen",
        "gpg.x509.program": "gpgsm",
        "interactive.diffFilter": "cat",
        "protocol.ext.allow": "never",
        "sequence.editor": f"${{GIT_EDITOR:-{_EDITOR}}}",
    }
)
"""Git's settings that name a program, and the value that each has instead: what Git does where nobody sets it."""

GIT_VARIABLES = MappingProxyType(
    {
        "core.gitProxy": ("GIT_PROXY_COMMAND", ""),
        "core.pager": ("GIT_PAGER", "${PAGER:-$(command -v pager || command -v less || echo cat)}"),
    }
)
"""The same for settings that only a variable of their own outranks (``pager.COMMAND`` goes with ``core.pager``)."""

LONGEST_FILE = 65536
"""Largest file that a bundle lays down in the home (bytes)."""
MOST_FILES = 64

_PLACE = re.compile(
    r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._][A-Za-z0-9._-]*(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._][A-Za-z0-9._-]*){0,7}\Z"
)


class Persistence(Part, frozen=True):
    """What of a session may act on a later one. Without it: nothing that the sandbox knows of.

    ``files`` are laid down from the bundle at every start and are read-only in the sandbox, at these places or any other.
    """

    files: Annotated[
        dict[str, str],
        says(
            "Files of the home directory, by their place in it: their whole text.",
            {".mcp.json": '{"mcpServers": {}}\n'},
        ),
    ] = {}  # noqa: RUF012 - msgspec copies an empty default
    writable: Annotated[
        tuple[str, ...],
        says("Configuration of agents and MCP clients that the agent may change for later sessions.", [".claude.json"]),
    ] = ()
    git_hooks: Annotated[
        str,
        says("A directory that the sandbox cannot write; its hooks run in every repository.", "/usr/share/team/hooks"),
    ] = ""
    git_settings: Annotated[
        tuple[str, ...],
        says("Settings naming programs that each repository's own configuration may make.", ["core.fsmonitor"]),
    ] = ()

    def places(self) -> tuple[tuple[str, bool], ...]:
        """Return the places of the home that are read-only, and whether each is a directory; outer ones first."""
        known = [(name, False) for name in (*START_FILES, *AGENT_FILES) if name not in self.writable]
        known += [(name, True) for name in (*START_DIRECTORIES, *AGENT_DIRECTORIES) if name not in self.writable]
        covered = {name for name, _ in known}
        more = [name for name in self.files if not any(_within(name, other) for other in covered)]
        return (*known, *((name, False) for name in more))


def _within(place: str, other: str) -> bool:
    return PurePosixPath(place).is_relative_to(other)


def git_environment(rules: Persistence) -> dict[str, str]:
    """Return the variables by which Git takes no program from a repository's configuration, except where ``rules`` say so."""
    settings = {name: value for name, value in GIT_SETTINGS.items() if name not in rules.git_settings}
    if rules.git_hooks:
        settings["core.hooksPath"] = rules.git_hooks
    values = {"GIT_CONFIG_COUNT": str(len(settings))}
    for number, (name, value) in enumerate(sorted(settings.items())):
        values |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return values | dict(pair for name, pair in GIT_VARIABLES.items() if name not in rules.git_settings)


def check_place(value: str, report: Report) -> None:
    """Report a place in the home that is not a plain relative path, or holds keys."""
    if len(value) > 200 or not _PLACE.match(value):
        report(
            f"{value[:80]!r} is not a plain path below the home directory", "write for example .claude/settings.json"
        )
    elif _within(value, ".ssh"):
        report(f"{value} would let somebody in, or hold a key", "leave it out; people sign in by certificates")


def check_text(value: str, report: Report) -> None:
    """Report a file that is too large or is no text."""
    if len(value.encode()) > LONGEST_FILE or "\0" in value:
        report(f"a file of the home is text of at most {LONGEST_FILE} bytes", "put it into the image")


def check_writable(value: str, report: Report) -> None:
    """Report a place that is not one of those which may be left to the agent."""
    if value not in (*AGENT_FILES, *AGENT_DIRECTORIES):
        report(
            f"{value[:80]!r} cannot be left to the agent",
            f"name one of {', '.join((*AGENT_FILES, *AGENT_DIRECTORIES))}",
        )


def check_git_setting(value: str, report: Report) -> None:
    """Report a name that is no setting which is held."""
    known = (*GIT_SETTINGS, *GIT_VARIABLES)
    if value not in known:
        report(f"{value[:80]!r} is not a setting that is held", f"name one of {', '.join(sorted(known))}")


def check_persistence(value: Persistence, report: StructureReport) -> None:
    """Report files that stand in each other's way, and hooks that are stated twice."""
    if len(value.files) > MOST_FILES:
        report("files", f"more than {MOST_FILES} files", "put them into the image")
    fixed = {*START_FILES, *AGENT_FILES}
    whole = {*fixed, *START_DIRECTORIES, *AGENT_DIRECTORIES}
    for name in value.files:
        if any(name != other and _within(name, other) for other in (*fixed, *value.files)):
            report(("files", name), f"{name} lies below a file", "correct the place")
        elif any(name != other and _within(other, name) for other in whole) or name in whole - fixed:
            report(("files", name), f"{name} is a directory", "name a file")
        elif any(_within(name, other) for other in value.writable):
            report(("files", name), f"{name} is left to the agent as well", "remove it from one of the two")
    if value.git_hooks and "core.hooksPath" in value.git_settings:
        report("git_hooks", "repositories choose their own hooks", "remove core.hooksPath from git_settings")
