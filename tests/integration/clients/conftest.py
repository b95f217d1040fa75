"""One workspace with both rings, for real clients; started once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / name) for name in ("gateway", "ring1")]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Return a workspace whose sandbox reaches the far ends through ring 1 and ring 2."""
    from clients_rig import Workspace
    from ring2_rig import Rig

    from saw.runtime.landlock import abi

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    with ExitStack() as stack:
        ring2 = Rig(stack, Path(tmp_path_factory.mktemp("ring2")))
        workspace = Workspace(ring2)
        stack.callback(workspace.stop)
        workspace.open()
        yield workspace
