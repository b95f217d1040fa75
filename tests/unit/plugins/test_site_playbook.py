"""The playbook site: which parts it looks after on which hosts, and that an unknown part stops it before anything else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
SITE = ROOT / "playbooks/site.yml"
HOSTS = """
[control_plane]
control
[hypervisors]
edge
[perimeter]
edge
[workspaces]
guest
[all:vars]
ansible_connection=local
"""
pytestmark = pytest.mark.control("P0-01")


@pytest.fixture
def site(tmp_path: Path):
    """Run the playbook on hosts that are this machine, as far as it gets; only parts that change nothing are asked for."""
    place = tmp_path / "collections/ansible_collections/secure_agent"
    place.mkdir(parents=True)
    (place / "workspace").symlink_to(ROOT)
    (tmp_path / "hosts").write_text(HOSTS)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(tmp_path / "hosts"), str(SITE)]
        return subprocess.run(
            [*command, "-e", f"ansible_python_interpreter={sys.executable}", *options],
            capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
            env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"), "ANSIBLE_HOME": str(tmp_path / "home"),
                 "ANSIBLE_FORCE_COLOR": "0"},
        )  # fmt: skip

    return run


def hosts_of(listing: str) -> dict[str, set[str]]:
    """Names of plays and the hosts that ``--list-hosts`` tells for each."""
    plays = re.split(r"^  play #\d+ \(.*?\): (.*?)\s+TAGS.*$", listing, flags=re.MULTILINE)
    return {
        name: set(re.findall(r"^      (\S+)$", text, re.MULTILINE))
        for name, text in zip(plays[1::2], plays[2::2], strict=True)
    }


@pytest.mark.thorough
@pytest.mark.parametrize("limit", [[], ["-l", "edge"]], ids=["all hosts", "one host"])
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            '{"site_parts": ["baseline", "basline"]}',
            "site_parts: basline is not among control_plane, audit_witness, base",
        ),
        ("site_parts=baseline", "site_parts has to be a list"),
        ('{"site_parts": {"baseline": true}}', "site_parts has to be a list"),
    ],
    ids=["not known", "text", "mapping"],
)
def test_what_is_no_known_part_stops_the_run_before_any_play(site, parts, words, limit) -> None:
    done = site("-e", parts, *limit)
    assert done.returncode not in (0, 1), done.stdout
    assert words in " ".join(done.stderr.split())
    assert "PLAY [" not in done.stdout


def test_what_the_inventory_names_is_refused_as_well(site, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(HOSTS + "site_parts=['basline']\n")
    done = site()
    assert done.returncode == 2, done.stdout
    assert "site_parts: basline is not among control_plane, audit_witness, baseline" in " ".join(done.stdout.split())
    assert re.findall(r"^PLAY \[(.*?)\]", done.stdout, re.MULTILINE) == ["Parts of the site"]


def test_a_known_part_reaches_the_host_that_the_limit_names(site) -> None:
    chosen = hosts_of(site("--list-hosts", "-l", "edge", "-e", '{"site_parts": ["baseline"]}').stdout)
    assert chosen["Baseline"] == {"edge"}
    assert not chosen["Endpoint detection"] | chosen["Patching"]


@pytest.mark.thorough
def test_no_part_does_nothing_on_any_host(site) -> None:
    done = site("-e", '{"site_parts": []}')
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+) +: ok=(\d+) ", done.stdout, re.MULTILINE))
    assert {host: count for host, count in counts.items() if count != "0"} == {"localhost": "1"}, done.stdout


def test_each_part_takes_its_own_hosts(site) -> None:
    usual = hosts_of(site("--list-hosts").stdout)
    assert usual["Baseline"] == {"control", "edge"}
    assert not usual["Endpoint detection"] | usual["Patching"] | usual["Telemetry"] | usual["Schedule of drift reports"]
    chosen = hosts_of(
        site("--list-hosts", "-e", '{"site_parts": ["edr", "patching", "telemetry", "drift_schedule"]}').stdout
    )
    assert chosen["Endpoint detection"] == chosen["Patching"] == chosen["Telemetry"] == {"control", "edge"}
    assert (chosen["Schedule of drift reports"], chosen["Baseline"]) == ({"control"}, set())
    other = hosts_of(site("--list-hosts", "-e", '{"site_parts": ["baseline"], "site_hosts": ["guest"]}').stdout)
    assert other["Baseline"] == {"guest"}


def test_every_part_is_a_playbook_of_its_name() -> None:
    plays = yaml.safe_load(SITE.read_text())
    imported = [play["ansible.builtin.import_playbook"] for play in plays[1:]]
    known = plays[0]["vars"]["known"]
    assert [name.removesuffix(".yml") for name in imported] == [*known[:-1], "workspace_converge"]
    assert known[-1] == "workspaces"


#: Hosts by group: one in all of them, one in each alone; and the embedded default.
FLEETS = [
    {name: ["every", f"only_{name}"] for name in ("control_plane", "hypervisors", "perimeter", "bastions")},
    {"control_plane": ["one"], "perimeter": ["two"], "hypervisors": ["two"]},
]


@pytest.mark.parametrize("fleet", FLEETS, ids=["all_groups", "embedded"])
def test_each_host_gets_the_runtime_once_and_before_anything_that_needs_it(tmp_path: Path, fleet) -> None:
    """The conditions of the playbook control_plane, judged by Ansible itself, with a note in place of the role."""
    plays = yaml.safe_load((ROOT / "playbooks/control_plane.yml").read_text())
    for number, play in enumerate(plays):
        first = play.pop("roles")[0]
        assert first["role"].endswith(".saw_runtime")
        note = {"ansible.builtin.debug": {"msg": f"{number} {{{{ inventory_hostname }}}} gets it"}}
        play["tasks"] = [note | ({"when": first["when"]} if "when" in first else {})]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(plays))
    text = "".join(f"[{group}]\n" + "".join(f"{host}\n" for host in hosts) for group, hosts in fleet.items())
    (tmp_path / "hosts").write_text(text + "[all:vars]\nansible_connection=local\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path / "hosts", tmp_path / "play.yml"],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_FORCE_COLOR": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    got = re.findall(r"(\d) (\w+) gets it", done.stdout)
    assert sorted(host for _, host in got) == sorted({host for hosts in fleet.values() for host in hosts})
    order = [
        play["hosts"] if isinstance(play["hosts"], str) and "{" not in play["hosts"] else "bastions" for play in plays
    ]
    for number, host in got:
        assert int(number) == min(order.index(group) for group, hosts in fleet.items() if host in hosts)
