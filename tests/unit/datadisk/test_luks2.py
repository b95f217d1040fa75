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


def erased(disk: Path) -> luks2.Erased:
    planned = luks2.plan(disk)
    assert planned is not None
    return luks2.erase(disk, planned)


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


GOOD = b'"segments":{"0":{"offset":"3145728"}}'
SHORT = {"nothing", "cut", "data behind the end"}


def spoken(text: bytes) -> bytes:
    """A disk whose header is whole and holds ``text``."""
    return luks2_parts.header(0, text, size=0x100000) + bytes(3 * OFFSET)


SPOILT: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(2 * OFFSET),
    "magic": lambda: b"X" + luks2_parts.header(0, luks2_parts.metadata())[1:],
    "version": lambda: (raw := luks2_parts.header(0, luks2_parts.metadata()))[:7] + b"\x01" + raw[8:],
    "cut": lambda: luks2_parts.header(0, luks2_parts.metadata())[:-1],
    "elsewhere": lambda: luks2_parts.header(0x8000, luks2_parts.metadata()),
    "no segments": lambda: luks2_parts.header(0, {"keyslots": {}, "segments": {}}),
    "data in the header": lambda: luks2_parts.header(0, luks2_parts.metadata(offset=SIZE)),
    "data behind the end": lambda: luks2_parts.header(0, luks2_parts.metadata()),
    "deep JSON": lambda: spoken(b'{"keyslots":{"0":' + b"[" * 100_000 + b"]" * 100_000 + b"}," + GOOD + b"}"),
    "endless JSON": lambda: spoken(b'{"keyslots":{},' + GOOD + b"}" + b" " * 600_000),
    "an endless number": lambda: spoken(b'{"keyslots":{},' + GOOD.replace(b"3145728", b"9" * 5000) + b"}"),
    "no offset": lambda: spoken(b'{"keyslots":{},' + GOOD.replace(b"offset", b"size") + b"}"),
    "no JSON": lambda: luks2_parts.header(0, {"keyslots": []}),
}


@pytest.mark.parametrize("what", sorted(SPOILT))
def test_what_is_no_valid_header_is_none(tmp_path: Path, what: str) -> None:
    disk = tmp_path / "disk"
    raw = SPOILT[what]()
    disk.write_bytes(raw if what in SHORT else raw.ljust(2 * OFFSET, b"\0"))
    assert luks2.read_header(disk) is None
    assert luks2.plan(disk) is None


def test_a_header_like_the_spoilt_ones_is_read_when_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(spoken(b'{"keyslots":{"0":' + b"[" * 100 + b"]" * 100 + b"}," + GOOD + b"}" + b" " * 400_000))
    found = luks2.read_header(disk)
    assert found is not None
    assert found.data_offset == 3 * OFFSET


def test_a_header_that_is_too_deep_leaves_the_second_copy_to_be_read(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk", size=0x40000)
    raw = bytearray(disk.read_bytes())
    deep = b'{"keyslots":{"0":' + b"[" * 50_000 + b"]" * 50_000 + b"}," + GOOD + b"}"
    raw[:0x40000], raw[0x40000:0x80000] = (
        luks2_parts.header(0, deep, size=0x40000), luks2_parts.header(0x40000, luks2_parts.metadata(), size=0x40000),
    )  # fmt: skip
    disk.write_bytes(raw)
    found = luks2.read_header(disk)
    assert found is not None
    assert found.uuid == UUID


MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("offset", "length", "goes"),
    [
        (MIB, 18 * MIB, 16 * MIB),
        (17 * MIB, 18 * MIB, 17 * MIB),
        (MIB, 2 * MIB, 2 * MIB),
        (18 * MIB, 18 * MIB, 18 * MIB),
    ],
    ids=["never less than 16 MiB", "as far as the data", "never more than there is", "all of it"],
)
def test_an_erasure_takes_headers_and_key_slots_and_leaves_the_data(
    tmp_path: Path, offset: int, length: int, goes: int
) -> None:
    disk = luks2_parts.volume(tmp_path / "disk", luks2_parts.metadata(offset=offset), length=length)
    assert luks2.plan(disk) == luks2.Erased(str(disk), "luks2-header", UUID, ("0", "1"), 0, 0, goes)
    found = erased(disk)
    assert found == luks2.Erased(str(disk), "luks2-header", UUID, ("0", "1"), goes, goes, goes)
    assert disk.read_bytes() == bytes(goes) + b"D" * (length - goes)
    assert luks2.plan(disk) is None


@pytest.mark.parametrize(("length", "goes"), [(18 * MIB, 16 * MIB), (3 * MIB, 3 * MIB)])
def test_without_a_header_the_place_of_the_key_slots_goes_where_that_is_asked_for(
    tmp_path: Path, length: int, goes: int
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"K" * length)
    assert luks2.plan(disk) is None
    planned = luks2.plan(disk, unreadable=True)
    assert planned == luks2.Erased(str(disk), "luks2-unreadable", "", (), 0, 0, goes)
    assert not luks2.zeros(disk, goes)
    assert luks2.erase(disk, planned) == luks2.Erased(str(disk), "luks2-unreadable", "", (), goes, goes, goes)
    assert disk.read_bytes() == bytes(goes) + b"K" * (length - goes)
    assert luks2.zeros(disk, goes)
    assert not luks2.zeros(disk, length + 1)


def test_an_erasure_never_lets_the_disk_grow_whatever_was_planned(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    planned = luks2.Erased(str(disk), "luks2-header", UUID, (), 0, 0, 4 * OFFSET)
    assert luks2.erase(disk, planned).extent == disk.stat().st_size == 2 * OFFSET


def test_an_erasure_that_does_not_read_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    monkeypatch.setattr(luks2.os, "fsync", lambda _: disk.write_bytes(b"L" * 2 * OFFSET))
    with pytest.raises(DataDiskError, match="does not read back"):
        erased(disk)


def test_links_and_folders_are_not_erased(tmp_path: Path) -> None:
    disk = luks2_parts.volume(tmp_path / "disk")
    link = tmp_path / "link"
    link.symlink_to(disk)
    planned = luks2.plan(disk)
    assert planned is not None
    for path in (link, tmp_path, tmp_path / "none"):
        with pytest.raises(DataDiskError):
            luks2.erase(path, planned)
    assert luks2.read_header(link) is not None
    assert stat.S_ISREG(disk.stat().st_mode)
