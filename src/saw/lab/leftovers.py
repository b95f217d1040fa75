"""End what the project runs on this machine for one build directory: hosts, namespaces, and programs of a killed run.

Three sites keep light hosts under a build directory, each in a network namespace of its own: the embedded default, the role
tests and the image build. So does each measurement of the playbook ``site``, which ends them itself unless it is killed.
A host is found by what it consists of - its directory, its pid file, its control group - so also one of an interrupted run is
found. Hosts of another checkout's build directory are named and left alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saw.lab.nspawn import LabError, LabNetwork, LightHost
from saw.lab.process import end_strays

Say = Callable[[str], None]
PROC = Path("/proc")


@dataclass(frozen=True)
class Site:
    """A directory of light hosts below the build directory, and the network that they share."""

    title: str
    folder: str
    network: LabNetwork
    hosts: tuple[str, ...]


SITES = (
    Site("the embedded default", "lab", LabNetwork(), ("enterprise", "edge", "control")),
    Site("the image build", "image-tree", LabNetwork("sawimg", "10.78.0"), ("image",)),
    Site("the role tests", "molecule", LabNetwork("sawmol", "10.79.0"), ("bare", "guest", "edge", "control")),
)
ROLE_TESTS = SITES[2]
_MEASURED = re.compile(r"site-([0-9]{1,5})-[A-Za-z0-9_]+\Z")
"""The folder of a measurement of the playbook ``site``; the number is that of its network."""


def measured_network(number: int) -> LabNetwork:
    """Return the network of the measurement with this number, 0 to 99999; no other part of the project uses it."""
    return LabNetwork(f"saws{number}", f"10.92.{number % 250}")


def measurements(build: Path) -> list[Site]:
    """Return the measurements of the playbook ``site`` whose folders are there: one that was killed leaves its hosts."""
    found = [(match, path) for path in sorted(build.glob("site-*")) if (match := _MEASURED.match(path.name))]
    title = "a measurement of the playbook site"
    return [
        Site(title, f"{path.name}/lab", measured_network(int(match[1])), ("edge", "control", "guest"))
        for match, path in found
    ]


@dataclass
class Ended:
    """How much was ended."""

    hosts: int = 0
    networks: int = 0
    programs: int = 0
    left_alone: int = 0

    def __str__(self) -> str:
        words = (
            (self.hosts, "host", "hosts"),
            (self.networks, "network namespace", "network namespaces"),
            (self.programs, "program of an interrupted run", "programs of an interrupted run"),
        )
        parts = [f"{count} {one if count == 1 else many}" for count, one, many in words]
        return ", ".join(parts)


@dataclass(frozen=True)
class Running:
    """A process in the control group of a light host; ``root`` is known for the host's systemd-nspawn alone."""

    pid: int
    namespace: str
    host: str
    root: Path | None


def running(proc: Path = PROC) -> Iterator[Running]:
    """Yield every process on this machine that belongs to a light host, of whatever checkout."""
    for entry in sorted(proc.glob("[0-9]*")):
        try:
            groups = (entry / "cgroup").read_text(encoding="utf-8")
            arguments = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if arguments == [""]:  # a process that has ended and that nobody has collected yet
            continue
        group = re.search(r"^0::/saw-([a-z0-9]+)-([a-z0-9.-]+)", groups, re.MULTILINE)
        if group:
            root = next((word.partition("=")[2] for word in arguments if word.startswith("--directory=")), "")
            is_nspawn = Path(arguments[0]).name == "systemd-nspawn" and root
            yield Running(int(entry.name), group[1], group[2], Path(root) if is_nspawn else None)


def foreign(found: list[Running], namespace: str, build: Path) -> list[Path]:
    """Return the root trees of hosts in ``namespace`` that lie outside ``build``: another checkout runs them."""
    roots = [process.root for process in found if process.namespace == namespace and process.root is not None]
    return sorted(root for root in roots if not root.is_relative_to(build))


def end_site(site: Site, build: Path, found: list[Running], ended: Ended, say: Say, *, purge: bool) -> None:
    """End the hosts of ``site`` under ``build`` and its network, unless another checkout uses that network."""
    here = [process for process in found if process.namespace == site.network.namespace]
    others = foreign(found, site.network.namespace, build)
    if others:
        owner = others[0].parents[3]
        if len(others) < len([process for process in here if process.root]):
            raise LabError(
                f"hosts of {build} and of {owner} share the namespace {site.network.namespace}",
                cure=f"end {site.title} of {owner} first, then run it again",
            )
        say(f"left alone: {site.title} of {owner} ({len(others)} hosts); end it there")
        ended.left_alone += len(others)
        return
    directory = build / site.folder
    known = {path.name for path in directory.glob("hosts/*") if path.is_dir()} | {process.host for process in here}
    for name in dict.fromkeys((*site.hosts, *sorted(known))):
        processes = sum(process.host == name for process in here)
        if name in known or os.geteuid() == 0:  # an empty control group may be all that is left
            LightHost(name, "", directory, site.network).down(purge=purge)
        if processes:
            say(f"ended host {name} of {site.title} ({processes} processes)")
            ended.hosts += 1
    if site.network.exists() or Path("/sys/class/net", site.network.uplink).exists():
        site.network.down()
        say(f"removed network namespace {site.network.namespace} with its bridge and links")
        ended.networks += 1


def end_all(build: Path, repository: Path, say: Say, *, purge: bool, sites: tuple[Site, ...] = SITES) -> Ended:
    """End every site of ``build`` and the programs that a killed run left working; report each thing to ``say``."""
    ended = Ended()
    markers = (
        (str(build), ("ansible-playbook", "packer")),
        (f"{repository}/molecule/", ("molecule", "ansible-playbook")),
    )
    for marker, programs in markers if ROLE_TESTS in sites else markers[:1]:
        ended.programs += end_strays(marker, programs)
    if ended.programs:
        say(f"ended {ended.programs} programs of an interrupted run")
    found = list(running())
    for site in sites:
        end_site(site, build, found, ended, say, purge=purge)
    if purge:
        for site in measurements(build):
            end_site(site, build, found, ended, say, purge=True)
            shutil.rmtree((build / site.folder).parent)
    return ended
