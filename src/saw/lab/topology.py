"""What the embedded default consists of: hosts, addresses, names, and the files that tools read about it."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from saw.files import write_atomic, write_private
from saw.lab.nspawn import LabNetwork, LightHost, known_hosts, login_key_of

TRUST_DOMAIN = "saw.example"
WORKSPACE = "ws-demo"
ENTERPRISE_NAMES = ("git.example.com", "api.example.com", "models.example.com")
CREDENTIALS = ("git-token", "api-token", "model-key")
BASTION_PORT = 2222
LANDLOCK = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
"""System calls that a terminal in the browser needs on the control host (docs/decisions/0037)."""
IDENTITY_PROVIDER = "/opt/identity"
"""Where the host ``enterprise`` has the identity provider's program."""


@dataclass(frozen=True)
class Lab:
    """The embedded default under ``build``/lab."""

    repository: Path
    build: Path

    @property
    def directory(self) -> Path:
        """State of the lab."""
        return self.build / "lab"

    @property
    def network(self) -> LabNetwork:
        """The lab's private network."""
        return LabNetwork()

    @property
    def images(self) -> Path:
        """Golden images, bound read-only into the hypervisor."""
        return self.build / "images"

    @property
    def host_names(self) -> tuple[str, ...]:
        """Names of the light hosts."""
        return ("control", "edge", "enterprise")

    def hosts(self) -> list[LightHost]:
        """The light hosts: control plane; perimeter and hypervisor; far-end services."""
        self.images.mkdir(parents=True, exist_ok=True)
        devices = tuple(device for device in ("/dev/net/tun", "/dev/kvm") if Path(device).exists())
        binds = (*devices, f"{self.images}:/var/lib/saw/images")
        identity = (f"{self.repository}/tests/oidc:{IDENTITY_PROVIDER}",)
        return [
            LightHost("control", "10.77.0.10", self.directory, self.network, system_calls=LANDLOCK),
            LightHost("edge", "10.77.0.20", self.directory, self.network, "all", binds),
            LightHost("enterprise", "10.77.0.30", self.directory, self.network, read_only=identity),
        ]

    @property
    def context_file(self) -> Path:
        """Context of the ``saw`` command for this lab."""
        return self.directory / "context.json"

    @property
    def inventory_file(self) -> Path:
        """Inventory of the lab."""
        return self.directory / "inventory.yml"

    @property
    def secrets_directory(self) -> Path:
        """Credentials of the far-end services, made on the spot; they go to the perimeter and to the far end alone."""
        return self.directory / "secrets"

    @property
    def keys_directory(self) -> Path:
        """Officer keys of the demonstration, made on the spot."""
        return self.directory / "keys"

    def credentials(self) -> dict[str, str]:
        """Return the credential values, making them on the first call."""
        self.secrets_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        values = {}
        for name in CREDENTIALS:
            path = self.secrets_directory / name
            if not path.exists():
                write_private(path, f"{name}-{secrets.token_urlsafe(24)}")
            values[name] = path.read_text(encoding="ascii")
        return values

    def write_files(self, variables: dict[str, Any]) -> None:
        """Write inventory, known_hosts and context."""
        hosts = {host.name: host for host in self.hosts()}
        trusted = known_hosts(self.directory, list(hosts.values()))
        key = login_key_of(self.directory)
        common = {
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={trusted} -o StrictHostKeyChecking=yes",
        }
        inventory = {
            "all": {
                "hosts": {name: {"ansible_host": host.address} for name, host in hosts.items()},
                "vars": {**common, **variables},
                "children": {
                    "control_plane": {"hosts": {"control": {}}},
                    "perimeter": {"hosts": {"edge": {}}},
                    "bastions": {"hosts": {"edge": {}}},
                    "hypervisors": {"hosts": {"edge": {}}},
                    "enterprise": {"hosts": {"enterprise": {}}},
                },
            }
        }
        write_private(self.inventory_file, yaml.safe_dump(inventory, sort_keys=False))
        context = {
            "broker": {
                "socket": "/run/saw/broker/operator.sock",
                "ssh": {
                    "host": hosts["control"].address, "port": 22, "user": "root", "key": str(key), "known_hosts": str(trusted),
                },
            },
            "ingress": {"host": hosts["edge"].address},
            "bastion": {"host": hosts["edge"].address, "port": BASTION_PORT},
        }  # fmt: skip
        write_atomic(self.context_file, msgspec.json.format(msgspec.json.encode(context)))


def find_lab(start: Path | None = None) -> Lab:
    """Return the lab of the repository around ``start`` (default: the working directory)."""
    here = (start or Path.cwd()).resolve()
    for directory in (here, *here.parents):
        if (directory / "galaxy.yml").exists() and (directory / "src/saw").is_dir():
            return Lab(directory, Path(os.environ.get("SAW_BUILD", str(directory / "build"))).resolve())
    return Lab(here, Path(os.environ.get("SAW_BUILD", str(here / "build"))).resolve())
