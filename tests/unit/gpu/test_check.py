"""The look at a host's GPUs: quiet without one, and every fault named, kept and reported once. ``nvidia-smi`` is the far end."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from saw.cli.main import main as saw_main
from saw.edr.service import factory_of
from saw.gpu.check import FIELDS, look_at, present, read_gpus
from saw.gpu.config import GpuConfig
from saw.gpu.findings import open_store, record
from saw.gpu.modules import GpuError

pytestmark = pytest.mark.control("GPU-01")
WELL = "GPU-1, NVIDIA H100, 550.163.01, Enabled, Enabled, 0, [N/A], [N/A]"
NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
Host = Callable[..., GpuConfig]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with PCI functions (vendor, class), a loaded module or none, and an ``nvidia-smi`` that answers so."""

    def make(*functions: tuple[str, str], module: str = "550.163.01", answer: str = WELL, code: int = 0) -> GpuConfig:
        for number, (vendor, kind) in enumerate(functions):
            device = tmp_path / f"sys/bus/pci/devices/0000:0{number}:00.0"
            device.mkdir(parents=True, exist_ok=True)
            (device / "vendor").write_text(f"{vendor}\n")
            (device / "class").write_text(f"{kind}\n")
        if module:
            (tmp_path / "sys/module/nvidia").mkdir(parents=True, exist_ok=True)
            (tmp_path / "sys/module/nvidia/version").write_text(f"{module}\n")
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {code}\n")
        program.chmod(0o755)
        return GpuConfig(
            certificate="/none", state_dir=str(tmp_path / "state"), sys_dir=str(tmp_path / "sys"),
            nvidia_smi=str(program), workspace=str(tmp_path / "none.json"), syslog=str(tmp_path / "log"),
        )  # fmt: skip

    return make


def test_without_a_gpu_nothing_is_wrong_and_nothing_is_asked(host: Host) -> None:
    """A controller for audio of the same maker is no GPU."""
    config = host(("0x8086", "0x030000"), ("0x10de", "0x040300"), module="", code=9)
    state = look_at(config, NOW)
    assert (state.present, state.problems) == ((), ())


def test_a_gpu_that_is_well(host: Host) -> None:
    config = host(("0x10de", "0x030200"), ("0x10de", "0x040300"))
    assert present(Path(config.sys_dir)) == ["0000:00:00.0"]
    state = look_at(config, NOW)
    assert state.problems == ()
    (gpu,) = state.gpus
    assert (gpu.driver_version, gpu.persistence, gpu.ecc, gpu.uncorrected, gpu.retired) == (
        "550.163.01",
        True,
        True,
        0,
        None,
    )


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"module": ""}, "the kernel module nvidia is not loaded"),
        ({"module": "550.90.07"}, "driver 550.163.01 and kernel module 550.90.07 differ"),
        ({"answer": WELL.replace("Enabled, Enabled", "Disabled, Enabled")}, "persistence is off"),
        ({"answer": WELL.replace(", 0,", ", 7,")}, "7 memory errors"),
        ({"answer": WELL.replace("[N/A], [N/A]", "2, No")}, "2 pages of memory are retired"),
        ({"answer": WELL.replace("[N/A], [N/A]", "0, Yes")}, "pages wait to be retired"),
        ({"answer": ""}, "1 GPUs are on the bus and 0 answer"),
        ({"answer": "NVIDIA-SMI has failed", "code": 9}, "nvidia-smi ended with 9: NVIDIA-SMI has failed"),
    ],
)
def test_every_fault_is_named(host: Host, fault: dict[str, object], words: str) -> None:
    assert words in "\n".join(look_at(host(("0x10de", "0x030200"), **fault), NOW).problems)


@pytest.mark.parametrize(
    "answer", ["GPU-1, NVIDIA H100", WELL.replace(", 0,", ", many,"), WELL.replace("Enabled", "perhaps")]
)
def test_an_answer_of_another_form_is_refused(answer: str) -> None:
    with pytest.raises(GpuError, match="nvidia-smi told"):
        read_gpus(answer)
    assert len(read_gpus(f"{WELL}\n\n{WELL}\n")) == 2
    assert len(FIELDS) == 8


def test_a_fault_is_a_finding_once_while_it_lasts(host: Host) -> None:
    ill = host(("0x10de", "0x030200"), module="550.90.07")
    store, factory = open_store(ill), factory_of("saw-gpu")
    try:
        assert len(record(look_at(ill, NOW), ill, store, factory, NOW)) == 1
        assert record(look_at(ill, NOW), ill, store, factory, NOW) == []
        (found,) = store.newest()
        assert (found.event["class_uid"], found.event["severity"]) == (2004, "Medium")
        assert "differ" in found.event["message"]
        well = host(("0x10de", "0x030200"))
        assert record(look_at(well, NOW), well, store, factory, NOW) == []
        ill = host(("0x10de", "0x030200"), module="550.90.07")
        later = NOW.replace(hour=13)
        assert len(record(look_at(ill, later), ill, store, factory, later)) == 1
    finally:
        store.close()


def test_the_command_keeps_the_state_and_tells_the_hosts_log(
    host: Host, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    file.write_bytes(msgspec.json.encode(host(("0x10de", "0x030200"), module="550.90.07")))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.settimeout(60)
        assert saw_main(["gpu", "check", "--config", str(file), "--report", "--json"]) == 1
        assert b"gpu_unhealthy" in log.recv(65536)
    assert json.loads(capfd.readouterr().out)["problems"]
    state = json.loads((tmp_path / "state/state.json").read_text())
    assert state["module_version"] == "550.90.07"
    file.write_bytes(msgspec.json.encode(host(("0x10de", "0x030200"))))
    assert saw_main(["gpu", "check", "--config", str(file)]) == 0
    assert "GPU-1  NVIDIA H100  driver 550.163.01" in capfd.readouterr().out
    file.write_text('{"certificate": "/none", "colour": "red"}')
    assert saw_main(["gpu", "check", "--config", str(file)]) == 1
