"""Each area is in force on a booted host, not only written down."""

from __future__ import annotations

import subprocess

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-07")

#: Type a password at su's question, as somebody who is not root; tells whether the command behind it ran.
TRY = """
import os, pty, select, sys
name, password = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    stranger = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    os.execvp("setpriv", [*stranger, "su", name, "-c", "echo I-AM-$(id -un)"])
seen = b""
try:
    while select.select([terminal], [], [], 30)[0]:
        piece = os.read(terminal, 1024)
        if not piece:
            break
        seen += piece
        if seen.rstrip().endswith(b"Password:") and password is not None:
            os.write(terminal, password.encode() + b"\\n")
            password = None
except OSError:
    pass
os.waitpid(pid, 0)
sys.exit(f"I-AM-{name}".encode() not in seen)
"""


@pytest.fixture(scope="module")
def people(host):
    """Two people of this host: ann has a password, eve has an empty one."""
    host.run_expect([0], "useradd --create-home --shell /bin/bash ann && echo ann:correct-horse | chpasswd")
    host.run_expect([0], "useradd --create-home --shell /bin/bash eve && passwd --delete eve")
    host.run_expect([0], "faillock --user ann --reset && faillock --user eve --reset")
    yield
    host.run("faillock --user ann --reset; faillock --user eve --reset; userdel --remove ann; userdel --remove eve")


def login(host, name, password):
    """Whether su lets somebody in with that password."""
    return host.run("python3 -c %s %s %s", TRY, name, password).rc == 0


def test_kernel_values_are_in_force_where_a_container_may_set_them(host):
    assert host.sysctl("net.ipv4.conf.all.accept_redirects") == 0
    assert host.sysctl("net.ipv4.conf.default.rp_filter") == 1
    for line in ("-kernel.kptr_restrict = 2", "-kernel.unprivileged_bpf_disabled = 1", "-kernel.yama.ptrace_scope = 2"):
        assert host.file("/etc/sysctl.d/50-saw-baseline.conf").contains(f"^{line}$"), line
    assert "ip_forward" not in host.file("/etc/sysctl.d/50-saw-baseline.conf").content_string


def test_an_unused_protocol_cannot_be_loaded(host):
    shown = host.run("modprobe --showconfig")
    assert {"install sctp /bin/false", "install usb_storage /bin/false"} <= set(shown.stdout.splitlines())
    assert host.run("modprobe sctp").rc != 0


@pytest.mark.parametrize("folder", ["/tmp", "/var/tmp", "/dev/shm"])
def test_a_program_in_a_folder_that_everyone_writes_does_not_run(host, folder):
    assert {"nosuid", "nodev", "noexec"} <= set(host.mount_point(folder).options)
    done = host.run(f"cp /bin/true {folder}/program && {folder}/program; code=$?; rm -f {folder}/program; exit $code")
    assert (done.rc, "Permission denied" in done.stderr) == (126, True)
    assert host.run("cp /bin/true /root/program && /root/program; code=$?; rm -f /root/program; exit $code").rc == 0


def test_the_options_come_back_at_boot(host):
    assert host.service("saw-baseline-mounts").is_enabled
    host.run_expect(
        [0], "mount -o remount,bind,exec,nosuid,nodev /dev/shm && systemctl restart saw-baseline-mounts.service"
    )
    assert "noexec" in host.mount_point("/dev/shm").options


@pytest.mark.usefixtures("people")
def test_an_empty_password_opens_nothing_and_a_right_one_does(host):
    assert not login(host, "eve", "")
    assert login(host, "ann", "correct-horse")


@pytest.mark.usefixtures("people")
def test_wrong_passwords_lock_the_account_and_the_right_one_no_longer_helps(host):
    assert not login(host, "ann", "wrong")
    assert not login(host, "ann", "wrong")
    assert not login(host, "ann", "correct-horse")
    host.run_expect([0], "faillock --user ann --reset")
    assert login(host, "ann", "correct-horse")


def test_the_ssh_server_offers_no_password(host):
    effective = set(host.run("sshd -T").stdout.splitlines())
    wanted = {
        "passwordauthentication no",
        "permitemptypasswords no",
        "permitrootlogin without-password",
        "maxauthtries 3",
    }
    assert wanted | {"x11forwarding no", "allowtcpforwarding no", "banner /etc/issue.net"} <= effective
    offer = [
        "ssh",
        "-F",
        "/dev/null",
        "-v",
        "-o",
        "PreferredAuthentications=password",
        "-o",
        "NumberOfPasswordPrompts=1",
    ]
    offer += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@10.79.0.50", "true"]
    done = subprocess.run(offer, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr
    assert "Access is for authorized use only." in done.stderr


def test_the_key_still_opens(host):
    assert host.run("id -u").stdout.strip() == "0"


@pytest.mark.usefixtures("people")
def test_people_make_files_that_others_cannot_read(host):
    assert host.run("su --login ann --command umask").stdout.strip() == "0027"


@pytest.mark.usefixtures("people")
def test_no_core_is_dumped(host):
    assert host.run("su --login ann --command 'ulimit -Hc'").stdout.strip() == "0"
    assert host.run("systemctl show --property=DefaultLimitCORE --value").stdout.strip() == "0"


def test_the_journal_is_kept_over_a_restart(host):
    assert host.file("/var/log/journal").is_directory
    effective = host.run("systemd-analyze cat-config systemd/journald.conf").stdout
    assert "\nStorage=persistent\n" in effective
    assert host.service("systemd-journald").is_running


@pytest.mark.usefixtures("people")
def test_passwords_of_new_accounts_run_out(host):
    assert host.run("getent shadow ann").stdout.split(":")[3:6] == ["1", "365", "7"]


def test_secrets_of_the_system_are_for_root_alone(host):
    assert host.file("/etc/shadow").mode & 0o137 == 0
    assert host.file("/etc/ssh/sshd_config").mode == 0o600
    reader = host.run("setpriv --reuid=nobody --clear-groups ls /etc/cron.d /root /etc/ssh/sshd_config.d")
    assert reader.stderr.count("Permission denied") == 3
