"""A recording opens whole, in order and under its own key, or it is refused with the reason; and it becomes an asciicast."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.identity.sealed import SealKey
from saw.sessions.asciicast import lines, play
from saw.sessions.recording import (
    MAGIC,
    Chunk,
    Ending,
    Event,
    Header,
    RecordingBroken,
    RecordingFailed,
    Writer,
    digest_of,
    events,
    verify,
)

SESSION = "ses-" + "1" * 32
OTHER = "ses-" + "2" * 32
KEY = SealKey(bytes(range(32)), os.urandom)
HEADER = Header(
    SESSION, "ws-a", "user:ada@example.com", 1_790_000_000.5, terminal=True, columns=100, rows=30, term="xterm"
)
ENDING = Ending("closed", 0, 3, 9, "a" * 64, "b" * 64)

pytestmark = pytest.mark.control("ID-02")


def recorded(path: Path, shown: list[bytes], *, session: str = SESSION, end: bool = True) -> str:
    """Write a recording; return its digest."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        writer = Writer(descriptor, session, KEY, 1024**3)
        writer.write(Chunk(header=HEADER))
        for place, piece in enumerate(shown):
            writer.write(Chunk(events=(Event(place / 10, "o", piece),)))
        if end:
            writer.write(Chunk(ending=ENDING))
        return writer.digest
    finally:
        os.close(descriptor)


def split(raw: bytes) -> list[bytes]:
    """The frames of a file."""
    at, found = len(MAGIC), []
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        found.append(raw[at : at + 4 + length])
        at += 4 + length
    return found


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=8))
def test_what_was_recorded_comes_back(tmp_path_factory: pytest.TempPathFactory, shown: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("r") / "r"
    digest = recorded(path, shown)
    found = verify(path, SESSION, KEY, digest=digest)
    assert (found.header, found.ending, found.digest, found.chunks) == (HEADER, ENDING, digest, len(shown) + 2)
    assert [event.data for event in events(path, SESSION, KEY)] == shown
    assert digest_of(path, SESSION) == digest


@given(st.data())
def test_a_changed_bit_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("r") / "r"
    digest = recorded(path, [b"one", b"two"])
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    for unfinished in (False, True):
        with pytest.raises(RecordingBroken):
            verify(path, SESSION, KEY, digest=digest, unfinished=unfinished)


@given(st.data())
def test_a_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("r") / "r"
    digest = recorded(path, [b"one", b"two"])
    raw = path.read_bytes()
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(RecordingBroken):
        verify(path, SESSION, KEY)
    with pytest.raises(RecordingBroken):
        verify(path, SESSION, KEY, digest=digest, unfinished=True)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ([0, 2, 1, 3], "chunk 2"),
        ([0, 1, 3], "chunk 3"),
        ([1, 2, 3], "chunk 1"),
        ([0, 1, 1, 2, 3], "chunk 3"),
        ([0, 1, 2, 3, 3], "chunk 5"),
        ([], "empty"),
    ],
    ids=["swapped", "left-out", "no-header", "twice", "after-the-end", "empty"],
)
def test_chunks_out_of_their_place_are_refused(tmp_path: Path, order: list[int], reason: str) -> None:
    path = tmp_path / "r"
    recorded(path, [b"one", b"two"])
    frames = split(path.read_bytes())
    path.write_bytes(MAGIC + b"".join(frames[place] for place in order))
    with pytest.raises(RecordingBroken, match=reason):
        verify(path, SESSION, KEY)
    path.write_bytes(MAGIC + b"".join(frames))
    assert verify(path, SESSION, KEY).chunks == 4


def test_chunks_of_another_session_and_another_key_are_refused(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    recorded(mine, [b"one"])
    recorded(theirs, [b"one"], session=OTHER)
    with pytest.raises(RecordingBroken, match="another session"):
        verify(theirs, SESSION, KEY)
    mixed = split(mine.read_bytes())
    mixed[1] = split(theirs.read_bytes())[1]
    (tmp_path / "mixed").write_bytes(MAGIC + b"".join(mixed))
    with pytest.raises(RecordingBroken, match="chunk 2"):
        verify(tmp_path / "mixed", SESSION, KEY)
    with pytest.raises(RecordingBroken, match="chunk 1"):
        verify(mine, SESSION, SealKey(bytes(32), os.urandom))
    assert verify(mine, SESSION, KEY).header == HEADER


def test_one_without_an_end_is_played_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "r"
    digest = recorded(path, [b"one"], end=False)
    with pytest.raises(RecordingBroken, match="does not say how the session ended"):
        verify(path, SESSION, KEY, digest=digest)
    assert verify(path, SESSION, KEY, digest=digest, unfinished=True).ending is None
    path.write_bytes(path.read_bytes()[:-5])
    assert verify(path, SESSION, KEY, unfinished=True).chunks == 1
    with pytest.raises(RecordingBroken, match="not where the audit trail says"):
        verify(path, SESSION, KEY, digest=digest, unfinished=True)


def test_what_does_not_reach_the_disk_is_not_recorded() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(RecordingFailed, match="No space left"):
            Writer(descriptor, SESSION, KEY, 1024**3)
    finally:
        os.close(descriptor)


def test_a_recording_that_nears_its_limit_says_so(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "r", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        writer = Writer(descriptor, SESSION, KEY, 1024 * 1024 + 64 * 1024)
        writer.write(Chunk(header=HEADER))
        assert not writer.full
        writer.write(Chunk(events=(Event(0, "o", bytes(64 * 1024)),)))
        assert writer.full
    finally:
        os.close(descriptor)


def test_an_asciicast_has_what_players_read() -> None:
    shown = [
        Event(0.5, "o", "ä".encode()[:1]),
        Event(0.75, "o", "ä".encode()[1:] + b"\xff"),
        Event(1.0, "e", b"err"),
        Event(1.5, "r", b"80x24"),
        Event(2.0, "i", b"typed"),
        Event(2.5, "m", b"closed"),
    ]
    header, *rest = [json.loads(line) for line in lines(HEADER, shown)]
    assert (header["version"], header["width"], header["height"], header["timestamp"]) == (2, 100, 30, 1_790_000_000)
    assert rest == [
        [0.75, "o", "ä\N{REPLACEMENT CHARACTER}"],
        [1.0, "o", "err"],
        [1.5, "r", "80x24"],
        [2.0, "i", "typed"],
        [2.5, "m", "closed"],
    ]


def test_a_player_keeps_the_pace_but_waits_no_longer_than_asked() -> None:
    pauses: list[float] = []
    out = io.BytesIO()
    shown = [Event(1.0, "o", b"a"), Event(1.5, "i", b"typed"), Event(11.5, "e", b"b")]
    play(shown, out, pauses.append, idle_s=2.0, speed=2.0)
    assert (out.getvalue(), pauses) == (b"ab", [0.5, 0.25, 1.0])
