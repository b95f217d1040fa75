"""The inventory plugin against a real broker, as ``ansible-inventory`` shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from databases import beside

ROOT = Path(__file__).resolve().parents[3]
KEYED = {"key": "saw_workspace.ring", "prefix": "ring"}


class Shown:
    """What ``ansible-inventory --list`` printed."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.failed, self.words = done.returncode != 0, " ".join((done.stdout + done.stderr).split())
        # Ansible shows data that is no template as {"__ansible_unsafe": text}.
        self.all: dict[str, Any] = {}
        if not self.failed:
            self.all = json.loads(done.stdout, object_hook=lambda found: found.get("__ansible_unsafe", found))

    @property
    def hosts(self) -> dict[str, Any]:
        return dict(self.all["_meta"]["hostvars"])

    def group(self, name: str) -> set[str]:
        return set(self.all.get(name, {}).get("hosts", []))


@pytest.fixture(scope="module")
def shop(broker_context, tmp_path_factory):
    """Workspaces in rings of this module's own, and a way to list them."""
    base = tmp_path_factory.mktemp("inventory")
    link = base / "ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    for name, ring in (("inv-a", "inv-one"), ("inv-b", "inv-two")):
        broker_context.workspace(name, ring=ring)
    broker_context.operator.request(
        "POST",
        "/v1/workspaces",
        {"id": "inv-c", "sponsor": "{{ 6 * 7 }}", "blueprint": "coding", "ring": "inv-two", "image": "workspace"},
    )
    broker_context.step("inv-c", "decommissioned")

    def show(*options: str, bastion: dict[str, Any] | None = None, **told: Any) -> Shown:
        context = {"broker": {"socket": broker_context.config.operator_socket}, "bastion": bastion}
        (base / "context.json").write_text(json.dumps(context))
        file = base / "fleet.broker.yml"
        file.write_text(
            json.dumps(
                {
                    "plugin": "secure_agent.workspace.broker",
                    "context": str(base / "context.json"),
                    "rings": ["inv-one", "inv-two"],
                    **told,
                }
            )
        )
        environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(base), "SAW_SSH_KEYS": str(base / "kept")}
        environment |= {"ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1", "ANSIBLE_NOCOLOR": "1"}
        command = [str(Path(sys.executable).parent / "ansible-inventory"), *options, "-i", str(file), "--list"]
        return Shown(
            subprocess.run(command, env=environment, cwd=base, capture_output=True, text=True, timeout=300, check=False)
        )

    show.base = base
    return show


def test_workspaces_are_hosts_with_what_the_register_says(shop) -> None:
    every = ["requested", "decommissioned"]
    shown = shop(
        states=every,
        strict=True,
        bastion={"host": "edge.example.com", "port": 2200},
        keyed_groups=[KEYED],
        groups={"gone": "saw_workspace.state == 'decommissioned'"},
        compose={
            "owner": "saw_workspace.sponsor",
            "agent_of": "saw_agent.sponsor",
            "label": "saw_workspace.ring ~ '/' ~ saw_workspace.blueprint",
        },
    )
    assert not shown.failed, shown.words
    assert set(shown.hosts) == shown.group("saw_workspaces") == {"inv-a", "inv-b", "inv-c"}
    assert (shown.group("ring_inv_one"), shown.group("ring_inv_two")) == ({"inv-a"}, {"inv-b", "inv-c"})
    assert shown.group("gone") == {"inv-c"}
    one = shown.hosts["inv-a"]
    told = one["saw_workspace"]
    assert (told["id"], told["state"], told["blueprint"], told["ring"]) == ("inv-a", "requested", "coding", "inv-one")
    assert (told["image"], told["image_sha256"], told["ek_recorded"]) == ("workspace", "1" * 64, False)
    assert (told["policy_digest"], told["attested_at"], told["lease_expires_at"]) == (None, None, None)
    assert (one["owner"], one["label"]) == ("ada@example.com", "inv-one/coding")
    agent = one["saw_agent"]
    assert (agent["id"], agent["name"], agent["state"]) == (told["agent_id"], told["agent_id"], "registered")
    assert agent["claims"] == {"harness": "", "model": ""}
    assert set(agent) & {"owner", "purpose"} == set()
    assert (shown.hosts["inv-c"]["saw_agent"]["state"], one["agent_of"]) == ("retired", "ada@example.com")
    # A sponsor that looks like a template stays the text that it is.
    assert shown.hosts["inv-c"]["owner"] == shown.hosts["inv-c"]["saw_workspace"]["sponsor"] == "{{ 6 * 7 }}"
    assert (one["ansible_user"], one["ansible_port"]) == ("saw-session", 2200)
    assert "ansible_host" not in one
    config = Path(one["ansible_ssh_args"].removeprefix("-F "))
    assert config.parent == shop.base / "kept"
    assert config.stat().st_mode & 0o777 == 0o600
    assert "HostName edge.example.com" in config.read_text()


def test_hosts_with_equal_fields_share_keyed_groups_and_nothing_else_of_the_first_host(shop, broker_context) -> None:
    for name, ring in (("inv-k1", "inv-even"), ("inv-k2", "inv-even"), ("inv-k3", "inv-odd"), ("inv-k4", "inv-even")):
        broker_context.workspace(name, ring=ring)
    shown = shop(
        rings=["inv-even", "inv-odd"],
        keyed_groups=[
            KEYED,
            {"key": "saw_workspace.blueprint", "prefix": "", "separator": "", "parent_group": "kinds"},
            {"key": "saw_workspace.sponsor", "prefix": "of", "parent_group": "{{ saw_workspace.ring }}_people"},
            {"key": "saw_workspace.attested_at", "default_value": "never", "prefix": "attested"},
            {"key": "saw_workspace.reported_at", "prefix": "reported"},
            {"key": "saw_workspace.ring ~ '-x'", "prefix": "joined"},
        ],
        groups={"first": "saw_workspace.id == 'inv-k1'"},
    )
    assert not shown.failed, shown.words
    even, odd = {"inv-k1", "inv-k2", "inv-k4"}, {"inv-k3"}
    assert (shown.group("ring_inv_even"), shown.group("ring_inv_odd")) == (even, odd)
    assert (shown.group("joined_inv_even_x"), shown.group("joined_inv_odd_x")) == (even, odd)
    assert shown.group("coding") == shown.group("attested_never") == shown.group("of_ada_example_com") == even | odd
    assert shown.group("first") == {"inv-k1"}
    assert shown.all["kinds"] == {"children": ["coding"]}
    assert shown.all["inv_even_people"] == shown.all["inv_odd_people"] == {"children": ["of_ada_example_com"]}
    assert not [name for name in shown.all if name.startswith("reported")]


def test_what_another_source_says_of_a_host_is_not_passed_on_to_hosts_with_equal_fields(shop, broker_context) -> None:
    for name in ("inv-s1", "inv-s2", "inv-s3"):
        broker_context.workspace(name, ring="inv-sources")
    before = shop.base / "before.yml"
    before.write_text(json.dumps({"elsewhere": {"hosts": {"inv-s1": {}}}}))
    shown = shop("-i", str(before), rings=["inv-sources"], keyed_groups=[KEYED])
    assert not shown.failed, shown.words
    assert shown.group("elsewhere") == {"inv-s1"}
    assert shown.group("ring_inv_sources") == {"inv-s1", "inv-s2", "inv-s3"}


def test_extra_variables_count_for_fields_where_they_are_asked_for(shop) -> None:
    told = {"keyed_groups": [{**KEYED, "parent_group": "{{ site }}"}], "compose": {"known": "saw_workspace.ring"}}
    site = ("--extra-vars", json.dumps({"site": "north"}))
    shown = shop(*site, rings=["inv-one"], use_extra_vars=True, **told)
    assert shown.all.get("north") == {"children": ["ring_inv_one"]}, shown.words
    assert "north" not in shop(*site, rings=["inv-one"], **told).all
    other = ("--extra-vars", json.dumps({"site": "north", "saw_workspace": {"ring": "other"}}))
    shown = shop(*other, rings=["inv-one"], use_extra_vars=True, **told)
    assert (shown.hosts["inv-a"]["known"], shown.group("ring_other")) == ("other", {"inv-a"})


def test_filters_leave_out_and_the_ingress_has_a_port_for_each(shop) -> None:
    shown = shop(states=["requested"], sponsors=["ada@example.com"], blueprints=["coding"])
    assert set(shown.hosts) == {"inv-a", "inv-b"}, shown.words
    for name, told in shown.hosts.items():
        assert told["ansible_port"] == 22000 + told["saw_workspace"]["number"]
        assert told["ansible_ssh_extra_args"] == f"-o HostKeyAlias={name}"
        assert told["ansible_user"] == "agent"
    bare = shop(rings=["inv-one"], connection=False)
    assert set(bare.hosts) == {"inv-a"}
    assert {name for name in bare.hosts["inv-a"] if name.startswith("ansible_")} == set()


def test_a_workspace_without_a_way_in_is_left_out_with_a_warning_and_the_others_stay(shop, broker_context) -> None:
    broker_context.workspace("inv-near", ring="inv-ways")
    broker_context.workspace("inv-far", ring="inv-ways")
    with beside(broker_context.config) as store:
        store.execute("UPDATE workspaces SET number = 10001 WHERE id = 'inv-far'")
    shown = shop(rings=["inv-ways"])
    assert set(shown.hosts) == shown.group("saw_workspaces") == {"inv-near"}, shown.words
    assert "left out, as there is no way in by a port: inv-far; go through a bastion, or name" in shown.words
    for told in ({"bastion": {"host": "edge.example.com"}}, {"connection": False}):
        shown = shop(rings=["inv-ways"], **told)
        assert set(shown.hosts) == {"inv-near", "inv-far"}
        assert "left out" not in shown.words


def test_the_cache_answers_until_it_is_flushed(shop, broker_context) -> None:
    told = {"rings": ["inv-cache"], "cache": True, "cache_plugin": "ansible.builtin.jsonfile"}
    told["cache_connection"] = str(shop.base / "cache")
    assert set(shop(**told).hosts) == set()
    broker_context.workspace("inv-late", ring="inv-cache")
    assert set(shop(**told).hosts) == set()
    assert set(shop("--flush-cache", **told).hosts) == {"inv-late"}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"states": ["gone"]}, "gone"),
        ({"strict": True, "compose": {"owner": "saw_workspace.owner"}}, "Could not set owner for host inv-"),
        ({"strict": True, "keyed_groups": [{"key": "saw_workspace.attested_at"}]}, "No key or key resulted empty"),
        ({"context": "/nowhere/context.json"}, "broker: "),
    ],
)
def test_what_cannot_be_is_refused(shop, told: dict[str, Any], words: str) -> None:
    shown = shop(**told)
    assert shown.failed
    assert words in shown.words


def test_an_id_that_ansible_takes_for_something_else_is_refused(shop, broker_context) -> None:
    broker_context.workspace("localhost", ring="inv-taken")
    shown = shop(rings=["inv-taken"])
    assert shown.failed
    assert "Ansible has another meaning for the workspace id 'localhost'" in shown.words
