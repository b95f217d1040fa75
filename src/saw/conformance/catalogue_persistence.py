"""Cases of the suite ``files`` about persistence: what an agent leaves behind for a later session to start."""

from __future__ import annotations

from typing import Any

from saw.conformance.case import Case
from saw.conformance.catalogue_host import ABSENT, SCOPE

PLACES = "read-only places in the home"
GIT = "Git's settings in the environment"
NOT_STARTED = ("not_started",)
"""Git did what it was asked for, or refused, and the program did not run."""


def _case(
    name: str, title: str, attempt: str, arguments: dict[str, Any], *, layer: str = SCOPE,
    expected: tuple[str, ...] = ABSENT, twin: str = "twin.files.tmp",
) -> Case:  # fmt: skip
    return Case(f"files.persist.{name}", "RUN-04", "files", title, attempt, arguments, layer, expected, twin)


def _kept(name: str, title: str, path: str, *, home: bool = True) -> Case:
    return _case(
        name, title, "persist", {"path": path, "home": home}, twin="twin.files.home" if home else "twin.files.tmp"
    )


def _aside(name: str, title: str, folder: str, path: str) -> Case:
    arguments = {"folder": folder, "path": path}
    return _case(name, title, "persist-around", arguments, expected=(*ABSENT, "EBUSY", "EXDEV"), twin="twin.files.home")


def _places() -> list[Case]:
    return [
        _kept("bashrc", "the shell's start-up file", ".bashrc"),
        _kept("profile", "the login shell's start-up file", ".profile"),
        _kept("zshenv", "another shell's start-up file", ".zshenv"),
        _kept("ssh", "a key that may log in", ".ssh/authorized_keys"),
        _kept("gitconfig", "git's configuration", ".gitconfig"),
        _kept("git", "git's other configuration", ".config/git/config"),
        _kept("user-unit", "a unit of the user's systemd", ".config/systemd/user/saw-probe.service"),
        _kept("user-unit-data", "a unit of the user's systemd, among data", ".local/share/systemd/user/saw-probe.service"),
        _aside("parent", "a user unit, by moving the directory around it aside", ".config", "systemd/user/saw-probe.service"),
        _aside("parent-data", "a user unit among data, by moving the directory around it aside", ".local/share",
               "systemd/user/saw-probe.service"),
        _kept("environment", "the environment of every session", ".config/environment.d/saw-probe.conf"),
        _kept("autostart", "a program at the start of a desktop", ".config/autostart/saw-probe.desktop"),
        _kept("tmux", "the terminal multiplexer's configuration", ".tmux.conf"),
        _kept("cron", "a job of cron", "/etc/cron.d/saw-probe", home=False),
        _kept("crontab", "a crontab", "/var/spool/cron/crontabs/saw-probe", home=False),
        _kept("unit", "a unit of systemd", "/etc/systemd/system/saw-probe.service", home=False),
        _kept("profile-d", "everybody's start-up files", "/etc/profile.d/saw-probe.sh", home=False),
        _kept("ld-preload", "a library in every program", "/etc/ld.so.preload", home=False),
        _kept("sudoers", "the right to become root", "/etc/sudoers.d/saw-probe", home=False),
        _kept("git-template", "a hook in every new repository", "/usr/share/git-core/templates/hooks/post-checkout", home=False),
        _kept("git-system", "git's configuration for everybody", "/etc/gitconfig", home=False),
    ]  # fmt: skip


def _agents() -> list[Case]:
    def agent(name: str, title: str, path: str) -> Case:
        return _case(
            f"agent.{name}", title, "persist", {"path": path, "home": True}, layer=PLACES, twin="twin.files.home"
        )

    return [
        agent("settings", "hooks and permissions of an agent", ".claude/settings.json"),
        agent("state", "the MCP servers of an agent", ".claude.json"),
        agent("sub-agents", "an agent's helpers", ".claude/agents/saw-probe.md"),
        agent("commands", "an agent's commands", ".claude/commands/saw-probe.md"),
        agent("instructions", "an agent's standing instructions", ".codex/AGENTS.md"),
        agent("toml", "another agent's servers and programs", ".codex/config.toml"),
        agent("json", "a third agent's servers", ".gemini/settings.json"),
        agent("extension", "an extension of an agent", ".gemini/extensions/saw-probe/gemini-extension.json"),
        agent("editor", "the MCP servers of an editor", ".cursor/mcp.json"),
        agent("plugin", "a plugin of an agent", ".config/opencode/plugin/saw-probe.js"),
        agent("general", "MCP servers of any client", ".mcp.json"),
        _aside(
            "agent.parent", "an agent's settings, by moving the directory around them aside", ".claude", "settings.json"
        ),
    ]


def _git() -> list[Case]:
    def git(name: str, title: str, command: list[str], config: list[str], *, hook: str = "", given: str = "") -> Case:
        arguments = {"command": command, "config": config, "hook": hook, "given": given}
        return _case(
            f"git.{name}", title, "git-program", arguments, layer=GIT, expected=NOT_STARTED, twin="twin.files.git"
        )

    commit = ["commit", "--allow-empty", "-m", "x"]
    return [
        git("hook", "a hook of a repository", commit, [], hook="post-commit"),
        git("hook-before", "a hook that runs before a commit", commit, [], hook="pre-commit"),
        git("hook-checkout", "a hook that runs at a checkout", ["checkout", "-q", "-b", "other"], [], hook="post-checkout"),
        git("hooks-path", "hooks elsewhere, by the repository's configuration", commit, ["core.hooksPath", "{folder}/program.d"]),
        git("monitor", "the file system monitor of a repository", ["status"], ["core.fsmonitor", "{program}"]),
        git("transport", "the SSH program of a repository", ["ls-remote", "ssh://host.invalid/x"],
            ["core.sshCommand", "{program}"]),
        git("remote", "a remote that is a command", ["ls-remote", "ext::{program} x"], ["protocol.ext.allow", "always"]),
        git("proxy", "the proxy program of a repository", ["ls-remote", "git://host.invalid/x"],
            ["core.gitProxy", "{program}"]),
        git("helper", "a helper that is asked for passwords", ["credential", "fill"], ["credential.helper", "{program}"],
            given="protocol=https\nhost=host.invalid\n\n"),
        git("editor", "the editor of a repository", ["commit", "--allow-empty"], ["core.editor", "{program}"]),
        git("signing", "the signing program of a repository", [*commit, "-S"], ["gpg.program", "{program}"]),
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    return [
        Case("twin.files.home", "RUN-04", "files", "write, rename and remove a file in the home or the project", "write-home",
             {}, is_twin=True),
        Case("twin.files.git", "RUN-04", "files", "make a repository, commit, and read the history", "git-works", {},
             is_twin=True, seconds=20.0),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks."""
    return [*_places(), *_agents(), *_git()]
