"""The source ``qemu`` of a golden image: a virtual machine in place of a light host, and the tree out of its disk afterwards.

The machine boots the tree's own kernel with a disk that is made of the base tree, and runs an SSH server as its only process
(``machine-init.sh``). So the same roles find the same as with the source ``null``, and nothing is left of keys and boot.
What lies on its disk in the end becomes a tree again, from which the one way to make an image goes on (:mod:`saw.image.disk`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from saw.files import write_atomic, write_private
from saw.image.disk import MIB, ImageError, kernel_release, lay_out, run
from saw.image.settle import EXT4_ENVIRONMENT, space_of
from saw.image.unpack import unpack_disk
from saw.lab.nspawn import LightHost, host_key_of, login_key_of
from saw.vm.accel import probe

SOURCES = ("tree", "qemu")
"""Words for Packer's sources: a light host that serves the tree, or a virtual machine."""
VARIABLE = "SAW_IMAGE_SOURCE"
INIT = Path(__file__).with_name("machine-init.sh")
SPARE_BYTES = 2048 * MIB
"""Free space of the machine's root file system: what roles unpack and remove again."""
CONTROL_BYTES = 4 * MIB
BOUND = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What Packer runs under: processes with a namespace of their own, which end with the build, however that ends."""
MEMORY_MIB = 2048
_TASK = re.compile(rb"TASK \[([^\]]+)\]")

Say = Callable[[str], None]


class Machine(msgspec.Struct, frozen=True):
    """What Packer needs of the machine: its disk, kernel and command line, accelerator, and where it may write.

    The disk was made here a moment ago, in a folder that nobody else may read or write: Packer is not asked to hash it.
    """

    disk: Path
    kernel: Path
    command_line: str
    accelerator: str
    folder: Path

    @property
    def result(self) -> Path:
        """The disk as the roles left it."""
        return self.folder / "out" / "machine.qcow2"

    @property
    def console(self) -> Path:
        """What the machine printed."""
        return self.result.with_name("console.log")

    def variables(self) -> dict[str, object]:
        """Return the values of Packer's variables that the source ``qemu`` reads."""
        return {
            "machine_disk": self.disk, "machine_disk_checksum": "none", "machine_kernel": self.kernel,
            "machine_command_line": self.command_line, "machine_accelerator": self.accelerator,
            "machine_cpu": "host" if self.accelerator == "kvm" else "max", "machine_memory": MEMORY_MIB,
            "machine_cpus": len(os.sched_getaffinity(0)), "machine_output": self.result.parent,
        }  # fmt: skip


def source_of(word: str) -> str:
    """Return the source that ``word`` names, ``tree`` where it is empty; raise :class:`ImageError` when there is none."""
    if word and word not in SOURCES:
        raise ImageError(f"there is no source {word!r} of images", cure=f"take one of: {', '.join(SOURCES)}")
    return word or SOURCES[0]


def prepare(host: LightHost, folder: Path, accelerated: Path, say: Say) -> Machine:
    """Make the machine's disk of the tree of ``host``, which is removed then; ``accelerated`` keeps what was found out of KVM.

    Everything lies in ``folder``, which nobody else may read while keys are in it. Raises :class:`ImageError`.
    """
    folder.mkdir(mode=0o700)
    kernel = folder / "vmlinuz"
    shutil.copyfile(host.root / "boot" / f"vmlinuz-{kernel_release(host.root)}", kernel)
    found = probe(kernel, accelerated)
    say(f"  machine under {found.name}: {found.reason}{f' ({found.cure})' if found.cure else ''}")
    identity = str(uuid.uuid4())
    control, root, disk = folder / "control.img", folder / "root.img", folder / "machine.raw"
    _file_system(_control(host, folder / "control"), control, CONTROL_BYTES)
    size = -(-(space_of(host.root) * 6 // 5 + SPARE_BYTES) // MIB) * MIB
    _file_system(host.root, root, size)
    host.remove_tree()
    lay_out(disk, control, root, str(uuid.uuid4()), identity)
    shutil.rmtree(folder / "control")
    # -n: else the first mounts would note themselves below /run, on the disk
    command_line = (
        f"root=PARTUUID={identity} rw rootfstype=ext4 rootwait console=ttyS0 panic=-1 init=/bin/sh -- -c "
        '"mount -n -t devtmpfs devtmpfs /dev; mount -n -t tmpfs -o mode=0755 tmpfs /run && mkdir -m 0700 /run/saw-machine && '
        'mount -r -t ext4 /dev/nvme0n1p1 /run/saw-machine && exec /bin/sh /run/saw-machine/init"'
    )
    return Machine(disk, kernel, command_line, "kvm" if found.name == "kvm" else "tcg", folder)


def _control(host: LightHost, folder: Path) -> Path:
    """Lay out what the machine's first process reads: itself, its host key, who may log in, and the environment of commands."""
    folder.mkdir(mode=0o700)
    write_atomic(folder / "init", INIT.read_bytes())
    write_private(folder / "host", host_key_of(host.lab, host.name).read_bytes())
    write_private(folder / "login", login_key_of(host.lab).with_suffix(".pub").read_bytes())
    write_private(folder / "environment", " ".join(("SYSTEMD_OFFLINE=1", *host.environment)).encode() + b"\n")
    return folder


def _file_system(tree: Path, target: Path, size: int) -> None:
    """Make an ext4 file system without a journal: what a machine leaves that ended as it should is whole without one."""
    with target.open("wb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.truncate(size)
    run(
        "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=1",
        "-d", str(tree), str(target), env=EXT4_ENVIRONMENT,
    )  # fmt: skip


def provision(
    command: list[str], log: Path, say: Say, machine: Machine | None, *, environment: dict[str, str], folder: Path
) -> None:
    """Run Packer with ``command`` in ``folder``; its output, with times, goes to ``log``. Raises :class:`ImageError`.

    With a ``machine`` each step of the playbook is said as it begins, for one may take minutes; Packer, Ansible and the machine
    end with this process; and so does the build when the machine's kernel gave up, for whose SSH server Packer would wait.
    """
    if machine is None:
        with log.open("wb") as stream:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                check=False,
                cwd=folder,
            ).returncode
    else:
        status = _followed(
            command,
            log,
            say,
            machine,
            environment={**environment, "PACKER_CACHE_DIR": str(machine.folder)},
            folder=folder,
        )
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise ImageError(f"packer failed ({status}):\n{tail}", cure=f"read {log}")


def _followed(
    command: list[str], log: Path, say: Say, machine: Machine, *, environment: dict[str, str], folder: Path
) -> int:
    with log.open("wb") as stream:
        child = subprocess.Popen(
            [*BOUND, *command], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, cwd=folder
        )
        try:
            with log.open("rb") as told:
                while (status := child.poll()) is None:
                    _tell(told.read(), say)
                    _refuse_panic(machine)
                    time.sleep(1.0)
                _tell(told.read(), say)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return status


def _refuse_panic(machine: Machine) -> None:
    try:
        console = machine.console.read_bytes()
    except FileNotFoundError:
        return
    before, found, after = console.partition(b"Kernel panic")
    if found:
        text = (before[-400:] + found + after[:200]).decode("utf-8", "replace")
        raise ImageError(f"the machine's kernel gave up: {text}", cure="report this with the text of its console")


def _tell(text: bytes, say: Say) -> None:
    for step in _TASK.findall(text):
        say(f"    {step.decode('utf-8', 'replace').rpartition('secure_agent.workspace.')[2]}")


def take_over(disk: Path, root: Path) -> int:
    """Make ``root`` out of the machine's ``disk``; return the number of paths. See :func:`saw.image.unpack.unpack_disk`."""
    if root.exists() and any(root.iterdir()):
        raise ImageError(f"{root} is not empty", cure="build it again")
    return unpack_disk(disk, root)
