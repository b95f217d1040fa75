"""The configuration of saw-gatekeeper (``/etc/saw/gatekeeper.json``)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

import msgspec

from saw.addressing import Band, ingress_address, problems_of_blocks
from saw.errors import ConfigError
from saw.files import load_json
from saw.gateway.replicas import MOST_REPLICAS, Sockets, problem_of_sockets, sockets_of
from saw.secrets.settings import problems_of_vault
from saw.secrets.vault_settings import AppRole, VaultSettings

LONGEST_VAULT_STEP_S = 5
LONGEST_CACHE_S = 300
"""How long a value of a vault may count at most (seconds): a revoked one is used no longer."""


class Ring2Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where ring 2's Envoy finds its files and what it listens on.

    ``xds_dir`` holds ``bootstrap.json``, ``lds.json``, ``cds.json`` and ``sds-*.json``; ``tls_dir`` holds
    ``server.pem``, ``server.key`` and ``ca.pem`` (the authority that workspace SVIDs must chain to), replaced by
    renames when they are renewed. ``upstream_ca_file`` is what upstream servers must chain to. ``broker_address`` is
    the ``host:port`` (an IP address) of the TCP pass-through. ``envoy`` is the binary that ``--check`` runs.
    ``ingress_address`` has the ingress ports of the first 10,000 numbers, ``ingress_blocks`` names an address for each further
    block of 10,000, by its number from 1 on; a workspace of a block without one is reached through a bastion alone.
    ``send_socket`` is where Envoy takes an approved call from the gatekeeper; its folder belongs to Envoy's user.
    """

    xds_dir: Path = Path("/var/lib/saw/ring2")
    tls_dir: Path = Path("/etc/saw/ring2-tls")
    upstream_ca_file: Path = Path("/etc/ssl/certs/ca-certificates.crt")
    ingress_address: str = "0.0.0.0"  # noqa: S104 - nftables admits the operator networks alone
    ingress_blocks: dict[str, str] = {}
    broker_address: str
    server_name: str = "ring2.saw.internal"
    envoy: Path = Path("/opt/saw/bin/envoy")
    send_socket: Path = Path("/run/saw/ring2/send.sock")

    def ingress_of(self, number: int) -> str | None:
        """Return the address of the ingress of workspace ``number``, None where it has none."""
        return ingress_address(number, self.ingress_address, self.ingress_blocks)


class ResolverConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How names become addresses: an optional hosts file first, then the system's resolver; answers live ``ttl_s``."""

    hosts_file: Path | None = None
    ttl_s: float = 5.0
    timeout_s: float = 3.0


class NftConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may reach the perimeter host itself (``ssh_port``), the ingress ports and a bastion on this host (``bastion_port``,
    None without one): these networks and nobody else."""

    operator_networks: tuple[str, ...] = ()
    ssh_port: int = 22
    bastion_port: int | None = None


class CredentialVault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HashiCorp Vault or OpenBao in which credentials lie whose ``ref`` says ``vault:``.

    ``url``: https, without a path. ``ca_file``: authorities (PEM) of its certificate, None for the system's. One of
    ``token_file`` (read again for each call, so that an agent may renew it) and ``approle``; these files are private to the
    gatekeeper. ``timeout_s``: for each step of a call. ``cache_s``: how long a value may be used without asking again.
    """

    url: str
    ca_file: str | None = None
    namespace: str | None = None
    token_file: str | None = None
    approle: AppRole | None = None
    timeout_s: float = 2.0
    cache_s: float = 0.0

    @property
    def secret_file(self) -> Path:
        """Return the file with what proves who we are there."""
        return Path(self.approle.secret_id_file if self.approle else self.token_file or "")

    def settings(self) -> VaultSettings:
        """Return the same in the words of the client."""
        return VaultSettings(
            url=self.url, ca_file=self.ca_file, namespace=self.namespace, token_file=self.token_file, approle=self.approle,
            timeout_s=self.timeout_s,
        )  # fmt: skip


class RecordsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where calls of models are kept that policy has kept. ``key_file``: what they are encrypted under, 32 bytes, private.

    ``limit_mib``: the most that they take; calls that must be kept and do not fit are refused. ``readers_group``: who may read
    them, beside root, with `saw inference`; each reading is in the audit trail.
    """

    key_file: Path = Path("/etc/saw/gatekeeper-tls/records.key")
    limit_mib: int = 10240
    readers_group: str = ""


class GatekeeperConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything saw-gatekeeper is told.

    ``numbers`` are the numbers of the workspaces that this perimeter serves; others have no listener here.
    ``stale_after_s`` is the longest time without an answer from the broker after which every call is refused, whatever
    the leases say. ``release_grace_s`` is how long a workspace may run the release before the current one.
    ``clock_bound_s`` is how far the clock may step back before calls are refused. ``spool_limit`` is how many events
    may wait for the broker before calls are refused. ``reservation_s`` is how long what was set aside for a call of a model
    service waits for news of its end before it counts as spent. ``authz_group`` owns the authorisation socket with the
    gatekeeper: whoever can write to it can obtain credentials. ``review_socket``, of the same group, is where calls
    that wait for a person are taken in; without it they are refused with ``review_required``. ``credentials_dir`` and ``vault``
    are where credentials lie; without a vault, calls that need one from there are refused. ``records``: where calls are kept that
    policy has kept; without it such calls are refused. ``replicas`` is how many gatekeepers this host runs; with more than one,
    ``{replica}`` in ``authz_socket``, ``review_socket`` and ``ring2.send_socket`` stands for the number of each.
    """

    name: str
    broker_url: str
    broker_name: str = "broker.saw.internal"
    ca_file: Path
    cert_file: Path
    key_file: Path
    tuf_root_file: Path
    state_dir: Path = Path("/var/lib/saw/gatekeeper")
    authz_socket: Path = Path("/run/saw/gatekeeper/authz.sock")
    authz_group: str = ""
    review_socket: Path | None = None
    ring2: Ring2Config
    replicas: int = 1
    numbers: Band = Band()
    credentials_dir: Path = Path("/etc/saw/credentials")
    vault: CredentialVault | None = None
    records: RecordsConfig | None = None
    stale_after_s: float = 90.0
    release_grace_s: float = 120.0
    clock_bound_s: float = 5.0
    poll_wait_s: int = 10
    spool_limit: int = 500_000
    reservation_s: int = 3600
    resolver: ResolverConfig = ResolverConfig()
    nft: NftConfig = NftConfig()

    def sockets(self, replica: int = 1) -> Sockets:
        """Return the sockets of a replica, from 1 on."""
        return sockets_of(replica, authz=self.authz_socket, review=self.review_socket, send=self.ring2.send_socket)

    def all_sockets(self) -> tuple[Sockets, ...]:
        """Return the sockets of every replica, the first one's first."""
        return tuple(self.sockets(replica) for replica in range(1, self.replicas + 1))


def split_address(text: str, name: str) -> tuple[str, int]:
    """Split ``ip:port`` (``[v6]:port``); raise :class:`ConfigError` that names the field when it is something else."""
    host, _, port = text.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
        number = int(port)
    except ValueError:
        number, address = 0, ""
    if not 0 < number < 65536:
        raise ConfigError(f"{name} {text!r} is not an IP address with a port", cure="write it as 192.0.2.1:8443")
    return address, number


def _path(kind: object, value: object) -> Path:
    if kind is Path and isinstance(value, str) and value.startswith("/"):
        return Path(value)
    raise ValueError(f"{value!r} is not an absolute path")


def _problems_of_numbers(config: GatekeeperConfig) -> Iterator[str]:
    band, ring2 = config.numbers, config.ring2
    if band.first > band.last:
        yield "numbers.first is above numbers.last"
    yield from problems_of_blocks(ring2.ingress_blocks, "ring2.ingress_blocks")
    for address in ring2.ingress_blocks.values():
        try:
            specific = not ipaddress.ip_address(address).is_unspecified
        except ValueError:
            specific = False
        if not specific:
            yield f"ring2.ingress_blocks: {address!r} is not an address of this host"
    first = ring2.ingress_of(1)
    if set(ring2.ingress_blocks) - {"0"} and first is not None:
        if ipaddress.ip_address(first).is_unspecified:
            yield "ring2.ingress_address must be one address where ring2.ingress_blocks names others"
        elif first in {address for block, address in ring2.ingress_blocks.items() if block != "0"}:
            yield "ring2.ingress_blocks names ring2.ingress_address again"


def load_config(path: Path | str) -> GatekeeperConfig:
    """Read and check the configuration; raise :class:`ConfigError` that names the field and the cure."""
    raw = load_json(path, dict[str, object])
    try:
        config = msgspec.convert(raw, GatekeeperConfig, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is not valid: {error}", cure="correct the named field") from error
    split_address(config.ring2.broker_address, "ring2.broker_address")
    try:
        ipaddress.ip_address(config.ring2.ingress_address)
    except ValueError as error:
        raise ConfigError(f"ring2.ingress_address: {error}", cure="write an address of this host") from error
    for problem in _problems_of_numbers(config):
        raise ConfigError(problem, cure="correct the named field; docs/scale.md has an example")
    for network in config.nft.operator_networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ConfigError(f"nft.operator_networks: {error}", cure="write it as 192.0.2.0/24") from error
    if not config.broker_url.startswith("https://"):
        raise ConfigError(f"broker_url {config.broker_url!r} is not https", cure="write https://<address>:<port>")
    for field in ("stale_after_s", "release_grace_s", "clock_bound_s"):
        if getattr(config, field) < 0:
            raise ConfigError(f"{field} is negative", cure="write seconds, 0 or more")
    if (vault := config.vault) is not None:
        problems = list(problems_of_vault(vault.settings(), "vault"))
        if vault.timeout_s > LONGEST_VAULT_STEP_S:
            problems.append(f"vault.timeout_s must be 1 to {LONGEST_VAULT_STEP_S}")
        if not 0 <= vault.cache_s <= LONGEST_CACHE_S:
            problems.append(f"vault.cache_s must be 0 to {LONGEST_CACHE_S}")
        if problems:
            raise ConfigError(f"{path} is not valid: {'; '.join(problems)}", cure="correct the named field")
    if config.records is not None and not 1 <= config.records.limit_mib <= 16 * 1024 * 1024:
        raise ConfigError(
            f"records.limit_mib is {config.records.limit_mib}", cure="write 1 or more MiB, for example 10240"
        )
    if not 1 <= config.replicas <= MOST_REPLICAS:
        raise ConfigError(f"replicas is {config.replicas}", cure=f"write 1 to {MOST_REPLICAS}")
    if problem := problem_of_sockets(config.all_sockets()):
        raise ConfigError(problem, cure="see docs/perimeter.md")
    if not 60 <= config.reservation_s <= 86400:
        raise ConfigError(f"reservation_s is {config.reservation_s}", cure="write 60 to 86400 whole seconds")
    if not 1 <= config.poll_wait_s <= 30:
        raise ConfigError(f"poll_wait_s is {config.poll_wait_s}", cure="write 1 to 30 whole seconds")
    return config
