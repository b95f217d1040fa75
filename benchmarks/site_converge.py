"""The playbook ``site`` on hosts of its own: what a first run changes, what a run without a change costs, and where it goes.

    python benchmarks/site_converge.py [--runs 3]       # JSON; root

Two fresh light hosts, a control host and one that is perimeter, hypervisor and bastion, are converged, get a first release of
policy, and are converged again until nothing is left to do; the runs after that are measured. A third host has the root tree of
the newest golden image that was made of the present sources; where there is none it is left out, and the answer says so. The
network is the benchmark's own, so an embedded workspace may run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[1] / "src")]

from results import Goal, Result, result  # noqa: E402 - the module beside this one

from saw.files import write_atomic, write_private  # noqa: E402
from saw.image import package_state  # noqa: E402
from saw.image.base_os import base_os  # noqa: E402
from saw.image.build import ImageBuild  # noqa: E402
from saw.image.finished import GoldenImage  # noqa: E402
from saw.image.unpack import unpack_disk  # noqa: E402
from saw.image.wheelhouse import wheelhouse  # noqa: E402
from saw.lab.leftovers import measured_network  # noqa: E402
from saw.lab.nspawn import LabNetwork, LightHost, host_key_of, known_hosts, login_key_of  # noqa: E402
from saw.lab.playbook import environment_of, signals_given_back, what_changed  # noqa: E402
from saw.lab.process import wait_for  # noqa: E402
from saw.lab.steps import Progress  # noqa: E402
from saw.lab.topology import BASTION_PORT, LANDLOCK, TRUST_DOMAIN, Lab, find_lab  # noqa: E402
from saw.lab.up import Bringup  # noqa: E402

GOAL = Goal("value", "most", 15.0)
ROWS = (
    "site_no_change_all_hosts", "site_no_change_processor", "site_no_change_slowest_host", "site_no_change_questions",
    "site_no_change_changes", "site_image_changes",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
DOOR = 2222
"""Port of the SSH server that the golden image's host gets for this: its own takes nothing but certificates."""
HERE_ALONE = frozenset(
    {
        "add_host",
        "assert",
        "debug",
        "fail",
        "group_by",
        "include_role",
        "include_tasks",
        "include_vars",
        "meta",
        "set_fact",
        "validate_argument_spec",
    }
)
"""Actions that do not ask a host: they cost the controller milliseconds."""
DOOR_UNIT = """[Unit]
Description=Way in for a measurement
[Service]
ExecStart=/usr/sbin/sshd -D -f /dev/null -o Port={port} -o PidFile=none -o HostKey=/etc/ssh/door_key \\
  -o AuthorizedKeysFile=/etc/ssh/door_login
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
[Install]
WantedBy=multi-user.target
"""


class Task(msgspec.Struct, frozen=True):
    """One task on one host; ``seconds`` from its start to its answer."""

    host: str
    play: str
    role: str
    task: str
    action: str
    seconds: float
    changed: bool
    places: str = ""
    items: int = 1
    """How many items its loop had."""

    @property
    def asks(self) -> int:
        """How often it asked a host: once for each item, and never where the controller answers by itself."""
        return 0 if self.action.rpartition(".")[2] in HERE_ALONE else self.items


@dataclass(frozen=True)
class Run:
    """One run of the playbook: wall time and processor time in seconds, and the tasks that were not skipped."""

    seconds: float
    tasks: list[Task] = field(default_factory=list)
    processor: float = 0.0
    """Of Ansible and of all hosts together; it hardly depends on what else the machine does."""

    def hosts(self) -> list[str]:
        """Names of the hosts with a task, without the controller."""
        return sorted({one.host for one in self.tasks} - {"localhost"})

    def of(self, host: str) -> list[Task]:
        """Tasks of one host."""
        return [one for one in self.tasks if one.host == host]

    def changes(self, host: str | None = None) -> list[str]:
        """Say what was changed, on ``host`` or everywhere."""
        found = [one for one in self.tasks if one.changed and host in {None, one.host}]
        return [": ".join(filter(None, (one.host, one.role, one.task, one.places))) for one in found]

    def slowest(self, count: int = 10) -> list[Task]:
        """Return the tasks that took longest, on whichever host."""
        return sorted(self.tasks, key=lambda one: -one.seconds)[:count]

    def told(self) -> dict[str, Any]:
        """Return the run as JSON has it."""
        return {
            "seconds": round(self.seconds, 2),
            "processor_seconds": round(self.processor, 2),
            "changed": len(self.changes()),
            "changes": self.changes(),
            "hosts": {
                host: {
                    "seconds": round(sum(one.seconds for one in self.of(host)), 2),
                    "tasks": len(self.of(host)),
                    "asked": sum(one.asks for one in self.of(host)),
                    "changed": len(self.changes(host)),
                }
                for host in self.hosts()
            },
            "slowest": [
                {"seconds": round(one.seconds, 2), "host": one.host, "role": one.role, "task": one.task}
                for one in self.slowest()
            ],
        }


class Fleet(Lab):
    """The hosts of this measurement: those of the embedded default, on a network and in a folder of their own."""

    @property
    def network(self) -> LabNetwork:
        """A network that no other part of the project uses."""
        return measured_network(int(self.build.name.split("-")[1]))

    def hosts(self) -> list[LightHost]:
        """Control host; perimeter, hypervisor and bastion."""
        prefix, tun = self.network.prefix, tuple(name for name in ("/dev/net/tun",) if Path(name).exists())
        return [
            LightHost("control", f"{prefix}.10", self.directory, self.network, system_calls=LANDLOCK),
            LightHost("edge", f"{prefix}.20", self.directory, self.network, "all", tun),
        ]

    def guest(self) -> LightHost:
        """The host with the golden image's tree."""
        return LightHost("guest", f"{self.network.prefix}.40", self.directory, self.network, "all")

    def boot_image(self, image: GoldenImage) -> LightHost:
        """Lay out the tree of ``image`` and boot it, with a way in."""
        host = self.guest()
        unpack_disk(Path(image.image), host.root)
        host.personalise()
        etc = host.root / "etc"
        write_private(etc / "ssh/door_key", host_key_of(self.directory, host.name).read_bytes())
        write_private(etc / "ssh/door_login", login_key_of(self.directory).with_suffix(".pub").read_bytes())
        write_atomic(etc / "systemd/system/door.service", DOOR_UNIT.format(port=DOOR))
        (etc / "systemd/system/multi-user.target.wants/door.service").symlink_to("/etc/systemd/system/door.service")
        self.network.up()
        host.boot()
        ssh = [
            "ssh",
            "-F",
            "/dev/null",
            *self.ssh_options(host).split(),
            "-i",
            str(login_key_of(self.directory)),
            "-p",
            str(DOOR),
        ]
        wait_for(
            "the host of the image lets us in", lambda: lets_in([*ssh, f"root@{host.address}", "true"]), patience=180
        )
        return host

    def ssh_options(self, *hosts: LightHost) -> str:
        """Return options for ssh that trust ``hosts`` alone."""
        trusted = known_hosts(self.directory, list(hosts))
        doors = "".join(
            f"[{host.address}]:{DOOR} "
            + " ".join(host_key_of(self.directory, host.name).with_suffix(".pub").read_text().split()[:2])
            + "\n"
            for host in hosts
        )
        write_atomic(trusted, trusted.read_text(encoding="ascii") + doors)
        return f"-o UserKnownHostsFile={trusted} -o StrictHostKeyChecking=yes -o BatchMode=yes"

    def write_inventory(self, hosts: list[LightHost], variables: dict[str, Any]) -> None:
        """Write inventory and the operator's context."""
        named = {host.name: host for host in hosts}
        key = str(login_key_of(self.directory))
        options = self.ssh_options(*hosts)
        groups = {"control_plane": ["control"], "hypervisors": ["edge"], "perimeter": ["edge"], "bastions": ["edge"]}
        groups |= {"workspaces": ["guest"]} if "guest" in named else {}
        ports = {"guest": {"ansible_port": DOOR}}
        inventory = {
            "all": {
                "hosts": {name: {"ansible_host": host.address, **ports.get(name, {})} for name, host in named.items()},
                "vars": {
                    "ansible_user": "root", "ansible_python_interpreter": "/usr/bin/python3",
                    "ansible_ssh_private_key_file": key, "ansible_ssh_common_args": options, **variables,
                },
                "children": {group: {"hosts": {name: {} for name in members}} for group, members in groups.items()},
            }
        }  # fmt: skip
        write_private(self.inventory_file, yaml.safe_dump(inventory, sort_keys=False))
        ssh = {
            "host": named["control"].address,
            "port": 22,
            "user": "root",
            "key": key,
            "known_hosts": options.split("=", 1)[1].split()[0],
        }
        write_atomic(
            self.context_file, json.dumps({"broker": {"socket": "/run/saw/broker/operator.sock", "ssh": ssh}}).encode()
        )


def items_of(answer: dict[str, Any]) -> int:
    """Return how many items of a loop were not skipped; 1 without a loop."""
    items = answer.get("results")
    return sum(not one.get("skipped") for one in items if isinstance(one, dict)) if isinstance(items, list) else 1


def processor_seconds(hosts: list[LightHost]) -> float:
    """Return what this process's children and all that lives in ``hosts`` used up to now, ended programs of theirs included."""
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            group = (place / "cgroup").read_text(encoding="utf-8")
            if any(f"/{host.cgroup}" in group for host in hosts):
                ticks += sum(map(int, (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:15]))
        except OSError:
            continue  # it has ended, and is its parent's now
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def lets_in(command: list[str]) -> bool:
    """Tell whether ``command`` over SSH ends well."""
    return (
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False).returncode == 0
    )


def run_site(fleet: Fleet, variables: dict[str, Any]) -> Run:
    """Run the playbook once; raises with its output's end when a task fails."""
    from ansible_runner.interface import run

    tasks: list[Task] = []
    plays = {"name": ""}

    def note(event: dict[str, Any]) -> bool:
        data, kind = event.get("event_data", {}), event.get("event", "")
        if kind == "playbook_on_play_start":
            plays["name"] = str(data.get("name", ""))
        elif kind == "runner_on_ok" and data.get("task"):
            answer, action = data.get("res", {}), data.get("resolved_action") or data.get("task_action", "")
            tasks.append(
                Task(
                    str(data["host"]), plays["name"], str(data.get("role", "")), str(data["task"]), str(action),
                    float(data.get("duration", 0.0)), bool(answer.get("changed")), what_changed(answer), items_of(answer),
                )
            )  # fmt: skip
        return True

    place = fleet.build / "runner"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700, parents=True)
    environment = environment_of(fleet)
    hosts = [*fleet.hosts(), fleet.guest()]
    begin, used = time.monotonic(), processor_seconds(hosts)
    with signals_given_back():
        done = run(
            private_data_dir=str(place), playbook=str(fleet.repository / "playbooks/site.yml"),
            inventory=str(fleet.inventory_file), extravars=variables, envvars=environment, quiet=True, event_handler=note,
        )  # fmt: skip
    seconds = time.monotonic() - begin
    if done.status != "successful":
        raise RuntimeError(f"site ended with {done.status}:\n{done.stdout.read()[-4000:]}")
    return Run(seconds, tasks, processor_seconds(hosts) - used)


@contextmanager
def fleet_of(found: Lab, *, with_image: bool = True) -> Iterator[tuple[Fleet, dict[str, Any], str]]:
    """Boot the hosts; give them, the variables of the playbook, and why there is no host with an image, if there is none."""
    cache = found.build / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    base = package_state.Base(found.repository / "packer/packages/host.txt", cache, base_os(found.repository))
    tar = base.tar(package_state.settle(base, package_state.Choice("reuse"))[0])
    images = ImageBuild(found.repository, found.build)
    image = images.matching() if with_image else None
    found.build.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ending:
        folder = ending.enter_context(
            tempfile.TemporaryDirectory(prefix=f"site-{os.getpid() % 100000}-", dir=found.build)
        )
        fleet = Fleet(found.repository, Path(folder))
        ending.callback(fleet.network.down)
        for host in [*fleet.hosts(), fleet.guest()]:
            ending.callback(host.down, purge=True)
        hosts = fleet.hosts()
        for host in hosts:
            host.up(tar)
        if image:
            hosts.append(fleet.boot_image(image))
        prefix = fleet.network.prefix
        fleet.write_inventory(
            hosts,
            {
                "saw_runtime_wheelhouse": str(wheelhouse(found.repository, cache)),
                "broker_trust_domain": TRUST_DOMAIN,
                "perimeter_broker_address": f"{prefix}.10:8443",
                "perimeter_operator_networks": [f"{prefix}.0/24"],
                "perimeter_bastion_port": BASTION_PORT,
                "bastion_broker_address": f"{prefix}.10:8443",
                "bastion_port": BASTION_PORT,
                "perimeter_credentials": fleet.credentials(),
            },
        )
        variables: dict[str, Any] = {"site_parts": ["control_plane", "baseline"]}
        if image:
            # what packer/build.pkr.hcl gave
            variables = {
                "site_parts": ["control_plane", "baseline", "workspaces"],
                "workspace_converge_baseline": True,
                "sandbox_mcp_servers": str(images.mcp_servers(cache)),
            }
        yield fleet, variables, "" if image else "no golden image was made of the present sources: run `make image`"


def converge(found: Lab, runs: int = 3, *, with_image: bool = True) -> tuple[Run, list[Run], str]:
    """Return the first run on fresh hosts, ``runs`` runs after which nothing is left to do, and why no image was looked at."""
    with fleet_of(found, with_image=with_image) as (fleet, variables, missing):
        first = run_site(fleet, variables)
        Bringup(fleet, Progress(total=1)).publish()  # until there is a root of trust, a perimeter stays closed
        run_site(fleet, variables)
        return first, [run_site(fleet, variables) for _ in range(runs)], missing


def measure(runs: int) -> list[Result]:
    """Return the rows of ``make bench``; each is of the fastest run."""
    first, after, missing = converge(find_lab(ROOT), runs)
    best = min(after, key=lambda one: one.seconds)
    own = {host: sum(one.seconds for one in best.of(host)) for host in best.hosts()}
    most = max(best.hosts(), key=lambda host: own[host])
    note = f"the best of {runs} runs; {len(own)} hosts at the same time"
    asked = max(sum(one.asks for one in best.of(host)) for host in best.hosts())
    changes = max(len(one.changes()) for one in after)
    image = None if missing else len(first.changes("guest"))
    return [
        result(ROWS[0], best.seconds, "s", note=note),
        result(ROWS[1], best.processor, "s", note="processor time of Ansible and all hosts together"),
        result(ROWS[2], own[most], "s", goal=GOAL, note=f"the tasks of {most}, added up"),
        result(ROWS[3], asked, "", note="questions to a host, on the one with most of them"),
        result(ROWS[4], changes, "", goal=Goal("value", "most", 0)),
        result(ROWS[5], image, "", note=missing or "; ".join(first.changes("guest"))),
    ]


def main() -> int:
    """Print everything as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="measured runs (default 3)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("root is needed to boot hosts: use sudo", file=sys.stderr)
        return 2
    with redirect_stdout(sys.stderr):  # what the steps say of themselves
        first, after, missing = converge(find_lab(ROOT), options.runs)
    told = {"first": first.told(), "after": [one.told() for one in after], "no_image": missing or None}
    print(json.dumps(told, indent=1))
    return 1 if any(one.changes() for one in after) else 0


if __name__ == "__main__":
    sys.exit(main())
