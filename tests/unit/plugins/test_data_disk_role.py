"""The role's generator: /home is the encrypted volume where the machine was told so, and nothing changes anywhere else."""

from __future__ import annotations

import configparser
import json
import subprocess
from pathlib import Path

import jinja2
import msgspec
import pytest
import yaml

from saw.datadisk.config import CREDENTIAL, DataDiskConfig

ROLE = Path(__file__).resolve().parents[3] / "roles/data_disk"
DEFAULTS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())


def rendered(name: str, **changes: object) -> str:
    """Render a template of the role as Ansible does, as far as its templates need that."""
    environment = jinja2.Environment(  # noqa: S701 - units and scripts, no pages
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["to_nice_json"] = lambda value, **_: json.dumps(value, indent=4)
    source = (ROLE / "templates" / name).read_text()
    return environment.from_string(source).render({**DEFAULTS, "ansible_managed": "managed", **changes})


def generated(place: Path, *, told: bool, key: str = "") -> list[str]:
    """Run the generator as systemd does; return what lies in the folder of its early units."""
    credential = place / "credential"
    if told:
        credential.write_text("{}")
    early = place / "early"
    for folder in ("normal", "early", "late"):
        (place / folder).mkdir()
    script = rendered("generator.sh.j2", data_disk_recovery_key=key)
    assert f"/run/credentials/@system/{CREDENTIAL}" in script or key
    script = script.replace(f"/run/credentials/@system/{CREDENTIAL}", str(credential))
    subprocess.run(
        ["sh", "-s", *(str(place / name) for name in ("normal", "early", "late"))], input=script, text=True, check=True
    )
    assert not [*(place / "normal").iterdir(), *(place / "late").iterdir()]
    return sorted(str(path.relative_to(early)) for path in early.rglob("*") if not path.is_dir() or path.is_symlink())


def test_without_the_credential_nothing_is_generated(tmp_path: Path) -> None:
    assert generated(tmp_path, told=False) == []


@pytest.mark.parametrize(("told", "key"), [(True, ""), (False, "-----BEGIN PUBLIC KEY-----")])
def test_with_it_home_is_the_volume_and_waits_for_its_opening(tmp_path: Path, told: bool, key: str) -> None:
    assert generated(tmp_path, told=told, key=key) == [
        r"dev-mapper-saw\x2dhome.device.d/50-saw.conf", "home.mount", "local-fs.target.requires/home.mount",
    ]  # fmt: skip
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(tmp_path / "early/home.mount")
    assert dict(unit["Mount"]) == {
        "What": "/dev/mapper/saw-home", "Where": "/home", "Type": "ext4", "Options": "nosuid,nodev,noatime",
    }  # fmt: skip
    assert unit["Unit"]["Requires"] == "saw-data-disk.service"
    assert "saw-data-disk.service" in unit["Unit"]["After"].split()
    assert "local-fs.target" in unit["Unit"]["Before"].split()
    assert (tmp_path / "early/local-fs.target.requires/home.mount").resolve() == tmp_path / "early/home.mount"


def test_the_roles_defaults_make_a_configuration_that_counts() -> None:
    found = msgspec.json.decode(rendered("data-disk.json.j2"), type=DataDiskConfig)
    assert found == DataDiskConfig("/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_data")
    assert (found.pcrs, found.secure_boot, found.trim) == ((7,), "required", True)


def test_the_unit_gets_the_credentials_and_leaves_no_core() -> None:
    text = rendered("saw-data-disk.service.j2")
    assert {"ImportCredential=saw.data-disk", "ImportCredential=saw.data-disk.recovery", "LimitCORE=0"} <= set(
        text.splitlines()
    )
    assert "RuntimeDirectoryMode=0700" in text
