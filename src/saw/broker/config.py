"""The broker's configuration file ``/etc/saw/broker.json``, read strictly."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from saw.errors import ConfigError
from saw.files import load_json

_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*")


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the TLS side listens; port 0 lets the kernel choose (tests)."""

    host: str = "0.0.0.0"  # noqa: S104 - the control host has one address and its firewall decides who reaches it
    port: int = 8443


class TufSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``timestamp_ttl_s``: how long the signed timestamp is valid, seconds (60 to 7 days); it is renewed at half of it."""

    timestamp_ttl_s: int = 3600


class RolloutSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a release stops on its way through a ring. See docs/rollout.md.

    ``max_refused``: how many workspaces may refuse. ``max_silent_s``: how long an attested workspace that was offered a
    release may leave it without an end, seconds. ``max_deny_rate_increase``: by how much the share of denied calls (0 to 1)
    may exceed that of the release before, once each has decided ``min_calls`` calls. ``first_wave``: how many workspaces
    are offered it first (each further wave doubles the number), 0 for all at once. ``soak_s``: how long everyone must have
    loaded it before it is complete, seconds. ``require_rollback``: nobody is offered it before a rollback is in escrow.
    """

    max_refused: int = 0
    max_silent_s: int = 300
    max_deny_rate_increase: float = 0.1
    min_calls: int = 20
    first_wave: int = 0
    soak_s: int = 600
    require_rollback: bool = False


class DelegationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``required``: a workspace that was never given a delegation may call nothing. ``max_duration_s``: longest life of one."""

    required: bool = False
    max_duration_s: int = 7 * 86_400


class ImageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``candidate_rings``: whose workspaces may be made on an image that is not promoted yet."""

    candidate_rings: tuple[str, ...] = ("canary",)


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the broker is told. Directories and sockets are absolute paths.

    ``operator_group``: members may use the operator socket besides root; absent or unknown means root alone.
    """

    trust_domain: str
    state_dir: str
    operator_socket: str
    server_names: tuple[str, ...]
    listen: Listen = Listen()
    operator_group: str | None = None
    tuf: TufSettings = TufSettings()
    rollout: RolloutSettings = RolloutSettings()
    delegation: DelegationSettings = DelegationSettings()
    image: ImageSettings = ImageSettings()

    @property
    def state(self) -> Path:
        """The state directory."""
        return Path(self.state_dir)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state / "broker.db"

    @property
    def tuf_dir(self) -> Path:
        """The TUF repository: ``metadata/`` and ``targets/`` inside."""
        return self.state / "tuf"

    @property
    def keys(self) -> Path:
        """Private directory of the authorities and the online key."""
        return self.state / "keys"


def load_config(path: Path | str) -> BrokerConfig:
    """Read and check the configuration; raise :class:`ConfigError` that names the field and the cure."""
    config = load_json(path, BrokerConfig)
    problems: list[str] = []
    if not _DNS_NAME.fullmatch(config.trust_domain):
        problems.append("trust_domain must be a lower-case DNS name")
    if not config.server_names or not all(_DNS_NAME.fullmatch(name) for name in config.server_names):
        problems.append("server_names must list lower-case DNS names")
    problems.extend(
        f"{name} must be an absolute path"
        for name in ("state_dir", "operator_socket")
        if not Path(getattr(config, name)).is_absolute()
    )
    if not 0 <= config.listen.port <= 65535:
        problems.append("listen.port must be 0 to 65535")
    if not 60 <= config.tuf.timestamp_ttl_s <= 7 * 86_400:
        problems.append("tuf.timestamp_ttl_s must be 60 to 604800")
    if not 60 <= config.delegation.max_duration_s <= 7 * 86_400:
        problems.append("delegation.max_duration_s must be 60 to 604800")
    problems.extend(
        f"rollout.{name} must be {low} to {high}"
        for name, low, high in (
            ("max_refused", 0, 1_000_000),
            ("max_silent_s", 10, 86_400),
            ("max_deny_rate_increase", 0, 1),
            ("min_calls", 1, 1_000_000),
            ("first_wave", 0, 1_000_000),
            ("soak_s", 0, 30 * 86_400),
        )
        if not low <= getattr(config.rollout, name) <= high
    )
    if problems:
        raise ConfigError(f"{path} is not valid: {'; '.join(problems)}", cure="correct the named fields")
    return config
