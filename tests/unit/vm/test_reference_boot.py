"""A reference boot touches nothing of a workspace, whatever its name, and two of them do not meet.

Real swtpm, qemu-img and locks; the emulator at the far end is a small program that prints a report on the console.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from saw.vm import accel, measure, qemu
from saw.vm.spec import VmError, VmSpec

Make = Callable[..., VmSpec]
MACHINE = """#!/bin/sh
for word; do case "$word" in *path=*/console.log) console=${{word##*path=}} ;; esac; done
{before}
printf 'SAW-BOOT-REPORT-BEGIN\\n 0 : 0x{a}\\n 15 : 0x{a}\\nSAW-BOOT-REPORT-END\\n' > "$console"
exec sleep 60
"""


@pytest.fixture
def machine(hypervisor: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install the emulator; ``before`` is what it does before it reports."""
    monkeypatch.setattr(measure, "probe", lambda *_: accel.Acceleration("tcg", "asked by the test"))

    def install(before: str = "") -> None:
        program = hypervisor / "tools/qemu-system-x86_64"
        program.write_text(MACHINE.format(before=before, a="a" * 64))
        program.chmod(0o755)

    return install


@pytest.mark.parametrize("name", ["measure", "reference-boot", "vm", "lock"])
def test_a_workspace_of_any_name_keeps_data_disk_and_vtpm(
    make_spec: Make, machine: Callable[..., None], name: str
) -> None:
    machine()
    workspace = make_spec(id=name, tpm=True)
    qemu.create(workspace)
    workspace.runtime.mkdir(parents=True)
    (workspace.runtime / "tpm.sock").touch()
    before = {path: path.read_bytes() for path in workspace.directory.rglob("*") if path.is_file()}
    answer = measure.reference_boot(Path(workspace.image), patience=30)
    assert answer["image_sha256"] == workspace.image_sha256
    assert answer["pcrs"] == {"0": "a" * 64}
    assert {path: path.read_bytes() for path in before} == before
    assert (workspace.runtime / "tpm.sock").exists()
    assert not (measure.PLACE / "vm").exists()
    assert not measure.RUNTIME_PLACE.exists()


def test_a_second_reference_boot_waits_and_is_refused_when_the_first_does_not_end(
    make_spec: Make, machine: Callable[..., None], hypervisor: Path
) -> None:
    gate = hypervisor / "gate"
    machine(f"touch {hypervisor}/begun; while [ ! -e {gate} ]; do sleep 0.05; done")
    image = Path(make_spec().image)
    answers: list[dict[str, object]] = []
    first = threading.Thread(target=lambda: answers.append(measure.reference_boot(image, patience=60)))
    first.start()
    try:
        while not (hypervisor / "begun").exists():
            assert first.is_alive()
            first.join(0.05)
        with pytest.raises(VmError, match="another reference boot runs on this hypervisor") as refused:
            measure.reference_boot(image, patience=0.3)
        assert refused.value.cure == "run this again when it has ended"
        second = threading.Thread(target=lambda: answers.append(measure.reference_boot(image, patience=60)))
        second.start()
    finally:
        gate.touch()
        first.join(60)
    second.join(60)
    assert [answer["pcrs"] for answer in answers] == [{"0": "a" * 64}] * 2
