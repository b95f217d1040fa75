"""The broker as one object: keys, database and the parts that use them. The two applications are built on it."""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from saw.audit import EventFactory
from saw.broker.agents import Agents
from saw.broker.attestation import Attestation
from saw.broker.bastion_sessions import BastionSessions
from saw.broker.certificates import Certificates
from saw.broker.charges import Charges
from saw.broker.clock import Clock
from saw.broker.config import BrokerConfig
from saw.broker.context import Services
from saw.broker.delegations import Delegations
from saw.broker.forwards import Forwards
from saw.broker.gates import Gates
from saw.broker.holds import Holds
from saw.broker.image_history import ImageHistory
from saw.broker.images import Images
from saw.broker.job_work import JobWork
from saw.broker.jobs import Jobs
from saw.broker.machines import Machines
from saw.broker.notification_courier import Courier, senders
from saw.broker.notifications import Notifications
from saw.broker.overview import Overview
from saw.broker.people import map_again
from saw.broker.perimeter import Views
from saw.broker.policy_requests import PolicyRequests
from saw.broker.recordings import Recordings
from saw.broker.register_place import require_register
from saw.broker.registry import Registry
from saw.broker.releases import Releases
from saw.broker.replicas import Upkeep, join
from saw.broker.repository import OnlineKey, Repository
from saw.broker.resource_retention import ResourceRetention
from saw.broker.resource_use import ResourceUse
from saw.broker.retention import Retention
from saw.broker.review_decisions import Decisions
from saw.broker.review_vault import Vault
from saw.broker.reviewers import Reviewers
from saw.broker.reviews import Reviews
from saw.broker.rollout_control import Rollouts
from saw.broker.rollout_views import RolloutViews
from saw.broker.secret_place import (
    ONLINE,
    SESSIONS,
    SSH,
    SSH_SESSIONS,
    Signer,
    load_authority,
    load_seal_key,
    load_ssh,
    open_secrets,
    require_place,
)
from saw.broker.sponsors import Sponsors
from saw.broker.sso.service import SingleSignOn
from saw.broker.store import Store
from saw.broker.tool_reviews import ToolReviews
from saw.broker.trail import Trail
from saw.broker.wake import Waker
from saw.identity.ssh import SshAuthority
from saw.identity.x509 import Authority

RING2_NAME = "ring2.saw.internal"

logger = logging.getLogger("saw.broker")


@dataclass(frozen=True)
class Broker:
    """Every part, wired."""

    config: BrokerConfig
    services: Services
    waker: Waker
    authority: Authority
    ssh: SshAuthority
    repository: Repository
    registry: Registry
    images: Images
    attestation: Attestation
    releases: Releases
    rollouts: Rollouts
    rollout_views: RolloutViews
    certificates: Certificates
    sessions: BastionSessions
    forwards: Forwards
    recordings: Recordings
    charges: Charges
    resource_use: ResourceUse
    resource_retention: ResourceRetention
    overview: Overview
    delegations: Delegations
    agents: Agents
    sponsors: Sponsors
    reviewers: Reviewers
    reviews: Reviews
    decisions: Decisions
    gates: Gates
    tools: ToolReviews
    policy_requests: PolicyRequests
    jobs: Jobs
    job_work: JobWork
    machines: Machines
    views: Views
    trail: Trail
    image_history: ImageHistory
    holds: Holds
    retention: Retention
    notifications: Notifications
    courier: Courier
    sso: SingleSignOn | None
    upkeep: Upkeep

    @classmethod
    def open(cls, config: BrokerConfig, clock: Clock, random: Callable[[int], bytes]) -> Self:
        """Open an initialised state directory (see :mod:`saw.broker.setup`) and bring registry and repository in line."""
        require_register(config)
        require_place(config)
        secrets = open_secrets(config)
        authority = load_authority(config, secrets)
        ssh = load_ssh(secrets, SSH)
        online = OnlineKey.parse(secrets.read(ONLINE), ONLINE)
        waker = Waker()
        store = Store.open(config, waker)
        try:
            upkeep = join(config, store, waker)
        except BaseException:
            store.close()
            raise
        events = EventFactory("saw-broker", host=socket.gethostname(), new_uid=lambda: str(uuid.uuid4()))
        services = Services(config, store, clock, random, events, secrets, Signer(secrets))
        repository = Repository(config.tuf_dir, online, config.tuf.timestamp_ttl_s)
        registry = Registry(services)
        vault = Vault.load(secrets, random)
        releases = Releases(services, repository)
        rollouts = Rollouts(services, repository, releases)
        sso = SingleSignOn.open(services)
        charges, resource_use = Charges(services), ResourceUse(services)
        jobs = Jobs(services, registry)
        delegations, forwards = Delegations(services), Forwards(services)
        broker = cls(
            config=config,
            services=services,
            waker=waker,
            authority=authority,
            ssh=ssh,
            repository=repository,
            registry=registry,
            images=Images(services, releases.officers),
            attestation=Attestation(services, registry, authority, ssh),
            releases=releases,
            rollouts=rollouts,
            rollout_views=RolloutViews(services),
            certificates=Certificates(services, authority, ssh, RING2_NAME),
            sessions=BastionSessions(
                services,
                forwards,
                load_ssh(secrets, SSH_SESSIONS),
                ssh,
                load_seal_key(secrets, SESSIONS, random),
            ),
            forwards=forwards,
            recordings=Recordings(services),
            charges=charges,
            resource_use=resource_use,
            resource_retention=ResourceRetention(services),
            overview=Overview(services, charges, resource_use),
            delegations=delegations,
            agents=Agents(services, delegations),
            sponsors=Sponsors(services, registry),
            reviewers=Reviewers(services),
            reviews=Reviews(services, vault),
            decisions=Decisions(services, vault),
            gates=Gates(services, vault),
            tools=ToolReviews(services, vault),
            policy_requests=PolicyRequests(services),
            jobs=jobs,
            job_work=JobWork(services, jobs),
            machines=Machines(services, None if sso is None else sso.provider),
            views=Views(services, releases, rollouts),
            trail=Trail(services),
            image_history=ImageHistory(services),
            holds=Holds(services),
            retention=Retention(services),
            notifications=Notifications(services),
            courier=Courier(services, waker, senders(services)),
            sso=sso,
            upkeep=upkeep,
        )
        map_again(store, config.sso)
        if config.postgresql is None:  # else another broker may be sending, and a claim ends by itself
            broker.courier.take_back()
        for release in releases.synchronise():
            logger.info("release recorded at start: %s", release)
        rollouts.act()
        return broker

    def trust(self) -> dict[str, object]:
        """Return everything public that others need to trust this broker."""
        return {
            "trust_domain": self.config.trust_domain,
            "ca_pem": self.authority.ca_pem.decode(),
            "ssh_user_ca": self.ssh.user_ca,
            "ssh_host_ca": self.ssh.host_ca,
            "tuf_root": self.releases.tuf_root(),
        }

    def close(self) -> None:
        """Wake every poll and close the database."""
        self.waker.close()
        if self.sso is not None:
            self.sso.provider.close()
        self.upkeep.close()
        self.services.secrets.close()
        self.services.store.close()
