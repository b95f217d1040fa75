"""Light hosts with a booted systemd: nspawn containers on one private bridge, for the embedded default and the role tests.

They need neither systemd as PID 1 nor a container registry nor cgroup v2 on the machine: each host gets a private mount
namespace with a fresh cgroup v2 tree. The bridge lies in a network namespace of its own; deleting that namespace takes
bridge and links with it. Nothing is registered anywhere, so what is left to clean is a process, a directory, a namespace.

    python -m saw.lab.nspawn network up|down  [--lab DIR]
    python -m saw.lab.nspawn up NAME --root-tar TAR --address 10.77.0.10 [--capability all] [--bind SRC:DST] [--lab DIR]
    python -m saw.lab.nspawn down NAME [--purge] [--lab DIR]

``up`` is idempotent: a running host stays as it is, a stopped one is booted again, a missing one is unpacked from the tar.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from saw.errors import SawError
from saw.files import write_atomic, write_private
from saw.lab.process import command_line, recall, remember, run, stop, wait_for
from saw.lab.strays import unmarked

PREFIX = "10.77.0"
GATEWAY = f"{PREFIX}.1"


class LabError(SawError):
    """The embedded lab cannot be brought to the wanted state."""

    code = "lab_failed"


@dataclass(frozen=True)
class LabNetwork:
    """A bridge in its own network namespace, joined to the machine by one veth pair (``GATEWAY`` on our side)."""

    namespace: str = "sawlab"
    prefix: str = PREFIX

    @property
    def gateway(self) -> str:
        """The machine's address on the lab network."""
        return f"{self.prefix}.1"

    @property
    def uplink(self) -> str:
        """Name of the machine's end of the veth pair."""
        return f"{self.namespace}h"

    def exists(self) -> bool:
        """Tell whether the namespace is there."""
        return Path("/run/netns", self.namespace).exists()

    def complete(self) -> bool:
        """Tell whether the last step of :meth:`up`, setting the uplink up, was done."""
        try:
            flags = Path("/sys/class/net", self.uplink, "flags").read_text(encoding="ascii")
        except OSError:
            return False
        return self.exists() and bool(int(flags, 16) & 1)

    def up(self) -> None:
        """Create namespace, bridge and uplink where they are missing; what an interrupted run left half made is redone."""
        if self.complete():
            return
        self.down()
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self.uplink, "type", "veth", "peer", "name", "uplink", "netns", self.namespace)
        inside = ("ip", "-n", self.namespace)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "add", "lab0", "type", "bridge", "forward_delay", "0")
        run(*inside, "link", "set", "lab0", "up")
        run(*inside, "link", "set", "uplink", "master", "lab0", "up")
        run("ip", "addr", "add", f"{self.gateway}/24", "dev", self.uplink)
        run("ip", "link", "set", self.uplink, "up")

    def down(self) -> None:
        """Remove namespace and links; nothing happens when they are not there."""
        if Path("/sys/class/net", self.uplink).exists():
            run("ip", "link", "delete", self.uplink)
        if self.exists():
            run("ip", "netns", "delete", self.namespace)


@dataclass(frozen=True)
class LightHost:
    """One booted nspawn host: its root tree, its pid file and its console lie under ``lab``/hosts/``name``."""

    name: str
    address: str
    lab: Path
    network: LabNetwork = field(default_factory=LabNetwork)
    capability: str = ""
    binds: tuple[str, ...] = ()
    system_calls: str = ""
    """Names that nspawn's filter lets through besides its own, such as those of Landlock, which older versions refuse."""
    booted: bool = True
    """False runs nothing but an SSH server on the tree, for building images: systemd is not there, nothing starts."""
    read_only: tuple[str, ...] = ()
    """Folders of the machine that the host sees and cannot change (``FROM:TO``)."""
    environment: tuple[str, ...] = ()
    """What that server sets for every command (``NAME=VALUE``, no spaces)."""

    @property
    def directory(self) -> Path:
        """Where everything of this host lies."""
        return self.lab / "hosts" / self.name

    @property
    def root(self) -> Path:
        """The host's root file system."""
        return self.directory / "root"

    @property
    def pid_file(self) -> Path:
        """Pid and start time of its systemd-nspawn."""
        return self.directory / "nspawn.pid"

    @property
    def cgroup(self) -> str:
        """Name of its control group in the machine's cgroup v2 tree."""
        return f"saw-{self.network.namespace}-{self.name}"

    def running(self) -> bool:
        """Tell whether its systemd-nspawn is alive."""
        return recall(self.pid_file) is not None

    def unpack(self, tar: Path) -> None:
        """Lay out the root tree from ``tar``; a half-unpacked tree of an interrupted run is thrown away first."""
        done = self.directory / "unpacked"
        stamp = f"{tar.name} {tar.stat().st_mtime_ns}\n"
        if done.exists() and self.root.exists():
            return
        self.remove_tree()
        self.root.mkdir(parents=True)
        run("tar", "-C", str(self.root), "--numeric-owner", "-xpf", str(tar))
        if self.booted:
            self.personalise()
        write_atomic(done, stamp)

    def personalise(self) -> None:
        """Give the host its name, address, host key and the lab's login key."""
        root = self.root
        write_atomic(root / "etc/hostname", f"{self.name}\n")
        network = root / "etc/systemd/network"
        network.mkdir(parents=True, exist_ok=True)
        write_atomic(
            network / "10-lab.network",
            f"[Match]\nName=host0\n[Network]\nAddress={self.address}/24\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        )
        (root / "etc/machine-id").unlink(missing_ok=True)
        write_atomic(root / "etc/machine-id", f"{uuid.uuid4().hex}\n", mode=0o444)
        for key in (root / "etc/ssh").glob("ssh_host_*"):
            key.unlink()
        host_key = host_key_of(self.lab, self.name)
        write_private(root / "etc/ssh/ssh_host_ed25519_key", host_key.read_bytes())
        write_atomic(root / "etc/ssh/ssh_host_ed25519_key.pub", host_key.with_suffix(".pub").read_bytes())
        ssh = root / "root/.ssh"
        ssh.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(ssh / "authorized_keys", login_key_of(self.lab).with_suffix(".pub").read_bytes())
        for unit in ("systemd-networkd.service", "ssh.service"):
            wants = root / "etc/systemd/system/multi-user.target.wants"
            wants.mkdir(parents=True, exist_ok=True)
            link = wants / unit
            if not link.is_symlink():
                link.symlink_to(f"/usr/lib/systemd/system/{unit}")

    def up(self, tar: Path, *, patience: float = 120.0) -> None:
        """Bring the host to "SSH answers"; see the module's text. Raises :class:`LabError` with the console's end."""
        self.network.up()
        self.unpack(tar)
        if not self.running():
            self.boot()
        try:
            wait_for(f"SSH on host {self.name}", self.answers, patience=patience)
        except SawError as error:
            console = self.directory / "console.log"
            tail = console.read_text(encoding="utf-8", errors="replace")[-1500:] if console.exists() else ""
            raise LabError(
                f"{error.message}; its console ends with:\n{tail}", cure="run `make clean`, then again"
            ) from error

    def boot(self) -> None:
        """Start systemd-nspawn in its own mount and cgroup environment and remember it; end what a killed one left."""
        end_cgroup(self.cgroup)
        nspawn = [*self.arguments(), *(["--boot"] if self.booted else self.ssh_server_only())]
        script = (
            "mount --make-rprivate / && (umount -R /sys/fs/cgroup 2>/dev/null || true) && "
            f"mount -t cgroup2 none /sys/fs/cgroup && mkdir -p /sys/fs/cgroup/{self.cgroup} && "
            f"echo $$ > /sys/fs/cgroup/{self.cgroup}/cgroup.procs && "
            'exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 "$@"'
        )
        command = [
            "nsenter", f"--net=/run/netns/{self.network.namespace}", "unshare", "--mount", "sh", "-ec", script, "sh", *nspawn,
        ]  # fmt: skip
        with (self.directory / "console.log").open("wb") as console:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, start_new_session=True,
                env=unmarked(),
            )  # fmt: skip
        try:
            remember(self.pid_file, child.pid)
        except OSError:  # a host that no later run could find must not run
            child.kill()
            child.wait()
            end_cgroup(self.cgroup)
            raise

    def arguments(self) -> list[str]:
        """Return systemd-nspawn's command line without what it runs."""
        nspawn = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--console=pipe",
            f"--machine={self.name}", f"--directory={self.root}", "--network-bridge=lab0", "--resolv-conf=off",
            "--timezone=off", "--link-journal=no", "--private-users=no",
        ]  # fmt: skip
        if self.capability:
            nspawn.append(f"--capability={self.capability}")
        if self.system_calls:
            nspawn.append(f"--system-call-filter={self.system_calls}")
        nspawn += [f"--bind={bind}" for bind in self.binds]
        nspawn += [f"--bind-ro={bind}" for bind in self.read_only]
        return nspawn

    def outdated(self) -> bool:
        """Tell whether the booted host runs, and was started with another command line than it would be now."""
        pid = recall(self.pid_file)
        if pid is None:
            return False
        started, wanted = command_line(pid), [*self.arguments(), "--boot"]
        return started[:1] == wanted[:1] and started != wanted

    def ssh_server_only(self) -> list[str]:
        """Arguments that run an SSH server as the only process; its keys lie under /run and never touch the tree."""
        keys = self.directory / "keys"
        keys.mkdir(mode=0o700, exist_ok=True)
        write_private(keys / "host", host_key_of(self.lab, self.name).read_bytes())
        write_private(keys / "login", login_key_of(self.lab).with_suffix(".pub").read_bytes())
        environment = " ".join(("SYSTEMD_OFFLINE=1", *self.environment))
        script = (
            f"ip address add {self.address}/24 dev host0 && ip link set host0 up && mkdir -p /run/sshd && "
            "install -m 0700 -d /run/keys && install -m 0600 /run/lab-keys/host /run/lab-keys/login /run/keys/ && "
            "exec /usr/sbin/sshd -D -e -f /dev/null -h /run/keys/host -o AuthorizedKeysFile=/run/keys/login "
            f"-o PermitRootLogin=prohibit-password -o 'SetEnv={environment}' -o Subsystem='sftp internal-sftp'"
        )
        return [f"--bind-ro={keys}:/run/lab-keys", "--as-pid2", "/bin/sh", "-ec", script]

    def answers(self) -> bool:
        """Tell whether an SSH banner comes back; a dead nspawn raises at once."""
        if not self.running():
            raise LabError(f"host {self.name} ended while starting", cure="read its console.log")
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def down(self, *, purge: bool = False) -> None:
        """Power the host off (SIGTERM asks its systemd), and with ``purge`` remove its tree."""
        stop(self.pid_file, patience=15.0)
        end_cgroup(self.cgroup)
        if purge:
            self.remove_tree()
            shutil.rmtree(self.directory, ignore_errors=True)

    def remove_tree(self) -> None:
        """Delete the root tree; refuse when anything is still mounted below it."""
        if not self.root.exists():
            return
        prefix = str(self.root.resolve()) + "/"
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        busy = [line.split()[1] for line in mounts if (line.split()[1] + "/").startswith(prefix)]
        if busy:
            raise LabError(f"{busy[0]} is still mounted below {self.root}", cure=f"umount {busy[0]}")
        (self.directory / "unpacked").unlink(missing_ok=True)  # first: an interrupted removal must not look unpacked
        run("rm", "-rf", "--one-file-system", str(self.root))


def end_cgroup(name: str) -> None:
    """Kill whatever still runs in the control group ``name`` and remove it; nothing happens when it is not there.

    A host whose systemd-nspawn was killed goes on running without it: its control group is the one thing that still names
    its processes. The cgroup v2 tree is mounted for a moment in a private mount namespace. Raises when something survives.
    """
    group = f"/sys/fs/cgroup/{name}"
    script = (
        "mount --make-rprivate / && (umount -R /sys/fs/cgroup 2>/dev/null || true) && mount -t cgroup2 none /sys/fs/cgroup && "
        '[ -d "$1" ] || exit 0\n'
        # whoever made the group may remove it at any moment
        'for try in $(seq 100); do [ -d "$1" ] || exit 0; grep -q "^populated 0" "$1/cgroup.events" 2>/dev/null && break\n'
        # cgroup.kill came with Linux 5.14; the loop serves older kernels
        'if [ -e "$1/cgroup.kill" ]; then (echo 1 > "$1/cgroup.kill") 2>/dev/null || true\n'
        'else find "$1" -name cgroup.procs -exec cat {} + | xargs -r kill -9 || true; fi\n'
        "sleep 0.1; done\n"
        'find "$1" -depth -type d -exec rmdir {} + 2>/dev/null || true\n'
        'if [ -d "$1" ]; then echo "$1 cannot be emptied" >&2; exit 1; fi'
    )
    run("unshare", "--mount", "sh", "-ec", script, "sh", group)


def key_pair(path: Path, comment: str) -> Path:
    """Make an Ed25519 key pair at ``path`` once and return the private key's path, which appears last and complete."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".key-", dir=path.parent) as scratch:
            fresh = Path(scratch, "key")
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(fresh))
            write_atomic(path.with_suffix(".pub"), fresh.with_suffix(".pub").read_bytes())
            write_private(path, fresh.read_bytes())
    return path


def login_key_of(lab: Path) -> Path:
    """The key with which the controller logs in to the lab's hosts."""
    return key_pair(lab / "ssh" / "controller", "saw-lab-controller")


def host_key_of(lab: Path, name: str) -> Path:
    """The host key of host ``name``; made here so that known_hosts is right before the first connection."""
    return key_pair(lab / "ssh" / f"host-{name}", f"saw-lab-{name}")


def known_hosts(lab: Path, hosts: list[LightHost]) -> Path:
    """Write the lab's known_hosts file and return its path."""
    lines = []
    for host in hosts:
        kind, key = host_key_of(lab, host.name).with_suffix(".pub").read_text(encoding="ascii").split()[:2]
        lines.append(f"{host.address},{host.name} {kind} {key}\n")
    path = lab / "ssh" / "known_hosts"
    write_atomic(path, "".join(lines))
    return path


def main(argv: list[str] | None = None) -> int:
    """Command line of this module (see its text)."""
    parser = argparse.ArgumentParser(prog="python -m saw.lab.nspawn", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--lab", type=Path, default=Path("build/lab"))
    parser.add_argument("--namespace", default="sawlab")
    parser.add_argument("--prefix", default=PREFIX)
    actions = parser.add_subparsers(dest="action", required=True)
    network = actions.add_parser("network")
    network.add_argument("what", choices=["up", "down"])
    up = actions.add_parser("up")
    up.add_argument("name")
    up.add_argument("--root-tar", type=Path, required=True)
    up.add_argument("--address", required=True)
    up.add_argument("--capability", default="")
    up.add_argument("--bind", action="append", default=[])
    up.add_argument("--system-calls", default="")
    down = actions.add_parser("down")
    down.add_argument("name")
    down.add_argument("--purge", action="store_true")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("root is needed to start hosts: use sudo", file=sys.stderr)
        return 1
    lab = options.lab.resolve()
    lan = LabNetwork(options.namespace, options.prefix)
    try:
        if options.action == "network":
            (lan.up if options.what == "up" else lan.down)()
        elif options.action == "up":
            binds = tuple(options.bind)
            host = LightHost(options.name, options.address, lab, lan, options.capability, binds, options.system_calls)
            host.up(options.root_tar)
            print(
                json.dumps(
                    {"name": host.name, "address": host.address, "key": str(login_key_of(lab)),
                     "known_hosts": str(known_hosts(lab, [host])), "root": str(host.root)}
                )
            )  # fmt: skip
        else:
            LightHost(options.name, "", lab, lan).down(purge=options.purge)
    except SawError as error:
        print(f"nspawn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
