"""A publication on disk: whoever finds its folder finds all of it, also when the command that wrote it was ended half-way."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from saw.cli import policy_signing
from saw.cli.policy_signing import load_publication, save_publication
from saw.policy.tuf_repository import Publication

BUNDLE = "rings/canary/coding.bundle.json"
MADE = Publication({"targets.json": b"top", "canary.json": b"ring"}, {BUNDLE: b"bundle"})
COSIGNED = Publication({"targets.json": b"top, twice", "canary.json": b"ring, twice"}, {BUNDLE: b"bundle"})


def ended_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the write of the file ``number`` be the end of the command."""
    real, count = policy_signing.write_atomic, iter(range(100))

    def write(path: Path, content: bytes) -> None:
        if next(count) == number:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(policy_signing, "write_atomic", write)


@pytest.mark.control("POL-02")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_new_folder_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "releases/coding-1"
    with monkeypatch.context() as patch:
        ended_at(patch, number)
        with pytest.raises(KeyboardInterrupt):
            save_publication(str(out), MADE)
    assert list((tmp_path / "releases").iterdir()) == []
    save_publication(str(out), MADE)
    assert load_publication(str(out)) == MADE
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((out / "metadata").stat().st_mode)


def test_an_empty_folder_is_taken_and_a_full_one_keeps_what_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_publication(str(out), MADE)
    with monkeypatch.context() as patch:
        ended_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            save_publication(str(out), COSIGNED)
    assert load_publication(str(out)).metadata == {"canary.json": b"ring, twice", "targets.json": b"top"}
    save_publication(str(out), COSIGNED)
    assert load_publication(str(out)) == COSIGNED
