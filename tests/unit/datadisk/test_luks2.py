"""Headers of LUKS2 volumes are read as the format says, and an erasure leaves none of what holds a key."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import luks2_parts
import pytest
from luks2_parts import OFFSET, SIZE, UUID

from saw.datadisk import luks2
from saw.datadisk.errors import DataDiskError


def test_a_header_says_what_the_volume_is(tmp_path: Path) -> None:
    found = luks2.read_header(luks2_parts.volume(tmp_path / "disk", luks2_parts.metadata({"0": {"type": "t"}})))
    assert found == luks2.Header(UUID, "saw-home", ("0", "1"), {"0": {"type": "t"}}, OFFSET)


def test_the_second_copy_counts_when_the_first_is_damaged(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    raw = bytearray(disk.read_bytes())
    raw[5000] ^= 1
    disk.write_bytes(raw)
    found = luks2.read_header(disk)
    assert found is not None
    assert found.uuid == UUID
    raw[SIZE + 5000] ^= 1
    disk.write_bytes(raw)
    assert luks2.read_header(disk) is None


SPOILT: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(2 * OFFSET),
    "magic": lambda: b"X" + luks2_parts.header(0, luks2_parts.metadata())[1:],
    "version": lambda: (raw := luks2_parts.header(0, luks2_parts.metadata()))[:7] + b"\x01" + raw[8:],
    "cut": lambda: luks2_parts.header(0, luks2_parts.metadata())[:-1],
    "elsewhere": lambda: luks2_parts.header(0x8000, luks2_parts.metadata()),
    "no segments": lambda: luks2_parts.header(0, {"keyslots": {}, "segments": {}}),
    "data in the header": lambda: luks2_parts.header(0, luks2_parts.metadata(offset=SIZE)),
    "no JSON": lambda: luks2_parts.header(0, {"keyslots": []}),
}


@pytest.mark.parametrize("what", sorted(SPOILT))
def test_what_is_no_valid_header_is_none(tmp_path: Path, what: str) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(SPOILT[what]())
    assert luks2.read_header(disk) is None
    before = disk.read_bytes()
    assert luks2.erase(disk) is None
    assert disk.read_bytes() == before


def test_an_erasure_takes_headers_and_key_slots_and_leaves_the_data(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    found = luks2.erase(disk)
    assert found == luks2.Erased(str(disk), "luks2-header", UUID, ("0", "1"), OFFSET, OFFSET)
    assert disk.read_bytes() == bytes(OFFSET) + b"D" * OFFSET
    assert luks2.erase(disk) is None


def test_an_erasure_that_does_not_read_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    monkeypatch.setattr(luks2.os, "fsync", lambda _: disk.write_bytes(b"L" * 2 * OFFSET))
    with pytest.raises(DataDiskError, match="does not read back"):
        luks2.erase(disk)


def test_links_and_folders_are_not_erased(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    link = tmp_path / "link"
    link.symlink_to(disk)
    for path in (link, tmp_path, tmp_path / "none"):
        with pytest.raises(DataDiskError):
            luks2.erase(path)
    assert luks2.read_header(link) is not None
    assert stat.S_ISREG(disk.stat().st_mode)
