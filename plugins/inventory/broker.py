# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The workspaces that the broker has in its register, as hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: broker
short_description: Workspaces from the broker's register
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Each workspace is a host, named by its id, in the group C(saw_workspaces). What the register says of it is in the variable
    C(saw_workspace), what it says of its agent in C(saw_agent).
  - Hosts are reached as C(saw ssh) reaches them, through the bastion where the context file names one. OpenSSH obtains a
    certificate for each connection; no key and no secret is in the inventory.
  - The name of the inventory file ends with C(broker.yml) or C(broker.yaml).
notes:
  - It runs on the controller, with Ansible's own Python.
  - Values of the register are never evaluated as templates.
  - Without a bastion, a workspace whose ingress port the context file cannot tell is left out, with a warning that names it.
requirements:
  - The Python package C(secure-agent-workspace) for Ansible's own Python
extends_documentation_fragment:
  - constructed
  - inventory_cache
options:
  plugin:
    description: Marks the file as one for this plugin.
    type: str
    required: true
    choices: [secure_agent.workspace.broker]
  context:
    description:
      - Context file that says where the broker's operator socket is, and the bastion if there is one.
      - Without it and without the environment variable, the socket of this machine is used.
    type: path
    env:
      - name: SAW_CONTEXT
  states:
    description: Only workspaces in one of these states.
    type: list
    elements: str
    choices: [requested, provisioning, attesting, active, stopped, quarantined, decommissioned]
    default: [requested, provisioning, attesting, active, stopped, quarantined]
  blueprints:
    description: Only workspaces of one of these blueprints. Empty means all.
    type: list
    elements: str
    default: []
  rings:
    description: Only workspaces in one of these rings. Empty means all.
    type: list
    elements: str
    default: []
  sponsors:
    description: Only workspaces of one of these sponsors. Empty means all.
    type: list
    elements: str
    default: []
  images:
    description: Only workspaces that are bound to one of these images. Empty means all.
    type: list
    elements: str
    default: []
  connection:
    description: Set the variables with which hosts are reached. Without them, only the register is shown.
    type: bool
    default: true
"""

EXAMPLES = r"""
# fleet.broker.yml
plugin: secure_agent.workspace.broker
states: [active]
keyed_groups:
  - key: saw_workspace.ring
    prefix: ring
  - key: saw_workspace.blueprint
    prefix: blueprint
groups:
  old_policy: saw_workspace.reported_digest != saw_workspace.policy_digest
compose:
  owner: saw_workspace.sponsor
strict: true
cache: true
cache_plugin: ansible.builtin.jsonfile
cache_connection: ~/.cache/saw/inventory
cache_timeout: 300
"""

import gc
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleParserError
from ansible.inventory.host import Host
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.path import basedir
from ansible.utils.vars import combine_vars

try:
    from saw.broker.client import OperatorClient, listed_agents, listed_workspaces, load_context
    from saw.cli.ssh import fleet_file
    from saw.errors import SawError

    MISSING = False
except ImportError:
    SawError = Exception
    MISSING = True

GROUP = "saw_workspaces"
#: What is told of a workspace. Free texts that a machine or a person wrote stay with the broker.
FIELDS = (
    "id",
    "number",
    "state",
    "state_since",
    "created_at",
    "sponsor",
    "agent_id",
    "blueprint",
    "ring",
    "image",
    "image_sha256",
    "policy_digest",
    "attested_at",
    "lease_expires_at",
    "ek_recorded",
    "reported_state",
    "reported_digest",
    "reported_verified",
    "reported_at",
)
_fields = itemgetter(*FIELDS)
#: What is told of its agent as ``saw_agent``, for the same reason without owner and purpose; the last two are claims.
AGENT_FIELDS = ("id", "name", "state", "sponsor", "created_at", "predecessor", "version")
CLAIMS = ("harness", "model")
#: Option → filter of the broker's list.
FILTERS = {"states": "state", "blueprints": "blueprint", "rings": "ring", "sponsors": "sponsor", "images": "image"}
#: Names that mean something else to Ansible.
TAKEN = frozenset({"all", "ungrouped", "localhost", GROUP})
CERTIFICATE_TTL_S = 120
#: Up to so many workspaces, their agents are asked for by the workspace.
MOST_NAMED = 50
#: So many workspaces are named in a warning.
MOST_TOLD = 20


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No look for garbage: all that is made of a large fleet stays, and looking at it again takes a sixth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Alike:
    """Keyed groups whose keys are fields: ``groups`` has where the hosts with these values of ``fields`` belong."""

    def __init__(self, found: list[tuple[str, Any]]) -> None:
        self.fields = [pair[0] for pair in found]
        self.keyed = [pair[1] for pair in found]
        self.groups: dict[tuple[Any, ...], list[Any]] = {}


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """Ansible's way to the register."""

    NAME = "secure_agent.workspace.broker"

    def verify_file(self, path: str) -> bool:
        """Tell whether the file may be one for this plugin, by its name."""
        return super().verify_file(path) and path.endswith(("broker.yml", "broker.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Read the register, or what the cache kept of it, and add its workspaces to ``inventory``."""
        super().parse(inventory, loader, path, cache)
        if MISSING:
            raise AnsibleParserError("broker: Ansible's own Python lacks secure-agent-workspace; install it there")
        self._read_config_data(path)
        try:
            with nothing_collected():
                self._add(self._rows(path, cache))
        except SawError as error:
            raise AnsibleParserError(f"broker: {error}") from error

    def _rows(self, path: str, cache: bool) -> list[dict[str, Any]]:
        """Return what the cache has for this file and these filters, else what the broker says now."""
        filters = {name: [str(value) for value in self.get_option(option)] for option, name in FILTERS.items()}
        place = str(self.get_option("context") or "")
        key = self.get_cache_key(f"{path}\0{place}\0{sorted(filters.items())}")
        use, keep = self.get_option("cache") and cache, self.get_option("cache")
        if use:
            try:
                return list(self._cache[key])
            except KeyError:
                pass
        client = OperatorClient.from_context(place or None)
        with client.session():
            rows = listed_workspaces(client, **filters)
            agents = {one["id"]: one for one in listed_agents(client, **_of_workspaces(rows))}
        rows = [
            {**dict(zip(FIELDS, _fields(row), strict=True)), "agent": _told_of(agents.get(row["agent_id"]))}
            for row in rows
        ]
        if keep:
            self._cache[key] = rows
        return rows

    def _add(self, rows: list[dict[str, Any]]) -> None:
        inventory = self.inventory
        inventory.add_group(GROUP)
        ingress = self._way_in()
        compose, groups, keyed = (self.get_option(name) for name in ("compose", "groups", "keyed_groups"))
        strict = self.get_option("strict")
        alike, single = self._parted(keyed)
        # Ansible would look for the folder of the inventory file once for each host.
        source, inventory.current_source = inventory.current_source, None
        unreached: dict[str, list[str]] = {}
        origin = {"inventory_file": source, "inventory_dir": basedir(source) if source else None}
        for kept in rows:
            # A cache from before agents were told has none.
            name, agent = kept["id"], kept.get("agent", {})
            row = dict(zip(FIELDS, _fields(kept), strict=True))
            if name in TAKEN or name in inventory.groups:
                raise AnsibleParserError(
                    f"broker: Ansible has another meaning for the workspace id {name!r}; leave it out by the filters"
                )
            try:
                way = {} if ingress is None else _way_by_port(ingress, name, row["number"])
            except SawError as error:
                unreached.setdefault(error.cure, []).append(name)
                continue
            host = self._host(name)
            # Straight into the host's variables: ``set_variable`` marks every value below with the file that it came from, which
            # takes most of the time of a large fleet. Values without marks are data, never templates.
            known = host.vars
            known.update(origin, saw_workspace=row, saw_agent=agent, **way)
            if compose or groups or keyed:
                told = {"saw_workspace": row, "saw_agent": agent, "inventory_hostname": name}
                self._join(host, alike, told, strict)
                self._set_composite_vars(compose, told, name, strict)
                if compose:
                    told |= known
                self._add_host_to_composed_groups(groups, told, name, strict, fetch_hostvars=False)
                self._add_host_to_keyed_groups(single, told, name, strict, fetch_hostvars=False)
        inventory.current_source = source
        for cure, names in unreached.items():
            more = f" and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
            self.display.warning(
                f"broker: left out, as there is no way in by a port: {', '.join(names[:MOST_TOLD])}{more}; {cure}"
            )

    def _host(self, name: str) -> Any:
        """Return the host, in the group of all workspaces. A new one is made as ``add_host`` makes it, without the origin, which
        that would set twice and check each time."""
        inventory = self.inventory
        if name in inventory.hosts or name in C.LOCALHOST:
            inventory.add_host(name, GROUP)
            return inventory.hosts[name]
        host = inventory.hosts[name] = Host(name)
        inventory.groups[GROUP].add_host(host)
        return host

    def _parted(self, keyed: Any) -> tuple[Alike, list[Any]]:
        """Return the keyed groups that hosts with equal fields have in common, and those to be found for each host alone."""
        found: list[Any] = keyed if isinstance(keyed, list) else []
        fields = [
            _field(one.get("key"))
            if isinstance(one, dict) and not self.templar.is_template(one.get("parent_group"))
            else ""
            for one in found
        ]
        alike = [(field, one) for field, one in zip(fields, found, strict=True) if field]
        return Alike(alike), [one for field, one in zip(fields, found, strict=True) if not field]

    def _join(self, host: Any, alike: Alike, told: dict[str, Any], strict: bool) -> None:
        """Put a new host into keyed groups: the first with these values as Ansible does it, the others where that one is."""
        if not alike.keyed:
            return
        values = tuple(told["saw_workspace"][field] for field in alike.fields)
        groups = alike.groups.get(values)
        if groups is None:
            before = {group.name for group in host.groups if host.name in group.host_names}
            self._add_host_to_keyed_groups(alike.keyed, told, host.name, strict, fetch_hostvars=False)
            direct = [group for group in host.groups if host.name in group.host_names]
            # A host that another source has made may have been in one of them before: it is no example.
            if before == {GROUP}:
                alike.groups[values] = [group for group in direct if group.name != GROUP]
            return
        for group in groups:
            group.add_host(host)

    def _compose(self, template: Any, variables: Any, **more: Any) -> Any:
        """Evaluate an expression; one that only names a field of the register needs no template engine, which compiles anew
        for each host."""
        if field := _field(template):
            # What follows, such as the parent group, is evaluated with the same variables.
            seen = combine_vars(variables, self._vars) if self.get_option("use_extra_vars") else variables
            self.templar.available_variables = seen
            if seen["saw_workspace"] is variables["saw_workspace"]:
                return variables["saw_workspace"][field]
        return super()._compose(template, variables, **more)

    def _way_in(self) -> Any:
        """Set what all hosts are reached by; return the ingress when each has a port of its own."""
        if not self.get_option("connection"):
            return None
        place = str(self.get_option("context") or "") or None
        context = load_context(place)
        to = context.bastion or context.ingress
        config = fleet_file(context, place, CERTIFICATE_TTL_S)
        told: dict[str, Any] = {"ansible_user": to.user, "ansible_ssh_args": f"-F {shlex.quote(str(config))}"}
        if context.bastion is not None:
            told["ansible_port"] = context.bastion.port
        for name, value in told.items():
            self.inventory.set_variable(GROUP, name, value)
        return None if context.bastion is not None else context.ingress


def _field(template: Any) -> str:
    """Return the field of the register that an expression names and nothing else, empty when it does more."""
    field = template.removeprefix("saw_workspace.") if isinstance(template, str) else ""
    return field if field in FIELDS and template != field else ""


def _way_by_port(ingress: Any, name: str, number: int) -> dict[str, Any]:
    """Return how ssh reaches a workspace by its port. The host stays the id, for which ssh has the certificate made."""
    host, port = ingress.of(number)
    elsewhere = f" -o HostName={shlex.quote(host)}" if host != ingress.host else ""
    return {"ansible_port": port, "ansible_ssh_extra_args": f"-o HostKeyAlias={name}{elsewhere}"}


def _of_workspaces(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the filter for the agents of these workspaces; of many, all agents are read, in one page each."""
    return {"workspace": [row["id"] for row in rows]} if len(rows) <= MOST_NAMED else {}


def _told_of(agent: dict[str, Any] | None) -> dict[str, Any]:
    """Return what is told of an agent, nothing of one that the register does not know."""
    if agent is None:
        return {}
    claims = {name: agent["claims"][name] for name in CLAIMS}
    return {**{name: agent[name] for name in AGENT_FIELDS}, "claims": claims}
