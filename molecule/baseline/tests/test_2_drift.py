"""Drift is reported before it is mended, one run mends it, and a host that is half configured is no reason to die."""

from __future__ import annotations

import pytest

testinfra_hosts = ["bare"]

#: What goes wrong in twenty places, and the words by which `--check --diff` reports it.
DRIFT = {
    "echo '-kernel.sysrq = 1' >> /etc/sysctl.d/50-saw-baseline.conf": "--kernel.sysrq = 1",
    "sysctl --quiet --write net.ipv4.conf.all.accept_redirects=1": "-sysctl net.ipv4.conf.all.accept_redirects: 1",
    "rm /etc/modprobe.d/50-saw-baseline.conf": "+install sctp /bin/false",
    "mount -o remount,bind,exec,nosuid,nodev /tmp": "-mount /tmp: without noexec",
    "umount /var/tmp": "-mount /var/tmp: no mount",
    "systemctl disable --quiet saw-baseline-mounts.service": "item=mounts",
    "sed -i /authfail/d /etc/pam.d/common-auth": "-lines /etc/pam.d/common-auth: no line with",
    "sed -i 's/deny=2/deny=9/' /usr/share/pam-configs/saw-baseline-fail": "deny=9",
    "sed -i 's/^password.*pam_unix.so.*/& nullok/' /etc/pam.d/common-password": "-word /etc/pam.d/common-password: nullok",
    "sed -i 's/^PasswordAuthentication no/PasswordAuthentication yes/' /etc/ssh/sshd_config.d/50-saw-baseline.conf":
        "-PasswordAuthentication yes",
    "echo umask 000 > /etc/profile.d/50-saw-baseline.sh": "-umask 000",
    "sed -i 's/^UMASK.*/UMASK 000/' /etc/login.defs": "-setting /etc/login.defs:UMASK: 000",
    "rm /etc/security/limits.d/50-saw-baseline.conf": "+* hard core 0",
    "sed -i 's/persistent/none/' /etc/systemd/journald.conf.d/50-saw-baseline.conf": "-Storage=none",
    "echo 'Debian GNU/Linux 13' > /etc/issue.net": "-Debian GNU/Linux 13",
    "sed -i 's/^PASS_MAX_DAYS.*/PASS_MAX_DAYS 99999/' /etc/login.defs": "-setting /etc/login.defs:PASS_MAX_DAYS: 99999",
    "usermod --shell /bin/bash games": "-shell games: /bin/bash",
    "passwd --quiet --delete irc": "-password irc: empty",
    "chmod 644 /etc/shadow": "-mode /etc/shadow: 0644",
    "chown nobody /etc/cron.d": "-owner /etc/cron.d: 65534",
}  # fmt: skip
#: The same twenty places as `saw drift check` names them.
PLACES = {
    "/etc/sysctl.d/50-saw-baseline.conf", "sysctl net.ipv4.conf.all.accept_redirects", "/etc/modprobe.d/50-saw-baseline.conf",
    "mount /tmp", "mount /var/tmp", "enable saw-baseline-mounts.service", "lines /etc/pam.d/common-auth",
    "/usr/share/pam-configs/saw-baseline-fail", "word /etc/pam.d/common-password", "/etc/ssh/sshd_config.d/50-saw-baseline.conf",
    "/etc/profile.d/50-saw-baseline.sh", "setting /etc/login.defs:UMASK", "/etc/security/limits.d/50-saw-baseline.conf",
    "/etc/systemd/journald.conf.d/50-saw-baseline.conf", "/etc/issue.net", "setting /etc/login.defs:PASS_MAX_DAYS",
    "shell games", "password irc", "mode /etc/shadow", "owner /etc/cron.d",
}  # fmt: skip
#: What the host looks like to somebody who compares.
LOOK = (
    "find /etc /usr/share/pam-configs -type f -exec sha256sum {} + | sort; stat -c %a:%U /etc/shadow /etc/cron.d;"
    " grep -E '/(tmp|shm) ' /proc/self/mounts; sysctl net.ipv4.conf.all.accept_redirects"
)


@pytest.mark.control("P0-01")
def test_drift_in_twenty_places_is_reported_and_mended_by_one_run(host, play, drift):
    assert len(DRIFT) == len(PLACES) == 20
    for command in DRIFT:
        host.run_expect([0], command)
    before = host.run(LOOK).stdout
    report = play("baseline", "--check", "--diff")
    assert report.returncode == 0, report.stdout + report.stderr
    assert [words for words in DRIFT.values() if words not in report.stdout] == [], report.stdout
    assert host.run(LOOK).stdout == before, "check mode changed something"

    code, found = drift()
    assert (code, found["unchecked"], found["problems"]) == (1, [], []), found
    assert {one["place"] for one in found["drift"]} >= PLACES, found
    assert {(one["host"], one["role"]) for one in found["drift"]} == {("bare", "baseline")}
    assert host.run(LOOK).stdout == before, "the report changed something"

    one = play("baseline", "--check", "--diff", "-e", '{"baseline_areas": ["banner"]}')
    assert ("Debian GNU/Linux 13" in one.stdout, one.changed) == (True, 1), one.stdout
    assert sum(words in one.stdout for words in DRIFT.values()) == 1, "an area that is switched off was looked at"

    mended = play("baseline")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    again = play("baseline", "--check", "--diff")
    assert (again.returncode, again.changed) == (0, 0), again.stdout
    code, found = drift()
    assert (code, found["hosts"], found["drift"]) == (0, ["bare"], []), found
    for question, answer in {
        "sysctl -n net.ipv4.conf.all.accept_redirects": "0",
        "findmnt --noheadings --output OPTIONS --target /var/tmp | grep -c noexec": "1",
        "grep -c authfail /etc/pam.d/common-auth": "1",
        "grep -c nullok /etc/pam.d/common-password": "0",
        "getent passwd games | cut -d: -f7": "/usr/sbin/nologin",
        "getent shadow irc | cut -d: -f2": "!",
        "stat -c %a:%U /etc/shadow /etc/cron.d | tr '\\n' ' '": "640:root 700:root",
        "sshd -T | grep ^passwordauth": "passwordauthentication no",
    }.items():
        assert host.run(question).stdout.strip() == answer, question


@pytest.mark.control("P0-01")
def test_check_mode_lives_on_a_host_that_is_half_configured(host, play):
    """Files, folders and a working SSH configuration are missing; a real run refuses before it changes anything."""
    host.run_expect([0], "mkdir /root/kept && cp -a /etc/login.defs /etc/ssh /etc/pam.d /root/kept/")
    try:
        host.run_expect(
            [0],
            "rm -r /etc/login.defs /etc/pam.d/common-account /etc/systemd/journald.conf.d /etc/sysctl.d/50-saw-baseline.conf"
            " /etc/default/useradd /etc/issue; echo Nonsense yes >> /etc/ssh/sshd_config;"
            " ln -s /dev/null /etc/systemd/system/systemd-timesyncd.service",
        )
        forecast = play("baseline", "--check", "--diff")
        assert forecast.returncode == 0, forecast.stdout + forecast.stderr
        assert forecast.changed > 0
        assert "`sshd -T` fails" in forecast.said
        assert "time synchronization: neither chrony nor systemd-timesyncd is installed" in forecast.said
        refused = play("baseline")
        assert (refused.returncode, refused.changed) == (2, 0), refused.stdout
        assert not host.file("/etc/issue").exists, "something was changed before the refusal"
    finally:
        host.run_expect([0], "rm /etc/systemd/system/systemd-timesyncd.service")
        host.run_expect([0], "cp -a /root/kept/login.defs /root/kept/ssh /root/kept/pam.d /etc/ && rm -r /root/kept")
    mended = play("baseline")
    assert (mended.returncode, mended.changed > 0) == (0, True), mended.stdout + mended.stderr


@pytest.mark.control("P0-07")
def test_passwords_are_not_switched_off_where_no_key_opens_the_host(host, play):
    """The running server still takes the key: it has not read what its configuration says by now."""
    lost = "/etc/ssh/sshd_config.d/01-lost.conf"
    host.run_expect([0], f"printf 'AuthorizedKeysFile none\\nPasswordAuthentication yes\\n' > {lost}")
    try:
        refused = play("baseline")
        assert (refused.returncode, refused.changed) == (2, 0), refused.stdout
        assert "no account could log in any more" in refused.said
    finally:
        host.run_expect([0], f"rm {lost}")
    shut_out = play("baseline", "-e", "baseline_ssh_root_login=no")
    assert (shut_out.returncode, shut_out.changed) == (2, 0)
    assert "would lock itself out" in shut_out.said
