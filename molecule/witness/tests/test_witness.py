"""A host signs the trail's tree, another witnesses it by itself; a tree that was made anew stops it, and says so."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import testinfra

testinfra_hosts = ["edge"]
pytestmark = pytest.mark.control("AUD-02")
STATE = "/var/lib/saw/witness"
TREE = "/var/lib/saw/audit-tree"
BOUND_S = 120


def status(host: Any) -> dict[str, Any]:
    """How the witness says that it is; its exit code says the same."""
    done = host.run("/opt/saw/bin/saw audit witness status --json")
    found = json.loads(done.stdout)
    assert done.rc == (0 if found["ok"] else 1)
    return dict(found)


def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    end = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.5)


@pytest.fixture
def control(host: Any) -> Any:
    """The control host, by the same inventory."""
    return testinfra.get_host("ansible://control", ansible_inventory=host.backend.ansible_inventory)


def test_both_run_by_timers_under_accounts_that_can_do_little(host: Any, control: Any) -> None:
    for where, unit, account, most in (
        (control, "saw-audit-checkpoint", "saw-audit-tree", 3.0),
        (host, "saw-audit-witness", "saw-witness", 3.0),
    ):
        timer = where.service(f"{unit}.timer")
        assert timer.is_running
        assert timer.is_enabled
        assert f"User={account}" in where.run(f"systemctl show --property User {unit}.service").stdout
        report = where.run(f"systemd-analyze security --no-pager {unit}.service | tail -n 1").stdout
        assert float(report.split(":")[1].split()[0]) < most, report
    assert control.file(f"{TREE}/log.key").mode == 0o600
    assert host.file(f"{STATE}/witness.key").mode == 0o600
    assert host.run(f"setpriv --reuid nobody --clear-groups cat {STATE}/witness.key").rc != 0


def test_the_tree_grows_is_signed_again_and_witnessed(host: Any, control: Any) -> None:
    before = status(host)
    assert before["state"] == "witnessing", before
    control.run_expect([0], "/opt/saw/bin/saw audit hold add --from 2026-01-01 --to 2026-01-02 --reason witness --json")
    until(lambda: status(host)["size"] > before["size"], lambda: str(status(host)))
    until(lambda: status(host)["checked_at"] > before["checked_at"], lambda: str(status(host)))
    assert host.file(f"{STATE}/checkpoint").content_string.count("— witness.test ") == 1


def test_a_tree_made_anew_fails_the_unit_and_stays_an_alarm_until_it_is_cleared(host: Any, control: Any) -> None:
    code = (
        "import hashlib, pathlib, sys, time; from saw.audit.note import Signer, sign_checkpoint;"
        "from saw.audit.tiles import Folder, Leaf, TreeWriter; from saw.audit import merkle;"
        "tree = Folder(pathlib.Path(sys.argv[1])); key = Signer.parse(pathlib.Path(sys.argv[2]).read_text());"
        "new = TreeWriter(tree, key.public.name, 0, merkle.EMPTY_ROOT);"
        "new.add(Leaf('x', n + 1, hashlib.sha256(b'%d' % n).hexdigest()) for n in range(100_000)); point = new.finish();"
        "tree.write('checkpoint', sign_checkpoint(point, key, int(time.time())).encode())"
    )
    control.run_expect([0], "systemctl stop saw-audit-checkpoint.timer saw-audit-checkpoint.service")
    control.run_expect([0], f"mv {TREE}/tiles {TREE}/kept && runuser -u saw-audit-tree -- mkdir {TREE}/tiles")
    try:
        forge = f'runuser -u saw-audit-tree -- /opt/saw/bin/python -I -c "{code}" {TREE}/tiles {TREE}/log.key'
        control.run_expect([0], forge)
        until(lambda: status(host)["state"] == "alarm", lambda: str(status(host)))
        assert status(host)["alarm"]["code"] == "tree_forked"
        assert host.run("systemctl start saw-audit-witness.service").rc == 1
        until(
            lambda: host.run("systemctl is-failed saw-audit-witness.service").rc == 0, lambda: "the unit did not fail"
        )
        kinds = [
            json.loads(line)["finding_info"]["types"]
            for line in host.file(f"{STATE}/findings.jsonl").content_string.splitlines()
        ]
        assert ["tree_forked"] in kinds
    finally:
        control.run_expect([0], f"rm -r {TREE}/tiles && mv {TREE}/kept {TREE}/tiles")
        control.run_expect([0], "systemctl start saw-audit-checkpoint.timer saw-audit-checkpoint.service")
    assert host.run("systemctl start saw-audit-witness.service").rc == 1, "the right tree alone is not enough"
    clear = "runuser -u saw-witness -- /opt/saw/bin/saw audit witness clear --reason 'the test is over'"
    host.run_expect([0], clear)
    host.run_expect([0], "systemctl start saw-audit-witness.service")
    assert status(host)["state"] == "witnessing"
