"""The worker's configuration file ``/etc/saw/worker.json``, read strictly. Secrets are in files that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from saw.errors import ConfigError
from saw.files import load_json
from saw.jobs.messages import KINDS, Kind

DEFAULT_CONFIG = "/etc/saw/worker.json"
CREDENTIALS = "/run/credentials/"
COLLECTION = "secure_agent.workspace"

_Seconds = Annotated[int, msgspec.Meta(ge=1, le=7 * 86_400)]


class AnsibleSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Playbooks are run here. All are absolute paths.

    ``inventory``: the fleet's, with a group ``hypervisors``. ``key_file``, ``known_hosts``: how ssh gets to its hosts; host
    keys are always checked. ``context``: how the playbooks' modules reach the broker (``SAW_CONTEXT``). ``collections``: where
    the collection is installed, when that is not where Ansible looks. ``playbooks``: a folder with ``workspace_<kind>.yml``,
    instead of the collection's own. ``config_file``: an ``ansible.cfg``. ``timeout_s``: how long a run may take, seconds.
    """

    inventory: str
    key_file: str | None = None
    known_hosts: str | None = None
    context: str | None = None
    collections: str | None = None
    playbooks: str | None = None
    config_file: str | None = None
    timeout_s: _Seconds = 7200


class AwxSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """AWX runs them. ``url`` begins with https://; ``token_file`` holds a token of a user who may execute the templates.

    ``organization``: in which the templates are, when their names are not unique. ``templates``: names other than
    ``saw-workspace-<kind>``. ``api``: the path of the API. ``timeout_s``: of one call; ``poll_s``: between two looks at a job.
    """

    url: str
    token_file: str
    ca_file: str | None = None
    organization: str | None = None
    templates: dict[Kind, str] = {}
    api: str = "/api/v2/"
    timeout_s: _Seconds = 30
    poll_s: Annotated[float, msgspec.Meta(ge=0.02, le=60)] = 2.0

    def template(self, kind: Kind) -> str:
        """Return the name of the job template for ``kind``."""
        return self.templates.get(kind, f"saw-workspace-{kind}")


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``broker_socket``: the broker's socket for workers on this host; or ``broker_context``: a context file whose part
    ``machine`` says how to get to a broker elsewhere. ``slots``: how many jobs run at a time, besides one that kills.
    ``keep_runs``: how many folders of ended runs, with Ansible's whole output, are kept. One of ``ansible`` and ``awx``.
    """

    state_dir: str
    broker_socket: str | None = None
    broker_context: str | None = None
    slots: Annotated[int, msgspec.Meta(ge=1, le=32)] = 2
    keep_runs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 50
    ansible: AnsibleSettings | None = None
    awx: AwxSettings | None = None

    @property
    def state(self) -> Path:
        """The state directory."""
        return Path(self.state_dir)


def load_config(path: Path | str) -> WorkerConfig:
    """Read and check the configuration; raise :class:`ConfigError` that names the field and the cure."""
    config = load_json(path, WorkerConfig)
    if problems := list(_problems(config)):
        raise ConfigError(f"{path} is not valid: {'; '.join(problems)}", cure="correct the named fields")
    return config


def _problems(config: WorkerConfig) -> Iterator[str]:
    if (config.broker_socket is None) == (config.broker_context is None):
        yield "it has broker_socket or broker_context, one of the two"
    if (config.ansible is None) == (config.awx is None):
        yield "it has ansible or awx, one of the two"
    for part, names in (
        (config, ("state_dir", "broker_socket", "broker_context")),
        (
            config.ansible,
            ("inventory", "key_file", "known_hosts", "context", "collections", "playbooks", "config_file"),
        ),
        (config.awx, ("token_file", "ca_file")),
    ):
        for name in names if part is not None else ():
            value = getattr(part, name)
            if value is not None and not Path(value).is_absolute():
                yield f"{name} must be an absolute path"
    if config.awx is not None:
        place = urlsplit(config.awx.url)
        if place.scheme != "https" or not place.hostname or place.query or place.fragment:
            yield "awx.url must begin with https:// and name a host"
        if not (config.awx.api.startswith("/") and config.awx.api.endswith("/")):
            yield "awx.api must begin and end with /"


def missing_for(settings: AnsibleSettings) -> Iterator[str]:
    """Yield what a worker needs for playbooks and this host does not have."""
    for name in ("inventory", "key_file", "known_hosts", "context", "collections", "playbooks", "config_file"):
        value = getattr(settings, name)
        # what systemd hands over is there for the unit alone
        if value is not None and not value.startswith(CREDENTIALS) and not Path(value).exists():
            yield f"ansible.{name}: there is no {value}"
    if settings.playbooks is not None:
        for kind in KINDS:
            if not (file := Path(settings.playbooks) / f"workspace_{kind}.yml").is_file():
                yield f"ansible.playbooks: there is no {file}"
    elif settings.collections is not None:
        place = Path(settings.collections) / "ansible_collections" / COLLECTION.replace(".", "/")
        if not (place / "playbooks/workspace_start.yml").is_file():
            yield f"ansible.collections: the collection {COLLECTION} is not installed in {settings.collections}"
