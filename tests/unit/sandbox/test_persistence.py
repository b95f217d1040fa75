"""What a session leaves behind does not start in a later one, and what the policy allows does."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_sandbox_spec import ACCOUNT, GOVERNANCE, POLICY

from saw.policy.errors import PolicyError
from saw.policy.loader import load_governance, load_members, load_policy
from saw.policy.persistence import AGENT_FILES, GIT_SETTINGS, GIT_VARIABLES, Persistence, git_environment
from saw.policy.reach_diff import diff_bundles
from saw.runtime import sandbox_home, sandbox_units
from saw.runtime.launcher import Launch
from saw.runtime.sandbox import SandboxError, compile_spec, encode_launch

pytestmark = pytest.mark.control("RUN-04")
ROOT = os.geteuid() == 0
HOOKS = {"git_hooks": "/usr/share/team/hooks"}


def governance(persistence: str = "{}") -> bytes:
    text = GOVERNANCE.format(best_effort="false", credential="git-token", directory="/home/agent/project")
    return f"{text}persistence: {persistence}\n".encode()


def policy(read_write: str = ", /home/agent", read_only: str = "") -> bytes:
    return POLICY.format(read_only=read_only, read_write=read_write, compatibility="hard_requirement").encode()


def build(persistence: str = "{}", **files: str):
    return compile_spec(load_policy(policy(**files)), load_governance(governance(persistence)), account=ACCOUNT)


# --- programs that Git starts


class Repository:
    """A repository in which an earlier session left programs, and a later session that uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.program = folder / "work", folder / "ran", folder / "program"
        self.program.write_text(f'#!/bin/sh\ntouch "{self.mark}"\nexit 1\n', encoding="ascii")
        self.program.chmod(0o755)
        self.base = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
            "EDITOR": "true",
            **{f"GIT_{who}_{what}": "a@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }  # fmt: skip
        self.folder.mkdir()
        self.git("init", "-q")
        (self.folder / "file").write_text("one\n", encoding="ascii")
        self.git("add", "file")
        self.git("commit", "-q", "-m", "one")

    def git(self, *words: str, rules: Persistence | None = None, config: str = "") -> subprocess.CompletedProcess[str]:
        held = {} if rules is None else git_environment(rules)
        if config:
            self.git("config", config, str(self.program) if config != "protocol.ext.allow" else "always")
        return subprocess.run(
            ["git", *words], cwd=self.folder, env={**self.base, **held}, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip

    def ran(self, *words: str, rules: Persistence | None, config: str = "") -> bool:
        self.mark.unlink(missing_ok=True)
        self.git(*words, rules=rules, config=config)
        return self.mark.exists()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


PROGRAMS = {
    "core.fsmonitor": ("status",),
    "core.sshCommand": ("ls-remote", "ssh://host.invalid/x"),
    "core.editor": ("commit", "--allow-empty"),
    "sequence.editor": ("rebase", "-i", "--root"),
    "core.gitProxy": ("ls-remote", "git://host.invalid/x"),
    "core.askPass": ("-c", "credential.helper=", "credential", "fill"),
    "credential.helper": ("credential", "fill"),
    "gpg.program": ("commit", "--allow-empty", "-S", "-m", "x"),
    "gpg.x509.program": ("-c", "gpg.format=x509", "commit", "--allow-empty", "-S", "-m", "x"),
    "gpg.ssh.program": ("-c", "gpg.format=ssh", "-c", "user.signingKey=k", "commit", "--allow-empty", "-S", "-m", "x"),
    "gpg.ssh.defaultKeyCommand": ("-c", "gpg.format=ssh", "commit", "--allow-empty", "-S", "-m", "x"),
    "protocol.ext.allow": ("ls-remote", "ext::{program} x"),
}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_program_of_the_repositorys_configuration_does_not_start_unless_policy_says_so(repository, name):
    words = [word.format(program=repository.program) for word in PROGRAMS[name]]
    if name in {"core.askPass", "credential.helper"}:
        words = ["-c", "credential.https://a.example.com.username=u", *words]
        done = "protocol=https\nhost=a.example.com\n\n"
        repository.git("config", name, str(repository.program))

        def ran(rules: Persistence | None) -> bool:
            repository.mark.unlink(missing_ok=True)
            environment = {**repository.base, **({} if rules is None else git_environment(rules))}
            subprocess.run(["git", *words], cwd=repository.folder, env=environment, input=done, text=True,
                           capture_output=True, check=False, timeout=60)  # fmt: skip
            return repository.mark.exists()
    else:

        def ran(rules: Persistence | None) -> bool:
            return repository.ran(*words, rules=rules, config=name)

    assert ran(None), "the attack does not work where nothing refuses it"
    assert not ran(Persistence())
    assert ran(Persistence(git_settings=(name,)))


def test_the_other_name_of_the_signing_program_is_held_with_it(repository):
    words = ("commit", "--allow-empty", "-S", "-m", "x")
    assert repository.ran(*words, rules=None, config="gpg.openpgp.program")
    assert not repository.ran(*words, rules=Persistence())
    assert repository.ran(*words, rules=Persistence(git_settings=("gpg.program",)))


def test_what_has_no_command_of_its_own_here_is_held_as_well():
    assert set(GIT_SETTINGS) - set(PROGRAMS) == {
        "core.alternateRefsCommand",
        "core.hooksPath",
        "interactive.diffFilter",
    }
    assert set(GIT_VARIABLES) - set(PROGRAMS) == {"core.pager"}


def test_hooks_of_a_repository_do_not_run_and_those_of_the_policy_do(repository, tmp_path):
    hook = repository.folder / ".git/hooks/post-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_bytes(repository.program.read_bytes())
    hook.chmod(0o755)
    commit = ("commit", "-q", "--allow-empty", "-m", "x")
    assert repository.ran(*commit, rules=None)
    assert not repository.ran(*commit, rules=Persistence())
    assert repository.ran(*commit, rules=Persistence(git_settings=("core.hooksPath",)))
    elsewhere = tmp_path / "hooks"
    elsewhere.mkdir()
    hook.rename(elsewhere / "post-commit")
    repository.git("config", "core.hooksPath", str(elsewhere))
    assert repository.ran(*commit, rules=None)
    assert not repository.ran(*commit, rules=Persistence())
    repository.git("config", "--unset", "core.hooksPath")
    assert repository.ran(*commit, rules=Persistence(git_hooks=str(elsewhere)))


def test_git_works_as_before(repository):
    held = Persistence()
    (repository.folder / "file").write_text("two\n", encoding="ascii")
    for words in (("add", "file"), ("commit", "-m", "two"), ("branch", "b"), ("status",), ("commit", "--allow-empty", "--amend"),
                  ("rebase", "-q", "-i", "HEAD~1"), ("fetch", "-q", "."), ("stash", "list"), ("gc", "-q")):  # fmt: skip
        done = repository.git(*words, rules=held)
        assert done.returncode == 0, (words, done.stderr)
    assert "two" in repository.git("log", "-p", rules=held).stdout
    chosen = subprocess.run(
        ["git", "commit", "--allow-empty"], cwd=repository.folder, capture_output=True, text=True, check=False,
        env={**repository.base, **git_environment(held), "EDITOR": "echo from-editor >"},
    )  # fmt: skip
    assert "from-editor" in chosen.stdout, chosen.stderr


def test_the_pager_of_a_repository_is_not_taken(repository):
    repository.git("config", "core.pager", str(repository.program))
    assert repository.git("var", "GIT_PAGER").stdout.strip() == str(repository.program)
    assert str(repository.program) not in repository.git("var", "GIT_PAGER", rules=Persistence()).stdout


# --- the policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{files: {../x: a}}", "not a plain path"),
        ("{files: {/etc/x: a}}", "not a plain path"),
        ("{files: {a//b: a}}", "not a plain path"),
        ("{files: {.ssh/authorized_keys: a}}", "let somebody in"),
        ("{files: {.claude: a}}", "is a directory"),
        ("{files: {.claude/agents: a}}", "is a directory"),
        ("{files: {.bashrc/x: a}}", "below a file"),
        ("{files: {a: x, a/b: x}}", "below a file"),
        ('{files: {.mcp.json: "\\0"}}', "is text"),
        ("{writable: [.bashrc]}", "cannot be left"),
        ("{writable: [.mcp.json], files: {.mcp.json: a}}", "left to the agent as well"),
        ("{git_settings: [core.autocrlf]}", "not a setting that is held"),
        ("{git_hooks: hooks}", "absolute"),
        ("{git_hooks: /usr/hooks, git_settings: [core.hooksPath]}", "choose their own"),
        ("{hooks: /usr}", "not known"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_cure(text, reason):
    with pytest.raises(PolicyError) as refused:
        load_governance(governance(text))
    assert reason in str(refused.value)
    assert all(problem.cure for problem in refused.value.problems)


def test_hooks_must_be_readable_and_out_of_the_agents_hands():
    for hooks, reason in (
        ("/home/agent/hooks", "can be written"),
        ("/srv/hooks", "cannot be read"),
        ("/home", "can be written"),
    ):
        with pytest.raises(SandboxError, match=reason):
            build(f"{{git_hooks: {hooks}}}")
    spec = build("{git_hooks: /usr/share/team/hooks}")
    held = {
        spec.environment[f"GIT_CONFIG_KEY_{n}"]: spec.environment[f"GIT_CONFIG_VALUE_{n}"]
        for n in range(len(GIT_SETTINGS))
    }
    assert held == {**GIT_SETTINGS, "core.hooksPath": "/usr/share/team/hooks"}


def test_every_unit_of_the_sandbox_gets_the_settings(tmp_path):
    spec = build()
    for launch in (spec.shell_launch(), spec.mcp_launch(spec.mcp_servers[0])):
        path = tmp_path / "launch.json"
        path.write_bytes(encode_launch(launch))
        assert git_environment(Persistence()).items() <= Launch.read(str(path)).environment.items()


def test_configuration_of_agents_is_read_only_unless_it_is_left_to_them():
    spec = build()
    assert {f"/home/agent/{name}" for name in AGENT_FILES} < set(spec.protected)
    assert {"/home/agent/.local/share/systemd", "/home/agent/.config/opencode"} < set(spec.protected)
    unit = sandbox_units.shell_unit(spec)
    assert "\nBindPaths=/home/agent/.claude\n" in unit
    assert "\nBindReadOnlyPaths=/home/agent/.claude/settings.json\n" in unit
    left = build("{writable: [.claude.json]}")
    assert set(spec.protected) - set(left.protected) == {"/home/agent/.claude.json"}
    assert build(read_write="").protected == ()


def test_a_file_of_the_bundle_is_stated_in_the_unit_and_must_be_visible():
    spec = build("{files: {project/.mcp.json: '{}'}}")
    unit = sandbox_units.shell_unit(spec)
    assert "\nBindReadOnlyPaths=/home/agent/project/.mcp.json\n" in unit
    assert unit.count("\nPlaced=/home/agent/project/.mcp.json sha256:") == 1
    assert "Placed" not in sandbox_units.shell_unit(build())
    unit = sandbox_units.shell_unit(spec, systemd=sandbox_units.systemd_version())
    sandbox_units.verify_units({"saw-shell.service": unit})
    with pytest.raises(SandboxError, match="does not exist in the sandbox"):
        build("{files: {.mcp.json: '{}'}}", read_write="")


PLAIN = b"schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"


def gained(old: str, new: str) -> dict[str, str]:
    first, second = (
        load_members({"policy.yaml": policy(), "governance.yaml": PLAIN + f"persistence: {text}\n".encode()})
        for text in (old, new)
    )
    return {item.what.split(":")[0]: item.risk for item in diff_bundles(first, second).gained}


@pytest.mark.control("POL-01")
def test_what_may_act_on_later_sessions_is_part_of_the_diff_of_reach():
    assert gained("{}", "{writable: [.claude.json]}") == {"persistence.writable[.claude.json]": "high"}
    assert gained("{}", "{git_settings: [core.hooksPath]}") == {"persistence.git_settings[core.hooksPath]": "high"}
    assert gained("{}", "{git_hooks: /usr/h}") == {"persistence.git_hooks": "medium"}
    assert gained("{files: {.mcp.json: a}}", "{files: {.mcp.json: b}}") == {"persistence.files[.mcp.json]": "medium"}
    assert gained("{files: {a/b: x}}", "{}") == {"persistence.writable[a/b]": "high"}
    assert gained("{writable: [.claude.json], git_settings: [core.pager], git_hooks: /usr/h}", "{}") == {}


# --- the home directory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    if not ROOT:
        pytest.skip("changing owners needs root")
    place = tmp_path / "home"
    place.mkdir()
    os.chown(place, 2000, 2000)
    return place


def lay(home: Path, record: Path, **files: str) -> list[str]:
    named = {name.replace("__", "/").replace("_", "."): text for name, text in files.items()}
    spec = replace(build(), home=str(home), read_write=(str(home),), persistence=Persistence(files=named))
    changed = sandbox_home.protect_home(spec) + sandbox_home.place_files(spec, record)
    return sorted({str(Path(path).relative_to(home)) for path in changed})


def test_files_of_the_bundle_are_laid_down_at_every_start_and_taken_back(home, tmp_path):
    record = tmp_path / "var/placed.json"
    assert ".mcp.json" in lay(home, record, _mcp_json="one", project__x="two", _claude__agents__a_md="three")
    assert lay(home, record, _mcp_json="one", project__x="two", _claude__agents__a_md="three") == []
    for name, text in ((".mcp.json", "one"), ("project/x", "two"), (".claude/agents/a.md", "three")):
        found = (home / name).stat()
        assert ((home / name).read_text(), found.st_uid, found.st_mode & 0o777) == (text, 0, 0o644)
    assert (home / "project").stat().st_uid == (home / ".claude").stat().st_uid == 2000
    inode = (home / ".mcp.json").stat().st_ino
    (home / ".mcp.json").write_text("changed by somebody", encoding="ascii")
    assert lay(home, record, _mcp_json="1") == [".claude/agents/a.md", ".mcp.json", "project/x"]
    assert ((home / ".mcp.json").read_text(), (home / ".mcp.json").stat().st_ino) == ("1", inode)
    assert not (home / "project/x").exists()
    assert not (home / ".claude/agents/a.md").exists()
    assert lay(home, record) == [".mcp.json"]
    assert (home / ".mcp.json").read_text() == "{}\n"
    assert lay(home, record) == []


def test_a_start_writes_no_file_through_a_link_and_leaves_what_is_the_agents_again(home, tmp_path):
    record, victim = tmp_path / "placed.json", tmp_path / "victim"
    victim.mkdir()
    lay(home, record, a__b="x")
    (home / "a").rename(home / "moved")
    (home / "a").symlink_to(victim)
    with pytest.raises(SandboxError, match="cannot be prepared"):
        lay(home, record, a__b="x")
    (victim / "b").write_text("kept", encoding="ascii")
    assert lay(home, record) == []
    assert (victim / "b").read_text() == "kept"
    record.write_text("[1]", encoding="ascii")
    with pytest.raises(SandboxError, match="cannot be read"):
        lay(home, record)


def test_a_record_that_somebody_changed_takes_nothing_outside_the_home(home, tmp_path):
    record = tmp_path / "placed.json"
    lay(home, record, a="x")
    outside, inside = tmp_path / "outside", home / "b"
    for place in (outside, inside):
        place.write_text("root's", encoding="ascii")
    names = [f"{home}/../outside", str(home), str(outside), "b", str(inside)]
    record.write_bytes(json.dumps(names).encode())
    assert lay(home, record) == ["b"]
    assert (outside.exists(), inside.exists()) == (True, False)
    assert json.loads(record.read_bytes()) == []


def test_what_the_agent_configured_before_is_set_aside(home, tmp_path):
    (home / ".claude").mkdir()
    (home / ".claude/settings.json").write_text("evil", encoding="ascii")
    (home / ".claude/history").write_text("kept", encoding="ascii")
    for name in (".claude", ".claude/settings.json", ".claude/history"):
        os.chown(home / name, 2000, 2000)
    lay(home, tmp_path / "placed.json")
    assert (home / ".claude/settings.json").read_text() == "{}\n"
    assert (home / ".claude/settings.json.saw-replaced").read_text() == "evil"
    assert (home / ".claude/history").read_text() == "kept"
