"""The client against a repository that lies: what was changed is refused for a known reason, in bounded time and size."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface
from tuf_world import STABLE, World

from saw.policy.bundle import MAX_BUNDLE
from saw.policy.errors import RepositoryError
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_metadata import Metadata, Snapshot, Timestamp, parse, sign_metadata

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]

CODES = {"freeze", "rollback", "threshold", "mix_and_match", "unreachable", "malformed", "not_found"}
BASE = "https://broker/tuf"
SECONDS = 120
LIMITS = {"timestamp": 16_384, "snapshot": 2_000_000, "targets": 5_000_000, "root": 512_000}
CHUNK = 65_536
ROLES = ("timestamp", "snapshot", "targets", "root")
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


class Liar(FetcherInterface):
    """Serves files by name, or endless ones, and counts what the client took."""

    def __init__(self, files: Mapping[str, bytes], endless: str = "") -> None:
        self.files, self.endless, self.taken = files, endless, 0

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(f"{BASE}/")
        raw = self.files.get(name)
        if raw is None:
            raise DownloadHTTPError("not found", 404)
        if name == self.endless:
            while True:
                self.taken += CHUNK
                yield b" " * CHUNK
        self.taken += len(raw)
        yield raw


class Repository(NamedTuple):
    """Its files, which of them a fresh client reads for each role, the honest target, the root and the online key."""

    files: dict[str, bytes]
    names: dict[str, str]
    target: bytes
    root: bytes
    online: Ed25519PrivateKey
    folder: Path
    old: frozenset[bytes]


@pytest.fixture
def honest(world: World, tmp_path: Path) -> Repository:
    """A repository of three releases, each newer than the one before."""
    old = frozenset({world.release(1), world.release(2)})
    target = world.release(3)
    files = {str(p.relative_to(world.store)): p.read_bytes() for p in world.store.rglob("*") if p.is_file()}

    def newest(role: str) -> str:
        found = [name for name in files if name.endswith(f".{role}.json")]
        return max(found, key=lambda name: int(name.removeprefix("metadata/").partition(".")[0]))

    names = {"timestamp": "metadata/timestamp.json", "root": "metadata/2.root.json"}
    names |= {"snapshot": newest("snapshot"), "targets": newest("targets")}
    names["target"] = next(name for name, raw in files.items() if name.startswith("targets/") and raw == target)
    return Repository(files, names, target, world.root, world.online, tmp_path / "fuzz", old)


def ask(repository: Repository, changed: Mapping[str, bytes], endless: str = "") -> tuple[str | bytes, Liar]:
    """What a fresh client says with ``changed`` files: the code of its refusal, or the target's bytes."""
    shutil.rmtree(repository.folder, ignore_errors=True)
    liar = Liar({**repository.files, **changed}, endless)
    begin = time.monotonic()
    try:
        updater = refresh(repository.folder / "m", repository.folder / "t", BASE, repository.root, liar)
        result: str | bytes = fetch_target(updater, STABLE)[0]
    except RepositoryError as error:
        assert error.code in CODES
        assert error.cure
        assert len(error.message) < 8192
        result = error.code
    assert time.monotonic() - begin < SECONDS
    return result, liar


def test_the_honest_repository_is_taken(honest: Repository) -> None:
    assert ask(honest, {})[0] == honest.target


def damaged(raw: bytes, how: str, at: float, piece: bytes) -> bytes:
    place = int(at * len(raw))
    if how == "flip":
        return raw[:place] + bytes([raw[place] ^ (piece[0] or 1)]) + raw[place + 1 :]
    if how == "insert":
        return raw[:place] + piece + raw[place:]
    if how == "cut":
        return raw[:place] + raw[place + len(piece) :]
    return raw[:place] if how == "truncate" else piece


@FUZZ
@given(
    st.sampled_from(["timestamp", "snapshot", "targets"]),
    st.sampled_from(["flip", "insert", "cut", "truncate", "replace"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=6),
)
def test_damaged_metadata_never_brings_another_target(
    honest: Repository, role: str, how: str, at: float, piece: bytes
) -> None:
    name = honest.names[role]
    result, _ = ask(honest, {name: damaged(honest.files[name], how, at, piece)})
    # Only what means the same (a space between two values, a signature that nobody counts) may pass.
    assert result in CODES or result == honest.target


@FUZZ
@given(
    st.sampled_from(["flip", "insert", "cut", "truncate", "replace"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=6),
)
def test_a_damaged_target_is_always_refused(honest: Repository, how: str, at: float, piece: bytes) -> None:
    changed = damaged(honest.target, how, at, piece)
    assert changed != honest.target
    assert ask(honest, {honest.names["target"]: changed})[0] in {"mix_and_match", "malformed", "unreachable"}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every value inside ``value``."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*at, index))


_OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.text(max_size=8),
    st.sampled_from(["2999-01-01T00:00:00Z", "1999-01-01T00:00:00Z", "0" * 64, "root", {}, [], {"x": 1}]),
)


@FUZZ
@given(st.sampled_from(["timestamp", "snapshot", "targets"]), st.integers(0, 10_000), _OTHER, st.booleans())
def test_a_changed_statement_is_always_refused(
    honest: Repository, role: str, number: int, other: object, remove: bool
) -> None:
    name = honest.names[role]
    tree = json.loads(honest.files[name])
    before = copy.deepcopy(tree["signed"])
    ways = list(places(tree["signed"]))
    *way, last = ways[number % len(ways)]
    holder = tree["signed"]
    for step in way:
        holder = holder[step]
    if remove:
        del holder[last]
    else:
        holder[last] = other
    if json.dumps(tree["signed"]) == json.dumps(before):
        return
    result, _ = ask(honest, {name: json.dumps(tree).encode()})
    assert result in CODES


@FUZZ
@given(st.integers(1, 6), st.integers(1, 6), st.integers(-90, 90))
def test_whoever_holds_the_online_key_gives_out_only_what_officers_signed(
    honest: Repository, snapshot_version: int, targets_version: int, days: int
) -> None:
    timestamp = parse(Timestamp, honest.files[honest.names["timestamp"]], "timestamp.json").signed
    snapshot = parse(Snapshot, honest.files[honest.names["snapshot"]], "snapshot.json").signed
    timestamp.snapshot_meta.version = snapshot_version
    timestamp.expires += timedelta(days=days)
    snapshot.version = snapshot_version
    snapshot.expires += timedelta(days=days)
    snapshot.meta["targets.json"].version = targets_version
    changed = {
        honest.names["timestamp"]: sign_metadata(Metadata(timestamp), [honest.online]),
        f"metadata/{snapshot_version}.snapshot.json": sign_metadata(Metadata(snapshot), [honest.online]),
    }
    result, _ = ask(honest, changed)
    assert result in CODES or result == honest.target or result in honest.old


@pytest.mark.parametrize("role", [*ROLES, "target"])
def test_endless_answers_are_cut_off(honest: Repository, role: str) -> None:
    name = honest.names[role]
    result, liar = ask(honest, {name: b"x"}, endless=name)
    assert result in {"malformed", "mix_and_match", "unreachable"}
    limit = LIMITS.get(role, MAX_BUNDLE)
    others = sum(len(raw) for raw in honest.files.values())
    assert liar.taken <= limit + others + 2 * CHUNK


@FUZZ
@given(
    st.sampled_from(ROLES),
    st.sampled_from(["[", '{"a":', "9", '"\\ud800', "\x00", "\xff\xfe", " "]),
    st.integers(1, 20_000),
)
def test_deep_and_strange_texts_are_refused_in_bounds(honest: Repository, role: str, piece: str, times: int) -> None:
    raw = (piece * times).encode("latin-1")[: LIMITS[role]]
    assert ask(honest, {honest.names[role]: raw})[0] in CODES


def test_stale_files_under_new_names_are_refused(honest: Repository) -> None:
    """Each older snapshot and targets under the name of the newest, all of them properly signed once."""
    for role in ("snapshot", "targets"):
        for name, raw in honest.files.items():
            if name.endswith(f".{role}.json") and name != honest.names[role]:
                assert ask(honest, {honest.names[role]: raw})[0] in {"rollback", "mix_and_match", "malformed"}
