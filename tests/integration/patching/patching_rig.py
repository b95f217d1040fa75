"""One host in a folder: apt, dpkg and unattended-upgrades are the machine's own, their state and their sources are scratch.

The root of the machine is bound read-only; only the places that apt, dpkg and ``saw patch`` write are there anew. The sources
are local repositories of packages that are made here, signed with a key that is made here.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec

sys.path.append(str(Path(__file__).resolve().parents[1] / "edr"))

from edr_rig import LogSocket

from saw.audit import validate
from saw.edr.store import Found
from saw.patching.config import PatchConfig, read_config
from saw.patching.findings import open_store

BOUND_S = 240.0
SECURITY = {"Origin": "Debian", "Label": "Debian-Security", "Suite": "stable-security", "Codename": "trixie-security"}
MAIN = {"Origin": "Debian", "Label": "Debian", "Suite": "stable", "Codename": "trixie"}
ACME = {"Origin": "Acme", "Label": "Acme", "Suite": "stable", "Codename": "trixie"}
PACKAGED = Path("/etc/apt/apt.conf.d/50unattended-upgrades")
TEMPLATES = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
    loader=jinja2.FileSystemLoader(Path(__file__).resolve().parents[3] / "roles/patching/templates"),
    trim_blocks=True, undefined=jinja2.StrictUndefined,
)  # fmt: skip
LISTED = {"origin": "Debian", "codename": "${distro_codename}-security", "label": "Debian-Security"}


def made(command: list[str], **options: Any) -> str:
    """Run a program that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False, **options)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


class Signer:
    """A key of its own, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        self._gpg = [
            "gpg",
            "--homedir",
            str(folder),
            "--batch",
            "--quiet",
            "--no-tty",
            "--passphrase",
            "",
            "--pinentry-mode",
            "loopback",
        ]
        made([*self._gpg, "--quick-generate-key", "archive@example.com", "ed25519", "sign", "never"])
        self.public = made([*self._gpg, "--armor", "--export"])

    def clearsign(self, text: str) -> str:
        """Sign a Release file."""
        return made([*self._gpg, "--clearsign", "--output", "-"], input=text)

    def close(self) -> None:
        """End gpg's agent."""
        made(["gpgconf", "--homedir", str(self.folder), "--kill", "all"])


class Repository:
    """A local repository; ``told`` are the fields of its Release file. Without a signer it is not signed."""

    def __init__(self, folder: Path, told: dict[str, str], signer: Signer | None) -> None:
        self.folder = folder
        self.signer = signer
        self._told = told
        self._packages: list[str] = []
        folder.mkdir(parents=True)
        self.publish()

    def add(self, deb: Path) -> None:
        """Publish one more package."""
        raw = deb.read_bytes()
        control = made(["dpkg-deb", "--field", str(deb)]).strip()
        (self.folder / deb.name).write_bytes(raw)
        digest = hashlib.sha256(raw).hexdigest()
        self._packages.append(f"{control}\nFilename: ./{deb.name}\nSize: {len(raw)}\nSHA256: {digest}\n")
        self.publish()

    def publish(self) -> None:
        """Write Packages and Release."""
        packages = "\n".join(self._packages)
        (self.folder / "Packages").write_text(packages)
        fields = "".join(f"{name}: {value}\n" for name, value in self._told.items())
        digest = hashlib.sha256(packages.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S UTC")
        release = f"{fields}Date: {date}\nSHA256:\n {digest} {len(packages)} Packages\n"
        if self.signer is None:
            (self.folder / "Release").write_text(release)
        else:
            (self.folder / "InRelease").write_text(self.signer.clearsign(release))


def package(folder: Path, name: str, version: str) -> Path:
    """Build a package that brings one file with its version."""
    tree = folder / f"{name}_{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "opt/probe").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@example.com>\nDescription: a probe\n"
    )
    (tree / f"opt/probe/{name}").write_text(f"{version}\n")
    deb = folder / f"{name}_{version}_all.deb"
    made(["dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(deb)])
    return deb


class Host:
    """The scratch host. ``repositories`` are its sources by name."""

    def __init__(self, folder: Path, signer: Signer) -> None:
        self.folder = folder
        self.signer = signer
        self.repositories: dict[str, Repository] = {}
        for name in (
            "etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "etc/apt/trusted.gpg.d", "opt",
            "run", "boot", "livepatch", "var/cache/apt/archives/partial", "var/lib/apt/lists/partial", "var/lib/dpkg/info",
            "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "var/log/apt", "var/tmp", "bin", "var/lib/saw",
        ):  # fmt: skip
            (folder / name).mkdir(parents=True)
        (folder / "var/run").symlink_to("/run")
        (folder / "var/lib/dpkg/status").write_text("")
        (folder / "etc/apt/archive.asc").write_text(signer.public)
        (folder / "os-release").write_text('ID=debian\nVERSION_CODENAME=trixie\nPRETTY_NAME="a probe"\n')
        self.apt("50test", 'APT::Sandbox::User "root";\nAcquire::Languages "none";\n')
        self.config_file = folder / "patching.json"
        self.told: dict[str, Any] = {}
        self.configure()
        shutil.copy(PACKAGED, folder / "etc/apt/apt.conf.d")
        self.engine()
        self.log = LogSocket(folder / "log")
        self.systemctl("exit 0")

    def apt(self, name: str, text: str) -> None:
        """Write a file of apt's configuration."""
        (self.folder / "etc/apt/apt.conf.d" / name).write_text(text)

    def engine(self, *, more: str = "", **variables: Any) -> None:
        """Tell unattended-upgrades what the role tells it, beside the file that its package brings."""
        told = {"patching_origins": [LISTED], "patching_holds": self.told.get("holds", []), "patching_updates": True}
        self.apt(
            "60saw-patching", TEMPLATES.get_template("apt.conf.j2").render(ansible_managed="a test", **told | variables)
        )
        self.apt("90more", more)

    def configure(self, **changes: Any) -> PatchConfig:
        """Write the configuration with ``changes``, which stay."""
        self.told |= changes
        values = {
            "origins": [LISTED],
            "syslog": str(self.folder / "log"),
            "os_release": str(self.folder / "os-release"),
            "livepatch_dir": str(self.folder / "livepatch"),
            "workspace": "/run/saw/workspace.json",
        }
        self.config_file.write_text(json.dumps({**values, **self.told}))
        return read_config(self.config_file)

    def systemctl(self, script: str) -> None:
        """Say what systemctl answers: this machine has no systemd that could be asked."""
        path = self.folder / "bin/systemctl"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def repository(self, name: str, told: dict[str, str], *, signed: bool = True, options: str = "") -> Repository:
        """Give the host a source."""
        made_one = Repository(self.folder / "repositories" / name, told, self.signer if signed else None)
        self.repositories[name] = made_one
        options = options or "signed-by=/etc/apt/archive.asc"
        (self.folder / f"etc/apt/sources.list.d/{name}.list").write_text(f"deb [{options}] file:{made_one.folder} ./\n")
        return made_one

    def publish(self, name: str, told: dict[str, str], deb: Path) -> None:
        """Publish a package in one of the host's sources, which is made when it is not there."""
        (self.repositories.get(name) or self.repository(name, told)).add(deb)

    def hold(self, *names: str, until: str = "2099-12-31") -> None:
        """Hold packages in the configuration, and in what the role tells the engine."""
        self.configure(
            holds=[{"package": name, "owner": "ann", "reason": "the next one", "until": until} for name in names]
        )
        self.engine()

    @property
    def box(self) -> list[str]:
        """The command that enters the host."""
        there = self.folder
        binds = [("etc/apt", "/etc/apt"), ("opt", "/opt"), ("run", "/run"), ("boot", "/boot"), ("var", "/var")]
        box = ["bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
        for inside, outside in binds:
            box += ["--bind", str(there / inside), outside]
        box += ["--ro-bind", str(there / "os-release"), "/usr/lib/os-release"]
        box += ["--bind", str(there), str(there), "--unshare-net", "--die-with-parent"]
        box += ["--setenv", "TMPDIR", "/var/tmp", "--setenv", "PATH", f"{there}/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        return [*box, "--"]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the host."""
        return subprocess.run(
            [*self.box, *command],
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def command(self) -> Path:
        """A program outside that is ``saw`` on the host."""
        path = self.folder / "saw"
        inside = [*self.box, sys.executable, "-m", "saw.cli.main"]
        path.write_text(
            f'#!/bin/sh\narea=$1; shift\nexec {shlex.join(inside)} "$area" --config {self.config_file} "$@"\n'
        )
        path.chmod(0o755)
        return path

    def told_by(self, *words: str) -> dict[str, Any]:
        """What ``saw patch … --json`` says."""
        done = self.saw(*words, "--json")
        assert done.stdout.startswith("{"), done.stderr
        return dict(json.loads(done.stdout))

    def saw(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``saw patch`` as people do."""
        return self.run(sys.executable, "-m", "saw.cli.main", "patch", "--config", str(self.config_file), *words)

    def install(self, *debs: Path) -> None:
        """Install packages as they are."""
        done = self.run("dpkg", "--install", *map(str, debs))
        assert done.returncode == 0, done.stderr

    def version(self, name: str) -> str:
        """The version of a package by the file that it brought."""
        return (self.folder / "opt/probe" / name).read_text().strip()

    def found(self) -> list[Found]:
        """Findings in the spool, each checked against OCSF."""
        config = read_config(self.config_file)
        self_state = {**json.loads(self.config_file.read_text()), "state_dir": f"{self.folder}{config.state_dir}"}
        store = open_store(msgspec.convert(self_state, PatchConfig))
        try:
            found = store.newest()
        finally:
            store.close()
        for one in found:
            validate(one.event)
            assert one.event["class_uid"] == 2003
        return found

    def close(self) -> None:
        """Close the log."""
        self.log.close()

    def subjects(self, kind: str) -> list[str]:
        """What findings of a kind are about."""
        return [
            one.event["unmapped"]["saw"]["subject"]
            for one in self.found()
            if one.event["finding_info"]["types"] == [kind]
        ]
