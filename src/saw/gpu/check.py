"""A look at the GPUs of this host: driver and module of one version, persistence on, memory without known damage.

What ``nvidia-smi`` tells is read from its CSV query (``nvidia-smi --help-query-gpu`` describes the fields). A value that a device
does not have (``[N/A]``, ``[Not Supported]``) is no problem.
"""

from __future__ import annotations

import csv
import subprocess
from datetime import datetime
from pathlib import Path

import msgspec

from saw.gpu.config import GpuConfig
from saw.gpu.modules import GpuError

VENDOR = "0x10de"
GPU_CLASSES = ("0x0300", "0x0302")
"""PCI classes of a GPU: VGA and 3D controller. The same card may have functions for audio or USB besides."""
FIELDS = (
    "uuid",
    "name",
    "driver_version",
    "persistence_mode",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.double_bit.count",
    "retired_pages.pending",
)
STATE = "state.json"
_ABSENT = {"n/a", "not supported", "unknown error", ""}


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as ``nvidia-smi`` tells of it. What the device does not have is None."""

    uuid: str
    name: str
    driver_version: str
    persistence: bool | None
    ecc: bool | None
    uncorrected: int | None
    retired: int | None
    retired_pending: bool | None


class State(msgspec.Struct, frozen=True):
    """The last look, ``state.json``: PCI addresses of GPUs, what was told of them, and what is wrong. ``time`` is RFC 3339."""

    time: str
    present: tuple[str, ...]
    module_version: str
    gpus: tuple[Gpu, ...]
    problems: tuple[str, ...]


def present(sys_dir: Path = Path("/sys")) -> list[str]:
    """Return the PCI addresses of NVIDIA's GPUs below ``sys_dir``."""
    found = []
    for device in sorted((sys_dir / "bus/pci/devices").glob("*")):
        try:
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == VENDOR and kind[:6] in GPU_CLASSES:
            found.append(device.name)
    return found


def look_at(config: GpuConfig, now: datetime) -> State:
    """Look at the GPUs of this host. Without one there is nothing to be wrong."""
    time, sys_dir = now.isoformat(timespec="seconds"), Path(config.sys_dir)
    devices = present(sys_dir)
    if not devices:
        return State(time, (), "", (), ())
    problems: list[str] = []
    try:
        loaded = (sys_dir / "module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        loaded = ""
        problems.append("the kernel module nvidia is not loaded (see the kernel's log: is its signer's key enrolled?)")
    gpus: tuple[Gpu, ...] = ()
    try:
        gpus = read_gpus(query(config.nvidia_smi))
    except GpuError as error:
        problems.append(error.message)
    else:
        problems += judge(gpus, devices, loaded)
    return State(time, tuple(devices), loaded, gpus, tuple(problems))


def query(program: str) -> str:
    """Ask ``nvidia-smi``; raise :class:`GpuError` with its words (it ends with 9 where no driver or device answers)."""
    words = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        raise GpuError(f"{program} cannot be run: {error.strerror}", cure="install the package nvidia-smi") from error
    except subprocess.TimeoutExpired as error:
        raise GpuError(f"{program} did not answer within 120 s", cure="look at the kernel's log") from error
    if done.returncode:
        told = " ".join((done.stdout + done.stderr).split())[-300:]
        raise GpuError(f"nvidia-smi ended with {done.returncode}: {told}", cure="look at the kernel's log")
    return done.stdout


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Read the CSV answer; raise :class:`GpuError` for a line that has other fields than were asked for."""
    found = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if not row:
            continue
        if len(row) != len(FIELDS):
            raise GpuError(f"nvidia-smi told {len(row)} fields, asked were {len(FIELDS)}")
        uuid, name, version, *rest = (word.strip() for word in row)
        persistence, ecc, uncorrected, retired, pending = rest
        found.append(
            Gpu(uuid, name, version, _switch(persistence), _switch(ecc), _count(uncorrected), _count(retired),
                _switch(pending))
        )  # fmt: skip
    return tuple(found)


def judge(gpus: tuple[Gpu, ...], devices: list[str], loaded: str) -> list[str]:
    """Return every way in which the GPUs are not well. ``devices`` are on the bus; ``loaded`` is the module's version."""
    problems = []
    if len(gpus) != len(devices):
        problems.append(f"{len(devices)} GPUs are on the bus and {len(gpus)} answer")
    for gpu in gpus:
        if loaded and gpu.driver_version != loaded:
            problems.append(f"{gpu.uuid}: driver {gpu.driver_version} and kernel module {loaded} differ")
        if gpu.persistence is False:
            problems.append(f"{gpu.uuid}: persistence is off (systemctl status nvidia-persistenced)")
        if gpu.uncorrected:
            problems.append(f"{gpu.uuid}: {gpu.uncorrected} memory errors since the driver was loaded")
        if gpu.retired:
            problems.append(f"{gpu.uuid}: {gpu.retired} pages of memory are retired")
        if gpu.retired_pending:
            problems.append(f"{gpu.uuid}: pages wait to be retired; the GPU needs a reset")
    return problems


def _plain(word: str) -> str:
    return word.strip("[] ").lower()


def _switch(word: str) -> bool | None:
    plain = _plain(word)
    if plain in _ABSENT:
        return None
    if plain not in {"enabled", "disabled", "yes", "no"}:
        raise GpuError(f"nvidia-smi told {word!r} where a switch was asked for")
    return plain in {"enabled", "yes"}


def _count(word: str) -> int | None:
    plain = _plain(word)
    if plain in _ABSENT:
        return None
    if not plain.isdecimal():
        raise GpuError(f"nvidia-smi told {word!r} where a number was asked for")
    return int(plain)
