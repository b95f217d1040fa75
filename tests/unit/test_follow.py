"""``scripts/follow.py``: a long command shows its stages as they begin, its whole output goes to the log."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/follow.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("saw_follow", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("INFO     [control > converge] Executing", "[control > converge] Executing"),
        ("\x1b[31mERROR    \x1b[0m[control > syntax] \x1b[31mExecuted: Failed\x1b[0m", "[control > syntax] Executed: Failed"),
        ("  │ PLAY [Control plane] ***********", "PLAY [Control plane]"),
        ("=========== 12 passed in 3.10s ==========", "12 passed in 3.10s"),
        ("[ 4/10] control plane, perimeter", "[ 4/10] control plane, perimeter"),
        ("        FAILED after 3.0 s", "FAILED after 3.0 s"),
        ("INFO     [control > converge] Executed: Successful", None),
        ("INFO     [control > discovery] scenario test matrix: syntax", None),
        ("TASK [Build] ****", None),
        ("        done in 3.0 s", None),
    ],
)  # fmt: skip
def test_only_lines_that_begin_or_end_a_stage_are_shown(line: str, short: str | None) -> None:
    assert load().stage(line) == short


def follow(tmp_path: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--log", str(tmp_path / "log"), *options, "--", "sh", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)


def test_the_log_has_everything_and_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    done = follow(tmp_path, "echo detail; echo 'INFO     [a > verify] Executing'; exit 3")
    assert done.returncode == 3
    assert [line.split("] ", 1)[1] for line in done.stdout.splitlines()] == ["[a > verify] Executing"]
    assert (tmp_path / "log").read_text() == "detail\nINFO     [a > verify] Executing\n"


def test_a_stage_that_is_replayed_into_another_file_is_shown_once(tmp_path: Path) -> None:
    (tmp_path / "all.log").write_text("[ 9/10] of an earlier run\n")
    script = (
        "for run in 1 2; do echo '[ 1/10] check' >inner; sleep 1; cat inner >>all.log; done;"
        "echo '[ 2/10] image' >>all.log"
    )
    done = follow(tmp_path, script, "--watch", str(tmp_path / "inner"), "--watch", str(tmp_path / "all.log"))
    shown = [line.split("s] ", 1)[1] for line in done.stdout.splitlines()]
    assert shown.count("[ 2/10] image") == 1
    assert shown.count("[ 1/10] check") == 2
    assert "[ 9/10] of an earlier run" not in shown


def test_a_test_that_ended_tells_where_a_quiet_run_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    quick = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import follow; follow.QUIET_S = 0.2; exit(follow.main())"
    line = "tests/e2e/test_1_bring_up.py::test_nothing_leaves PASSED [ 13%]"
    command = ["--log", str(tmp_path / "log"), "--whole", "--", "sh", "-c", f"echo '{line}'; read -r _ <{tmp_path}/go"]
    running = subprocess.Popen([sys.executable, "-c", quick, *command], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        assert running.stdout.readline() == f"{line}\n"
        assert running.stdout.readline().endswith("still at: what follows test_nothing_leaves\n")
    finally:
        (tmp_path / "go").write_text("on\n")
        running.communicate(timeout=30)
    assert running.returncode == 0
