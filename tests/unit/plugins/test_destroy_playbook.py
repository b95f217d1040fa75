"""workspace_destroy as people run it, on a workspace that asks for a wipe: a real broker and the real driver."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from driver_host import SAW
from test_rebuild_playbook import Hypervisor

from saw.policy.keys import create_key

pytestmark = [
    pytest.mark.control("GPU-01"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own"),
]


def test_a_workspace_that_could_not_be_wiped_is_not_released_and_a_wiped_one_is(
    tmp_path: Path, broker_context: object
) -> None:
    host = Hypervisor(tmp_path, broker_context, "gone-with-a-wipe", wipe=True)
    create_key(tmp_path / "keys", "wipe")
    disks = tmp_path / "state/vms" / host.name
    (disks / "data.img").unlink()
    (disks / "data.img").symlink_to("/dev/zero")
    values = {"gpu_wipe_key": str(tmp_path / "keys/wipe.key"), "gpu_wipe_records": str(tmp_path / "records")}

    refused = host.play("workspace_destroy", values)
    assert refused.returncode == 2, refused.stdout
    assert "data.img is no regular file and no block device" in " ".join(refused.stdout.split())
    assert (disks / "root.qcow2").exists()
    assert not (tmp_path / "records").exists()

    (disks / "data.img").unlink()
    (disks / "data.img").write_bytes(b"the user's" * 1000)
    done = host.play("workspace_destroy", values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not disks.exists()
    record = tmp_path / f"records/{host.name}.wiped.signed.json"
    words = [
        str(SAW),
        "gpu",
        "verify",
        str(record),
        "--workspace",
        host.name,
        "--public",
        str(tmp_path / "keys/wipe.pub"),
    ]
    told = host.inside(*words).stdout
    assert "data.img: 10000 bytes overwritten, 10000 read back as zeros" in told
    assert "destroyed by playbook" in told
