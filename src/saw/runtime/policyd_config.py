"""Configuration of policyd and what the workspace was told at its creation."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from saw.addressing import Number
from saw.errors import ConfigError
from saw.files import load_json
from saw.runtime.ring1 import Ring1

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class PolicydConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/policyd.json``; every value has the default of the architecture page. Times are in seconds.

    ``readback_s`` bounds the wait for both parts to enforce what was switched to, ``proxy_start_s`` the wait for a ring 1
    that was not seen running yet. ``calls_s`` is the shortest time between two reports of how many calls were denied,
    ``decisions_s`` between two of which ones, ``usage_s`` between two of what the agent used; decisions are read from the
    journal in ``journal_dir``, null for the host's own.
    ``review_user`` are the mediators of MCP servers, for whom people are asked; null asks nobody.
    ``ask_user`` is the decision service, which passes on what agents ask for beyond their policy; null passes nothing on.
    ``nv_index`` (for example ``0x01500010``) adds a revision floor in the TPM. ``attest_socket`` null measures nothing; the
    broker then issues no identity for the policy.
    """

    run_dir: str = "/run/saw"
    state_dir: str = "/var/lib/saw/policyd"
    attest_socket: str | None = "/run/saw/attest/attest.sock"
    decide_socket: str = "/run/saw/decide/authz.sock"
    system_bundle: str = "/etc/ssl/certs/ca-certificates.crt"
    envoy: str = "/opt/saw/bin/envoy"
    egress_group: str | None = "saw-egress"
    review_user: str | None = "saw-mcp"
    ask_user: str | None = "saw-egress"
    listen_address: str = "10.200.0.1"
    listen_port: Annotated[int, msgspec.Meta(gt=0, lt=65536)] = 3128
    poll_s: Seconds = 10.0
    heartbeat_s: Seconds = 5.0
    stall_s: Seconds = 180.0
    readback_s: Seconds = 90.0
    proxy_start_s: Seconds = 120.0
    validate_s: Seconds = 120.0
    measure_s: Seconds = 60.0
    calls_s: Seconds = 15.0
    decisions_s: Seconds = 20.0
    usage_s: Seconds = 900.0
    journal_dir: str | None = None
    nv_index: str | None = None
    tcti: str | None = None

    @property
    def run(self) -> Path:
        """The runtime directory shared by all parts of the workspace."""
        return Path(self.run_dir)

    @property
    def state(self) -> Path:
        """What survives a reboot."""
        return Path(self.state_dir)

    @property
    def generations(self) -> Path:
        """Where generations are compiled and switched."""
        return self.run / "generations"


class Workspace(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/run/saw/workspace.json``: what the VM was told at creation. All of it is public."""

    workspace_id: Name
    number: Number
    trust_domain: str
    broker_url: Annotated[str, msgspec.Meta(pattern=r"^https://[^\s/]+\Z")]
    broker_name: str
    ring2: str
    ring2_name: str
    ca_pem: str
    tuf_root: dict[str, Any]
    blueprint: Name
    ring: Name

    @property
    def target(self) -> str:
        """The TUF target path of this workspace's policy."""
        return f"rings/{self.ring}/{self.blueprint}.bundle.json"


def load_workspace(config: PolicydConfig) -> Workspace:
    """Read the workspace's facts; raises :class:`ConfigError`."""
    return load_json(config.run / "workspace.json", Workspace)


def ring1_settings(config: PolicydConfig, workspace: Workspace) -> Ring1:
    """Return ring 1's settings for this workspace; raises :class:`ConfigError` on a ring 2 address that is none."""
    host, _, port = workspace.ring2.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
        number = int(port)
    except ValueError as error:
        raise ConfigError(
            f"workspace.json: ring2 {workspace.ring2!r} is not address:port", cure="recreate the workspace"
        ) from error
    return Ring1(
        ring2_address=address,
        ring2_port=number,
        ring2_name=workspace.ring2_name,
        **_own(config),
    )


def bootstrap_settings(config: PolicydConfig) -> Ring1:
    """Return settings enough for the static part, which is the same for every workspace."""
    return Ring1(ring2_address="", ring2_port=0, **_own(config))


def _own(config: PolicydConfig) -> dict[str, Any]:
    return {
        "listen_address": config.listen_address,
        "listen_port": config.listen_port,
        "decide_socket": Path(config.decide_socket),
        "sds_file": config.run / "svid" / "sds.json",
        "ca_file": config.run / "ca.pem",
        "generations": config.generations,
    }
