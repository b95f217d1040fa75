"""The initial file system of an image whose root is verified: what opens the root by its hash, and nothing else.

Debian's cloud kernel reaches its disk without one, but device mapper is a module, and somebody has to hand it the root hash. It
is made of the tree's own programs, so it adds no package. Format: "newc" (the kernel's documentation, driver-api/
early-userspace/buffer-format), not compressed: a compressor of another version would make another image.
"""

from __future__ import annotations

import lzma
import stat
from pathlib import Path

from saw.image.disk import ImageError, kernel_release, run
from saw.image.settle import ENVIRONMENT, EPOCH

INIT = Path(__file__).with_name("verified-init.sh")
"""Its first program."""
PROGRAMS = (
    "usr/bin/dash", "usr/bin/kmod", "usr/bin/mount", "usr/bin/od", "usr/bin/sleep", "usr/sbin/blkid", "usr/sbin/e2fsck",
    "usr/sbin/switch_root", "usr/sbin/veritysetup",
)  # fmt: skip
"""What that program calls, by paths in the tree."""
LINKS = {
    "bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin", "usr/bin/sh": "dash",
    "usr/sbin/insmod": "../bin/kmod",
}  # fmt: skip
FOLDERS = ("dev", "proc", "run", "sys", "sysroot")
MODULES = ("sha256-ssse3", "dm-verity")
"""Modules of the kernel besides what they need; one that is built in is left out. The first only makes the second faster."""


def make_initrd(root: Path, target: Path) -> None:
    """Write the archive for the one kernel of ``root``; raise :class:`ImageError` when the tree lacks a part of it."""
    content: dict[str, bytes | str | None] = {**dict.fromkeys(FOLDERS), **LINKS, "init": INIT.read_bytes()}
    for path in (*PROGRAMS, *libraries(root)):
        content[path] = inside(root, path).read_bytes()
    modules = kernel_modules(root)
    for number, module in enumerate(modules):
        raw = inside(root, module).read_bytes()
        content[f"modules/{number:02}-{Path(module).name.removesuffix('.xz')}"] = (
            lzma.decompress(raw) if module.endswith(".xz") else raw
        )
    target.write_bytes(archive(content))


def libraries(root: Path) -> list[str]:
    """Return the shared libraries and the loader that :data:`PROGRAMS` need, as paths below ``usr``."""
    found = set()
    for program in PROGRAMS:
        inside(root, program)
        for line in run("chroot", str(root), "ldd", f"/{program}", env=ENVIRONMENT).splitlines():
            name = next((word for word in line.split() if word.startswith("/")), "")
            if name:
                found.add(name.lstrip("/") if name.startswith("/usr/") else f"usr{name}")
            elif "linux-vdso" not in line and "statically" not in line:
                raise ImageError(f"/{program} of the tree cannot run: {line.strip()}", cure="mend the list of packages")
    return sorted(found)


def kernel_modules(root: Path) -> list[str]:
    """Return the modules for :data:`MODULES` by paths in the tree, each after those that it needs."""
    folder = f"usr/lib/modules/{kernel_release(root)}"
    listed = inside(root, f"{folder}/modules.dep").read_text(encoding="utf-8").splitlines()
    needs = {path: more.split() for path, _, more in (line.partition(":") for line in listed)}
    built_in = inside(root, f"{folder}/modules.builtin").read_text(encoding="utf-8").split()
    found: list[str] = []
    for name in MODULES:
        path = next((one for one in needs if Path(one).name.split(".")[0] == name), "")
        if not path and not any(Path(one).stem == name for one in built_in):
            raise ImageError(f"the kernel of the tree has no module {name}", cure="take a kernel that has dm-verity")
        for one in (*reversed(needs.get(path, [])), *([path] if path else [])):
            if f"{folder}/{one}" not in found:
                found.append(f"{folder}/{one}")
    return found


def inside(root: Path, path: str) -> Path:
    """Return the file ``path`` of the tree, links followed; raise :class:`ImageError` where none is, or one of this machine."""
    found = (root / path).resolve()
    if not found.is_file() or not found.is_relative_to(root.resolve()):
        raise ImageError(
            f"the tree has no {path}, which an image with a verified root starts with", cure="mend the list of packages"
        )
    return found


def archive(content: dict[str, bytes | str | None]) -> bytes:
    """Return an archive of files (their bytes), symbolic links (their target) and folders (None), by path.

    Folders above them are added. Everything belongs to root, may be run, and has the one time of images.
    """
    above = {str(parent) for path in content for parent in Path(path).parents if str(parent) != "."}
    whole = bytearray()
    for number, (path, what) in enumerate(sorted({**dict.fromkeys(above), **content}.items()), 1):
        if what is None:
            whole += _member(path, number, stat.S_IFDIR | 0o755, b"")
        elif isinstance(what, str):
            whole += _member(path, number, stat.S_IFLNK | 0o777, what.encode())
        else:
            whole += _member(path, number, stat.S_IFREG | 0o755, what)
    whole += _member("TRAILER!!!", 0, 0, b"")
    return bytes(whole).ljust(-(-len(whole) // 512) * 512, b"\0")


def _member(path: str, number: int, mode: int, content: bytes) -> bytes:
    links = 2 if stat.S_ISDIR(mode) else 1
    name = path.encode() + b"\0"
    numbers = (number, mode, 0, 0, links, EPOCH if mode else 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % one for one in numbers) + name
    return head.ljust(-(-len(head) // 4) * 4, b"\0") + content.ljust(-(-len(content) // 4) * 4, b"\0")
