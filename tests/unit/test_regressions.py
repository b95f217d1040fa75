"""docs/regressions.md and the marks of the tests agree, and each way in which they could not is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/regressions.py"
TEST = 'import pytest\n\n@pytest.mark.regression("{mark}")\ndef test_refused():\n    pass\n'


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script as if it lay in ``root``."""
    (root / "scripts").mkdir(exist_ok=True)
    place = root / "scripts/regressions.py"
    place.write_text(SCRIPT.read_text())
    return subprocess.run([sys.executable, str(place), *words], capture_output=True, text=True, check=False)


def repository(root: Path, *, rows: str = "CVE-2026-1", mark: str = "CVE-2026-1") -> Path:
    (root / "docs").mkdir()
    (root / "tests").mkdir()
    lines = "\n".join(f"| {one} | there | here |" for one in rows.split())
    begin, end = "<!-- tests: begin, written by scripts/regressions.py -->", "<!-- tests: end -->"
    (root / "docs/regressions.md").write_text(f"# Title\n\n{lines}\n\n{begin}\n{end}\n")
    (root / "tests/test_net.py").write_text(TEST.format(mark=mark))
    return root


def test_this_repository_is_consistent() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_list_is_written_and_one_that_is_stale_is_found(tmp_path: Path) -> None:
    repository(tmp_path)
    assert "not current" in run(tmp_path, "--check").stderr
    assert run(tmp_path).returncode == 0
    assert run(tmp_path, "--check").returncode == 0
    assert "[test_refused](../tests/test_net.py)" in (tmp_path / "docs/regressions.md").read_text()


@pytest.mark.parametrize(
    ("rows", "mark", "words"),
    [
        ("CVE-2026-1 CVE-2026-2", "CVE-2026-1", "CVE-2026-2 has no marked test"),
        ("CVE-2026-1", "CVE-2026-9", "has no 'CVE-2026-9'"),
        ("CVE-2026-1 CVE-2026-1", "CVE-2026-1", "is there 2 times"),
    ],
)
def test_a_page_that_says_more_or_less_than_the_tests_is_found(
    tmp_path: Path, rows: str, mark: str, words: str
) -> None:
    repository(tmp_path, rows=rows, mark=mark)
    done = run(tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
