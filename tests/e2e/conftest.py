"""End to end on a real VM: everything runs against the checkout that ``SAW_E2E_CHECKOUT`` names (``make test-e2e`` makes it).

The tests build on one another in the order of their files: bring-up, attack as root in the VM, lease and kill, rebuild,
clean-up. Each states a promise of the product; none of them sleeps where it can wait for a state.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_access import PLACES, Workspace, wait_until

sys.path += [str(Path(__file__).parents[1] / "integration" / folder) for folder in ("docs", "broker")]

CHECKOUT = os.environ.get("SAW_E2E_CHECKOUT", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a checkout there is nothing to test against."""
    for item in items:
        item.add_marker(pytest.mark.e2e)
        if not CHECKOUT:
            item.add_marker(pytest.mark.skip(reason="run `make test-e2e`: it brings a workspace up from a clean clone"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The clean clone."""
    return Path(CHECKOUT)


@pytest.fixture(scope="session")
def log(checkout: Path) -> Iterator[Any]:
    """Output of the long commands; kept in the outer checkout's build directory."""
    path = Path("build/e2e.log")
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as stream:
        yield stream


@pytest.fixture(scope="session")
def report(checkout: Path) -> dict[str, Any]:
    """The control report of the bring-up."""
    path = checkout / "build/report.json"
    if not path.exists():
        pytest.fail("there is no report: the bring-up failed")
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def workspace(report: dict[str, Any], checkout: Path) -> Iterator[Workspace]:
    """The demonstration workspace."""
    made = Workspace(checkout, report["workspace"]["id"], int(report["workspace"]["number"]))
    yield made
    made.leave()


@pytest.fixture(scope="session")
def rooted(workspace: Workspace) -> Workspace:
    """The workspace with a root implant; it boots and attests like before."""

    def seen() -> str:
        return workspace.agent("test -d ~/.implant && echo there || echo absent").stdout.strip()

    if wait_until("a shell", seen, patience=300) == "absent":
        workspace.saw("lab", "stop", timeout=300)
        workspace.implant()
        workspace.saw("lab", "start", timeout=900)
    code, text = workspace.root("id -u")
    assert (code, text.strip()) == (0, "0")
    return workspace


@pytest.fixture(scope="session")
def planted(rooted: Workspace) -> str:
    """What root left in many places of the running VM, and the user in the home: the word that is in every such file."""
    marker = secrets.token_hex(16)
    places = [path for path in PLACES if path.endswith("attacker")]
    plant = "\n".join(f"echo {marker} > {path}" for path in [*places, "/home/agent/kept-by-user"])
    assert rooted.root(f"{plant}\nchown agent: /home/agent/kept-by-user; sync")[0] == 0
    return marker


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """Figures that the tests measured: name → ``{value, unit, goal}``; kept in the outer checkout's build directory."""
    measured: dict[str, Any] = {}
    yield measured
    path = Path("build/e2e-figures.json")
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**earlier, **measured}, indent=2) + "\n", encoding="utf-8")


def run(checkout: Path, *argv: str, log: Any = None, timeout: float = 1500) -> int:
    """Run a command of the clone; return its exit code."""
    done = subprocess.run(
        argv, cwd=checkout, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=timeout, check=False
    )
    return done.returncode
