"""Role gpu_driver: what DKMS and systemd are told, the patch, and the module that builds; refusals name their cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.secure_agent.workspace.plugins.modules import gpu_modules

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/gpu_driver"
pytestmark = pytest.mark.control("GPU-01")


def render(name: str, **variables: object) -> str:
    values = {
        **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
    }
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name).render({**values, "ansible_managed": "by a test", **variables}) + "\n"


def sourced(file: Path, expression: str, **environment: str) -> str:
    """What bash, which DKMS is written in, makes of a configuration file."""
    words = ["bash", "-c", f'. "$1"; printf %s "{expression}"', "bash", str(file)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout


def test_dkms_signs_with_the_key_that_it_is_given_and_never_with_one_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "50.conf"
    file.write_text(render("dkms-framework.conf.j2"))
    given = {"SAW_MODULE_KEY": "/proc/1/fd/3", "SAW_MODULE_CERTIFICATE": "/proc/1/fd/4"}
    assert sourced(file, "$mok_signing_key $mok_certificate", **given) == "/proc/1/fd/3 /proc/1/fd/4"
    for path in sourced(file, "$mok_signing_key $mok_certificate").split():
        assert not Path(path).parent.exists(), "DKMS could make a key there"


def test_dkms_is_told_of_the_one_patch(tmp_path: Path) -> None:
    file = tmp_path / "patch.conf"
    file.write_text(render("dkms-patch.conf.j2"))
    assert (ROLE / "files" / sourced(file, "${PATCH[0]}")).is_file()
    assert sourced(file, "${#PATCH[@]}") == "1"


def test_the_patch_changes_the_one_call(tmp_path: Path) -> None:
    """It is applied to lines as they stand in the driver's source around the two places."""
    file = tmp_path / "nvidia/nv-pci.c"
    file.parent.mkdir()
    head, call = (
        ["\n", "#if defined(NV_VGPU_KVM_BUILD)\n"],
        "    r = pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size);\n",
    )
    around = ["    /* Attempt to resize BAR1 to the largest supported size */\n", call, "\n"]
    lines = ["// a\n"] * 29 + head + ["// b\n"] * 204 + around
    file.write_text("".join(lines))
    words = ["git", "apply", "--unidiff-zero", str(ROLE / "files/pci-resize-resource.patch")]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(words, cwd=tmp_path, check=True, env=environment)
    text = file.read_text()
    assert "    r = saw_resize_bar(pci_dev, NV_GPU_BAR1, requested_size);\n" in text
    assert call not in text
    assert "requested_size" not in text.partition("/* Attempt")[0]
    again = subprocess.run(words, cwd=tmp_path, check=False, env=environment, capture_output=True)
    assert again.returncode != 0, "a source that makes the call itself takes no patch"


@pytest.mark.parametrize("name", ["saw-gpu-check.service.j2", "persistenced.conf.j2"])
@pytest.mark.parametrize(("vendor", "skipped"), [("0x10de", False), ("0x8086", True), (None, True)])
def test_units_are_skipped_without_a_device_of_the_maker(
    tmp_path: Path, name: str, vendor: str | None, skipped: bool
) -> None:
    lines = render(name).splitlines()
    (condition,) = [line for line in lines if line.startswith("ExecCondition=")]
    good = {int(line.partition("=")[2]) for line in lines if line.startswith("SuccessExitStatus=")}
    devices = tmp_path / "devices"
    (devices / "0000:00:00.0").mkdir(parents=True)
    if vendor:
        (devices / "0000:00:00.0/vendor").write_text(f"{vendor}\n")
    script = condition.partition("-c ")[2].strip("'").replace("/sys/bus/pci/devices", str(devices))
    done = subprocess.run(["/bin/sh", "-c", script], check=False)
    # What SuccessExitStatus= lists counts as success of a condition, too, and the unit would run.
    assert (1 <= done.returncode <= 254 and done.returncode not in good) is skipped


def test_the_driver_gives_its_nodes_to_one_group_and_nouveau_never_loads() -> None:
    lines = render("modprobe.conf.j2", gpu_driver_gid="2000").splitlines()
    assert {"blacklist nouveau", "install nouveau /bin/false"} <= set(lines)
    (options,) = [line for line in lines if line.startswith("options ")]
    assert options.split()[1] == "nvidia-current-open"
    assert {"NVreg_DeviceFileGID=2000", "NVreg_DeviceFileMode=0660"} <= set(options.split())


def test_packages_of_role_and_image_are_the_same() -> None:
    values = {
        **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
    }
    lines = (ROOT / "packer/packages/gpu.txt").read_text().splitlines()
    image = {line for line in lines if line and not line.startswith("#")}
    assert image == {*values["gpu_driver_packages"], values["gpu_driver_headers_package"]}


# --- module ------------------------------------------------------------------------------------------------------------------


def test_on_a_host_without_a_driver_check_mode_says_so_and_a_build_is_refused(tmp_path: Path, run_module: Any) -> None:
    certificate = tmp_path / "modules.pem"
    subprocess.run(
        ["openssl", "req", "-new", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=Example modules", "-keyout",
         str(tmp_path / "modules.key"), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    program = Path(sys.executable).with_name("saw")
    given = {"certificate": str(certificate), "key": (tmp_path / "modules.key").read_text(), "program": str(program)}
    looked = run_module(gpu_modules, check=True, **given)
    assert (looked.failed, looked["changed"]) == (False, True)
    assert "there is no source of nvidia-current-open" in looked["problems"][0]
    refused = run_module(gpu_modules, **given)
    assert refused.failed
    assert refused["failure"]["code"] == "gpu_failed"
    assert "install nvidia-open-kernel-dkms" in refused["msg"]
    assert "PRIVATE KEY" not in str(refused)


def test_modules_that_are_right_are_left_alone_and_others_get_the_key_on_standard_input(
    tmp_path: Path, run_module: Any
) -> None:
    program, log = tmp_path / "saw", tmp_path / "log"
    built, right = '{"ok":true,"changed":true}', '{"ok":true,"problems":[]}'
    wrong = '{"ok":false,"problems":["nvidia is missing"]}'
    program.write_text(
        f"#!/bin/sh\ncd {tmp_path}\necho $* >>log\nif [ $2 = build ]; then cat >given; echo '{built}'\n"
        f"elif [ -e right ]; then echo '{right}'\nelse echo '{wrong}'\nfi\n"
    )
    program.chmod(0o755)
    given = {"certificate": "/c.pem", "key": "the key", "program": str(program)}
    done = run_module(gpu_modules, **given)
    assert (done["changed"], done["problems"], (tmp_path / "given").read_text()) == (
        True,
        ["nvidia is missing"],
        "the key\n",
    )
    (tmp_path / "right").touch()
    assert run_module(gpu_modules, **given)["changed"] is False
    calls = [line.split()[1] for line in log.read_text().splitlines()]
    assert calls == ["driver", "build", "driver"]
    assert "the key" not in log.read_text()


def test_the_role_refuses_a_key_that_is_not_there(tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text(
        "- hosts: localhost\n  connection: local\n  gather_facts: false\n  roles: [secure_agent.workspace.gpu_driver]\n"
    )
    place = tmp_path / "collections/ansible_collections/secure_agent"
    place.mkdir(parents=True)
    (place / "workspace").symlink_to(ROOT)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "--check", str(play),
         "-e", f"ansible_python_interpreter={sys.executable}", "-e", f"gpu_driver_module_key={tmp_path}/none.key",
         "-e", f"gpu_driver_module_certificate={play}"],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"), "ANSIBLE_HOME": str(tmp_path / "home"),
             "ANSIBLE_FORCE_COLOR": "0"},
    )  # fmt: skip
    told = " ".join(done.stdout.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/none.key is no file on the controller" in told
    assert f"{play} is no file" not in told
