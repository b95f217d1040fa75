"""The configuration of a bastion (``/etc/saw/bastion.json``)."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec

from saw import addressing
from saw.errors import ConfigError
from saw.files import load_json

SSH_PORT = 22


class Ingress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Another way to workspaces than their own addresses: workspace number N is at ``base_port`` + N of ``host``.

    ``blocks``: addresses for numbers above 10,000, by the number of their block (:func:`saw.addressing.ingress`).
    """

    host: str
    base_port: int = addressing.INGRESS_BASE
    blocks: dict[str, str] = {}


class BastionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a bastion is told. Files and folders are absolute paths.

    ``recordings_dir`` belongs to the recorder's account alone. ``runtime_dir`` (in memory) holds the keys of live sessions.
    ``workspace_user`` and ``forward_user`` are the accounts in workspaces, for sessions and for forwarded ports.
    ``record_input`` also records what people type, which includes passwords. ``max_bytes`` is the most that one recording
    may grow to; the session ends there.
    """

    broker_url: str
    broker_name: str = "broker.saw.internal"
    ca_file: str
    cert_file: str
    key_file: str
    recordings_dir: str = "/var/lib/saw/bastion/recordings"
    runtime_dir: str = "/run/saw/bastion"
    workspace_user: str = "agent"
    forward_user: str = "saw-forward"
    ingress: Ingress | None = None
    record_input: bool = False
    max_bytes: int = 1024**3

    @property
    def recordings(self) -> Path:
        """Where recordings are written."""
        return Path(self.recordings_dir)

    def address(self, number: int) -> tuple[str, int]:
        """Return host and port of the SSH server of workspace ``number``; raise :class:`ConfigError` where there is none."""
        if self.ingress is None:
            return addressing.workspace(number), SSH_PORT
        return addressing.ingress(number, self.ingress.host, self.ingress.base_port, self.ingress.blocks)


def load_config(path: Path | str) -> BastionConfig:
    """Read and check the configuration; raise :class:`ConfigError` that names the field and the cure."""
    config = load_json(path, BastionConfig)
    for name in ("ca_file", "cert_file", "key_file", "recordings_dir", "runtime_dir"):
        if not Path(getattr(config, name)).is_absolute():
            raise ConfigError(f"{path}: {name} is not an absolute path", cure="write it from / on")
    if not config.broker_url.startswith("https://"):
        raise ConfigError(f"broker_url {config.broker_url!r} is not https", cure="write https://<address>:<port>")
    if config.max_bytes < 8 * 1024**2:
        raise ConfigError("max_bytes is less than 8 MiB", cure="write bytes")
    if config.ingress is not None:
        try:
            for address in (config.ingress.host, *config.ingress.blocks.values()):
                ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(f"ingress.host: {error}", cure="write an IP address") from error
        for problem in addressing.problems_of_blocks(config.ingress.blocks, "ingress.blocks"):
            raise ConfigError(problem, cure="name one address of the perimeter for each block of 10,000 numbers")
        if not 1024 <= config.ingress.base_port <= 65000:
            raise ConfigError("ingress.base_port is not 1024 to 65000", cure="write the port before workspace number 1")
    return config
