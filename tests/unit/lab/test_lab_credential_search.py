"""The credential search of the demonstration: the real collector as another process, the search outside."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from private_ns import private

from saw.lab import demo
from saw.lab.topology import Lab
from saw.lab.up import Bringup

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives the agent a home of its own in a private namespace")
HOME = Path("/home/agent")


class Job:
    """What the search needs of a bring-up."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bringup:
    """A job whose way into the workspace is a shell on this machine, which joins its words as ssh does."""
    way = tmp_path / "ssh"
    way.write_text(
        f'#!/bin/sh\nshift 2\nexec env -i PATH="$PATH" HOME={HOME} TOKEN="$TOKEN" /bin/sh -c '
        f'"$(printf %s "$*" | sed "s,/opt/saw/bin/python -I -,{sys.executable} -I - {HOME},")"\n'
    )
    way.chmod(0o755)
    monkeypatch.setattr(demo, "ssh_line", lambda workspace: [str(way), workspace])
    monkeypatch.delenv("TOKEN", raising=False)
    return cast("Bringup", Job(Lab(tmp_path, tmp_path / "build")))


def searched(job: Bringup, prepare: Callable[[dict[str, str]], None]) -> dict[str, Any]:
    """Return the finding when ``prepare`` has been done in the agent's home."""

    def attempt() -> dict[str, Any]:
        HOME.mkdir()
        prepare(job.lab.credentials())
        found = demo.credential_search(job, "ws")
        assert not (HOME / ".saw-search").exists()
        return found

    return private(attempt, tmpfs={"/home": "16m"})


def test_a_clean_home_is_searched_and_clean(job: Bringup) -> None:
    seen = searched(job, lambda _: None)
    assert (seen["verdict"], seen["ok"], seen["control"]) == ("deny", True, "CRED-01"), seen
    assert "found: none" in seen["detail"]


def test_a_credential_in_a_file_is_found_whatever_its_form(job: Bringup) -> None:
    def leak(secrets: dict[str, str]) -> None:
        (HOME / ".cache").mkdir()
        (HOME / ".cache/helper").write_bytes(base64.b64encode(f"x:{secrets['git-token']}".encode()))

    seen = searched(job, leak)
    assert (seen["verdict"], seen["ok"]) == ("allow", False)
    assert f"git-token in {HOME}/.cache/helper" in seen["detail"]


def test_a_credential_in_an_environment_and_in_git_configuration_is_found(
    job: Bringup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", job.lab.credentials()["api-token"])
    assert "api-token in environment:TOKEN" in searched(job, lambda _: None)["detail"]
    monkeypatch.delenv("TOKEN")

    def configure(secrets: dict[str, str]) -> None:
        (HOME / ".gitconfig").write_text(f"[http]\n extraHeader = Bearer {secrets['model-key']}\n")

    assert "model-key in git config" in searched(job, configure)["detail"]


def test_a_search_that_cannot_run_or_finds_not_even_the_planted_words_proves_nothing(
    job: Bringup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no way in >&2\nexit 255\n")
    broken.chmod(0o755)
    monkeypatch.setattr(demo, "ssh_line", lambda _: [str(broken)])
    seen = searched(job, lambda _: None)
    assert (seen["verdict"], seen["ok"]) == ("error", False)
    assert "no way in" in seen["detail"]
    blind = tmp_path / "blind"
    blind.write_text('#!/bin/sh\nprintf \'{"end": true, "left_out": []}\\n\'\n')
    blind.chmod(0o755)
    monkeypatch.setattr(demo, "ssh_line", lambda _: [str(blind)])
    seen = searched(job, lambda _: None)
    assert (seen["verdict"], seen["ok"]) == ("error", False)
    assert "not seen: ['planted in the environment', 'planted in a file']" in seen["detail"]
