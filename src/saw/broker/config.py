"""The broker's configuration file ``/etc/saw/broker.json``, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec

from saw.attest.image_record import Evidence
from saw.broker.break_glass_settings import BreakGlassSettings, problems_of_break_glass
from saw.broker.database_settings import parse_database
from saw.broker.forwarding_settings import ForwardingSettings, problems_of_forwarding
from saw.broker.gate_settings import GateSettings, MachineSettings, problems_of_gates
from saw.broker.job_settings import JobSettings, problems_of_jobs
from saw.broker.notification_settings import Channel, problems_of_notifications
from saw.broker.number_settings import NumberSettings, problems_of_numbers
from saw.broker.retention_settings import AuditSettings, problems_of_audit
from saw.broker.session_settings import SessionRules, problems_of_sessions
from saw.broker.sso_settings import SsoSettings, problems_of
from saw.broker.terminal.settings import TerminalSettings, problems_of_terminal
from saw.errors import ConfigError
from saw.files import load_json
from saw.secrets.settings import SecretsSettings, problems_of_secrets

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
    """``candidate_rings``: whose workspaces may be made on an image not promoted yet; ``require``: what a record carries.

    ``scan_max_age_s``: how old a search for known vulnerabilities may be when its record is registered, where one is required.
    ``baseline_floor``: the least hardening index (0 to 100) of the scanner Lynis that a record may state; 0 means any of
    any scanner. It takes ``baseline`` in ``require``.
    """

    candidate_rings: tuple[str, ...] = ("canary",)
    require: tuple[Evidence, ...] = ()
    scan_max_age_s: Annotated[int, msgspec.Meta(ge=3600, le=90 * 86_400)] = 7 * 86_400
    baseline_floor: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the broker is told. Directories and sockets are absolute paths.

    ``operator_group``: members may use the operator socket besides root; absent or unknown means root alone. ``sso``: how
    people sign in; absent means that there is no sign-in and no page. ``audit_socket``: a second socket that serves nothing
    but reading the trail, to root and members of ``audit_group``; absent means that there is none. ``gates`` and ``machines``:
    where changes to the fleet wait for people, and which programs may ask; ``machine_audience``: what tokens of machines are for.
    ``break_glass``: who may let a review through that its group cannot decide in time; absent means nobody.
    ``terminal``: sessions and recordings in a browser; absent means that there are none.
    ``jobs``: lifecycle calls run playbooks; absent means that they do not.
    ``forwarding``: ports of workspaces may be granted to people; absent means that none is.
    ``audit``: how long the trail is kept; absent means for ever.
    ``audit_tree``: folder of the trail's tree (``saw audit checkpoint``), served to witnesses; absent means that none is.
    ``numbers``: which numbers, and so which networks, workspaces get.
    ``notifications``: who is told that something waits for people; empty means nobody.
    ``postgresql`` (in the file: ``database``): the database of several brokers; absent means a SQLite file of this one.
    ``secrets``: where the broker's own keys are; absent means plain files.
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
    sessions: SessionRules = SessionRules()
    sso: SsoSettings | None = None
    audit_socket: str | None = None
    audit_group: str | None = None
    gates: dict[str, GateSettings] = {}
    break_glass: BreakGlassSettings | None = None
    machines: dict[str, MachineSettings] = {}
    machine_audience: str | None = None
    terminal: TerminalSettings | None = None
    jobs: JobSettings | None = None
    audit: AuditSettings | None = None
    audit_tree: str | None = None
    notifications: tuple[Channel, ...] = ()
    forwarding: ForwardingSettings | None = None
    postgresql: str | None = msgspec.field(name="database", default=None)
    secrets: SecretsSettings = SecretsSettings()
    numbers: NumberSettings = NumberSettings()

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
        """Private directory of certificates and public keys, and of all private ones where ``secrets`` does not say otherwise."""
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
        for name in ("state_dir", "operator_socket", "audit_socket", "audit_tree")
        if not Path(getattr(config, name) or "/").is_absolute() or getattr(config, name) == ""
    )
    if not 0 <= config.listen.port <= 65535:
        problems.append("listen.port must be 0 to 65535")
    if not 60 <= config.tuf.timestamp_ttl_s <= 7 * 86_400:
        problems.append("tuf.timestamp_ttl_s must be 60 to 604800")
    if not 60 <= config.delegation.max_duration_s <= 7 * 86_400:
        problems.append("delegation.max_duration_s must be 60 to 604800")
    problems.extend(problems_of_sessions(config.sessions))
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
    if config.image.baseline_floor and "baseline" not in config.image.require:
        problems.append(
            "image.baseline_floor holds for no image while image.require does not name baseline: add it there, or drop the floor"
        )
    if config.sso is not None:
        problems.extend(problems_of(config.sso))
    if config.terminal is not None:
        problems.extend(problems_of_terminal(config.terminal))
        if config.sso is None:
            problems.append("terminal needs sso: whoever opens one signs in first")
    if config.postgresql is not None:
        parse_database(config.postgresql)
    client = config.sso.provider.client_id if config.sso is not None else None
    problems.extend(problems_of_gates(config.gates, config.machines, audience=config.machine_audience, client=client))
    if config.break_glass is not None:
        problems.extend(problems_of_break_glass(config.break_glass))
    if config.jobs is not None:
        problems.extend(problems_of_jobs(config.jobs))
    if config.forwarding is not None:
        problems.extend(problems_of_forwarding(config.forwarding))
    problems.extend(problems_of_secrets(config.secrets))
    problems.extend(problems_of_numbers(config.numbers))
    if config.audit is not None:
        problems.extend(
            problems_of_audit(config.audit, ships=config.audit_socket is not None and config.audit_tree is None)
        )
    problems.extend(problems_of_notifications(config.notifications))
    if problems:
        raise ConfigError(
            f"{path} is not valid: {'; '.join(problems)}",
            cure="correct the named fields",
            details={"problems": problems},
        )
    return config
