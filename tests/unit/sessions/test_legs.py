"""The folders with the keys of live sessions: gone with their session, also when its recorder was killed."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from saw.errors import UnavailableError
from saw.sessions.legs import leg_folder

pytestmark = pytest.mark.control("ID-02")
RECORDER = """
import sys
from pathlib import Path
from saw.sessions.legs import leg_folder
with leg_folder(Path(sys.argv[1])) as folder:
    (folder / "key").write_text("a key")
    print(folder, flush=True)
    sys.stdin.read()
"""


def recorder(runtime: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(runtime)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_and_goes_with_its_session(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), leg_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "key").write_text("a key")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_recorder_left_goes_with_the_next_session_and_what_lives_stays(tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    killed, left = recorder(tmp_path)
    living, kept = recorder(tmp_path)
    killed.kill()
    killed.wait()
    assert (left / "key").exists()
    try:
        with leg_folder(tmp_path) as mine:
            assert {path.name for path in tmp_path.iterdir()} == {"another", kept.name, mine.name}
            assert (kept / "key").exists()
    finally:
        living.communicate("")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]


def test_without_room_for_keys_there_is_no_session(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no room for keys"), leg_folder(tmp_path / "missing"):
        pytest.fail("a folder was given")
