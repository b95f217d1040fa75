"""host_baseline and host_baseline_info: what is in force is compared, only ever tightened, and nobody is locked out."""

from __future__ import annotations

import os
import pwd
import stat
import time

import pytest
import yaml
from ansible_collections.secure_agent.workspace.plugins.modules import host_baseline, host_baseline_info

TODAY = int(time.time() // 86400)
RULES = {"max_days": 365, "min_days": 1, "warn_days": 7}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose kernel parameters, mounts and accounts are files of this test; its commands only say what they were."""
    (tmp_path / "booted").mkdir()
    for name, path in {
        "BOOTED": "booted", "CONTAINER": "container", "PROC_SYS": "sys", "MOUNTINFO": "mountinfo", "ACCOUNTS": "passwd",
        "SHADOW": "shadow", "LOGIN_DEFS": "login.defs",
    }.items():  # fmt: skip
        monkeypatch.setattr(host_baseline, name, str(tmp_path / path))
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/kptr_restrict").write_text("0\n")
    (tmp_path / "login.defs").write_text("# UMASK 077\nUID_MIN 1000\nUMASK\t\t022\n")
    ran: list[list[str]] = []
    monkeypatch.setattr(host_baseline.Host, "run", lambda _, *command: ran.append(list(command)))
    return type("FakeHost", (), {"root": tmp_path, "ran": ran})()


def test_a_kernel_value_is_forecast_set_and_left_alone(host, run_module):
    wanted = {"sysctl": {"kernel.kptr_restrict": 2, "kernel.nonesuch": 1}}
    value = host.root / "sys/kernel/kptr_restrict"
    forecast = run_module(host_baseline, check=True, **wanted)
    assert forecast["changes"] == [{"kind": "sysctl", "target": "kernel.kptr_restrict", "before": "0", "after": "2"}]
    assert forecast["diff"]["after"] == "sysctl kernel.kptr_restrict: 2\n"
    assert value.read_text() == "0\n"
    assert run_module(host_baseline, **wanted)["changed"]
    assert value.read_text() == "2"
    again = run_module(host_baseline, **wanted)
    assert not again["changed"]
    assert again["unavailable"] == [
        {"kind": "sysctl", "target": "kernel.nonesuch", "reason": "this kernel has no such parameter"}
    ]


def test_a_value_that_may_not_be_written_is_named_and_no_error(host, run_module, monkeypatch):
    value = str(host.root / "sys/kernel/kptr_restrict")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: path != value and real(path, mode, **more))
    outcome = run_module(host_baseline, sysctl={"kernel.kptr_restrict": 2})
    assert (outcome["changed"], outcome["unavailable"][0]["reason"]) == (False, "read-only here, it is 0")


def test_the_kernel_of_the_machine_that_builds_an_image_is_left_alone(host, run_module):
    (host.root / "booted").rmdir()
    outcome = run_module(
        host_baseline, sysctl={"kernel.kptr_restrict": 2}, mounts=[{"path": str(host.root), "options": ["noexec"]}]
    )
    assert not outcome["changed"]
    assert (host.root / "sys/kernel/kptr_restrict").read_text() == "0\n"


def test_mounts_get_the_options_they_lack(host, run_module):
    for name in ("tmp", "shm", "var"):
        (host.root / name).mkdir()
    lines = [
        f"30 1 0:1 / {host.root}/tmp rw,nosuid,nodev shared:1 - tmpfs tmpfs rw,size=1k",
        f"31 1 0:2 / {host.root}/shm rw,nosuid,nodev,noexec - tmpfs tmpfs rw",
    ]
    (host.root / "mountinfo").write_text("\n".join(lines) + "\n")
    options = ["nosuid", "nodev", "noexec"]
    wanted = [{"path": str(host.root / name), "options": options} for name in ("tmp", "shm", "var", "none")]
    outcome = run_module(host_baseline, mounts=wanted)
    assert [(one["target"][-3:], one["before"]) for one in outcome["changes"]] == [
        ("tmp", "without noexec"), ("var", "no mount"),
    ]  # fmt: skip
    assert outcome["unavailable"][0]["reason"] == "it is no folder here"
    remount = ["mount", "-o", "remount,bind,nosuid,nodev,noexec"]
    var = str(host.root / "var")
    assert host.ran == [[*remount, str(host.root / "tmp")], ["mount", "--bind", var, var], [*remount, var]]


@pytest.mark.parametrize("container", [True, False])
def test_a_mount_that_is_refused_is_an_error_outside_containers(host, run_module, monkeypatch, container):
    def refuse(self, *command):
        raise host_baseline.Failed("permission denied")

    monkeypatch.setattr(host_baseline.Host, "run", refuse)
    (host.root / "mountinfo").write_text("")
    if container:
        (host.root / "container").touch()
    outcome = run_module(host_baseline, mounts=[{"path": str(host.root), "options": ["noexec"]}])
    assert outcome.failed != container
    if container:
        assert outcome["unavailable"][0]["reason"] == "permission denied; it stays no mount"
    else:
        assert outcome["failure"]["code"] == "command_failed"


def setting(host, key, value, separator=" "):
    return {"settings": [{"path": str(host.root / "login.defs"), "key": key, "value": value, "separator": separator}]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("UMASK\t\t022\n", "UMASK 027\n", id="another value"),
        pytest.param("# UMASK 027\nA 1\n", "# UMASK 027\nA 1\nUMASK 027\n", id="a comment is no value"),
        pytest.param("UMASKED 1\nMY_UMASK 1\n", "UMASKED 1\nMY_UMASK 1\nUMASK 027\n", id="other names"),
        pytest.param("UMASK 022\nA 1\nUMASK 077\n", "UMASK 027\nA 1\n", id="twice"),
        pytest.param("A 1", "A 1\nUMASK 027\n", id="no end of line"),
        pytest.param("", "UMASK 027\n", id="empty"),
    ],
)
def test_a_setting_is_there_once_with_its_value(host, run_module, before, after):
    file = host.root / "login.defs"
    file.write_text(before)
    file.chmod(0o640)
    assert run_module(host_baseline, **setting(host, "UMASK", "027"))["changed"]
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (after, 0o640)
    assert not run_module(host_baseline, **setting(host, "UMASK", "027"))["changed"]


def test_a_setting_with_a_sign_between_and_one_without_its_file(host, run_module):
    file = host.root / "login.defs"
    file.write_text("INACTIVE=-1\n")
    assert run_module(host_baseline, **setting(host, "INACTIVE", "30", "="))["changed"]
    assert file.read_text() == "INACTIVE=30\n"
    file.unlink()
    assert run_module(host_baseline, **setting(host, "INACTIVE", "30", "="))["unavailable"]


def test_a_word_goes_from_lines_and_not_from_comments(host, run_module):
    file = host.root / "common-auth"
    file.write_text(
        "# nullok is bad\nauth required pam_unix.so nullok\nauth required pam_x.so nullok_secure nullok x\n"
    )
    wanted = {"words_removed": [{"path": str(file), "word": "nullok"}]}
    assert run_module(host_baseline, **wanted)["changed"]
    assert file.read_text() == "# nullok is bad\nauth required pam_unix.so\nauth required pam_x.so nullok_secure x\n"
    assert not run_module(host_baseline, **wanted)["changed"]


def test_missing_lines_are_brought_by_their_command(host, run_module, monkeypatch):
    file = host.root / "stack"
    file.write_text("one\n")
    wanted = {"ensured": [{"path": str(file), "matches": ["^one$", "^two$"], "command": ["enable", "two"]}]}
    outcome = run_module(host_baseline, **wanted)
    assert "still lacks '^two$' after `enable two`" in outcome["msg"], "a command that brings nothing is no success"
    monkeypatch.setattr(host_baseline.Host, "run", lambda *_: file.write_text("one\ntwo\n"))
    assert run_module(host_baseline, check=True, **wanted)["changed"]
    assert run_module(host_baseline, **wanted)["changed"]
    assert not run_module(host_baseline, **wanted)["changed"]


def test_modes_are_only_ever_tightened(host, run_module):
    wide, tight, link = (host.root / name for name in ("key-wide", "key-tight", "key-link"))
    wide.touch()
    wide.chmod(0o4666)
    tight.touch()
    tight.chmod(0o400)
    link.symlink_to("/etc/passwd")
    wanted = {"permissions": [{"path": str(host.root / "key-*"), "mode": "0640"}, {"path": "/none", "mode": "0600"}]}
    assert [one["target"] for one in run_module(host_baseline, check=True, **wanted)["changes"]] == [str(wide)]
    assert run_module(host_baseline, **wanted)["changed"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (wide, tight)] == [0o640, 0o400]
    assert not run_module(host_baseline, **wanted)["changed"]


def people(host, passwd, shadow):
    (host.root / "passwd").write_text("".join(f"{line}\n" for line in passwd))
    (host.root / "shadow").write_text("".join(f"{line}\n" for line in shadow))


@pytest.mark.control("P0-07")
def test_an_empty_password_is_locked_and_its_twin_with_one_is_not(host, run_module):
    people(
        host,
        ["eve:x:1001:1001::/home/eve:/bin/sh", "bob:x:1002:1002::/home/bob:/bin/sh"],
        [f"eve::{TODAY}:1:365:7:::", f"bob:$y$hash:{TODAY}:1:365:7:::"],
    )
    outcome = run_module(host_baseline, accounts=RULES)
    assert [(one["kind"], one["target"]) for one in outcome["changes"]] == [("password", "eve")]
    assert host.ran == [["usermod", "--lock", "eve"]]


def test_system_accounts_lose_their_shell_unless_named_or_opened_by_keys(host, run_module):
    (host.root / "git/.ssh").mkdir(parents=True)
    (host.root / "git/.ssh/authorized_keys").write_text("ssh-ed25519 AAAA\n")
    people(
        host,
        [
            "root:x:0:0::/root:/bin/bash", "games:x:5:60::/usr/games:/bin/bash", "mail:x:8:8::/var/mail:/usr/sbin/nologin",
            "sync:x:4:65534::/bin:/bin/sync", f"git:x:105:105::{host.root}/git:/bin/sh", "db:x:106:106::/var/db:/bin/sh",
            "ann:x:1000:1000::/home/ann:/bin/bash",
        ],
        [],
    )  # fmt: skip
    outcome = run_module(host_baseline, accounts={**RULES, "keep_shell": ["root", "db"]})
    assert host.ran == [["usermod", "--shell", "/usr/sbin/nologin", "games"]]
    assert [one["target"] for one in outcome["unavailable"]] == ["git"]


def test_ages_are_set_and_no_password_runs_out_at_once(host, run_module):
    people(
        host,
        [f"{name}:x:{1001 + number}:100::/home/{name}:/bin/sh" for number, name in enumerate(("new", "old", "strict", "key"))],
        [
            f"new:$y$hash:{TODAY}:0:99999:7:::", f"old:$y$hash:{TODAY - 400}:0:99999:7:::",
            f"strict:$y$hash:{TODAY}:1:90:7:::", f"key:!:{TODAY}:0:99999:7:::",
        ],
    )  # fmt: skip
    outcome = run_module(host_baseline, accounts=RULES)
    assert host.ran == [["chage", "--mindays", "1", "--maxdays", "365", "--warndays", "7", "new"]]
    assert [(one["target"], "run out at once" in one["reason"]) for one in outcome["unavailable"]] == [("old", True)]
    assert "hash" not in str(outcome["diff"])


class TestWaysIn:
    """Who could still log in."""

    @pytest.fixture
    def ssh(self, tmp_path, monkeypatch, run_module):
        """A running SSH server with these settings, and one account ann whose home is the test's folder."""
        ann = pwd.struct_passwd(("ann", "x", 1000, 1000, "", str(tmp_path), "/bin/sh"))
        root = pwd.struct_passwd(("root", "x", 0, 0, "", str(tmp_path / "root"), "/bin/sh"))
        monkeypatch.setattr(host_baseline_info.pwd, "getpwall", lambda: [root, ann])
        monkeypatch.setattr(host_baseline_info, "BOOTED", str(tmp_path))
        monkeypatch.setattr(host_baseline_info, "SSHD", str(tmp_path))
        monkeypatch.delenv("SSH_CONNECTION", raising=False)
        monkeypatch.delenv("SUDO_USER", raising=False)
        for account in ("", "root/"):
            (tmp_path / account / ".ssh").mkdir(parents=True)

        def look(*settings, active="active", code=0, **wanted):
            given = [
                "pubkeyauthentication yes",
                "authorizedkeysfile .ssh/authorized_keys",
                "passwordauthentication yes",
            ]
            names = {setting.split()[0] for setting in settings}
            given = "\n".join([*(line for line in given if line.split()[0] not in names), *settings])

            def run(self, command, **more):
                return (0, active, "") if command[0] == "systemctl" else (code, given, "")

            monkeypatch.setattr(host_baseline_info.AnsibleModule, "run_command", run)
            return run_module(host_baseline_info, **wanted)

        look.home = tmp_path
        return look

    @pytest.mark.control("P0-07")
    def test_passwords_stay_where_nothing_else_opens_the_host(self, ssh):
        assert "no account could log in any more" in ssh()["refusal"]
        (ssh.home / ".ssh/authorized_keys").write_text("# none yet\n\n")
        assert ssh()["refusal"], "a comment is no key"
        assert ssh(passwords=True)["refusal"] == ""
        (ssh.home / ".ssh/authorized_keys").write_text("ssh-ed25519 AAAA ann\n")
        found = ssh()
        assert (found["refusal"], found["ways_in"]) == ("", ["ann"])

    @pytest.mark.parametrize(
        "settings",
        [
            ["denyusers ann"],
            ["allowusers bob", "allowusers eve@192.0.2.1"],
            ["pubkeyauthentication no"],
            ["authorizedkeysfile none"],
            ["authorizedkeysfile /etc/keys/%u"],
        ],
    )
    def test_a_key_that_does_not_open_is_no_way_in(self, ssh, settings):
        (ssh.home / ".ssh/authorized_keys").write_text("ssh-ed25519 AAAA ann\n")
        assert ssh(*settings)["refusal"]
        assert ssh("allowusers a*", "denyusers bob", "authorizedkeysfile none %h/.ssh/authorized_keys")["refusal"] == ""

    def test_an_authority_is_a_way_in_when_it_holds_a_key(self, ssh):
        authority = ssh.home / "ca.pub"
        assert ssh(f"trustedusercakeys {authority}")["refusal"]
        authority.write_text("ssh-ed25519 AAAA ca\n")
        assert ssh(f"trustedusercakeys {authority}")["ways_in"] == ["certificates"]

    def test_roots_key_does_not_count_where_root_may_not_log_in(self, ssh):
        (ssh.home / "root/.ssh/authorized_keys").write_text("ssh-ed25519 AAAA root\n")
        assert ssh()["refusal"] == ""
        assert ssh(root_login="no")["refusal"]

    def test_a_play_that_came_as_root_does_not_shut_root_out(self, ssh, monkeypatch):
        (ssh.home / ".ssh/authorized_keys").write_text("ssh-ed25519 AAAA ann\n")
        monkeypatch.setattr(host_baseline_info.os, "geteuid", lambda: 0)
        assert ssh(root_login="no")["refusal"] == ""
        monkeypatch.setenv("SSH_CONNECTION", "192.0.2.1 1 192.0.2.2 22")
        assert "would lock itself out" in ssh(root_login="no")["refusal"]
        assert ssh()["refusal"] == ""
        monkeypatch.setenv("SUDO_USER", "ann")
        assert ssh(root_login="no")["refusal"] == ""

    def test_a_server_that_cannot_tell_its_settings_is_left_as_it_is(self, ssh):
        assert "`sshd -T` fails" in ssh(code=255)["refusal"]
        assert ssh(code=255, active="inactive")["refusal"] == "", "nobody is in there by SSH"


@pytest.mark.parametrize(
    ("release", "family"),
    [
        ('ID=debian\nVERSION_ID="13"\n', "debian"),
        ('ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n', "debian"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.4"\n', "redhat"),
        ("ID=arch\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_family_of_the_system(tmp_path, monkeypatch, release, family):
    file = tmp_path / "os-release"
    file.write_text(release)
    monkeypatch.setattr(host_baseline_info, "OS_RELEASE", str(file))
    assert host_baseline_info.system()["family"] == family
    assert yaml.safe_load(host_baseline_info.RETURN)["system"]["sample"].keys() == host_baseline_info.system().keys()
