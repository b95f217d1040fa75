"""Bills of materials of a golden image, made by kept tools while its tree is still there.

    sbom/debian.cdx.json  sbom/debian.spdx.json   every Debian package of the tree (debsbom, from dpkg's database)
    sbom/python.cdx.json                          every wheel of /opt/saw (cyclonedx-py)
    sbom/npm.cdx.json     sbom/npm.spdx.json      the MCP servers and what they need (npm sbom)

Formats: CycloneDX (ECMA-424) and SPDX (ISO/IEC 5962). Equal inputs give equal bytes: moment and serial number, which tools
make up anew each time, are set to the build's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from saw.files import write_atomic
from saw.image.disk import ImageError, digest_of, run
from saw.image.settle import MOMENT

NAMESPACE = "urn:saw:image"


@dataclass(frozen=True)
class Sources:
    """What an image is made of: its root tree, the wheels of ``/opt/saw``, and the MCP servers' lock file and tree."""

    root: Path
    wheels: Path
    servers: Path


def make_sboms(sources: Sources, target: Path, *, name: str, seed: str) -> dict[str, str]:
    """Write the bills of image ``name`` below ``target``/sbom; return path relative to ``target`` → SHA-256 (hex).

    ``seed`` is the digest of the build's inputs; serial numbers derive from it. Raises :class:`ImageError` when a tool fails or
    finds nothing.
    """
    folder = target / "sbom"
    folder.mkdir(parents=True, exist_ok=True)
    serials = {kind: str(uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/sbom/{kind}")) for kind in ("debian", "python", "npm")}
    _debian(sources.root, folder, name, serials["debian"])
    _python(sources.wheels, folder / "python.cdx.json", serials["python"])
    for kind, file in (("cyclonedx", "npm.cdx.json"), ("spdx", "npm.spdx.json")):
        _npm(sources.servers, folder / file, kind, serials["npm"])
    for path in folder.glob("*.json"):
        if not components(path):
            raise ImageError(f"{path.name} names no component", cure="look at the tree that the image is made of")
    return {f"sbom/{path.name}": digest_of(path) for path in sorted(folder.glob("*.json"))}


def components(path: Path) -> list[tuple[str, str]]:
    """Return name and version of everything that a bill (CycloneDX or SPDX, JSON) lists."""
    bill = json.loads(path.read_bytes())
    if "components" in bill:
        return [(one["name"], one.get("version", "")) for one in bill["components"]]
    return [(one["name"], one.get("versionInfo", "")) for one in bill.get("packages", ())]


def tool(name: str) -> str:
    """Return a tool of the group ``image`` next to this interpreter, or the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ImageError(
            f"{name} is not installed", cure="run `make workspace`, which installs it into the environment"
        )
    return found


def _debian(root: Path, folder: Path, name: str, serial: str) -> None:
    # It warns of every source package whose maintainer dpkg does not know, which is normal.
    run(
        tool("debsbom"), "generate", "--root", str(root), "--distro-name", name, "--distro-arch", "amd64",
        "--timestamp", MOMENT, "--validate",
        "--cdx-serialnumber", serial, "--spdx-namespace", f"{NAMESPACE}:{serial}", "-t", "cdx", "-t", "spdx",
        "--out", str(folder / "debian"),
        env={"PYTHONHASHSEED": "0"},  # it goes through sets, and their order is part of the bill
    )  # fmt: skip


def _python(wheels: Path, output: Path, serial: str) -> None:
    """The wheels themselves, not the list that was asked for: that names hashes of other platforms and markers, too."""
    from packaging.utils import canonicalize_name  # hosts, which make no images, lack it

    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        project, version = wheel.name.split("-")[:2]
        lines.append(f"{canonicalize_name(project)}=={version} --hash=sha256:{digest_of(wheel)}\n")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=output.parent) as listing:
        listing.writelines(lines)
        listing.flush()
        run(
            tool("cyclonedx-py"), "requirements", listing.name, "--output-reproducible", "--output-format", "JSON",
            "--output-file", str(output),
        )  # fmt: skip
    _settle(output, {"serialNumber": f"urn:uuid:{serial}"})


def _npm(servers: Path, output: Path, kind: str, serial: str) -> None:
    environment = {**os.environ, "NO_UPDATE_NOTIFIER": "1"}
    done = subprocess.run(
        ["npm", "sbom", "--sbom-format", kind],
        cwd=servers,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ImageError(f"`npm sbom` failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    write_atomic(output, done.stdout)
    if kind == "spdx":
        _settle(output, {"documentNamespace": f"{NAMESPACE}:{serial}"}, ("creationInfo", "created"))
    else:
        _settle(output, {"serialNumber": f"urn:uuid:{serial}"}, ("metadata", "timestamp"))


def _settle(path: Path, values: dict[str, str], moment: tuple[str, str] | None = None) -> None:
    """Set what a tool makes up anew each time, and write the bill in one order of its keys."""
    bill = json.loads(path.read_bytes())
    bill.update(values)
    if moment:
        bill[moment[0]][moment[1]] = MOMENT
    write_atomic(path, json.dumps(bill, indent=1, sort_keys=True) + "\n")
