"""Open the data disk of this machine with its TPM; make it a volume first, when it is a blank disk.

Who calls what: ``cryptsetup`` makes the volume, ``systemd-cryptenroll`` seals a key of its own making to the TPM, and
``systemd-cryptsetup`` opens the volume with it. No key is in an argument list, in the environment or in a log: programs read the
recovery key from standard input, or from a file in a private folder in memory where they can read nothing else.

A volume gets its final label last. So a disk whose making was cut off is known by its label, was never mounted, and is made anew.
Cut off before its first header is on the disk, it has no label yet: it holds bytes of which nothing is known, and is refused from
then on. Nothing is lost there; the cure is another blank disk (docs/data-disk.md).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from saw.datadisk import recovery
from saw.datadisk.config import DataDiskConfig
from saw.datadisk.errors import DataDiskError, DataDiskLocked, DataDiskRefused
from saw.files import write_private

NAME = "saw-home"
"""Label of the volume and of the file system in it, and the name under which it is opened."""
UNFINISHED = "saw-home-unfinished"
"""Label of a volume while it is made."""
EFI_SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
RUNTIME = Path("/run/saw-data-disk")
INTERNAL = "/usr/lib/systemd"
"""Where systemd-cryptsetup lies in releases of systemd that count it among their internal programs."""
_PIECE = 4 * 1024 * 1024
_RECOVER = "playbook data_disk_recover opens it with the recovery key (docs/data-disk.md)"

State = Literal["blank", "unfinished", "ours"]


class Opened(msgspec.Struct, frozen=True):
    """What was done: ``made`` a volume of a blank disk, and how it was opened (``nothing``: it was open)."""

    changed: bool
    device: str
    made: bool
    opened_by: Literal["tpm", "recovery", "nothing"]


def open_disk(config: DataDiskConfig, once: str = "", *, mapper: Path = Path("/dev/mapper")) -> Opened:
    """Open the data disk as ``/dev/mapper/saw-home``, its file system checked; ``once`` is a recovery key for this start.

    Raises :class:`DataDiskRefused` for a disk with something else on it, which stays as it is; :class:`DataDiskLocked` when this
    machine's TPM does not open it; :class:`DataDiskError` otherwise. Nothing is left open then.
    """
    if (mapper / NAME).exists():
        return Opened(False, config.device, False, "nothing")
    run("udevadm", "wait", f"--timeout={config.patience_s}", "--initialized=true", config.device)
    refuse_without_secure_boot(config)
    state = state_of(Path(config.device))
    how: Literal["tpm", "recovery"] = "tpm"
    if state == "ours":
        how = _open(config, once)
        check(mapper / NAME)
    else:
        make(config, mapper)
    return Opened(True, config.device, state != "ours", how)


def state_of(device: Path) -> State:
    """Tell what ``device`` is; raise :class:`DataDiskRefused` for a disk that holds something which is not ours."""
    done = _call("blkid", "-p", "-o", "export", str(device))
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines() if "=" in line)
    if done.returncode == 2 and not said:
        if not blank(device):
            raise DataDiskRefused(
                f"{device} is not blank: there are bytes on it of which nothing is known",
                cure="look what they are; for a disk that may be formatted: see docs/data-disk.md",
            )
        return "blank"
    if done.returncode == 0 and said.get("TYPE") == "crypto_LUKS" and said.get("VERSION") == "2":
        if said.get("LABEL") == NAME:
            return "ours"
        if said.get("LABEL") == UNFINISHED:
            return "unfinished"
    found = said.get("TYPE") or said.get("PTTYPE") or "more than one thing, or nothing that can be read"
    label = f" labelled {said['LABEL']!r}" if said.get("LABEL") else ""
    raise DataDiskRefused(
        f"{device} holds {found}{label} and is not formatted over",
        cure="attach the right disk, or a blank one; copy what is on this one away first (docs/data-disk.md)",
        details={"device": str(device), "found": found},
    )


def blank(device: Path) -> bool:
    """Tell whether every byte of ``device`` is a zero; holes that it names are not read, and the first other byte ends it.

    A volume whose header was lost has data behind zeros, and a person may still have a copy of the header.
    """
    with device.open("rb", buffering=0) as stream:
        file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        at, size = 0, stream.seek(0, os.SEEK_END)
        while at < size:
            try:
                at = stream.seek(at, os.SEEK_DATA)
            except OSError as error:
                if file and error.errno == errno.ENXIO:
                    return True  # a hole up to the end
                stream.seek(at)
            piece = stream.read(min(_PIECE, size - at))
            if not piece or piece != bytes(len(piece)):
                return False
            at += len(piece)
    return True


def refuse_without_secure_boot(config: DataDiskConfig) -> None:
    """Raise :class:`DataDiskLocked` when secure boot has to be on and is not: registers would say little about what runs."""
    if config.secure_boot == "any":
        return
    try:
        on = EFI_SECURE_BOOT.read_bytes()[4:5] == b"\x01"
    except OSError:
        on = False
    if not on:
        raise DataDiskLocked(
            "secure boot is off, and the key of the data disk is only for what the owner signed",
            cure="run an image with the owner's keys (docs/images.md), or set data_disk_secure_boot to any",
        )


def make(config: DataDiskConfig, mapper: Path) -> None:
    """Make a volume of the disk, with a recovery key for the operator and a key sealed to the TPM, and leave it open."""
    device, key, name = config.device, secrets.token_hex(32), str(uuid.uuid4())
    token = recovery.seal(key, name, config.recovery_key)
    run(
        "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", name, "--label", UNFINISHED,
        "--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256", "--pbkdf", "pbkdf2",
        "--pbkdf-force-iterations", "1000", "--key-file", "-", device, stdin=key,
    )  # fmt: skip
    run("cryptsetup", "token", "import", "--json-file", "-", device, stdin=msgspec.json.encode(token).decode())
    enrol(config, key)
    _attach(config)
    try:
        run(
            "mkfs.ext4", "-q", "-L", NAME, "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(mapper / NAME)
        )
        run("cryptsetup", "config", device, "--label", NAME)
    except DataDiskError:
        close()
        raise


def enrol(config: DataDiskConfig, key: str) -> None:
    """Seal a fresh key to the TPM and to its present registers, with ``key`` as the authority."""
    registers = "+".join(str(one) for one in sorted(config.pcrs))
    with _key_file(key) as file:
        run(
            "systemd-cryptenroll", f"--unlock-key-file={file}", "--tpm2-device=auto", f"--tpm2-pcrs={registers}",
            config.device,
        )  # fmt: skip


def check(volume: Path) -> None:
    """Have fsck mend the file system in ``volume``; raise :class:`DataDiskError` for what it leaves to a person."""
    done = _call("fsck.ext4", "-p", str(volume))
    if done.returncode & ~3:
        close()
        raise DataDiskError(
            f"the file system of the data disk needs a person: {(done.stdout + done.stderr).strip()[-300:]}",
            cure="open a copy of the disk with the recovery key and run fsck.ext4 on it (docs/data-disk.md)",
        )


def close() -> None:
    """Close the volume; nothing happens when it is not open."""
    _call("systemd-cryptsetup", "detach", NAME)


def _open(config: DataDiskConfig, once: str) -> Literal["tpm", "recovery"]:
    try:
        _attach(config)
    except DataDiskError as error:
        if not once:
            raise DataDiskLocked(
                f"the TPM of this machine does not open the data disk: {error.message}", cure=_RECOVER
            ) from error
        try:
            run(
                "cryptsetup",
                "open",
                "--type",
                "luks2",
                *_trim(config),
                "--key-file",
                "-",
                config.device,
                NAME,
                stdin=once,
            )
        except DataDiskError as failed:
            raise DataDiskLocked(
                "the recovery key does not open this data disk", cure="read the escrow again"
            ) from failed
        try:
            # For the same registers systemd-cryptenroll keeps what another TPM holds, and would do nothing.
            run("systemd-cryptenroll", "--wipe-slot=tpm2", config.device)
            enrol(config, once)
        except DataDiskError:
            close()
            raise
        return "recovery"
    return "tpm"


def _attach(config: DataDiskConfig) -> None:
    options = ["tpm2-device=auto", "headless=true", "tries=1", *(["discard"] if config.trim else [])]
    run("systemd-cryptsetup", "attach", NAME, config.device, "-", ",".join(options))


def _trim(config: DataDiskConfig) -> list[str]:
    return ["--allow-discards"] if config.trim else []


@contextmanager
def _key_file(key: str) -> Iterator[Path]:
    """Lay ``key`` into a file (0600) in a private folder of the memory file system while a program reads it."""
    with tempfile.TemporaryDirectory(prefix=".key-", dir=RUNTIME) as folder:
        file = Path(folder, "key")
        write_private(file, key)
        yield file


def run(*argv: str, stdin: str = "") -> str:
    """Run a program; raise :class:`DataDiskError` with the end of its error output."""
    done = _call(*argv, stdin=stdin)
    if done.returncode:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines())[-400:]
        raise DataDiskError(f"`{argv[0]} {argv[1]}` failed ({done.returncode}): {said}")
    return done.stdout


def _call(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=_environment())
    except FileNotFoundError as error:
        raise DataDiskError(f"{argv[0]} is not installed", cure="apply the role data_disk to this machine") from error


def _environment() -> dict[str, str]:
    """Names of programs and nothing else: ``PASSWORD`` and the like would be keys to systemd-cryptenroll."""
    return {"PATH": f"{os.environ.get('PATH', '/usr/sbin:/usr/bin:/sbin:/bin')}:{INTERNAL}", "LC_ALL": "C"}
