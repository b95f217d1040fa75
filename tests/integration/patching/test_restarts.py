"""The host restarts when it needs it, in its window, while no engagement runs and no package is changed; else it does not."""

from __future__ import annotations

import fcntl
from datetime import UTC, datetime, timedelta

import pytest
from patching_rig import Host

pytestmark = pytest.mark.control("P0-02")
DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def window(offset_h: int) -> dict[str, object]:
    """A window of two hours on every day, which begins so many hours from now."""
    return {"days": DAYS, "start": f"{datetime.now(UTC) + timedelta(hours=offset_h):%H:%M}", "minutes": 120}


@pytest.fixture
def tired(host: Host) -> Host:
    """A host that needs a restart, with a command that leaves a mark in place of one."""
    (host.folder / "run/reboot-required").write_text("")
    (host.folder / "run/reboot-required.pkgs").write_text("dbus\n")
    host.configure(reboot={"window": window(-1), "command": ["/usr/bin/touch", "/run/restarted"]})
    return host


def restarted(host: Host) -> bool:
    return (host.folder / "run/restarted").exists()


def test_a_host_that_needs_it_restarts_in_its_window_and_one_that_does_not_need_it_never_does(tired: Host) -> None:
    forecast = tired.told_by("reboot", "--dry-run")
    assert (forecast["needed"], forecast["restarting"], restarted(tired)) == (True, False, False)
    done = tired.told_by("reboot")
    assert (done["reasons"], done["restarting"]) == (["packages ask for it: dbus"], True)
    assert restarted(tired)
    (tired.folder / "run/restarted").unlink()
    (tired.folder / "run/reboot-required").unlink()
    assert tired.told_by("reboot")["needed"] is False
    assert not restarted(tired)


def test_outside_its_window_it_does_not_restart_unless_told_so(tired: Host) -> None:
    tired.configure(reboot={"window": window(3), "command": ["/usr/bin/touch", "/run/restarted"]})
    refused = tired.saw("reboot")
    assert (refused.returncode, "it is outside the reboot window, which begins at" in refused.stderr) == (1, True)
    assert not restarted(tired)
    assert tired.saw("reboot", "--outside-window").returncode == 0
    assert restarted(tired)


def test_during_an_engagement_it_does_not_restart_unless_told_so(tired: Host) -> None:
    tired.systemctl("echo 'saw-vm@ws-1.service loaded active running The VM of ws-1'")
    refused = tired.saw("reboot")
    assert (refused.returncode, "an engagement would be cut off: saw-vm@ws-1.service runs" in refused.stderr) == (
        1,
        True,
    )
    assert tired.saw("reboot", "--outside-window").returncode == 1, "one permission is not the other"
    tired.systemctl("echo broken >&2; exit 1")
    unknown = tired.saw("reboot")
    assert (unknown.returncode, "systemd does not say what runs: broken" in unknown.stderr) == (1, True)
    assert not restarted(tired)
    tired.systemctl("echo 'saw-vm@ws-1.service loaded active running The VM of ws-1'")
    assert tired.saw("reboot", "--during-engagement").returncode == 0
    assert restarted(tired)


def test_while_packages_are_changed_it_does_not_restart(tired: Host) -> None:
    with (tired.folder / "var/lib/dpkg/lock-frontend").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        refused = tired.saw("reboot")
        assert (refused.returncode, "packages are being changed" in refused.stderr) == (1, True)
        assert not restarted(tired)
    assert tired.saw("reboot").returncode == 0
