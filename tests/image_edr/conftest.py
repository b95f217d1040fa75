"""Detections on a booted golden image with endpoint detection: ``make image-edr-check`` brings the workspace up in a clone.

Not part of ``make test``: the image is built and booted for this alone. Ways into the VM are those of the end-to-end tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "e2e"))

from edr_findings import Findings, plant
from vm_access import Workspace, wait_until

CHECKOUT = os.environ.get("SAW_IMAGE_EDR_CHECKOUT", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a checkout there is nothing to test against."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.e2e)
            if not CHECKOUT:
                item.add_marker(pytest.mark.skip(reason="run `make image-edr-check`: it brings such a workspace up"))


@pytest.fixture(scope="session")
def workspace() -> Iterator[Workspace]:
    """The workspace on the image."""
    checkout = Path(CHECKOUT)
    report = json.loads((checkout / "build/report.json").read_text(encoding="utf-8"))
    made = Workspace(checkout, report["workspace"]["id"], int(report["workspace"]["number"]))
    yield made
    made.leave()


@pytest.fixture(scope="session")
def findings(workspace: Workspace) -> Findings:
    """The workspace's findings at the broker."""
    return Findings(workspace)


@pytest.fixture(scope="session")
def rooted(workspace: Workspace) -> Workspace:
    """The workspace with a root implant and what :func:`plant` wrote into the stopped VM's disk; it attests like before."""

    def seen() -> str:
        return workspace.agent("test -d ~/.implant && echo there || echo absent").stdout.strip()

    if wait_until("a shell", seen, patience=300) == "absent":
        workspace.saw("lab", "stop", timeout=300)
        workspace.implant()
        plant(workspace)
        workspace.saw("lab", "start", timeout=900)
    code, text = workspace.root("id -u")
    assert (code, text.strip()) == (0, "0")
    return workspace
