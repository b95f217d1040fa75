"""The playbook ``site`` on booted hosts: a run without a change changes nothing, and asks each host no oftener than stated."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from saw.lab.topology import Lab

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"))
MOST = {"control": 19, "edge": 34}
"""How often a run without a change may ask each host. Each question costs 0.4 s or more over SSH, so a role that needs a further
one says here why it is worth it."""
pytestmark = [
    pytest.mark.control("P0-01"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to boot a host"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The benchmark, which is no package."""
    spec = importlib.util.spec_from_file_location("site_converge", ROOT / "benchmarks/site_converge.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules["site_converge"] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def runs(site: ModuleType):
    """The first run on fresh hosts, and one after which nothing was left to do."""
    first, after, _ = site.converge(Lab(ROOT, ROOT / "build"), 1, with_image=False)
    return first, after[0]


@pytest.mark.thorough
def test_a_run_without_a_change_changes_nothing_on_any_host(runs) -> None:
    first, again = runs
    assert first.changes("control")
    assert first.changes("edge")
    assert again.hosts() == ["control", "edge"]
    assert again.changes() == []


def test_a_run_asks_each_host_no_oftener_than_stated(runs) -> None:
    _, again = runs
    asked = {host: sum(one.asks for one in again.of(host)) for host in again.hosts()}
    over = {host: count for host, count in asked.items() if count > MOST[host]}
    assert not over, [
        f"{one.host} {one.role}: {one.task} ({one.asks})" for host in over for one in again.of(host) if one.asks
    ]
