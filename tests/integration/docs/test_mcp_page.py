"""docs/mcp.md as it is written: its bundle is checked, its cases hold, and explain prints what the page shows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from page import run_page


@pytest.mark.control("RUN-05")
def test_the_page_on_tools(tmp_path: Path) -> None:
    printed, pinned = run_page("docs/mcp.md", tmp_path, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert "send limit as a value of type integer, at least 1, at most 50" in printed
    assert "search: sha256:" in pinned
