"""A VM has its image's owner's variables and the firmware that enforces them, or neither; a mix of both does not start.

No firmware runs here (tests/integration/vm does that): the emulator at the far end is a small program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from saw.vm import accel, measure, qemu, secure_boot
from saw.vm.spec import VmError, VmSpec

pytestmark = pytest.mark.control("IMG-01")
Make = Callable[..., VmSpec]
MACHINE = """#!/bin/sh
for word; do case "$word" in *path=*/console.log) console=${{word##*path=}} ;; esac; done
echo "$*" > {log}
printf '{report}' > "$console"
{end}
"""
PCR = " 0 : 0x" + "a" * 64


@pytest.fixture(autouse=True)
def firmware(hypervisor: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = hypervisor / "secboot.fd"
    path.touch()
    monkeypatch.setattr(secure_boot, "FIRMWARE", path)
    return path


def signed(spec: VmSpec, content: bytes = b"owner's keys") -> Path:
    """Put a variable store beside the image."""
    store = Path(spec.image).with_name(secure_boot.TEMPLATE)
    store.write_bytes(content)
    return store


def words(spec: VmSpec) -> str:
    spec.runtime.mkdir(parents=True, exist_ok=True)
    return " ".join(qemu.command_line(spec, "tcg"))


def test_an_image_without_its_owners_store_boots_as_ever(make_spec: Make) -> None:
    spec = make_spec(network=False, tpm=True)
    qemu.create(spec)
    qemu.startable(spec)
    line = words(spec)
    assert "q35,smm=off,vmport=off" in line
    assert f"readonly=on,file={qemu.FIRMWARE}" in line
    assert "cfi.pflash01" not in line
    assert str(secure_boot.FIRMWARE) not in line
    assert (spec.directory / "vars.fd").read_bytes() == b"factory"
    assert qemu.status(spec)["secure_boot"] is False


def test_a_vm_gets_a_copy_of_its_own_and_the_firmware_that_enforces_it(make_spec: Make, firmware: Path) -> None:
    spec = make_spec(network=False, tpm=True)
    store = signed(spec)
    assert qemu.create(spec)["changed"]
    qemu.startable(spec)
    line = words(spec)
    assert "q35,smm=on,vmport=off" in line
    assert f"unit=0,readonly=on,file={firmware}" in line
    assert f"unit=1,file={spec.directory}/vars.fd" in line
    assert "-global driver=cfi.pflash01,property=secure,value=on -global ICH9-LPC.disable_s3=1" in line
    variables = spec.directory / "vars.fd"
    assert variables.read_bytes() == store.read_bytes()
    assert variables.stat().st_mode & 0o777 == 0o600
    assert secure_boot.origin(spec) == hashlib.sha256(store.read_bytes()).hexdigest()
    assert qemu.status(spec)["secure_boot"] is True
    variables.write_bytes(b"owner's keys, and what the firmware noted")
    assert qemu.create(spec)["changed"] is False
    assert variables.read_bytes() == b"owner's keys, and what the firmware noted"


@pytest.mark.parametrize("then", [b"other keys", None], ids=["changed", "gone"])
def test_another_store_or_none_starts_nothing_until_the_vm_is_made_of_it(make_spec: Make, then: bytes | None) -> None:
    spec = make_spec(network=False, tpm=True)
    store = signed(spec)
    qemu.create(spec)
    qemu.startable(spec)
    if then is None:
        store.unlink()
    else:
        store.write_bytes(then)
    with pytest.raises(VmError, match="are not those that lie beside its image"):
        qemu.startable(spec)
    assert qemu.create(spec)["changed"]
    qemu.startable(spec)
    assert (spec.directory / "vars.fd").read_bytes() == (then or b"factory")
    assert ("smm=on" in words(spec)) is (then is not None)


def test_a_store_that_appears_beside_the_image_starts_nothing_either(make_spec: Make) -> None:
    spec = make_spec(network=False, tpm=True)
    qemu.create(spec)
    signed(spec)
    with pytest.raises(VmError, match="are not those that lie beside its image"):
        qemu.startable(spec)


def test_a_creation_that_was_cut_off_between_store_and_mark_goes_on(make_spec: Make) -> None:
    spec = make_spec(network=False, tpm=True)
    signed(spec)
    qemu.create(spec)
    (spec.directory / secure_boot.MARKER).unlink()
    with pytest.raises(VmError, match="are not those"):
        qemu.startable(spec)
    assert qemu.create(spec)["changed"]
    qemu.startable(spec)


def test_a_rebuild_begins_with_the_owners_store_again(make_spec: Make) -> None:
    spec = make_spec(network=False, tpm=True)
    signed(spec)
    qemu.create(spec)
    (spec.directory / "vars.fd").write_bytes(b"what the old system left")
    qemu.rebuild(spec)
    assert (spec.directory / "vars.fd").read_bytes() == b"owner's keys"
    assert secure_boot.origin(spec)


def test_a_hypervisor_without_that_firmware_says_so(make_spec: Make, firmware: Path) -> None:
    spec = make_spec(network=False, tpm=True)
    signed(spec)
    qemu.create(spec)
    firmware.unlink()
    with pytest.raises(VmError, match="is not on this hypervisor") as refused:
        qemu.startable(spec)
    assert refused.value.cure == "install the package ovmf"


REPORT = "SAW-BOOT-REPORT-BEGIN\\n" + PCR + "\\nSecureBoot: {}\\nSAW-BOOT-REPORT-END\\n"
STAYS = "exec sleep 60"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("boot", "words"),
    [
        ((REPORT.format(1), STAYS), ""),
        ((REPORT.format(0), STAYS), "does not see secure boot"),
        (("SecureBoot: 1\\n" + REPORT.format(""), STAYS), "does not see secure boot"),
        (("BdsDxe: failed to load Boot0001: Access Denied\\n", "exit 1"), "the firmware refuses the image"),
        (("BdsDxe: starting Boot0001\\n", "exit 1"), "did not report its boot measurements"),
    ],
    ids=["seen", "off", "said elsewhere", "refused", "silent"],
)
def test_a_reference_boot_with_the_owners_keys_counts_when_the_system_saw_them(
    make_spec: Make, hypervisor: Path, monkeypatch: pytest.MonkeyPatch, boot: tuple[str, str], words: str
) -> None:
    monkeypatch.setattr(measure, "probe", lambda *_: accel.Acceleration("tcg", "asked by the test"))
    program, log = hypervisor / "tools/qemu-system-x86_64", hypervisor / "argv"
    program.write_text(MACHINE.format(log=log, report=boot[0], end=boot[1]))
    program.chmod(0o755)
    spec = make_spec()
    signed(spec)
    if words:
        with pytest.raises(VmError, match=words):
            measure.reference_boot(Path(spec.image), patience=60)
    else:
        answer = measure.reference_boot(Path(spec.image), patience=60)
        assert answer["secure_boot"] is True
        assert answer["pcrs"] == {"0": "a" * 64}
    assert "smm=on" in log.read_text()
    assert not (measure.PLACE / "vm").exists()


def test_a_reference_boot_without_them_says_so(
    make_spec: Make, hypervisor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "probe", lambda *_: accel.Acceleration("tcg", "asked by the test"))
    program = hypervisor / "tools/qemu-system-x86_64"
    program.write_text(MACHINE.format(log="/dev/null", report=REPORT.format(0), end=STAYS))
    program.chmod(0o755)
    answer = measure.reference_boot(Path(make_spec().image), patience=60)
    assert answer["secure_boot"] is False
